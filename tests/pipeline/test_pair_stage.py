"""``bvpo pair`` through real files: quads, report, and preference sets that read back."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_fixtures import tokenizer_of
from scoring_fixtures import make_experiment, make_prompts, make_sample, write_config
from training_fixtures import tiny_causal_lm

from bvpo import cli
from bvpo.config import DataConfig
from bvpo.data.export import preference_row
from bvpo.data.scores import score_key
from bvpo.experiment import RecordStore, read_manifest, require_as_paired
from bvpo.formats import FORMATS, completion_ids, view_prompt
from bvpo.records import VIEWS, Prompt, Quad, Sample, Score
from bvpo.stages import pair as stage
from bvpo.strict import from_dict, read_jsonl
from bvpo.training.data import load_quads
from bvpo.training.tokenizing import TokenSettings, tokenize_views


@pytest.fixture(autouse=True)
def fresh_log_handler() -> None:
    """The command's handler writes to the stderr of its first call; each test has a stderr of its own."""
    logger = logging.getLogger("bvpo")
    logger.handlers.clear()
    logger.propagate = True  # else pytest adds a handler, and the command takes it for its own


def pair(*words: str) -> int:
    return cli.main(["pair", *words])


def scored(sample: Sample, value: float | None, error: str | None = None, **extra: Any) -> Score:
    return Score(
        sample_key=sample.key,
        prompt_id=sample.prompt_id,
        view=sample.view,
        scorer=extra.pop("scorer", "s-1"),
        value=value,
        error=None if value is not None else error or "no answer",
        extra=extra,
    )


def write_scores(folder: Path, scores: Iterable[Score], *, seal: bool = False) -> None:
    store = RecordStore(folder / "scores", Score, key=score_key)
    with store.open_writer() as writer:
        for score in scores:
            writer.append(score)
    if seal:
        store.seal()


def quads_of(folder: Path, name: str = "quads.jsonl") -> list[Quad]:
    return list(read_jsonl(folder / name, Quad))


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pairing.json").read_text())


def full_experiment(root: Path, *, prompts: list[Prompt] | None = None, seal: bool = False) -> Path:
    """Three prompts: both views differ in score, only the empty view can be paired, and nothing can.

    Answers of the trace view begin with a line break, as models write them.
    """
    rows: list[tuple[Sample, float | None]] = []
    for index in range(3):
        rows.append((make_sample("p0", "trace", index, f"\n\nT{index}", trace=f"\nthought {index}\n"), float(index)))
        rows.append((make_sample("p0", "empty", index, f"E{index}"), -float(index)))
        rows.append((make_sample("p1", "trace", index, None, finish="length"), None))
        rows.append(
            (make_sample("p1", "empty", index, f"Café {index} ☃", finish="length" if index == 2 else "stop"), index / 8)
        )
        rows.append((make_sample("p2", "trace", index, f"\n\nS{index}"), 1.0))
        rows.append((make_sample("p2", "empty", index, "same"), 2.0))
    folder = make_experiment(root, prompts or make_prompts(3), [sample for sample, _ in rows], seal=seal)
    write_scores(folder, (scored(sample, value) for sample, value in rows), seal=seal)
    return folder


def test_one_view_may_stand_alone(tmp_path: Path) -> None:
    """Mutation: a quad of one view counted as a quad of both, or an empty set of the other view exported."""
    for view in VIEWS:
        samples = [make_sample("p0", view, i, f"A{i}") for i in range(2)]
        folder = make_experiment(tmp_path / view, make_prompts(1), samples)
        write_scores(folder, [scored(sample, float(sample.index)) for sample in samples])
        assert pair(write_config(tmp_path / view, "")) == 0
        assert report_of(folder)["quads"] == {f"{view} only": 1, "total": 1, "splits": {"train": 1}}
        assert {path.name for path in (folder / "preferences").iterdir()} == {view, f"{view}.jsonl"}


