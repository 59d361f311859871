"""``bvpo score`` through real files: what is scored, what is kept, what a second run does."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judge_server import Fault, judge_server
from scoring_fixtures import make_experiment, make_prompts, make_sample, save_armorm, user, write_config

from bvpo import cli
from bvpo.data.scores import NO_ANSWER, answer_text, content_key, score_key
from bvpo.experiment import RecordStore, read_manifest
from bvpo.records import VIEWS, Prompt, Sample, Score
from bvpo.scorers.judge import Endpoint, JudgeScorer
from bvpo.stages import score as stage
from bvpo.strict import UserError

LENGTH = "def reward(messages, answer):\n    return len(answer)\n"
COUNTING = """
import pathlib
def reward(messages, answer):
    with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as file:
        file.write(answer + "\\n")
    if answer.startswith("bad") and not pathlib.Path(__file__).with_name("mended").exists():
        raise RuntimeError("no luck")
    return len(answer)
"""


@pytest.fixture(autouse=True)
def fresh_log_handler() -> None:
    """The command's handler writes to the stderr of its first call; each test has a stderr of its own."""
    logger = logging.getLogger("bvpo")
    logger.handlers.clear()
    logger.propagate = True  # else pytest adds a handler, and the command takes it for its own


def function_config(root: Path, source: str = COUNTING, more: str = "") -> str:
    (root / "rewards.py").write_text(source)
    section = f'[score]\nscorer = "function"\n[score.function]\npath = {json.dumps(f"{root}/rewards.py:reward")}\n'
    return write_config(root, section + more)


def score(*words: str) -> int:
    return cli.main(["score", *words])


def all_scores(folder: Path) -> list[Score]:
    return list(RecordStore(folder / "scores", Score, key=score_key))


def by_sample(folder: Path) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for one in sorted(all_scores(folder), key=lambda s: s.extra.get("attempt", 0)):
        found[one.sample_key] = one
    return found


def calls(root: Path) -> list[str]:
    file = root / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def mixed_samples() -> list[Sample]:
    return [
        make_sample("p0", "trace", 0, "\n\nlong answer"),
        make_sample("p0", "trace", 1, None, finish="length"),
        make_sample("p0", "trace", 2, " \n "),
        make_sample("p0", "trace", 3, None, finish="error", error="engine fell over"),
        make_sample("p0", "empty", 0, "long answer"),
        make_sample("p0", "empty", 1, "short"),
        make_sample("p1", "empty", 0, "long answer"),
        make_sample("p1", "empty", 1, "bad answer"),
    ]


@pytest.mark.parametrize("seal", [False, True])
def test_every_sample_gets_a_score_or_a_reason(tmp_path: Path, seal: bool) -> None:
    """Mutation: scoring an unclosed trace as an empty answer, failing a sample silently, or scoring equal answers twice."""
    folder = make_experiment(tmp_path, make_prompts(2), mixed_samples(), seal=seal)
    assert score(function_config(tmp_path)) == 0
    found = by_sample(folder)
    assert len(found) == len(all_scores(folder)) == 8
    values = {(s.prompt_id, s.view, s.index): found[s.key] for s in mixed_samples()}
    assert values["p0", "trace", 0].value == values["p0", "empty", 0].value == len("long answer")
    for index, why in ((1, "unclosed trace"), (2, "empty answer"), (3, "sampling failed")):
        one = values["p0", "trace", index]
        assert (one.value, one.error, one.extra) == (None, NO_ANSWER, {"why": why})
    assert values["p1", "empty", 1].value is None
    assert values["p1", "empty", 1].error == "RuntimeError: no luck"
    # the same words under another prompt are another answer; under the same prompt, in either view, one call serves both
    assert Counter(calls(tmp_path)) == {"long answer": 2, "short": 1, "bad answer": 1}
    shared = [one for one in found.values() if "same_as" in one.extra]
    assert len(shared) == 1 and found[shared[0].extra["same_as"]].value == shared[0].value
    entry = read_manifest(folder).stage("score")
    assert entry is not None and entry.finished
    assert entry.counts == {"samples": 8, "scored": 4, "failed": 1, "no_answer": 3}
    assert entry.fingerprints["scorer"]["scorer"] == "function" and entry.shards


