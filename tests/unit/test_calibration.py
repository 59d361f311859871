"""Calibration of stated preferences: values worked out by hand, symmetries, and what a calibrated model shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.evaluation.calibration import (
    HeldOutPair,
    adaptive_bins,
    brier_scores,
    calibration_error,
    calibration_rows,
    confidences,
    error_by_chance,
    log_losses,
    reliability_bins,
    rights,
)
from bvpo.evaluation.results import Results
from bvpo.report.reliability import reliability_charts, reliability_table
from bvpo.stats import share_interval

AT_70, AT_90 = math.log(7 / 3), math.log(9)  # margins that state 0.7 and 0.9
MARGINS = st.lists(
    st.one_of(st.floats(-1000, 1000, allow_nan=False), st.sampled_from([0.0, AT_70, -AT_70, 1000.0, -1000.0])),
    min_size=1,
    max_size=40,
).map(np.array)


def held_out(margins: list[float], prompts: list[str] | None = None, view: str = "trace") -> list[HeldOutPair]:
    names = prompts or [f"p{i}" for i in range(len(margins))]
    return [
        HeldOutPair(id=f"q{i}", view=view, prompt=name, margin=margin, score_margin=None)  # type: ignore[arg-type]
        for i, (name, margin) in enumerate(zip(names, margins, strict=True))
    ]


def simulated(rng: np.random.Generator, number: int, *, sharper: float = 1.0) -> np.ndarray:
    """Margins whose stated probabilities are true, or ``sharper`` times too far from 0."""
    sizes = np.abs(rng.normal(0, 1.5, number))
    return sharper * np.where(rng.random(number) < confidences(sizes), sizes, -sizes)


def test_values_by_hand() -> None:
    """Three pairs stated at 0.7, two of them right, and one at 0.9, right. Mutations: p in place of max(p, 1 - p); bins that
    weigh alike; the Brier score of the side that the model prefers; logarithms to base 2."""
    margins = np.array([AT_70, AT_70, -AT_70, AT_90])
    assert confidences(margins) == pytest.approx([0.7, 0.7, 0.7, 0.9])
    assert rights(np.array([2.0, 0.0, -1e-9])).tolist() == [1.0, 0.5, 0.0]
    assert brier_scores(margins) == pytest.approx([0.09, 0.09, 0.49, 0.01])
    assert log_losses(margins) == pytest.approx([math.log(p) for p in (10 / 7, 10 / 7, 10 / 3, 10 / 9)])
    first, last = reliability_bins(margins, num_bins=2)
    assert (first.start, first.end, first.num_pairs, last.num_pairs, last.end) == (0.5, 0.75, 3, 1, 1.0)
    assert (first.confidence, first.right) == pytest.approx((0.7, 2 / 3))
    wilson = share_interval(np.array([1.0, 1.0, 0.0]), 3)
    assert (first.low, first.high) == (wilson.low, wilson.high)
    assert (last.low, last.high) == (None, None), "one prompt has no interval"
    assert calibration_error((first, last)) == pytest.approx(0.75 * (0.7 - 2 / 3) + 0.25 * 0.1)
    by_chance = 0.75 * math.sqrt(2 / math.pi * 0.21 / 3) + 0.25 * 2 * 0.9 * 0.1
    assert error_by_chance((first, last)) == pytest.approx(by_chance)
    assert calibration_error(()) is error_by_chance(()) is None
    assert reliability_bins(np.array([])) == adaptive_bins(np.array([])) == ()


@given(MARGINS)
def test_the_opposite_preference(margins: np.ndarray) -> None:
    """Which response is called chosen is a convention: swapping all pairs turns right into wrong and p into 1 - p, in the
    same bins. Mutations: ties counted as right or as wrong; bins by p instead of by the preferred side."""
    assert rights(-margins) == pytest.approx(1 - rights(margins))
    assert log_losses(-margins) - log_losses(margins) == pytest.approx(margins, abs=1e-9)
    assert np.sqrt(brier_scores(-margins)) == pytest.approx(1 - np.sqrt(brier_scores(margins)))
    for cut in (reliability_bins, adaptive_bins):
        for one, other in zip(cut(margins), cut(-margins), strict=True):
            assert (one.start, one.end, one.num_pairs) == (other.start, other.end, other.num_pairs)
            assert one.confidence == other.confidence
            assert one.right == pytest.approx(1 - other.right)


@given(MARGINS, st.randoms(use_true_random=False))
def test_bins_hold_every_pair_in_any_order(margins: np.ndarray, random) -> None:  # type: ignore[no-untyped-def]
    """Mutations: probability 1 falls out of the last bin; equal probabilities are split by their place in the file; an
    overflow at margins of 1000."""
    shuffled = margins.tolist()
    random.shuffle(shuffled)
    assert np.isfinite(log_losses(margins)).all() and (brier_scores(margins) <= 1).all()
    for cut in (reliability_bins, adaptive_bins):
        bins, again = cut(margins), cut(np.array(shuffled))
        assert sum(one.num_pairs for one in bins) == len(margins)
        assert [one.num_pairs for one in bins] == [one.num_pairs for one in again]
        assert [one.right for one in bins] == pytest.approx([one.right for one in again])
        error = calibration_error(bins)
        assert error is not None and 0 <= error <= 1


def test_extreme_margins() -> None:
    """Mutation: log(1 - sigmoid(m)), which is infinite from m = 37 on."""
    margins = np.array([1000.0, -1000.0, 40.0])
    assert log_losses(margins).tolist() == pytest.approx([0.0, 1000.0, math.exp(-40)])
    assert brier_scores(margins) == pytest.approx([0.0, 1.0, math.exp(-80)], rel=1e-9)
    (last,) = reliability_bins(margins)
    assert (last.num_pairs, last.end) == (3, 1.0)


def test_adaptive_bins_share_out_evenly() -> None:
    """Mutation: bins of equal width under both names."""
    margins = np.random.default_rng(0).normal(0, 4, 103)
    sizes = [one.num_pairs for one in adaptive_bins(margins)]
    assert len(sizes) == 5 and max(sizes) - min(sizes) <= 1
    starts, ends = zip(*((one.start, one.end) for one in adaptive_bins(margins)), strict=True)
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("number", [40, 400])
def test_what_a_calibrated_model_shows_by_chance(number: int) -> None:
    """The error of calibrated statements is what ``error_by_chance`` says, and that of overconfident ones is far above it.
    Mutations: a factor in the formula; prompts counted once for all bins."""
    rng = np.random.default_rng(5)
    found = [reliability_bins(simulated(rng, number)) for _ in range(150)]
    errors, expected = (np.mean([of(bins) for bins in found]) for of in (calibration_error, error_by_chance))
    assert errors == pytest.approx(expected, rel=0.1)
    sure = [reliability_bins(simulated(rng, number, sharper=4.0)) for _ in range(50)]
    assert np.mean([calibration_error(bins) for bins in sure]) > 2 * np.mean([error_by_chance(bins) for bins in sure])


def test_pairs_of_one_prompt_are_averaged_first() -> None:
    """Seed 1 has a prompt with three pairs, all right, and one that is wrong; seed 2 the first prompt, wrong. Mutations:
    pairs instead of prompts weigh alike; seeds weighed by their pairs; seeds whose prompts are told apart by seed."""
    pairs = {
        "1": held_out([AT_70, AT_70, AT_70, -AT_70], ["a", "a", "a", "b"]),
        "2": held_out([-AT_90], ["a"]) + held_out([AT_90], ["a"], view="empty"),
    }
    trace, empty = calibration_rows("dpo", pairs)
    assert [row.view for row in (trace, empty)] == ["trace", "empty"]
    assert (trace.num_pairs, trace.num_prompts, empty.num_pairs) == (5, 2, 1)
    assert trace.accuracy.by_seed == {"1": 0.5, "2": 0.0} and trace.accuracy.value == pytest.approx(0.25)
    assert trace.brier.value == pytest.approx(((0.09 + 0.49) / 2 + 0.81) / 2)
    assert trace.log_loss.num_seeds == 2 and trace.log_loss.seed_low is not None
    assert trace.ece == calibration_error(trace.bins) and trace.adaptive_ece == calibration_error(trace.adaptive_bins)
    (stated_70,) = [one for one in trace.bins if one.confidence == pytest.approx(0.7)]
    assert (stated_70.num_pairs, stated_70.num_prompts, stated_70.right) == (4, 2, 0.5)


def test_nothing_was_held_out() -> None:
    """Mutation: the field required, so that results of an earlier version cannot be made."""
    results = Results(
        experiment="e", seeds=(1,), baseline="dpo", level=0.95, methods=(), scores=(), differences=(), curves=(), drops={},
        stochasticity={}, versions={}, command="",
    )  # fmt: skip
    assert results.calibration == ()
    assert reliability_table(results)[1] == list(reliability_charts(results, ["dpo"])) == []
    assert calibration_rows("dpo", {}) == calibration_rows("dpo", {"1": []}) == []


def test_the_chart_has_its_numbers() -> None:
    """A line per method that has the view, and a table row for every point. Mutation: the views mixed up, or a method that
    was not asked for."""
    rng = np.random.default_rng(1)
    rows = [
        row
        for name in ("dpo", "mix", "other")
        for row in calibration_rows(
            name,
            {
                seed: held_out(simulated(rng, 60).tolist())
                + (held_out(simulated(rng, 30).tolist(), view="empty") if name == "mix" else [])
                for seed in ("1", "2")
            },
        )
    ]
    results = Results(
        experiment="e", seeds=(1, 2), baseline="dpo", level=0.95, methods=(), scores=(), differences=(), curves=(), drops={},
        calibration=tuple(rows), stochasticity={}, versions={}, command="",
    )  # fmt: skip
    trace, empty = reliability_charts(results, ["dpo", "mix"])
    assert [row[0] for row in trace.rows] == ["dpo"] * 5 + ["mix"] * 5
    assert [row[0] for row in empty.rows] == ["mix"] * 5 and "other" not in trace.svg
    assert sum(int(row[-2]) for row in empty.rows) == 60
    assert [row[:3] for row in reliability_table(results)[1]] == [
        ["dpo", "trace", "120"],
        ["mix", "trace", "120"],
        ["mix", "empty", "60"],
        ["other", "trace", "120"],
    ]
