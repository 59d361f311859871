"""The mixing weight estimated from gradients: a positive-part James-Stein rule on a few quads' gradients per look.

In: one gradient (or a sketch of it) per quad and view, now and then during training. Out: what the two views' noise and
signal are, and alpha = clip(1 - (v_t - v_te) / E|g_t - g_e|^2), which is BVPO's Theorem 2 (arXiv 2510.05095) where the trace
view is unbiased. The true gradient is never needed for that; the price is the assumption b_t = 0, which holds near the
reference only, so the drift from it is watched. Pure: how gradients are taken is bvpo.training.probe.telemetry's business.

Legend: G groups of quads, S sketch entries, t trace view, e empty view; v are traces of covariances of the view's *mean*
gradient over one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bvpo.method.estimators import Moments, alpha_star

Floats = npt.NDArray[np.float64]

PREFIX = "noise/"
_NAMES = ("trace", "empty", "covariance", "trace_signal", "empty_signal", "distance")
"""Ingredients of a look with both views, by the names of the log (docs/training.md)."""

DECAY = 0.9
"""Weight of the looks so far when a new one comes (tests/theory/test_auto_alpha.py: without memory alpha is useless)."""
LEAST_LOOKS, LEAST_QUADS = 4, 64
"""Looks, and quads in them, before the estimate replaces the starting value."""
MOST_DRIFT, MOST_REWARD_DRIFT = 3.0, 0.3
"""Mean |log-ratio to the reference| of a trace-view response, in nats and times beta, beyond which b_t = 0 is not believed.
Within both, the rule's error was at most 1.09 times the smallest one in every enumerated world (docs/auto-alpha.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPairs:
    """Pairs of one optimizer step: with a trace pair, with an empty pair, with both. Expected values, so not integers."""

    trace: float
    empty: float
    both: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Inner products of two views' gradients of one quad: ``same``, E[a . b] within a quad, and ``other``, E[a] . E[b],
    estimated without bias from different quads (and so negative at times where it is small)."""

    same: float
    other: float

    @property
    def covariance(self) -> float:
        """tr Cov(a, b) of one quad's gradients."""
        return self.same - self.other


def products(a_GS: Floats, b_GS: Floats, *, quads_per_group: int = 1) -> Products:
    """From group means: each row is the mean gradient over ``quads_per_group`` quads, and rows share no quad."""
    num = len(a_GS)
    assert num == len(b_GS) and num >= 2, f"{num} and {len(b_GS)} groups, expected the same number, 2 or more"
    own = float(np.einsum("gs,gs->", a_GS, b_GS))
    every = float(a_GS.sum(0) @ b_GS.sum(0))
    other = (every - own) / (num * (num - 1))
    # a group's covariance is a quad's over the number of its quads
    return Products(same=other + quads_per_group * (own / num - other), other=other)


def ingredients(
    trace: Products | None, empty: Products | None, between: Products | None, pairs: StepPairs
) -> dict[str, float]:
    """What a look says about the step's mean gradients, by the names of the log; a view that is not there is left out."""
    found: dict[str, float] = {}
    for view, one, count in (("trace", trace, pairs.trace), ("empty", empty, pairs.empty)):
        if one is not None and count:
            found |= {f"{PREFIX}{view}": one.covariance / count, f"{PREFIX}{view}_signal": one.other}
    if between is not None and trace is not None and empty is not None and pairs.both:
        found[f"{PREFIX}covariance"] = between.covariance * pairs.both / (pairs.trace * pairs.empty)
        found[f"{PREFIX}distance"] = trace.other + empty.other - 2 * between.other
    return found


def james_stein(values: Mapping[str, float]) -> float:
    """alpha from (averaged) ingredients, without their prefix. BVPO Theorem 2 at b_t = 0, where 1 - alpha is the share of
    E|g_t - g_e|^2 that the trace view's own noise is.

    The distance of the views' expected gradients is the empty view's bias then; an estimate below 0 counts as 0.
    """
    moments = Moments(
        bias_trace_sq=0.0,
        bias_empty_sq=max(0.0, values["distance"]),
        bias_dot=0.0,
        var_trace=values["trace"],
        var_empty=values["empty"],
        cov=values["covariance"],
    )
    return alpha_star(moments)