def test_running_again_does_nothing_and_failures_are_retried_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: retrying silently, never retrying, or a retry that the store's first-key-wins rule hides."""
    folder = make_experiment(tmp_path, make_prompts(2), mixed_samples())
    config = function_config(tmp_path)
    assert score(config) == 0
    before = len(calls(tmp_path))
    assert score(config) == 0
    assert len(calls(tmp_path)) == before
    assert "1 failed before" in capsys.readouterr().err
    (tmp_path / "mended").touch()
    assert score(config, "--retry-failed") == 0
    assert calls(tmp_path)[before:] == ["bad answer"]
    retried = [one for one in all_scores(folder) if one.extra.get("attempt") == 1]
    assert [one.value for one in retried] == [len("bad answer")]
    assert by_sample(folder)[retried[0].sample_key].value == len("bad answer")
    entry = read_manifest(folder).stage("score")
    assert entry is not None and entry.counts["failed"] == 0 and entry.counts["scored"] == 5
    assert score(config, "--retry-failed") == 0
    assert len(calls(tmp_path)) == before + 1


def test_new_samples_reuse_known_answers(tmp_path: Path) -> None:
    """Mutation: looking for equal answers within one run only."""
    folder = make_experiment(tmp_path, make_prompts(2), mixed_samples())
    config = function_config(tmp_path)
    score(config)
    before = len(calls(tmp_path))
    with RecordStore(folder / "samples", Sample).open_writer() as writer:
        writer.append(make_sample("p0", "empty", 2, "short "))
        writer.append(make_sample("p0", "empty", 3, "new one"))
    assert score(config) == 0
    assert calls(tmp_path)[before:] == ["new one"]
    assert by_sample(folder)[make_sample("p0", "empty", 2, "").key].value == 5.0


def test_scores_do_not_tell_where_a_run_was_killed(tmp_path: Path) -> None:
    """Samples in the order in which they came, and any number of their scores written before. Mutation: `same_as` the first
    that was met, or another `extra` where the answer had been scored in an earlier run."""
    samples = [one for one in mixed_samples() if one.prompt_id == "p0"]
    found = []
    for number in range(len(samples) + 1):
        root = tmp_path / str(number)
        root.mkdir()
        folder = make_experiment(root, make_prompts(1), samples if number % 2 else samples[::-1])
        config = function_config(root, LENGTH)
        assert score(config) == 0
        kept = all_scores(folder)[:number]
        for path in (folder / "scores").iterdir():
            path.unlink()
        with RecordStore(folder / "scores", Score, key=score_key).open_writer() as writer:
            for one in kept:
                writer.append(one)
        assert score(config) == 0
        found.append({one.sample_key: replace(one, scorer="") for one in all_scores(folder)})
    assert all(one == found[0] for one in found)
    assert any("same_as" in one.extra for one in found[0].values())


