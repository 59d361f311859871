"""``bvpo sample`` through its command line, on a small model: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import engines_fixtures
import pytest
from engines_fixtures import FailingEngine, unlucky
from look_fixtures import Experiment, questions, save_talking_model
from models_fixtures import tiny_tokenizer

from bvpo.config import load_config
from bvpo.engines.base import ENGINES
from bvpo.experiment import Experiment as Folder
from bvpo.experiment import RecordStore, read_manifest
from bvpo.formats import decode_completion, get_format, view_prompt
from bvpo.records import VIEWS, Sample
from bvpo.stages import sample as sample_stage
from bvpo.strict import to_json

TOKENIZER = tiny_tokenizer()
R1 = get_format("r1-distill")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an experiment with its prompts; every folder shares the model."""
    monkeypatch.setitem(ENGINES, "failing", "engines_fixtures:create")

    def build(name: str = "one", toml: str = "num_samples = 2\n", prompts: Any = 6) -> Experiment:
        root = tmp_path / name
        root.mkdir()
        (root / "model").symlink_to(model)
        texts = questions(prompts) if isinstance(prompts, int) else prompts
        return Experiment(root, texts, toml).make("prompts")

    return build


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What the run has told people, as one text."""
    logger = logging.getLogger("bvpo")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "bvpo")
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def assert_equal(found: dict[str, Sample], expected: dict[str, Sample]) -> None:
    """The same samples; log-probabilities up to rounding, since batches differ."""
    assert found.keys() == expected.keys()
    for key, sample in expected.items():
        other = found[key]
        assert (other.token_ids, other.text, other.answer) == (sample.token_ids, sample.text, sample.answer)
        assert (other.prompt_id, other.view, other.index) == (sample.prompt_id, sample.view, sample.index)
        assert other.logprobs == pytest.approx(sample.logprobs, abs=1e-4)


# ------------------------------------------------------------------------------------------------ what is written


def test_samples_are_what_the_formats_say(make: Any) -> None:
    """Mutations: the views' prompts exchanged, completion_start at the end in the empty view, a stop token shown in the
    text, an unclosed trace with an answer, or samples that are equal because they share a seed."""
    experiment = make(toml="num_samples = 6\n")
    assert experiment.run("sample") == 0
    prompts = {prompt.id: prompt for prompt in experiment.prompts}
    samples = list(experiment.samples.values())
    assert Counter((s.prompt_id, s.view) for s in samples) == {(id, v): 6 for id in prompts for v in VIEWS}
    for sample in samples:
        written = view_prompt(TOKENIZER, R1, prompts[sample.prompt_id].messages, sample.view)
        assert (sample.prompt_ids, sample.completion_start) == (written.prompt_ids, written.completion_start)
        assert sample.text == decode_completion(TOKENIZER, R1, sample.token_ids)
        assert sample.finish == ("stop" if sample.token_ids[-1] == TOKENIZER.eos_token_id else "length")
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
        if sample.view == "empty":
            assert (sample.trace, sample.answer) == (None, sample.text)
        elif "</think>" in sample.text:
            assert sample.text == f"{sample.trace}</think>{sample.answer}"
        else:
            assert (sample.trace, sample.answer) == (sample.text, None)
    assert {s.index for s in samples} == set(range(6))
    assert {s.answer is None for s in samples if s.view == "trace"} == {True, False}
    assert len({s.token_ids for s in samples}) > 0.8 * len(samples)
    tokens_of_empty = {s.prompt_ids[-1] for s in samples if s.view == "empty"}
    assert tokens_of_empty == {TOKENIZER.convert_tokens_to_ids("</think>")}


def test_the_manifest_says_how(make: Any) -> None:
    """Mutation: the engine's fingerprint, the counts or the shards not recorded, or settings of this machine recorded."""
    experiment = make()
    assert experiment.run("sample", "--sample.options.max_batch_rows", "3") == 0
    entry = read_manifest(experiment.folder).stage("sample")
    assert entry is not None and entry.finished is not None
    assert entry.counts == {"asked": 24, "samples": 24, "failed": 0, "shared": 0}
    assert entry.fingerprints["engine"]["engine"] == "embedded" and entry.fingerprints["engine"]["content"]
    assert list(entry.shards) == [path.name for path in (experiment.folder / "samples").glob("*.parquet")]
    assert "max_batch_rows" not in json.dumps(entry.config)