def cosine(values: Mapping[str, float]) -> float | None:
    """Cosine between the views' expected gradients; None where noise hides one of them."""
    trace, empty = values["trace_signal"], values["empty_signal"]
    if not (trace > 0 and empty > 0):
        return None
    between = (trace + empty - values["distance"]) / 2
    return min(1.0, max(-1.0, between / math.sqrt(trace * empty)))


def is_far(drift: float, beta: float) -> bool:
    """Whether a policy with this mean |log-ratio| is outside of the reference's neighbourhood."""
    return drift > MOST_DRIFT or beta * drift > MOST_REWARD_DRIFT


def doubt_of_sampling(sampling: Mapping[str, Any]) -> str | None:
    """Why traces sampled with these settings (``temperature``, ``top_p``, ``top_k``) make the trace view biased even at the
    reference; None where they do not, or nothing is known."""
    usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    other = [f"{name} {sampling[name]:g}" for name, value in usual.items() if sampling.get(name, value) != value]
    if not other:
        return None
    return (
        f"the traces were sampled with {', '.join(other)}: the trace view is a little biased even at the reference, and "
        "alpha comes out a little off"
    )


class OnlineAlpha:
    """Alpha estimated from all looks so far, younger ones counting more; a :class:`bvpo.method.mixing.AlphaSource`.

    ``value`` is ``start`` until enough quads have been seen, and again where the policy has left the reference's
    neighbourhood. ``state`` and ``restore`` carry it over an interruption without a bit of difference.
    """

    def __init__(self, start: float, beta: float) -> None:
        self.start = start
        self._beta = beta
        self._weight = 0.0  # sum of decayed weights; a look weighs as much as it has quads
        self._looks = self._quads = 0.0
        self._sums = dict.fromkeys(_NAMES, 0.0)
        self._drift = 0.0

    def observe(self, ingredients: Mapping[str, float]) -> None:
        """One look, by the names of the log. A look without both views tells nothing about alpha and is passed over."""
        if f"{PREFIX}distance" not in ingredients:
            return
        quads = ingredients[f"{PREFIX}quads"]
        self._weight = DECAY * self._weight + quads
        self._looks += 1
        self._quads += quads
        for name in _NAMES:
            self._sums[name] = DECAY * self._sums[name] + quads * ingredients[f"{PREFIX}{name}"]
        self._drift = DECAY * self._drift + quads * ingredients.get(f"{PREFIX}drift", 0.0)

    @property
    def averages(self) -> dict[str, float] | None:
        """The looks' decayed averages, without prefix; None before the first."""
        if not self._weight:
            return None
        return {name: total / self._weight for name, total in self._sums.items()}

    @property
    def estimate(self) -> float | None:
        """The rule's alpha, whether or not it is to be trusted yet; None before the first look."""
        averages = self.averages
        return None if averages is None else james_stein(averages)

    @property
    def drift(self) -> float:
        """Decayed average of the looks' drift from the reference."""
        return self._drift / self._weight if self._weight else 0.0

    @property
    def has_seen_enough(self) -> bool:
        """Whether the estimate rests on enough quads to be used."""
        return self._looks >= LEAST_LOOKS and self._quads >= LEAST_QUADS

    @property
    def has_drifted(self) -> bool:
        """Whether the trace view's bias can no longer be taken for zero."""
        return is_far(self.drift, self._beta)

    def value(self, progress: float) -> float:
        """Alpha for the next step; ``progress`` plays no part."""
        estimate = self.estimate
        if estimate is None or not self.has_seen_enough or self.has_drifted:
            return self.start
        return estimate

    def state(self) -> dict[str, float]:
        """Everything that was learned, as plain numbers."""
        own = {"weight": self._weight, "looks": self._looks, "quads": self._quads, "drift": self._drift}
        return own | self._sums

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on from :meth:`state`; an empty mapping starts anew."""
        names = ("weight", "looks", "quads", "drift")
        self._weight, self._looks, self._quads, self._drift = (state.get(name, 0.0) for name in names)
        self._sums = {name: state.get(name, 0.0) for name in _NAMES}
