"""Declared comparisons: what a config may declare, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bvpo.config import ExperimentConfig, load_config
from bvpo.evaluation.declared import Declared, declared_rows, outcome
from bvpo.evaluation.metrics import Verdict, mean_over_seeds
from bvpo.runs.declaring import declared_of, enter, rows_of
from bvpo.stats import t_quantile
from bvpo.strict import UserError

TOML = """
name = "cmp"
root = "{root}"
[model]
path = "m"
[prompts]
sources = ["p.jsonl"]
[evaluate.benchmarks.chat]
source = "split:test"
metric = "reward"
[run]
seeds = [1, 2, 3]
[run.methods.dpo]
train.alpha.value = 1.0
[run.methods.mix]
train.alpha.value = 0.5
[run.declared.first]
better = "mix"
than = "dpo"
on = "chat/thinking/reward"
"""


TWICE = """[run.declared.zero]
better = "mix"
than = "dpo"
on = "chat/thinking/reward"
[run.declared.first]"""
ONE_MODE = """[evaluate]
modes = ["nothinking"]
[evaluate.benchmarks.chat]"""


def config(tmp_path: Path, *changes: tuple[str, str]) -> ExperimentConfig:
    text = TOML.format(root=tmp_path)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path)


def runs_of(values: dict[str, float]) -> dict[str, dict[str, list[Verdict]]]:
    """Seed -> two prompts around a value, in Thinking."""
    return {
        seed: {
            "chat": [
                Verdict(
                    prompt_id=name, mode="thinking", index=0, values={"reward": value + shift},
                    tokens=1, trace_tokens=0, closed=True,
                )
                for name, shift in (("a", -1.0), ("b", 1.0))
            ]
        }
        for seed, value in values.items()
    }  # fmt: skip


def test_the_level_is_shared_by_all_that_was_declared() -> None:
    """Mutation: 95 % for each of several comparisons, those that were taken back forgotten, or a verdict by the value
    instead of the interval."""
    runs = {"dpo": runs_of({"1": 0.0, "2": 0.0, "3": 0.0}), "mix": runs_of({"1": 1.0, "2": 1.1, "3": 1.2})}
    one = Declared(name="x", better="mix", than="dpo", benchmark="chat", mode="thinking", metric="reward")
    other = Declared(name="y", better="dpo", than="mix", benchmark="chat", mode="thinking", metric="reward")
    absent = Declared(name="z", better="mix", than="dpo", benchmark="chat", mode="nothinking", metric="reward")
    three = (one, other, absent)
    in_time = {"x": True, "y": False, "z": True}
    rows = declared_rows(three, runs, beforehand=in_time, num_seeds=3, num_withdrawn=1)
    half = t_quantile(1 - 0.05 / 4, 2) * 0.1 / 3**0.5
    assert rows[0].result.value == pytest.approx(1.1)
    assert (rows[0].result.seed_low, rows[0].result.seed_high) == pytest.approx((1.1 - half, 1.1 + half))
    assert [row.outcome for row in rows] == ["confirmed", "the opposite", "not finished"]
    assert [row.beforehand for row in rows] == [True, False, True]
    rows = declared_rows(three, runs, beforehand=in_time, num_seeds=4)
    assert {row.outcome for row in rows} == {"not finished"}, "three of four seeds decide nothing"


def test_one_seed_confirms_nothing() -> None:
    """Mutation: the interval over prompts in place of that over seeds."""
    found = mean_over_seeds({"1": {"a": 1.0, "b": 1.01, "c": 0.99}})
    assert found.prompt_low is not None and found.prompt_low > 0
    assert outcome(found) == "not confirmed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('better = "mix"', 'better = "mxi"'), r"run.declared.first.better: no method 'mxi'; did you mean 'mix'"),
        (('than = "dpo"', ""), r"run.declared.first.than: not set"),
        (('than = "dpo"', 'then = "dpo"'), r"unknown field 'then'; did you mean 'than'"),
        (('than = "dpo"', "than = 1"), r"run.declared.first.than: got 1"),
        (('than = "dpo"', 'than = "mix"'), r"compares 'mix' with itself"),
        (("[run.declared.first]", TWICE), r"first: says the same as run.declared.zero"),
        (("chat/thinking/reward", "chat/thinking"), r"expected benchmark/mode/metric"),
        (("chat/thinking/reward", "caht/thinking/reward"), r"no benchmark 'caht'; did you mean 'chat'"),
        (("chat/thinking/reward", "chat/thining/reward"), r"'thining' is not a mode that is evaluated"),
        (("chat/thinking/reward", "chat/thinking/accuracy"), r"'accuracy' is not a metric of chat \(reward\)"),
        (("chat/thinking/reward", "chat/thinking/tokens"), r"'tokens' is not a metric of chat"),
        (("[evaluate.benchmarks.chat]", ONE_MODE), r"'thinking' is not a mode that is evaluated"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """Mutation: a comparison with a name that means nothing, found out after the seeds have run."""
    with pytest.raises(UserError, match=message.replace(".declared.first.", r"\.declared\.first\.")):
        declared_of(config(tmp_path, change))


def in_time(own: ExperimentConfig, folder: Path, tuned: dict[str, Any] | None = None) -> list[bool]:
    return [row.beforehand for row in rows_of(own, folder, {}, tuned or {}, 0.95)]


@pytest.mark.parametrize("seen", ["eval/chat/verdicts.jsonl", "eval/chat/scores/1.jsonl", "other/chat/verdicts.jsonl"])
def test_what_is_entered_after_results_is_late(tmp_path: Path, seen: str) -> None:
    """Mutation: an entry that is renewed on every run, a change that keeps the old entry, or an evaluation that is half done
    or in another folder taken for none."""
    own, folder = config(tmp_path), tmp_path / "cmp"
    folder.mkdir()
    assert in_time(own, folder) == [False], "never entered"
    enter(own, folder, {})
    result = folder / "seed-1" / "dpo" / seen
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    enter(own, folder, {})
    assert in_time(own, folder) == [True]
    changed = config(tmp_path, ("chat/thinking/reward", "chat/nothinking/reward"))
    assert in_time(changed, folder) == [False]
    enter(changed, folder, {})
    assert in_time(changed, folder) == [False]
    (row,) = rows_of(own, folder, {}, {}, 0.95)
    assert row.beforehand is True and row.result.level == pytest.approx(0.975), "what came between counts"
    (folder / "declared.json").write_text("{")
    with pytest.raises(UserError, match=r"declared\.json"):
        enter(own, folder, {})


def test_seeds_and_settings_are_part_of_what_is_declared(tmp_path: Path) -> None:
    """Mutation: seeds added until it is confirmed, or a method that is tuned again, under the old entry."""
    own, folder = config(tmp_path), tmp_path / "cmp"
    folder.mkdir()
    enter(own, folder, {})
    assert in_time(own, folder) == [True]
    assert in_time(config(tmp_path, ("seeds = [1, 2, 3]", "seeds = [1, 2, 3, 4]")), folder) == [False]
    assert in_time(config(tmp_path, ("train.alpha.value = 0.5", "train.alpha.value = 0.6")), folder) == [False]
    assert in_time(own, folder, {"mix": {"train.loss.beta": 0.7}}) == [False]
    (folder / "seed-1" / "dpo" / "eval" / "chat" / "scores").mkdir(parents=True)
    before = (folder / "declared.json").read_text()
    enter(config(tmp_path, ("train.alpha.value = 0.5", "train.alpha.value = 0.6")), folder, {})
    assert (folder / "declared.json").read_text() == before, "a run that the stages will refuse spoils nothing"


def test_what_was_taken_back_still_counts(tmp_path: Path) -> None:
    """Mutation: of many declared comparisons the one that looks well is kept, and gets the whole level."""
    more = '[run.declared.second]\nbetter = "dpo"\nthan = "mix"\non = "chat/thinking/reward"\n[run.declared.first]'
    both, folder = config(tmp_path, ("[run.declared.first]", more)), tmp_path / "cmp"
    folder.mkdir()
    enter(both, folder, {})
    own = config(tmp_path)
    enter(own, folder, {})
    (row,) = rows_of(own, folder, {}, {}, 0.95)
    assert row.result.level == pytest.approx(0.975)


def test_nothing_declared_leaves_no_file(tmp_path: Path) -> None:
    """Mutation: an empty declared.json in every comparison."""
    text = TOML.format(root=tmp_path).partition("[run.declared")[0]
    (tmp_path / "c.toml").write_text(text)
    (tmp_path / "cmp").mkdir()
    enter(load_config(tmp_path / "c.toml"), tmp_path / "cmp", {})
    assert not (tmp_path / "cmp" / "declared.json").exists()