def test_another_machine_draws_the_same(make: Any) -> None:
    """Another folder, another order of prompts. Mutation: keys or seeds that depend on place, order or time."""
    one, other = make("one"), make("other", prompts=list(reversed(questions(6))))
    assert one.run("sample") == other.run("sample", "--sample.options.max_batch_rows", "5") == 0
    assert_equal(other.samples, one.samples)
    third = make("third")
    assert third.run("sample", "--seed", "43") == 0
    assert not third.samples.keys() & one.samples.keys()


# ------------------------------------------------------------------------------------------------ going on


def test_interrupted_and_run_again_is_the_same(make: Any, said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C twice. Mutations: done samples drawn again, waiting ones forgotten, records unsynced or the engine left open
    when interrupted, or a traceback."""
    whole, broken = (
        make("whole", "engine = 'failing'\nnum_samples = 3\n"),
        make("broken", "engine = 'failing'\nnum_samples = 3\n"),
    )
    assert whole.run("sample") == 0
    closed = FailingEngine.closed
    for stored in (5, 16):
        assert broken.run("sample", "--sample.options.stop_after", str(11 if stored == 16 else 5)) == 130
        assert len(RecordStore(broken.folder / "samples", Sample)) == stored
    assert FailingEngine.closed == closed + 2
    assert f"stopping: 11 of {36 - 5} samples were drawn and are stored" in said()
    assert "running the same command again resumes" in capsys.readouterr().err
    entry = read_manifest(broken.folder).stage("sample")
    assert entry is not None and entry.finished is None
    assert broken.run("sample") == 0
    assert "16 done, 20 left" in said()
    assert_equal(broken.samples, whole.samples)
    assert RecordStore(broken.folder / "samples", Sample).stats().num_duplicates == 0


def test_a_limit_first_then_all(make: Any, said: Any) -> None:
    """Mutation: --limit that changes keys, marks the stage finished, or takes other prompts than the first."""
    whole, part = make("whole"), make("part")
    assert whole.run("sample") == 0
    assert part.run("sample", "--limit", "2") == 0
    first = {prompt.id for prompt in part.prompts[:2]}
    assert {sample.prompt_id for sample in part.samples.values()} == first
    entry = read_manifest(part.folder).stage("sample")
    assert entry is not None and entry.finished is None
    assert "8 samples" in said() and "16 left" in said()
    assert part.run("sample") == 0
    assert_equal(part.samples, whole.samples)
    assert part.run("sample") == 0
    assert "24 done, 0 left" in said()


def test_parts_on_several_machines(make: Any) -> None:
    """Three parts in three folders, their samples put together. Mutation: parts that overlap or leave prompts out, a
    prompt's samples torn apart, or a stage that counts as finished after one part."""
    whole, parts = make("whole", prompts=12), [make(f"part{n}", prompts=12) for n in range(3)]
    assert whole.run("sample") == 0
    seen: list[set[str]] = []
    for number, part in enumerate(parts):
        assert part.run("sample", "--sample.shard", f"{number}/3") == 0
        seen.append({sample.prompt_id for sample in part.samples.values()})
        assert all(n == 4 for n in Counter(s.prompt_id for s in part.samples.values()).values())
    assert all(seen) and sum(map(len, seen)) == 12
    for part in parts[1:]:
        shutil.copytree(part.folder / "samples", parts[0].folder / "samples", dirs_exist_ok=True)
    assert_equal(parts[0].samples, whole.samples)
    assert parts[0].run("sample") == 0  # nothing is left, and now it is finished
    entry = read_manifest(parts[0].folder).stage("sample")
    assert entry is not None and entry.finished is not None and entry.counts["samples"] == 48


def test_parts_finish_where_prompts_of_other_parts_are_the_same(make: Any, said: Any) -> None:
    """Mutation: counting shared prompts of this part alone: something would be left for ever."""
    experiment = make()
    path = experiment.folder / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    twins = [{**row, "id": f"twin-{number}"} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twins]))
    for number in range(3):
        assert experiment.run("sample", "--sample.shard", f"{number}/3") == 0
    entry = read_manifest(experiment.folder).stage("sample")
    assert entry is not None and entry.finished is not None and "24 samples" in said()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--sample.temperature", "0.7"], "sample.temperature: 0.8 -> 0.7"),
        (["--sample.max_new_tokens", "61"], "sample.max_new_tokens: 60 -> 61"),
        (["--sample.num_samples", "1"], "sample.num_samples: 2 -> 1"),
        (["--sample.views", "trace"], "sample.views"),
        (["--seed", "7"], "seed: 42 -> 7"),
        (["--model.format", "r1-0528-qwen3"], 'format: "r1-distill" -> "r1-0528-qwen3"'),
        (["--sample.options.dtype", "bfloat16"], 'dtype: "float32" -> "bfloat16"'),
    ],
)
def test_changed_settings_are_refused(
    flags: list[str], difference: str, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: a setting that decides samples but is not compared."""
    experiment = make()
    assert experiment.run("sample", "--limit", "1") == 0
    before = experiment.samples
    assert experiment.run("sample", *flags) == 2
    error = capsys.readouterr().err
    assert "sample was started here with other settings" in error and difference in error
    assert experiment.samples == before


def test_a_changed_chat_template_is_refused(make: Any, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the tokenizer in a folder of its own. Mutation: only the weights in the fingerprint."""
    experiment = make()
    own = experiment.root / "tokenizer"
    TOKENIZER.save_pretrained(own)
    assert experiment.run("sample", "--model.tokenizer", str(own), "--limit", "1") == 0
    changed = copy.deepcopy(TOKENIZER)
    changed.chat_template = f"{changed.chat_template} "
    changed.save_pretrained(own)
    assert experiment.run("sample", "--model.tokenizer", str(own)) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_the_template_counts_whatever_the_engine_says(make: Any) -> None:
    """An engine behind HTTP knows nothing of the local tokenizer. Mutation: the template left out of the identity."""
    experiment = make()
    config, other = load_config(experiment.config), copy.deepcopy(TOKENIZER)
    other.chat_template = f"{other.chat_template}{{# a comment #}}"
    first, again, changed = (
        sample_stage._identity(config, Folder(experiment.folder), R1, tokenizer, {"engine": "x"})
        for tokenizer in (TOKENIZER, copy.deepcopy(TOKENIZER), other)
    )
    assert first == again != changed


def test_changed_prompts_are_refused(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: prompts.jsonl not fingerprinted."""
    experiment = make()
    assert experiment.run("sample", "--limit", "1") == 0
    path = experiment.folder / "prompts.jsonl"
    path.write_text(path.read_text().replace("Question 5", "Question 6"))
    assert experiment.run("sample") == 2
    assert "prompts" in capsys.readouterr().err


def test_more_samples_views_and_other_batches_are_welcome(make: Any, said: Any) -> None:
    """Mutation: refusing what changes no sample, drawing the old ones again, or forgetting the larger number."""
    experiment = make(toml="num_samples = 1\nviews = ['trace']\n")
    assert experiment.run("sample") == 0
    first = experiment.samples
    assert experiment.run("sample", "--sample.views", "trace,empty", "--sample.options.max_batch_rows", "2") == 0
    assert experiment.run("sample", "--sample.views", "trace,empty", "--sample.num_samples", "3") == 0
    samples = experiment.samples
    assert len(first) == 6 and len(samples) == 36 and first.items() <= samples.items()
    assert "36 asked for, 12 done, 24 left" in said()
    assert experiment.run("sample", "--sample.views", "trace,empty", "--sample.num_samples", "2") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample.engine", "embeded"], "engine: got 'embeded'"),
        (["--sample.options.max_rows", "3"], "unknown option 'max_rows'; did you mean 'max_batch_rows'?"),
        (["--sample.options.model", "x"], "write model.path instead"),
        (["--sample.engine", "openai"], "needs the addresses"),
        (["--sample.endpoints", "http://127.0.0.1:1"], "set engine to 'openai'"),
        (["--sample.splits", "tset"], "no prompt is in split 'tset'"),
        (["--sample.shard", "3/3"], "expected a part such as 0/4"),
        (["--model.path", "nowhere"], "cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a check removed (a traceback, or a run with a setting nobody reads)."""
    experiment = make()
    capsys.readouterr()
    assert experiment.run("sample", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not experiment.samples


def test_without_prompts(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: an empty experiment sampled in silence."""
    experiment = make()
    (experiment.folder / "prompts.jsonl").unlink()
    assert experiment.run("sample") == 2
    assert "make the experiment's prompts first" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the cost


def test_a_dry_run_tells_the_cost_and_writes_nothing(make: Any, said: Any) -> None:
    """Mutation: a dry run that begins the stage, or tokens not counted once per sample."""
    experiment = make()
    before = sorted(path.name for path in experiment.folder.rglob("*"))
    assert experiment.run("sample", "--dry-run") == 0
    assert sorted(path.name for path in experiment.folder.rglob("*")) == before
    prompts = [view_prompt(TOKENIZER, R1, p.messages, view).prompt_ids for p in experiment.prompts for view in VIEWS]
    total = 2 * sum(map(len, prompts))
    assert f"24 requests, {total:,} prompt and at most {24 * 60:,} new tokens" in said()
    assert f"longest prompt {max(map(len, prompts))} tokens" in said()
    assert "nothing was sampled" in said()


# ------------------------------------------------------------------------------------------------ failures


def failures(experiment: Experiment) -> list[Sample]:
    return list(RecordStore(experiment.folder / "samples" / "failed", Sample, key=lambda s: (s.key, s.error or "")))


def test_failures_are_kept_apart_and_tried_again_on_request(make: Any, said: Any) -> None:
    """Mutations: a failure among the samples (the first record of a key holds for ever), failures tried again unasked or
    never, a failure of the same kind stored twice, or one that is counted after it succeeded."""
    whole, unlucky_one = make("whole"), make("unlucky", "engine = 'failing'\nnum_samples = 2\n")
    assert whole.run("sample") == 0
    expected = {key for key in whole.samples if unlucky(key, 3)}
    assert 3 <= len(expected) <= 15
    assert unlucky_one.run("sample", "--sample.options.fail_one_in", "3") == 0
    assert unlucky_one.samples.keys() == whole.samples.keys() - expected
    assert {s.key for s in failures(unlucky_one)} == expected
    assert {(s.error, s.finish, s.answer, s.token_ids) for s in failures(unlucky_one)} == {
        ("out of luck", "error", None, ())
    }
    assert f"{len(expected)} x out of luck" in said() and f"{len(expected)} failed, 0 left" in said()
    entry = read_manifest(unlucky_one.folder).stage("sample")
    assert entry is not None and entry.counts["failed"] == len(expected) and entry.finished is not None

    assert unlucky_one.run("sample") == 0  # not asked to
    assert unlucky_one.samples.keys() == whole.samples.keys() - expected
    assert f"{len(expected)} failed before and stay as they are" in said()
    assert unlucky_one.run("sample", "--retry-failed", "--sample.options.fail_one_in", "3") == 2  # the same again
    assert len(failures(unlucky_one)) == len(expected)
    assert unlucky_one.run("sample", "--retry-failed") == 0
    assert_equal(unlucky_one.samples, whole.samples)
    entry = read_manifest(unlucky_one.folder).stage("sample")
    assert entry is not None and entry.counts["failed"] == 0


def test_a_hopeless_run_stops(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: thousands of requests to an engine that fails each of them."""
    experiment = make(toml="engine = 'failing'\nnum_samples = 9\n")
    assert experiment.run("sample", "--sample.options.fail_one_in", "1") == 2
    assert "the first 50 all failed, the last with: out of luck" in capsys.readouterr().err
    assert len(failures(experiment)) == 50


def rewrite_prompts(experiment: Experiment, change: Any) -> None:
    prompts = [change(json.loads(to_json(prompt)), n) for n, prompt in enumerate(experiment.prompts)]
    (experiment.folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))


def test_a_prompt_that_cannot_be_written_fails_alone(make: Any, said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: one odd prompt that ends the run, or one that is lost without a record. All odd: the settings are wrong."""
    experiment = make()

    def end_with_assistant(prompt: dict[str, Any], number: int) -> dict[str, Any]:
        return (
            {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": "?"}]}
            if number == 2
            else prompt
        )

    rewrite_prompts(experiment, end_with_assistant)
    odd = experiment.prompts[2].id
    assert experiment.run("sample") == 0
    assert len(experiment.samples) == 20
    assert Counter(s.prompt_id for s in failures(experiment)) == {odd: 4}
    assert {s.error for s in failures(experiment)} == {"a conversation must end with a user turn, got 'assistant'"}
    assert "4 failed, 0 left" in said()
    assert experiment.run("sample") == 0
    assert len(failures(experiment)) == 4

    other = make("other", prompts=1)
    rewrite_prompts(other, lambda prompt, _: end_with_assistant(prompt, 2))
    assert other.run("sample") == 2
    assert "must end with a user turn" in capsys.readouterr().err


def test_prompts_that_read_alike_are_drawn_once(make: Any, said: Any) -> None:
    """Two ids, one conversation: the same request, hence the same sample. Mutation: waiting for samples that cannot come,
    or a stage that never finishes."""
    experiment = make()
    same = experiment.prompts[0].messages[0].content

    def copy_first(prompt: dict[str, Any], number: int) -> dict[str, Any]:
        return {**prompt, "messages": [{"role": "user", "content": same}]} if number == 3 else prompt

    rewrite_prompts(experiment, copy_first)
    assert experiment.run("sample") == 0
    assert len(experiment.samples) == 20
    assert re.search(r"4 belong to prompts that read the same tokens", said())
    entry = read_manifest(experiment.folder).stage("sample")
    assert entry is not None and entry.finished is not None and entry.counts["shared"] == 4


# ------------------------------------------------------------------------------------------------ other engines


def test_a_server_is_sampled_through_the_same_stage(make: Any, said: Any) -> None:
    """The HTTP engine against the test server, stopped after the first prompts and run again at another address. Mutation:
    addresses in the identity, token ids lost on the way, or a preflight that changes with the address."""
    from http_fixtures import QUICK, server

    experiment = make(prompts=3)
    options = [f"--sample.options.{name}={value}" for name, value in QUICK.items()]
    first = server()
    try:
        flags = ["--sample.engine", "openai", "--sample.endpoints", first.url, *options]
        assert experiment.run("sample", *flags, "--limit", "1") == 0
    finally:
        first.stop()
    second = server()
    try:
        assert experiment.run("sample", *["--sample.engine", "openai", "--sample.endpoints", second.url, *options]) == 0
    finally:
        second.stop()
    assert "12 asked for, 4 done, 8 left" in said()
    for sample in experiment.samples.values():
        assert sample.text == decode_completion(TOKENIZER, R1, sample.token_ids)
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
    assert len(experiment.samples) == 12


def test_the_test_engine_is_the_real_one(make: Any) -> None:
    """Mutation: a fixture that makes the tests above check something else."""
    one, other = make("one"), make("other", "engine = 'failing'\nnum_samples = 2\n")
    assert one.run("sample") == other.run("sample") == 0
    assert_equal(other.samples, one.samples)
    assert engines_fixtures.FailingEngine.closed > 0
