"""Intervals that resample prompts, never rows: several samples of one prompt are not independent evidence.

In: one row of additive quantities per prompt (sums, counts, squares) and a statistic of their column sums, such as a ratio;
or one value per prompt, where a mean or a share is asked for. Out: an :class:`Interval`. Pure: the random generator is an
argument. What is summed, and which prompts take part, is the caller's business.

Legend: P prompts, D additive quantities, R resamples.

:func:`bootstrap_interval` is the bootstrap percentile interval with the quantiles widened to what a t-interval of P prompts
would take (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.2: the expanded percentile interval).
Of the plain percentile, BCa, expanded BCa and expanded percentile intervals it came nearest to its level for means and for
ratios of variances at 10 to 200 prompts; tests/unit/test_stats.py holds it to that. No interval is safe with a handful of
prompts and a heavy tail: for the mean of log-normal values over 20 prompts it covers 83 % instead of 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # column sums [R, D] -> values [R]

# Resamples in which the statistic is undefined (an empty denominator) are left out; with more of them there is no interval.
_MOST_UNDEFINED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its interval. ``low`` and ``high`` are ``None`` where there are too few prompts for one, ``value`` where
    it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    num_prompts: int


def bootstrap_interval(
    rows_PD: Floats,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The statistic over all prompts, and its interval over resamples of prompts."""
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number between 0 and 1")
    if rows_PD.ndim != 2:
        raise ValueError(f"rows: got {rows_PD.ndim} dimensions, expected one row per prompt")
    num_prompts = len(rows_PD)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(rows_PD.sum(axis=0)[None])[0]) if num_prompts else np.nan
        resampled_R = statistic(resampled_sums(rows_PD, rng, num_resamples)) if num_prompts > 1 else np.empty(0)
    defined_R = resampled_R[np.isfinite(resampled_R)]
    low = high = None
    if np.isfinite(value) and len(defined_R) and len(defined_R) >= (1 - _MOST_UNDEFINED) * num_resamples:
        tail = expanded_tail(level, num_prompts)
        low, high = (float(q) for q in np.quantile(defined_R, [tail, 1 - tail]))
    return Interval(
        value=float(value) if np.isfinite(value) else None, low=low, high=high, level=level, num_prompts=num_prompts
    )


def mean_interval(values_P: Floats, *, level: float = 0.95) -> Interval:
    """The mean of one value per prompt, with the t interval of their spread between prompts."""
    num_prompts = len(values_P)
    if not num_prompts:
        return Interval(value=None, low=None, high=None, level=level, num_prompts=0)
    value = float(values_P.mean())
    if num_prompts < 2:
        return Interval(value=value, low=None, high=None, level=level, num_prompts=num_prompts)
    half = t_quantile(level, num_prompts - 1) * float(values_P.std(ddof=1)) / float(np.sqrt(num_prompts))
    return Interval(value=value, low=value - half, high=value + half, level=level, num_prompts=num_prompts)


def share_interval(shares_P: Floats, num_samples: int, *, level: float = 0.95) -> Interval:
    """The mean of one share per prompt (of samples that are right, or cut, ...), with an interval that stays in [0, 1].

    It is Wilson's score interval with the effective number of samples: as many independent samples as would vary like this
    mean over prompts does (Korn and Graubard 1998, with t in place of z). Where nothing varies, because all shares are 0 or
    all are 1, each prompt counts as one sample: 50 right answers to 50 prompts still leave an accuracy of 0.93 possible.
    """
    plain = mean_interval(shares_P, level=level)
    if plain.value is None or plain.low is None:
        return plain
    share, num_prompts = min(max(plain.value, 0.0), 1.0), len(shares_P)
    spread, error = share * (1 - share), float(shares_P.var(ddof=1)) / num_prompts
    effective = float(num_prompts) if spread == 0 else min(spread / error, num_samples) if error > 0 else num_samples
    z = t_quantile(level, num_prompts - 1)
    centre = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * float(np.sqrt(spread / effective + z * z / (4 * effective * effective)))
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Interval(value=share, low=low, high=high, level=level, num_prompts=num_prompts)


def difference_interval(differences_P: Floats, *, bound: float | None = None, level: float = 0.95) -> Interval:
    """The mean of one paired difference per prompt: a t interval, as :func:`mean_interval`.

    ``bound`` is the largest difference that is possible (1 for what is right or wrong): the interval then rests on two more
    prompts, one at either bound (Bonett and Price 2012). Few prompts that differ are then not taken for proof that others
    do not, and where none differs the interval still has a width.
    """
    plain = mean_interval(differences_P, level=level)
    if bound is None or plain.low is None:
        return plain
    if np.abs(differences_P).max() > bound:
        raise ValueError(f"bound: got {bound}, but there are larger differences")
    wider = mean_interval(np.append(differences_P, [bound, -bound]), level=level)
    assert wider.low is not None and wider.high is not None
    return replace(plain, low=max(-bound, wider.low), high=min(bound, wider.high))


def t_quantile(level: float, degrees: int) -> float:
    """How many standard errors a two-sided interval of this level reaches to either side."""
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, expected a number between 0 and 1")
    return float(stdtrit(degrees, (1 + level) / 2))


def resampled_sums(rows_PD: Floats, rng: np.random.Generator, num_resamples: int) -> Floats:
    """Column sums ``[R, D]`` of ``num_resamples`` draws of P prompts with replacement."""
    num_prompts = len(rows_PD)
    sums_RD = np.empty((num_resamples, rows_PD.shape[1]))
    for resample in range(num_resamples):
        times_P = np.bincount(rng.integers(0, num_prompts, num_prompts), minlength=num_prompts)
        sums_RD[resample] = times_P @ rows_PD
    return sums_RD


def expanded_tail(level: float, num_prompts: int) -> float:
    """The share of resamples on either side of the interval.

    The percentile interval is too narrow by sqrt((P-1)/P), and uses the normal distribution where the t distribution with
    P - 1 degrees of freedom is due; both are put right in the quantile that is read off.
    """
    z = float(stdtrit(num_prompts - 1, (1 + level) / 2)) * np.sqrt(num_prompts / (num_prompts - 1))
    return float(ndtr(-z))


def mean(column: int, count: int) -> Statistic:
    """Sum of one column over the sum of another."""
    return lambda sums_RD: sums_RD[:, column] / sums_RD[:, count]


def ratio_of_means(above: tuple[int, int], below: tuple[int, int]) -> Statistic:
    """``mean(*above) / mean(*below)``."""
    top, bottom = mean(*above), mean(*below)
    return lambda sums_RD: top(sums_RD) / bottom(sums_RD)


def variance(count: int, total: int, squares: int) -> Statistic:
    """Unbiased variance of all values from their number, sum and sum of squares. Centre the values first: squares of large
    numbers lose the digits that matter."""

    def statistic(sums_RD: Floats) -> Floats:
        n, s, q = sums_RD[:, count], sums_RD[:, total], sums_RD[:, squares]
        n = np.where(n > 1, n, np.nan)
        return np.maximum(q - s * s / n, 0.0) / (n - 1)

    return statistic


def ratio(above: Statistic, below: Statistic) -> Statistic:
    """One statistic over another of the same resample."""
    return lambda sums_RD: above(sums_RD) / below(sums_RD)
