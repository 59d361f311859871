"""Comparisons that were declared before their seeds ran, and what became of each.

In: what was declared and the runs of the methods it names. Out: one :class:`~bvpo.evaluation.results.DeclaredRow`
each: the paired difference with an interval that is wider the more was declared (Bonferroni), so that all hold
together, and an outcome by rule. Pure; whether something was declared in time is for the caller to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bvpo.evaluation.metrics import Mode, OverSeeds, difference_over_seeds
from bvpo.evaluation.results import DeclaredRow, Outcome, Runs, difference, seed_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """``better`` is expected to be above ``than`` in one metric."""

    name: str
    better: str
    than: str
    benchmark: str
    mode: Mode
    metric: str


def declared_rows(
    declared: tuple[Declared, ...],
    runs: Mapping[str, Runs],
    *,
    beforehand: Mapping[str, bool],
    num_seeds: int,
    num_withdrawn: int = 0,
    level: float = 0.95,
) -> tuple[DeclaredRow, ...]:
    """One row per declared comparison. ``runs`` maps methods to their runs, ``num_seeds`` is how many there will be, and
    ``level`` is that of all rows together, with the ``num_withdrawn`` that were declared once."""
    own_level = 1 - (1 - level) / max(1, len(declared) + num_withdrawn)
    return tuple(_row(one, runs, beforehand[one.name], num_seeds, own_level) for one in declared)


def _row(one: Declared, runs: Mapping[str, Runs], beforehand: bool, num_seeds: int, level: float) -> DeclaredRow:
    key = (one.benchmark, one.mode, one.metric)
    sides = (runs.get(one.better, {}), runs.get(one.than, {}))
    result = difference(sides, *key, level=level)
    if result is None:  # no seed in common yet
        result = difference_over_seeds(*(seed_values(side, *key) for side in sides), level=level)
    return DeclaredRow(
        name=one.name,
        better=one.better,
        than=one.than,
        benchmark=one.benchmark,
        mode=one.mode,
        metric=one.metric,
        result=result,
        outcome=outcome(result) if result.num_seeds >= num_seeds else "not finished",
        beforehand=beforehand,
    )


def outcome(result: OverSeeds) -> Outcome:
    """By the interval over seeds alone: one seed confirms nothing."""
    if result.seed_low is not None and result.seed_low > 0:
        return "confirmed"
    if result.seed_high is not None and result.seed_high < 0:
        return "the opposite"
    return "not confirmed"