def test_another_scorer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: mixing the scores of an edited function with the old ones."""
    make_experiment(tmp_path, make_prompts(2), mixed_samples())
    assert score(function_config(tmp_path)) == 0
    before = len(calls(tmp_path))
    assert score(function_config(tmp_path, COUNTING + "# edited\n")) == 2
    said = capsys.readouterr().err
    assert "score was started here with other settings: scorer.source:" in said
    assert len(calls(tmp_path)) == before


def test_dry_run_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: creating the store, the manifest or a call."""
    folder = make_experiment(tmp_path, make_prompts(2), mixed_samples())
    before = sorted(tmp_path.rglob("*"))
    config = function_config(tmp_path)
    assert score(config, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "4 distinct answers; they serve 1 more samples" in said and "4 answers, about" in said
    made = {p for p in sorted(tmp_path.rglob("*")) if p not in before and "__pycache__" not in str(p)}
    assert made == {tmp_path / "rewards.py", tmp_path / "config.toml"} and not (folder / "scores").exists()


def test_limit_keeps_to_the_first_prompts_and_does_not_finish(tmp_path: Path) -> None:
    """Mutation: taking the limit as samples, or calling a part the whole."""
    folder = make_experiment(tmp_path, make_prompts(2), mixed_samples())
    config = function_config(tmp_path)
    assert score(config, "--limit", "1") == 0
    assert {one.prompt_id for one in all_scores(folder)} == {"p0"}
    entry = read_manifest(folder).stage("score")
    assert entry is not None and entry.finished is None
    assert score(config) == 0
    assert len(all_scores(folder)) == 8
    entry = read_manifest(folder).stage("score")
    assert entry is not None and entry.finished


def test_a_hopeless_scorer_stops_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: failing every answer of a long run for one bug in the function."""
    samples = [make_sample("p0", "empty", i, f"bad {i}") for i in range(80)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    assert score(function_config(tmp_path)) == 2
    assert "the first 50 answers all failed, the last with: RuntimeError: no luck" in capsys.readouterr().err
    assert len(calls(tmp_path)) == stage.HOPELESS == len(all_scores(folder))


def test_all_failed_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: exit code 0 when not one answer could be scored."""
    make_experiment(tmp_path, make_prompts(1), [make_sample("p0", "empty", 0, "bad")])
    assert score(function_config(tmp_path)) == 2
    assert "all 1 answers failed, most with: RuntimeError: no luck" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["prompts", "samples"])
def test_missing_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    """Mutation: scoring nothing with exit code 0."""
    prompts, samples = make_prompts(1), [make_sample("p0", "empty", 0, "a")]
    folder = make_experiment(tmp_path, prompts, samples if missing == "prompts" else [])
    if missing == "prompts":
        (folder / "prompts.jsonl").unlink()
    assert score(function_config(tmp_path)) == 2
    assert ("no such file" if missing == "prompts" else "nothing to score") in capsys.readouterr().err


SLOW = """
import time
def reward(messages, answer):
    time.sleep(0.05)
    return len(answer)
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_runs_keep_what_they_have(tmp_path: Path, how: signal.Signals, code: int) -> None:
    """Ctrl-C and kill -9. Mutation: writing scores at the end, a traceback on Ctrl-C, or scoring anew afterwards."""
    samples = [make_sample("p0", "empty", i, "a" * (i + 1)) for i in range(40)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    config = function_config(tmp_path, SLOW)
    command = [sys.executable, "-m", "bvpo", "score", config]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and sum(len(p.read_bytes().splitlines()) for p in (folder / "scores").glob("*.jsonl")) < 5
    ):
        time.sleep(0.02)
    run.send_signal(how)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == code
    if how == signal.SIGINT:
        assert "answers are scored" in said and "running the same command again resumes" in said
        assert "Traceback" not in said
    kept = len(all_scores(folder))
    assert 5 <= kept < 40
    assert score(function_config(tmp_path, SLOW)) == 0
    found = all_scores(folder)
    assert len(found) == 40 and {one.value for one in found} == {float(i + 1) for i in range(40)}


def test_progress_bar_shows_rate_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: no bar, or a bar that counts answers while its total counts samples."""
    make_experiment(tmp_path, make_prompts(2), mixed_samples())
    score(function_config(tmp_path, LENGTH))
    bar = capsys.readouterr().err
    assert re.search(r"score: 100%\|.*5/5 \[.*samples/s\]", bar)


