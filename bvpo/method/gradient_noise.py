"""Noise and signal of the two views' gradients over a sample of quads, the alpha they ask for, and what it would gain.

In: one gradient (or sketch) per quad and view, and which prompt each quad belongs to. Out: intervals that resample prompts
(:mod:`bvpo.stats`). All of it takes the trace view for unbiased, as ``alpha = "auto"`` does, so it speaks of a policy
at or near its reference. Pure; where the gradients come from is bvpo.training.probe.analysis's business.

Legend: Q quads, P prompts, S sketch entries, R resamples; t trace view, e empty view. ``V`` is a variance (trace of the
covariance) of one quad's gradient, ``U`` an inner product of expected gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bvpo.stats import Interval, Statistic, bootstrap_interval

Floats = npt.NDArray[np.float64]

# Columns of a prompt's row: numbers of quads and their square, products summed over quads, and products of the prompt's
# sums; then those sums themselves, S entries of each view.
_NUM, _NUM_SQ, _TT, _EE, _TE, _SUM_TT, _SUM_EE, _SUM_TE, _WITHIN, _WITHIN_NUM = range(10)
_HEAD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AtBatch:
    """At one number of quads per step: the alpha with the smallest mean squared error of the gradient, that error and the
    one of alpha 0.5, both over the error of the trace view alone (alpha 1)."""

    quads_per_step: int
    alpha: Interval
    error: Interval
    error_half: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNoise:
    """``noise_*``: V / U, the number of quads whose mean gradient is as much noise as signal. ``noise_ratio``: V_t / V_e.
    ``same_prompt``: share of V_t between pairs of one prompt, where prompts have several."""

    num_quads: int
    num_prompts: int
    noise_trace: Interval
    noise_empty: Interval
    noise_ratio: Interval
    cosine: Interval
    same_prompt: Interval | None
    batches: tuple[AtBatch, ...]


def analyze(
    trace_QS: Floats,
    empty_QS: Floats,
    prompts: Sequence[str],
    batches: Sequence[int],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> GradientNoise:
    """Everything about a sample of quads; ``prompts`` names each quad's prompt."""
    rows_PD = prompt_rows(trace_QS, empty_QS, prompts)

    def interval(statistic: Callable[[_Moments], Floats]) -> Interval:
        return _interval(rows_PD, statistic, seed, num_resamples, level)

    several = rows_PD[:, _WITHIN_NUM].sum() > 0
    return GradientNoise(
        num_quads=len(trace_QS),
        num_prompts=len(rows_PD),
        noise_trace=interval(lambda m: _over(m.v_t, m.u_tt)),
        noise_empty=interval(lambda m: _over(m.v_e, m.u_ee)),
        noise_ratio=interval(lambda m: _over(m.v_t, m.v_e)),
        cosine=interval(lambda m: np.clip(m.u_te / np.sqrt(_positive(m.u_tt) * _positive(m.u_ee)), -1, 1)),
        same_prompt=interval(lambda m: np.minimum(_over(m.within, m.v_t), 1)) if several else None,
        batches=tuple(
            AtBatch(
                quads_per_step=size,
                alpha=interval(lambda m, size=size: m.alpha(size)),
                error=interval(lambda m, size=size: m.error(size, m.alpha(size))),
                error_half=interval(lambda m, size=size: m.error(size, 0.5)),
            )
            for size in batches
        ),
    )