@pytest.mark.parametrize("seal", [False, True])
def test_quads_hold_the_best_and_the_worst_as_sampled(tmp_path: Path, seal: bool) -> None:
    """Mutation: chosen and rejected swapped, ids lost on the way, or a response cut at its limit called finished."""
    folder = full_experiment(tmp_path, seal=seal)
    assert pair(write_config(tmp_path, "")) == 0
    first, second = quads_of(folder)
    assert (first.id, second.id) == ("p0", "p1")
    assert first.messages == make_prompts(3)[0].messages
    assert first.trace and first.empty and second.empty and second.trace is None
    assert (first.trace.chosen.answer, first.trace.rejected.answer) == ("\n\nT2", "\n\nT0")
    assert (first.trace.chosen.trace, first.empty.chosen.trace) == ("\nthought 2\n", None)
    assert (first.empty.chosen.answer, first.empty.rejected.answer) == ("E0", "E2")
    assert (first.empty.chosen.score, first.empty.rejected.score) == (0.0, -2.0)
    for quad in (first, second):
        for one in filter(None, (quad.trace, quad.empty)):
            for response in (one.chosen, one.rejected):
                sample = RecordStore(folder / "samples", Sample).get(str(response.sample_key))
                assert sample is not None
                assert (response.token_ids, response.answer, response.trace) == (
                    sample.token_ids,
                    sample.answer,
                    sample.trace,
                )
                assert (one.prompt_ids, one.completion_start) == (sample.prompt_ids, sample.completion_start)
    assert second.empty.chosen.finished is False and second.empty.rejected.finished is True


