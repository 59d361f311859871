"""Intervals over prompts: they cover as often as they say, and they resample prompts, not rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bvpo.stats import (
    Interval,
    bootstrap_interval,
    expanded_tail,
    mean,
    ratio,
    ratio_of_means,
    resampled_sums,
    variance,
)

RATIO = ratio_of_means((0, 2), (1, 2))


def with_ones(*columns: np.ndarray) -> np.ndarray:
    return np.column_stack([*columns, np.ones(len(columns[0]))])


def coverage(draw: Callable[[np.random.Generator], np.ndarray], truth: float, statistic: object, times: int) -> float:
    """Share of simulated data sets whose interval holds the truth, at a fixed seed."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(times):
        found = bootstrap_interval(draw(rng), statistic, rng, num_resamples=200)  # type: ignore[arg-type]
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    return held / times


# Standard error of a coverage of 0.95 over 250 data sets: 0.014. The bounds are nearly three of them away.
NEAR = (0.912, 0.988)


@pytest.mark.parametrize("num_prompts", [10, 40])
def test_coverage_of_a_mean(num_prompts: int) -> None:
    """Mutation: tails of the plain percentile interval (covers 0.88 with 10 prompts), or 0.05 on each side."""
    share = coverage(lambda rng: with_ones(rng.normal(3, 1, num_prompts)), 3.0, mean(0, 1), 250)
    assert NEAR[0] <= share <= NEAR[1]


def test_coverage_of_a_ratio_of_variances() -> None:
    """What `bvpo analyze` does: five samples a prompt and view, variance within prompts, prompts of unequal spread.
    Mutation: resampling samples instead of prompts, or an interval for the mean of ratios."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        spread = rng.lognormal(0, 0.5, (30, 1))
        trace, empty = 3 * spread * rng.normal(size=(30, 5)), spread * rng.normal(size=(30, 5))
        return with_ones(trace.var(axis=1, ddof=1), empty.var(axis=1, ddof=1))

    share = coverage(draw, 9.0, RATIO, 250)
    assert NEAR[0] <= share <= NEAR[1]


def test_prompts_are_resampled_not_rows() -> None:
    """Ten samples share their prompt's effect. Taking each for a prompt of its own covers far too rarely; mutation: doing
    that in the library (one row per sample)."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(20, 1)) + 0.3 * rng.normal(size=(20, 10))

    def clustered(rng: np.random.Generator) -> np.ndarray:
        return np.column_stack([draw(rng).sum(axis=1), np.full(20, 10.0)])

    def by_row(rng: np.random.Generator) -> np.ndarray:
        return with_ones(draw(rng).ravel())

    assert coverage(clustered, 0.0, mean(0, 1), 200) >= NEAR[0]
    assert coverage(by_row, 0.0, mean(0, 1), 200) < 0.6


def test_tails_by_hand() -> None:
    """t with 9 degrees of freedom at 0.975 is 2.2622; times sqrt(10/9) it is 2.3846, beyond which 0.85 % of a normal
    distribution lies. Mutation: P instead of P - 1 degrees of freedom, or no factor."""
    assert expanded_tail(0.95, 10) == pytest.approx(0.00855, abs=2e-5)
    assert expanded_tail(0.95, 10**6) == pytest.approx(0.025, abs=1e-5)


rows = hnp.arrays(np.float64, st.tuples(st.integers(2, 12), st.just(3)), elements=st.floats(0.5, 100.0))


@given(rows, st.floats(0.01, 100.0), st.integers(0, 2**31))
def test_ratios_ignore_the_unit(data: np.ndarray, factor: float, seed: int) -> None:
    """The same prompts in other units: the same ratio and interval. Mutation: a constant added to a denominator."""
    one = bootstrap_interval(data, RATIO, np.random.default_rng(seed), num_resamples=50)
    scaled = bootstrap_interval(
        data * [factor, factor, 1.0], RATIO, np.random.default_rng(seed), num_resamples=50
    )  # both views in another unit
    assert one.value is not None and one.low is not None and one.high is not None
    assert one.low <= one.high
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx((one.value, one.low, one.high))
    assert one.value == pytest.approx(data[:, 0].sum() / data[:, 1].sum())


@given(rows, st.integers(0, 2**31))
def test_more_confidence_is_wider(data: np.ndarray, seed: int) -> None:
    """Mutation: the level not used, or used for one tail only."""
    wide, narrow = (
        bootstrap_interval(data, RATIO, np.random.default_rng(seed), num_resamples=200, level=level)
        for level in (0.99, 0.5)
    )
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_the_generator_decides() -> None:
    """Mutation: a generator of the module's own."""
    data = with_ones(np.arange(10.0))
    first, again, other = (
        bootstrap_interval(data, mean(0, 1), np.random.default_rng(seed), num_resamples=100) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_resamples_have_as_many_prompts() -> None:
    """Mutation: drawing without replacement (every sum equal), or another number of prompts."""
    sums = resampled_sums(with_ones(np.arange(6.0)), np.random.default_rng(0), 200)
    assert set(sums[:, 1]) == {6.0}
    assert len(set(sums[:, 0])) > 10


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (np.empty((0, 2)), (None, None, None)),
        (np.array([[3.0, 1.0]]), (3.0, None, None)),
        (np.array([[3.0, 0.0], [2.0, 0.0]]), (None, None, None)),
        (np.array([[2.0, 1.0]] * 5), (2.0, 2.0, 2.0)),
        # most resamples miss the only prompt with a denominator
        (np.array([[2.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), (5.0, None, None)),
    ],
)
def test_what_cannot_be_said_is_none(data: np.ndarray, expected: tuple[float | None, ...]) -> None:
    """Mutation: NaN, infinity or a made-up interval where there are too few prompts."""
    found = bootstrap_interval(data, mean(0, 1), np.random.default_rng(0), num_resamples=100)
    assert (found.value, found.low, found.high) == expected
    assert isinstance(found, Interval) and found.num_prompts == len(data)


@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3)))
def test_variance_is_numpys(values: np.ndarray) -> None:
    """Mutation: dividing by n, or forgetting the square of the mean."""
    sums = np.array([[len(values), values.sum(), (values**2).sum()]])
    assert variance(0, 1, 2)(sums)[0] == pytest.approx(values.var(ddof=1), abs=1e-6)


def test_statistics_by_hand() -> None:
    """Mutation: numerator and denominator exchanged."""
    sums = np.array([[6.0, 3.0, 2.0]])
    assert mean(0, 2)(sums)[0] == 3.0
    assert RATIO(sums)[0] == ratio(mean(0, 2), mean(1, 2))(sums)[0] == 2.0
    assert np.isnan(variance(0, 1, 2)(np.array([[1.0, 5.0, 25.0]]))[0])


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_share(level: float) -> None:
    """Mutation: 95 taken for 95 %."""
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(np.ones((3, 2)), mean(0, 1), np.random.default_rng(0), level=level)