def prompt_rows(trace_QS: Floats, empty_QS: Floats, prompts: Sequence[str]) -> Floats:
    """One row of additive quantities per prompt, in the order of their first quads."""
    order = {name: p for p, name in enumerate(dict.fromkeys(prompts))}
    of_Q = np.array([order[name] for name in prompts])
    num = len(order)

    def summed(values: Floats) -> Floats:
        total = np.zeros((num, *values.shape[1:]))
        np.add.at(total, of_Q, values)
        return total

    t_PS, e_PS, count = summed(trace_QS), summed(empty_QS), summed(np.ones(len(of_Q)))
    squares = summed((trace_QS**2).sum(1))
    head = [
        count,
        count**2,
        squares,
        summed((empty_QS**2).sum(1)),
        summed((trace_QS * empty_QS).sum(1)),
        (t_PS**2).sum(1),
        (e_PS**2).sum(1),
        (t_PS * e_PS).sum(1),
        squares - (t_PS**2).sum(1) / count,
        count - 1,
    ]
    return np.concatenate([np.stack(head, axis=1), t_PS, e_PS], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Moments:
    """All [R]. Means over quads, and over pairs of quads with different prompts."""

    u_tt: Floats
    u_ee: Floats
    u_te: Floats
    v_t: Floats
    v_e: Floats
    v_te: Floats
    within: Floats

    @classmethod
    def of(cls, sums_RD: Floats, repeats: float) -> _Moments:
        """``repeats``: 1 for the sample itself; 2 for resamples, in which a prompt meets itself as another (see
        :func:`_interval`)."""
        width = (sums_RD.shape[1] - _HEAD) // 2
        t_RS, e_RS = sums_RD[:, _HEAD : _HEAD + width], sums_RD[:, _HEAD + width :]
        num = sums_RD[:, _NUM]
        pairs = num**2 - repeats * sums_RD[:, _NUM_SQ]
        pairs = np.where(pairs > 0, pairs, np.nan)

        def other(a_RS: Floats, b_RS: Floats, own: int) -> Floats:
            return ((a_RS * b_RS).sum(1) - repeats * sums_RD[:, own]) / pairs

        u_tt, u_ee, u_te = other(t_RS, t_RS, _SUM_TT), other(e_RS, e_RS, _SUM_EE), other(t_RS, e_RS, _SUM_TE)
        return cls(
            u_tt=u_tt,
            u_ee=u_ee,
            u_te=u_te,
            v_t=sums_RD[:, _TT] / num - u_tt,
            v_e=sums_RD[:, _EE] / num - u_ee,
            v_te=sums_RD[:, _TE] / num - u_te,
            within=sums_RD[:, _WITHIN] / np.where(sums_RD[:, _WITHIN_NUM] > 0, sums_RD[:, _WITHIN_NUM], np.nan),
        )

    def _parts(self, size: float) -> tuple[Floats, Floats]:
        """(v_t - v_te, E|g_t - g_e|^2) of a step's mean gradients. BVPO Theorem 2 at b_t = 0."""
        distance = np.maximum(self.u_tt + self.u_ee - 2 * self.u_te, 0)
        return (self.v_t - self.v_te) / size, distance + (self.v_t + self.v_e - 2 * self.v_te) / size

    def alpha(self, size: float) -> Floats:
        excess, gap = self._parts(size)
        return 1 - np.clip(excess / gap, 0, 1)

    def error(self, size: float, alpha: Floats | float) -> Floats:
        """MSE(alpha) / MSE(1), from  g_c - mu = (g_t - mu) - (1 - alpha) (g_t - g_e)."""
        excess, gap = self._parts(size)
        rest = 1 - alpha
        return 1 - (2 * rest * excess - rest**2 * gap) / (self.v_t / size)


def _interval(
    rows_PD: Floats, statistic: Callable[[_Moments], Floats], seed: int, num_resamples: int, level: float
) -> Interval:
    """Products of different prompts' gradients are what is unbiased. In a resample a prompt meets copies of itself, which
    adds its own square once more in expectation: there it is taken off twice, or intervals would lie too high."""
    generator = np.random.default_rng(seed)

    def of(repeats: float) -> Statistic:
        return lambda sums_RD: statistic(_Moments.of(sums_RD, repeats))

    found = bootstrap_interval(rows_PD, of(2.0), generator, num_resamples=num_resamples, level=level)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of(1.0)(rows_PD.sum(axis=0)[None])[0])
    return replace(found, value=value if np.isfinite(value) else None)


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, np.nan)


def _over(above: Floats, below: Floats) -> Floats:
    """A ratio of two quantities that are positive; undefined where the estimate of the lower one is not."""
    return above / _positive(below)