def test_the_report_accounts_for_every_prompt_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a drop without a count, or counts of samples that do not add up."""
    folder = full_experiment(tmp_path)
    assert pair(write_config(tmp_path, "")) == 0
    report = report_of(folder)
    trace, empty = report["views"]["trace"], report["views"]["empty"]
    assert trace["prompts"] == empty["prompts"] == 3
    assert (trace["prompts_paired"], trace["prompts_dropped"]) == (1, {"unscorable": 1, "tie": 1})
    assert (empty["prompts_paired"], empty["prompts_dropped"]) == (2, {"all_identical": 1})
    assert trace["samples"] == {"scored": 6, "no answer": 3} and empty["samples"] == {"scored": 9}
    assert report["quads"] == {"both views": 1, "empty only": 1, "total": 2, "splits": {"train": 2}}
    assert empty["margin"]["q0"] == 0.25 and empty["margin"]["q100"] == 2.0 and trace["margin"]["mean"] == 2.0
    assert empty["unfinished"] == {"chosen": 1, "rejected": 0} and empty["chosen_longer"] == 0.0
    assert empty["tokens"]["rejected"]["q100"] == 9
    said = capsys.readouterr().err
    assert "1 prompts dropped, tie: all scores are equal" in said and "2 (1 both views, 1 empty only)" in said
    entry = read_manifest(folder).stage("pair")
    assert entry is not None and entry.finished and entry.counts["total"] == 2


def test_pairing_again_replaces_what_was_there(tmp_path: Path) -> None:
    """Mutation: refusing another strategy, or leaving files of the earlier pairing behind."""
    prompts = [
        Prompt(id=p.id, messages=p.messages, split=("train", "test")[i % 2]) for i, p in enumerate(make_prompts(3))
    ]
    folder = full_experiment(tmp_path, prompts=prompts)
    (folder / "quads.mine.jsonl").write_text("kept\n")
    assert pair(write_config(tmp_path, "")) == 0
    assert [q.id for q in quads_of(folder)] == ["p0"] and [q.id for q in quads_of(folder, "quads.test.jsonl")] == ["p1"]
    assert (folder / "preferences" / "empty.test.jsonl").is_file()
    assert not (folder / "preferences" / "trace.test.jsonl").exists()
    assert pair(write_config(tmp_path, '[pair]\nstrategy = "all_pairs"\nmin_margin = 1.5\nexport = false\n')) == 0
    assert [q.id for q in quads_of(folder)] == ["p0"]
    assert not (folder / "quads.test.jsonl").exists() and not list((folder / "preferences").iterdir())
    assert (folder / "quads.mine.jsonl").read_text() == "kept\n"


def test_all_pairs_join_in_order(tmp_path: Path) -> None:
    """Mutation: a cross product of the views, or quads of equal id."""
    folder = full_experiment(tmp_path)
    assert pair(write_config(tmp_path, '[pair]\nstrategy = "all_pairs"\nmax_pairs = 2\n')) == 0
    quads = quads_of(folder)
    assert [(q.id, q.trace is not None, q.empty is not None) for q in quads] == [
        ("p0", True, True),
        ("p0-2", True, True),
        ("p1", False, True),
        ("p1-2", False, True),
    ]
    assert report_of(folder)["views"]["empty"]["pairs_over_max"] == 2


def test_order_of_storage_never_matters(tmp_path: Path) -> None:
    """Mutation: relying on the order in which samples finished."""
    texts = []
    for name, reverse in (("a", False), ("b", True)):
        prompts = make_prompts(4)
        samples = [make_sample(f"p{p}", view, i, f"{p}{i}") for p in range(4) for view in VIEWS for i in range(4)]
        folder = make_experiment(tmp_path / name, prompts, samples[::-1] if reverse else samples, seal=reverse)
        scores = [scored(sample, float(sample.index % 3)) for sample in samples]
        write_scores(folder, scores[::-1] if reverse else scores)
        for strategy in ("best_worst", "top_vs_random", "all_pairs"):
            assert pair(write_config(tmp_path / name, f'[pair]\nstrategy = "{strategy}"\n')) == 0
            texts.append((folder / "quads.jsonl").read_text())
    assert texts[:3] == texts[3:] and len(set(texts)) == 3


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    """Mutation: taking the first record of a sample, or dropping samples that once failed."""
    samples = [make_sample("p0", "empty", i, f"E{i}") for i in range(3)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    write_scores(
        folder,
        [
            scored(samples[0], 9.0, attempt=1),
            scored(samples[0], None, "timeout"),
            scored(samples[1], 1.0),
            scored(samples[2], 5.0),
            scored(samples[2], None, "worse luck", attempt=1),
        ],
    )
    assert pair(write_config(tmp_path, "")) == 0
    (quad,) = quads_of(folder)
    assert quad.empty and (quad.empty.chosen.answer, quad.empty.rejected.answer) == ("E0", "E1")
    assert report_of(folder)["views"]["empty"]["samples"] == {"scored": 2, "failed to score": 1}


def test_scores_that_are_missing_or_foreign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: pairing without a word while scoring is half done, or comparing values of two scorers."""
    samples = [make_sample("p0", "empty", i, f"E{i}") for i in range(3)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    config = write_config(tmp_path, "")
    assert pair(config) == 2
    assert "no scores; score the samples first" in capsys.readouterr().err
    write_scores(folder, [scored(samples[0], 1.0), scored(samples[1], 2.0)])
    assert pair(config) == 0
    assert "1 samples have no score yet" in capsys.readouterr().err
    write_scores(folder, [scored(samples[2], 1.0, scorer="other-2")])
    assert pair(config) == 2
    assert "holds scores of s-1 and of other-2, which cannot be compared" in capsys.readouterr().err


def test_nothing_to_pair_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: an empty quads.jsonl and exit code 0."""
    samples = [make_sample("p0", "empty", i, "same") for i in range(3)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    write_scores(folder, [scored(sample, 1.0) for sample in samples])
    assert pair(write_config(tmp_path, "")) == 2
    said = capsys.readouterr().err
    assert "all_identical" in said and "no prompt has a pair in any view" in said
    assert not (folder / "quads.jsonl").exists()


def test_responses_to_different_prompt_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: taking the chosen sample's prompt for both."""
    samples = [make_sample("p0", "empty", i, f"E{i}", prompt_ids=(1, 2, 3, 4 + i)) for i in range(2)]
    folder = make_experiment(tmp_path, make_prompts(1), samples)
    write_scores(folder, [scored(sample, float(sample.index)) for sample in samples])
    assert pair(write_config(tmp_path, "")) == 2
    assert "drawn from different prompt tokens" in capsys.readouterr().err


def test_dry_run_and_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: writing in a dry run; a limit on samples instead of prompts."""
    folder = full_experiment(tmp_path)
    config = write_config(tmp_path, "")
    assert pair(config, "--dry-run") == 0
    assert "2 prompts paired" in capsys.readouterr().err
    assert not (folder / "quads.jsonl").exists() and not (folder / "manifest.json").exists()
    assert pair(config, "--limit", "1") == 0
    assert [q.id for q in quads_of(folder)] == ["p0"]


# ---------------------------------------------------------------------------------------------------------------------
# several traces per answer


def repeated_answers(root: Path) -> Path:
    """p0: three traces of the best answer and two of the worst; p1: two of each, the same tokens both times; p2: one."""
    samples = []
    for prompt, answers in (("p0", "bawbwcb"), ("p1", "bwbcw"), ("p2", "bwc")):
        for index, answer in enumerate(answers):
            trace = answer if prompt == "p1" else f"t{index}"
            sample = make_sample(prompt, "trace", index, f"{answer}!", trace=trace)
            ids = (20 + ord(trace[-1]), *sample.token_ids)
            samples.append(replace(sample, token_ids=ids))
            samples.append(make_sample(prompt, "empty", index, f"E{index}"))
    folder = make_experiment(root, make_prompts(3), samples)
    value = {"b": 2.0, "a": 1.0, "c": 1.0, "w": 0.0}
    of = {s.key: value[s.answer[0]] if s.view == "trace" else float(s.index) for s in samples if s.answer}
    write_scores(folder, (scored(sample, of[sample.key]) for sample in samples))
    return folder


def test_more_traces_of_a_pair_are_members_of_its_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations: members with the empty pair; members exported or counted as quads; the report silent about them; a repeat
    of the same tokens left out, which is a draw like any other."""
    folder = repeated_answers(tmp_path)
    assert pair(write_config(tmp_path, "")) == 0
    plain, report = (folder / "quads.jsonl").read_text(), report_of(folder)
    rows = (folder / "preferences" / "trace.jsonl").read_text()
    assert "group" not in plain and "traces" not in report
    assert pair(write_config(tmp_path, "[pair]\ntraces = 3\n")) == 0
    quads = quads_of(folder)
    assert [(q.id, q.group, q.empty is not None) for q in quads] == [
        ("p0", "p0", True), ("p0+2", "p0", False), ("p1", "p1", True), ("p1+2", "p1", False), ("p2", None, True),
    ]  # fmt: skip
    indices = [[r.trace for r in (q.trace.chosen, q.trace.rejected)] for q in quads if q.trace]
    assert indices == [["t0", "t2"], ["t3", "t4"], ["b", "w"], ["b", "w"], ["t0", "t1"]]
    tokens = [[r.token_ids for r in (q.trace.chosen, q.trace.rejected)] for q in quads if q.trace]
    assert tokens[2] == tokens[3] and tokens[0] != tokens[1]
    assert [replace(q, group=None) for q in quads if q.leads] == [
        from_dict(Quad, json.loads(x)) for x in plain.splitlines()
    ]
    assert (folder / "preferences" / "trace.jsonl").read_text() == rows
    assert report_of(folder) == {**report, "traces": {"1": 1, "2": 2}}
    assert "trace pairs by traces per answer: 1 with 1, 2 with 2" in capsys.readouterr().err
    assert cli.main(["status", str(folder)]) == 0 and "3 quads" in capsys.readouterr().out
    assert pair(write_config(tmp_path, "[pair]\ntraces = 0\n")) == 2


def test_several_traces_are_trained_on_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples to aligned model with ``pair.traces = 3`` and looks at the gradient; then the first traces alone. Mutations:
    groups lost between the stages; 'joint' trained on the members."""
    tokenizer, fmt = tokenizer_of("r1-distill"), FORMATS["r1-distill"]
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_causal_lm("qwen2", dtype=torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    prompts, samples = make_prompts(4), []
    for prompt in prompts:
        for view in VIEWS:
            sent = view_prompt(tokenizer, fmt, prompt.messages, view)
            for index in range(6):
                answer, trace = ("yes", "no")[index % 2], f"so {index}" if view == "trace" else None
                ids = completion_ids(tokenizer, fmt, view, trace, answer, True)
                sample = make_sample(
                    prompt.id, view, index, answer, trace=trace or "", prompt_ids=tuple(sent.prompt_ids)
                )
                samples.append(replace(sample, token_ids=tuple(ids), completion_start=sent.completion_start))
    folder = make_experiment(tmp_path, prompts, samples)
    write_scores(folder, (scored(sample, float(sample.answer == "yes")) for sample in samples))
    training = "quads_per_step = 4\nepochs = 4.0\nlearning_rate = 1e-2\nlogging_steps = 1\ntelemetry_steps = 1\n"
    config = write_config(
        tmp_path, f"[pair]\ntraces = 3\nexport = false\n[train]\n{training}[train.hf]\nuse_cpu = true\n"
    )
    words = [config, "--model.path", str(tmp_path / "model"), "--model.format", "r1-distill"]
    assert pair(*words) == 0
    assert [q.id for q in quads_of(folder)][:4] == ["p0", "p0+2", "p0+3", "p1"]
    assert cli.main(["train", *words, "--train.trace_estimator", "traces", "--train.loss.name", "simpo"]) == 2
    assert "loss 'simpo' has no reference" in capsys.readouterr().err
    assert cli.main(["train", *words, "--train.trace_estimator", "traces"]) == 0
    said = capsys.readouterr().err
    assert "traces per answer: 4 quads with 3" in said
    summary = json.loads((folder / "train" / "summary.json").read_text())
    assert (summary["quads"], summary["optimizer_steps"], summary["pairs"]) == (4, 4, {"trace": 4, "empty": 4})
    assert summary["last"]["trace/rewards/margins"] > 0 and "noise/drift" in summary["last"]
    shutil.rmtree(folder / "train")
    (folder / "manifest.json").unlink()
    assert cli.main(["train", *words]) == 0
    assert "8 further traces of quads with several are left out" in capsys.readouterr().err
    joint = json.loads((folder / "train" / "summary.json").read_text())
    assert joint["pairs"] == summary["pairs"] and joint["tokens"] < summary["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# preference sets


def texts_of(quads: Iterable[Quad]) -> list[Any]:
    """What a preference set must bring back: conversations, traces and answers of both sides, per view."""
    found = []
    for quad in quads:
        for view in VIEWS:
            one = quad.pair(view)
            if one is not None:
                sides = [(r.trace, r.answer) for r in (one.chosen, one.rejected)]
                found.append((view, [(m.role, m.content) for m in quad.messages], sides))
    return sorted(found, key=repr)


@pytest.mark.parametrize("form", ["jsonl", "folder"])
def test_preference_sets_read_back_as_the_same_pairs(tmp_path: Path, form: str) -> None:
    """Mutation: traces written through a template, whitespace stripped, chosen and rejected swapped, views not joined."""
    folder = full_experiment(tmp_path)
    assert pair(write_config(tmp_path, "")) == 0
    place = folder / "preferences"
    sets = {view: str(place / (f"{view}.jsonl" if form == "jsonl" else view)) for view in VIEWS}
    read = load_quads(DataConfig(trace=sets["trace"], empty=sets["empty"]), FORMATS["r1-distill"])
    written = quads_of(folder)
    assert texts_of(read.train) == texts_of(written) and len(texts_of(written)) == 3
    assert read.train.counts["joined"] == 1 and read.train.counts["empty_only"] == 1
    assert list(load_quads(DataConfig(quads=str(folder / "quads.jsonl")), FORMATS["r1-distill"]).train) == written


def test_rows_are_trls_conversational_form(tmp_path: Path) -> None:
    """Mutation: an implicit prompt, or a trace column that TRL does not know."""
    folder = full_experiment(tmp_path)
    assert pair(write_config(tmp_path, "")) == 0
    row = json.loads((folder / "preferences" / "trace.jsonl").read_text().splitlines()[0])
    assert row == {
        "id": "p0",
        "prompt": [{"role": "user", "content": "Question 0?"}],
        "chosen": [{"role": "assistant", "content": "\n\nT2", "reasoning_content": "\nthought 2\n"}],
        "rejected": [{"role": "assistant", "content": "\n\nT0", "reasoning_content": "\nthought 0\n"}],
        "score_chosen": 2.0,
        "score_rejected": 0.0,
    }
    assert preference_row(quads_of(folder)[1], "trace") is None


def test_the_folder_is_a_dataset_with_a_card(tmp_path: Path) -> None:
    """Mutation: a folder that `load_from_disk` cannot read, a card without its YAML head, or another set's numbers."""
    from datasets import DatasetDict, load_from_disk
    from trl.data_utils import is_conversational

    prompts = [
        Prompt(id=p.id, messages=p.messages, split=("train", "test")[i % 2]) for i, p in enumerate(make_prompts(3))
    ]
    folder = full_experiment(tmp_path, prompts=prompts)
    assert pair(write_config(tmp_path, "")) == 0
    loaded = load_from_disk(str(folder / "preferences" / "empty"))
    assert isinstance(loaded, DatasetDict) and {name: len(rows) for name, rows in loaded.items()} == {
        "train": 1,
        "test": 1,
    }
    assert is_conversational(loaded["train"][0])
    assert "reasoning_content" not in loaded["train"][0]["chosen"][0]
    card = (folder / "preferences" / "empty" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- preference\n") and "| rows | train 1, test 1 |" in card
    assert "| scorer | `s-1` |" in card and "`best_worst`" in card and "| model | `base` |" in card
    assert not list((folder / "preferences").glob(".*")), "no drafts are left"


def test_help_describes_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a verb whose help does not say what it does."""
    with pytest.raises(SystemExit):
        pair("--help")
    out = capsys.readouterr().out
    assert stage.ABOUT.split(".")[0] in " ".join(out.split()) and re.search(r"--pair\.min_margin +0\.0 ", out)


def test_silence_is_rejected_counted_and_exported_as_far_as_the_form_holds_it(tmp_path: Path) -> None:
    """Mutation: an unclosed trace written with a closed one's fields, exported as if it had closed, silence left out of the
    report, or rejected without being asked for."""
    rows = [
        (make_sample("p0", "trace", 0, "\n\nA", trace="t"), 1.0),
        (make_sample("p0", "trace", 1, None, finish="length"), None),
        (make_sample("p0", "empty", 0, "A"), 1.0),
        (make_sample("p0", "empty", 1, " \n"), None),
    ]
    folder = make_experiment(tmp_path, make_prompts(1), [sample for sample, _ in rows])
    write_scores(folder, (scored(sample, value) for sample, value in rows))
    assert pair(write_config(tmp_path, "")) != 0, "nothing to pair unless silence may be rejected"
    assert pair(write_config(tmp_path, "[pair]\nno_answer = 'reject'\n")) == 0
    (quad,) = quads_of(folder)
    assert quad.trace is None and quad.empty is not None and quad.empty.rejected.sample_key == rows[3][0].key
    assert quad.empty.rejected.score is None and report_of(folder)["views"]["empty"]["pairs_rejecting_silence"] == 1
    assert (
        load_quads(DataConfig(empty=str(folder / "preferences" / "empty")), FORMATS["r1-distill"], seed=0).train
        is not None
    )
    assert pair(write_config(tmp_path, "[pair]\nno_answer = 'drop'\nno_answer_trace = 'reject'\n")) == 0
    (quad,) = quads_of(folder)
    unclosed = rows[1][0]
    assert quad.empty is None and quad.trace is not None and quad.trace.rejected.token_ids == unclosed.token_ids
    assert (quad.trace.rejected.answer, quad.trace.rejected.trace) == ("", unclosed.text)
    assert not quad.trace.rejected.finished and preference_row(quad, "trace") is None


def test_rejected_silence_has_its_sampled_tokens_after_the_preference_set(tmp_path: Path) -> None:
    """Mutation: white space lost on the way, so that training would reject tokens that were never sampled, or an end of
    sequence lost."""
    tokenizer, fmt = tokenizer_of("r1-distill"), FORMATS["r1-distill"]
    prompts, samples = make_prompts(2), []
    for prompt, silence in zip(prompts, ("", " \n"), strict=True):
        sent = view_prompt(tokenizer, fmt, prompt.messages, "empty")
        for index, answer in enumerate(("yes", silence)):
            ids = completion_ids(tokenizer, fmt, "empty", None, answer, True)
            sample = make_sample(prompt.id, "empty", index, answer, prompt_ids=tuple(sent.prompt_ids))
            samples.append(replace(sample, token_ids=tuple(ids), completion_start=sent.completion_start))
    folder = make_experiment(tmp_path, prompts, samples)
    write_scores(folder, (scored(s, 1.0 if s.index == 0 else None) for s in samples))
    assert pair(write_config(tmp_path, "[pair]\nno_answer = 'reject'\n")) == 0
    sampled = DataConfig(quads=str(folder / "quads.jsonl"))
    exported = DataConfig(empty=str(folder / "preferences" / "empty"))
    found = []
    for config in (sampled, exported):
        quads = sorted(load_quads(config, fmt).train, key=lambda quad: quad.messages[0].content)
        tokens = [tokenize_views(quad, tokenizer, fmt, TokenSettings(max_length=500)).quad for quad in quads]
        branches = [quad.branches[3] for quad in tokens if quad is not None]
        found.append([branch.ids.tolist() for branch in branches if branch is not None])
    close, eos = tokenizer.encode("</think>", add_special_tokens=False), tokenizer.eos_token_id
    assert found[0] == found[1] and found[0][0] == [*close, eos] and len(found[0]) == 2
    assert [ids[len(close) :] for ids in found[0]] == [list(s.token_ids) for s in samples if s.index == 1]


def test_training_refuses_quads_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut at a line's end, which is a whole file to any reader. Mutations: the hash not written, not compared, or compared
    with quads that somebody made by hand."""
    folder = full_experiment(tmp_path)
    config = write_config(tmp_path, "")
    assert pair(config) == 0
    quads = folder / "quads.jsonl"
    require_as_paired(quads)
    whole = quads.read_bytes()
    cut = whole[: whole.index(b"\n") + 1]
    quads.write_bytes(cut)
    for flags in ((), ("--data.quads", str(quads)), ("--data.quads", str(tmp_path), "--data.eval_quads", str(quads))):
        capsys.readouterr()
        assert cli.main(["train", config, *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and f"{quads}: is not what bvpo pair wrote" in error
    (folder / "mine.jsonl").write_bytes(cut)
    require_as_paired(folder / "mine.jsonl")
    assert pair(config) == 0 and quads.read_bytes() == whole
    require_as_paired(quads)
    (folder / "manifest.json").unlink()
    quads.write_bytes(cut)
    require_as_paired(quads)