def test_armorm_through_the_stage(tmp_path: Path) -> None:
    """Mutation: the config's scorer not reaching the registry, or a value lost on its way to the store."""
    model = tmp_path / "armorm"
    model.mkdir()
    save_armorm(model)
    samples = [make_sample("p0", view, i, f"Because {i}.") for view in VIEWS for i in range(3)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    section = f'[score.reward_model]\nmodel = {json.dumps(str(model))}\ndevice = "cpu"\n'
    assert score(write_config(tmp_path, section)) == 0
    found = by_sample(folder)
    assert len(found) == 6 and all(one.scorer.startswith("armorm-") for one in found.values())
    for index in range(3):
        trace, empty = (found[make_sample("p0", view, index, "").key].value for view in VIEWS)
        assert trace == empty is not None
    assert len({one.value for one in found.values()}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# judges


def judge_config(root: Path, url: str, **more: Any) -> str:
    fields = {"model": "j", "base_url": url, "retries": 0, "concurrency": 2, **more}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
    return write_config(root, f'[score]\nscorer = "judge"\n[score.judge]\n{lines}')


def longer(text: str, number: int) -> str:
    a = text.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
    b = text.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
    return "[[A]]" if len(a) > len(b) else "[[B]]"


def test_pairwise_scores_follow_the_set_of_answers(tmp_path: Path) -> None:
    """More samples change what an answer is compared with. Mutation: keeping shares against a smaller set, comparing across
    views, or asking known comparisons again."""
    samples = [make_sample("p0", view, i, "x" * (i + 1)) for view in VIEWS for i in range(2)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    with judge_server(longer) as server:
        config = judge_config(tmp_path, server.url, mode="pairwise")
        assert score(config) == 0
        assert len(server.texts) == 2  # both views hold the same two answers: one comparison in both orders
        assert [by_sample(folder)[s.key].value for s in samples] == [0.0, 1.0, 0.0, 1.0]
        with RecordStore(folder / "samples", Sample).open_writer() as writer:
            writer.append(make_sample("p0", "trace", 2, "xxx"))
        assert score(config) == 0
        assert len(server.texts) == 6
    found = by_sample(folder)
    assert [found[make_sample("p0", "trace", i, "").key].value for i in range(3)] == [0.0, 0.5, 1.0]
    assert [found[make_sample("p0", "empty", i, "").key].value for i in range(2)] == [0.0, 1.0]


def test_judge_replies_outlive_the_experiment(tmp_path: Path) -> None:
    """Mutation: a cache in memory, a cache keyed by sample, or keeping replies without a verdict."""
    samples = [make_sample("p0", "empty", 0, "good"), make_sample("p0", "empty", 1, "odd")]
    for name in ("a", "b"):
        make_experiment(tmp_path / name, make_prompts(1), samples)
    cache = str(tmp_path / "replies")
    with judge_server(lambda text, number: "[[8]]" if "good" in text else "hm") as server:
        assert score(judge_config(tmp_path / "a", server.url, cache=cache)) == 0
        assert len(server.texts) == 2
        assert score(judge_config(tmp_path / "b", server.url, cache=cache)) == 0
        assert len(server.texts) == 3  # the reply without a verdict was not kept
        assert score(judge_config(tmp_path / "b", server.url, cache=cache), "--retry-failed") == 0
        assert len(server.texts) == 4
    found = by_sample(tmp_path / "b" / "experiment")
    assert {one.value for one in found.values()} == {8.0, None}
    entry = read_manifest(tmp_path / "a" / "experiment").stage("score")
    assert entry is not None and entry.counts["served_by"] == {"judge-2026-01-01": 1}


def test_no_key_in_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: writing the request's headers, the client or an error of the server's as it is."""
    monkeypatch.setenv("MY_KEY", "sk-secret-1234")
    samples = [make_sample("p0", "empty", 0, "good"), make_sample("p0", "empty", 1, "odd")]
    make_experiment(tmp_path, make_prompts(1), samples)

    def answer(text: str, number: int) -> str | Fault:
        return "[[8]]" if "good" in text else Fault(status=400, message="key sk-secret-1234 may not")

    with judge_server(answer) as server:
        assert score(judge_config(tmp_path, server.url, api_key_env="MY_KEY")) == 0
        assert server.keys[0] == "Bearer sk-secret-1234"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"sk-secret" in path.read_bytes()]
    assert "sk-secret" not in capsys.readouterr().err


def test_interrupting_a_judge_leaves_no_task_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: not closing the outcomes: requests would run on until the garbage collector comes by."""
    events: list[str] = []
    close = Endpoint.close

    async def close_endpoint(self: Endpoint) -> None:
        events.append("endpoint")
        await close(self)

    monkeypatch.setattr(Endpoint, "close", close_endpoint)
    monkeypatch.setattr(JudgeScorer, "close", lambda self: events.append("scorer"))
    samples = [make_sample("p0", "empty", i, "a" * (i + 1)) for i in range(9)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    seen = 0
    add = stage.Report.add

    def interrupted(self: Any, outcome: Any) -> None:
        nonlocal seen
        seen += 1
        add(self, outcome)
        if seen == 3:
            raise KeyboardInterrupt

    with judge_server(lambda text, number: "[[8]]") as server:
        config = judge_config(tmp_path, server.url)
        monkeypatch.setattr(stage.Report, "add", interrupted)
        assert score(config) == 130
        assert events == ["endpoint", "scorer"]
        assert len(all_scores(folder)) == 3
        monkeypatch.setattr(stage.Report, "add", add)
        assert score(config) == 0
        assert len(server.texts) <= 9 + 2  # at most the requests that were in flight are paid twice
    assert len(all_scores(folder)) == 9


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_content_keys() -> None:
    """Mutation: leaving the prompt or the context out of the key, or hashing the joined texts."""
    base = content_key(user("a"), "b")
    assert base == content_key(user("a"), "b")
    others = [
        content_key(user("ab"), ""),
        content_key(user("a"), "c"),
        content_key(user("c"), "b"),
        content_key(user("a"), "b", {}),
        content_key(user("a"), "b", ["x"]),
    ]
    assert len({base, *others}) == 6
    assert answer_text("\n\n a \n") == "a" and answer_text(" \n") is None and answer_text(None) is None


def test_metadata_separates_equal_texts(tmp_path: Path) -> None:
    """Mutation: one score for two prompts of equal words and different metadata, for a function that reads it."""
    prompts = [Prompt(id=f"p{i}", messages=user("Same?"), meta={"gold": str(i)}) for i in range(2)]
    samples = [make_sample(f"p{i}", "empty", 0, "1") for i in range(2)]
    folder = make_experiment(tmp_path, prompts, samples)
    source = "def reward(messages, answer, meta):\n    return float(answer == meta['gold'])\n"
    assert score(function_config(tmp_path, source)) == 0
    assert [by_sample(folder)[s.key].value for s in samples] == [0.0, 1.0]


def test_unknown_prompts_are_left_out(tmp_path: Path) -> None:
    """Samples of a prompt that prompts.jsonl lacks have no conversation. Mutation: a KeyError."""
    samples = [make_sample("p0", "empty", 0, "a"), make_sample("gone", "empty", 0, "a")]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    assert score(function_config(tmp_path)) == 0
    assert {one.prompt_id for one in all_scores(folder)} == {"p0"}


def test_config_contradictions(tmp_path: Path) -> None:
    """Mutation: settings of another scorer passing unread."""
    for text, said in (
        ('[score]\nscorer = "function"\n', "'score.function.path': not set"),
        ('[score]\nscorer = "judge"\n', "'score.judge.model': not set"),
        ('[score]\nscorer = "classifier"\n', "'score.reward_model.model': not set"),
        ('[score.judge]\nmodel = "j"\n', "'score.judge.model': set, but scorer 'armorm' never reads it"),
        (
            '[score]\nscorer = "judge"\n[score.judge]\nmodel = "j"\nrequest = {n = 2}\n',
            "'score.judge.request.n': is set by bvpo",
        ),
        ("[pair]\nmax_pairs = 2\n", "'pair.max_pairs': got 2, but strategy 'best_worst' never reads it"),
        ('[pair]\nties = "index"\nmin_margin = 0.1\n', "already drops every tie"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            stage.parse_command("score", [write_config(tmp_path, text)])
