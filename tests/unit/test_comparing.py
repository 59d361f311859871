"""Methods against methods, over seeds and prompts: what is paired with what, and the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import pytest
from scipy import stats

from bvpo.evaluation.comparing import SeedsRow, method_pairs, seeds_rows
from bvpo.evaluation.metrics import Verdict
from bvpo.strict import UserError


def verdict(prompt: str, value: float, *, mode: str = "thinking", tokens: int = 10) -> Verdict:
    return Verdict(
        prompt_id=prompt, mode=mode, index=0, values={"reward": value}, tokens=tokens, trace_tokens=0, closed=True
    )  # type: ignore[arg-type]  # fmt: skip


def runs(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[Verdict]]]:
    return {seed: {"chat": [verdict(prompt, value) for prompt, value in some.items()]} for seed, some in values.items()}


def rows_of(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]) -> dict[str, SeedsRow]:
    return {row.metric: row for row in seeds_rows(("x", "y"), runs(a), runs(b))}


def test_paired_by_seed_and_prompt() -> None:
    """By the book. Mutations: prompts of one side only in a mean; b - a; seeds weighed by their prompts; values of other
    seeds for the same prompt taken for a pair."""
    a = {"1": {"p": 5.0, "q": 1.0, "only a": 90.0}, "2": {"p": 2.0, "r": 4.0}, "3": {"s": 0.5}}
    b = {"1": {"p": 4.0, "q": 3.0}, "2": {"p": 0.0, "r": 1.0, "only b": -90.0}, "3": {"s": 0.0, "p": 7.0}}
    by_seed = {"1": ((5 - 4) + (1 - 3)) / 2, "2": ((2 - 0) + (4 - 1)) / 2, "3": 0.5}
    row = rows_of(a, b)["reward"]
    assert row.difference.by_seed == pytest.approx(by_seed)
    assert row.difference.value == pytest.approx(statistics.fmean(by_seed.values()))
    assert (row.difference.num_values, row.difference.only_a, row.difference.only_b) == (5, 1, 2)
    limits = stats.ttest_1samp(list(by_seed.values()), 0.0).confidence_interval(0.95)
    assert (row.difference.seed_low, row.difference.seed_high) == pytest.approx((limits.low, limits.high))
    assert row.mean_a is not None and row.mean_b is not None
    assert row.mean_a == pytest.approx(statistics.fmean([3.0, 3.0, 0.5]))
    assert row.mean_a - row.mean_b == pytest.approx(row.difference.value)


def test_shares_of_nothing_are_left_out() -> None:
    """No trace, no unclosed one. Mutation: lines of zeros; tokens left out, too."""
    found = rows_of({"1": {"p": 0.0}}, {"1": {"p": 0.0}})
    assert set(found) == {"reward", "tokens"}


def test_nothing_is_compared_unpaired() -> None:
    """Mutation: a row for seeds that only one side has."""
    assert not rows_of({"1": {"p": 1.0}}, {"2": {"p": 1.0}})


@pytest.mark.parametrize(
    ("wanted", "same", "pairs"),
    [
        ([], False, [("dpo", "dpo"), ("mix", "mix")]),
        (["mix"], False, [("mix", "mix")]),
        (["base,mix"], False, [("base", "mix")]),
        (["base, mix", "mix", "mix"], False, [("base", "mix"), ("mix", "mix")]),
        (["mix,dpo"], True, [("mix", "dpo")]),
    ],
)
def test_pairs_of_methods(wanted: list[str], same: bool, pairs: list[tuple[str, str]]) -> None:
    """Mutation: the order of a pair turned round; a pair told twice; methods of one side only in it."""
    theirs = ["base", "dpo", "mix"] if same else ["dpo", "other", "mix"]
    assert method_pairs(["base", "dpo", "mix"], theirs, wanted, same) == pairs


@pytest.mark.parametrize(
    ("wanted", "same", "said"),
    [
        ([], True, "are the same comparison: name two of its methods with --method ONE,OTHER; it has base, dpo"),
        (["dpo"], True, "are the same comparison"),
        (["dpo,dop"], False, "--method: B has no method 'dop'; did you mean 'dpo'?"),
        (["base"], False, "--method: B has no method 'base'"),
        (["a,b,c"], False, "got 'a,b,c', expected NAME or A_NAME,B_NAME"),
    ],
)
def test_pairs_that_are_none(wanted: list[str], same: bool, said: str) -> None:
    """Mutation: a method minus itself, which is zero; a name that is silently left out."""
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        method_pairs(["base", "dpo"], ["base", "dpo"] if same else ["dpo"], wanted, same)


def test_no_method_in_common() -> None:
    """Mutation: an empty table."""
    with pytest.raises(UserError, match="no method in common: A has dpo, B has mix; --method A_NAME,B_NAME"):
        method_pairs(["dpo"], ["mix"], [], False)
