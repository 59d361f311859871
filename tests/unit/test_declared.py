"""Declared comparisons: what a config may declare, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bvpo.config import ExperimentConfig, load_config
from bvpo.core.declared import Declared, declared_rows, outcome
from bvpo.core.evaluation import Verdict, mean_over_seeds
from bvpo.core.stats import t_quantile
from bvpo.jobs.declaring import declared_of, enter, rows_of
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
    """Mutation: 95 % for each of several comparisons, or a verdict by the value instead of the interval."""
    runs = {"dpo": runs_of({"1": 0.0, "2": 0.0, "3": 0.0}), "mix": runs_of({"1": 1.0, "2": 1.1, "3": 1.2})}
    one = Declared(name="x", better="mix", than="dpo", benchmark="chat", mode="thinking", metric="reward")
    other = Declared(name="y", better="dpo", than="mix", benchmark="chat", mode="thinking", metric="reward")
    absent = Declared(name="z", better="mix", than="dpo", benchmark="chat", mode="nothinking", metric="reward")
    rows = declared_rows((one, other, absent), runs, beforehand={"x": True, "y": False, "z": True})
    half = t_quantile(1 - 0.05 / 3, 2) * 0.1 / 3**0.5
    assert rows[0].result.value == pytest.approx(1.1)
    assert (rows[0].result.seed_low, rows[0].result.seed_high) == pytest.approx((1.1 - half, 1.1 + half))
    assert [row.outcome for row in rows] == ["confirmed", "the opposite", "no data"]
    assert [row.beforehand for row in rows] == [True, False, True]


def test_one_seed_confirms_nothing() -> None:
    """Mutation: the interval over prompts in place of that over seeds."""
    found = mean_over_seeds({"1": {"a": 1.0, "b": 1.01, "c": 0.99}})
    assert found.prompt_low is not None and found.prompt_low > 0
    assert outcome(found) == "not confirmed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('better = "mix"', 'better = "mxi"'), r"run.declared.first.better: no method 'mxi'; did you mean 'mix'"),
        (('than = "dpo"', ""), r"run.declared.first.than: no method ''"),
        (('than = "dpo"', 'then = "dpo"'), r"unknown field 'then'; did you mean 'than'"),
        (('than = "dpo"', "than = 1"), r"run.declared.first.than: got 1"),
        (("chat/thinking/reward", "chat/thinking"), r"expected benchmark/mode/metric"),
        (("chat/thinking/reward", "caht/thinking/reward"), r"no benchmark 'caht'; did you mean 'chat'"),
        (("chat/thinking/reward", "chat/thining/reward"), r"'thining' is not a mode"),
        (("chat/thinking/reward", "chat/thinking/accuracy"), r"'accuracy' is not a metric of chat \(reward, tokens"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """Mutation: a comparison with a name that means nothing, found out after the seeds have run."""
    with pytest.raises(UserError, match=message.replace(".declared.first.", r"\.declared\.first\.")):
        declared_of(config(tmp_path, change))


def test_what_is_entered_after_results_is_late(tmp_path: Path) -> None:
    """Mutation: an entry that is renewed on every run, or a change that keeps the old entry."""
    own = config(tmp_path)
    folder = tmp_path / "cmp"
    folder.mkdir()
    assert [row.beforehand for row in rows_of(own, folder, {}, 0.95)] == [False], "never entered"
    enter(own, folder)
    result = folder / "seed-1" / "dpo" / "eval" / "results.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    enter(own, folder)
    assert [row.beforehand for row in rows_of(own, folder, {}, 0.95)] == [True]
    changed = config(tmp_path, ("chat/thinking/reward", "chat/nothinking/reward"))
    assert [row.beforehand for row in rows_of(changed, folder, {}, 0.95)] == [False]
    enter(changed, folder)
    enter(own, folder)
    assert [row.beforehand for row in rows_of(own, folder, {}, 0.95)] == [False], "it was taken back in between"
    (folder / "declared.json").write_text("{")
    with pytest.raises(UserError, match=r"declared\.json"):
        enter(own, folder)


def test_nothing_declared_leaves_no_file(tmp_path: Path) -> None:
    """Mutation: an empty declared.json in every comparison."""
    text = TOML.format(root=tmp_path).partition("[run.declared")[0]
    (tmp_path / "c.toml").write_text(text)
    (tmp_path / "cmp").mkdir()
    enter(load_config(tmp_path / "c.toml"), tmp_path / "cmp")
    assert not (tmp_path / "cmp" / "declared.json").exists()
