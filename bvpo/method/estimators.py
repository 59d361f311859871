"""Bias, variance and mean squared error of the mixed gradient, and the mixing weights that minimise them, in closed form.

In: six numbers about the two views' gradients (:class:`Moments`), exact or estimated. Out: the error of
g_c = alpha * g_t + (1 - alpha) * g_e  as an estimate of mu, the gradient of the marginal loss, at any alpha, and the alpha
that is best (BVPO, arXiv 2510.05095, Theorems 2 to 4). Plain arithmetic on floats; alpha may also be an array. How the
numbers are measured is no concern of this module: bvpo.lab enumerates them, bvpo.method.online_alpha estimates them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Weight = TypeVar("Weight", float, npt.NDArray[np.float64])

UNDETERMINED = 0.5
"""What the optima return where the error does not depend on alpha (g_t = g_e): the paper's own weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """First and second moments of the views' gradients g_t (trace) and g_e (empty) around mu.

    Biases: b_t = E g_t - mu and b_e = E g_e - mu, here as squared norms and inner product. Covariances, as traces: S_t of
    g_t, S_e of g_e and S_te between the two. The covariances are those of the *batch mean* and so depend on its size.
    """

    bias_trace_sq: float
    bias_empty_sq: float
    bias_dot: float
    var_trace: float
    var_empty: float
    cov: float

    def at_batch(self, size: float) -> Moments:
        """From one quad to the mean of ``size`` independent quads: covariances shrink, biases stay."""
        assert size > 0, f"batch size {size}"
        return self.scale_covariances(1 / size)

    def scale_covariances(self, factor: float) -> Moments:
        """Every covariance term times ``factor``."""
        return replace(
            self, var_trace=factor * self.var_trace, var_empty=factor * self.var_empty, cov=factor * self.cov
        )

    @property
    def gap_sq(self) -> float:
        """E|g_t - g_e|^2 = |b_t - b_e|^2 + Var(g_t - g_e)."""
        bias = self.bias_trace_sq + self.bias_empty_sq - 2 * self.bias_dot
        return bias + self.var_trace + self.var_empty - 2 * self.cov


def bias_sq(moments: Moments, alpha: Weight) -> Weight:
    """|E g_c - mu|^2."""
    rest = 1 - alpha
    return (
        alpha**2 * moments.bias_trace_sq + rest**2 * moments.bias_empty_sq + 2 * alpha * rest * moments.bias_dot
    )  # fmt: skip


def variance(moments: Moments, alpha: Weight) -> Weight:
    """tr Cov(g_c)."""
    rest = 1 - alpha
    return alpha**2 * moments.var_trace + rest**2 * moments.var_empty + 2 * alpha * rest * moments.cov


def mse(moments: Moments, alpha: Weight) -> Weight:
    """E|g_c - mu|^2, bias and variance together."""
    return bias_sq(moments, alpha) + variance(moments, alpha)


def step_term(moments: Moments, alpha: Weight, *, eta_l: float) -> Weight:
    """|Bias|^2 + eta L Var: what one SGD step of size eta adds to the bound of Theorem 3; the MSE at eta L = 1."""
    return bias_sq(moments, alpha) + eta_l * variance(moments, alpha)


def alpha_star_unclipped(moments: Moments) -> float:
    """The minimum of the MSE over all real alpha. BVPO Theorem 2, before its clip; ``UNDETERMINED`` if there is none."""
    gap = moments.gap_sq
    if not gap > 0:
        return UNDETERMINED
    return (moments.var_empty - moments.cov + moments.bias_empty_sq - moments.bias_dot) / gap


def alpha_star(moments: Moments) -> float:
    """The minimum of the MSE in [0, 1]. BVPO Theorem 2."""
    return _clip(alpha_star_unclipped(moments))


def alpha_star_step(moments: Moments, *, eta_l: float) -> float:
    """The minimum of :func:`step_term` in [0, 1]: Theorem 2 with every covariance, above and below, times ``eta_l``.

    At eta_l = 1 it is :func:`alpha_star` (BVPO Theorem 4). A batch of B quads at eta L asks for the alpha of a batch of
    B / (eta L) quads: small steps average the noise away by themselves and leave the bias.
    """
    assert eta_l >= 0, f"eta L {eta_l}"
    return alpha_star(moments.scale_covariances(eta_l))


def error_floor(moments: Moments) -> float:
    """The smallest MSE of any mixture with alpha in [0, 1]."""
    return mse(moments, alpha_star(moments))


def regret(moments: Moments, alpha: float) -> float:
    """MSE at ``alpha`` over the smallest one, 1 or more; infinite where the smallest is 0 and this is not."""
    value, floor = mse(moments, alpha), error_floor(moments)
    if floor > 0:
        return value / floor
    return 1.0 if value <= 0 else math.inf


def step_regret(moments: Moments, alpha: float, *, eta_l: float) -> float:
    """:func:`regret` for :func:`step_term`: what ``alpha`` costs beyond the per-step optimum at this eta L."""
    return regret(moments.scale_covariances(eta_l), alpha)


def best_rescaled(target_sq: float, mean_sq: float, mean_dot_target: float, var: float) -> float:
    """min over c of E|c g - mu|^2 for an estimator g of mu: its error once the learning rate has set its scale.

    ``target_sq`` = |mu|^2, ``mean_sq`` = |E g|^2, ``mean_dot_target`` = E g . mu, ``var`` = tr Cov(g). The minimum is
    |mu|^2 - (E g . mu)^2 / E|g|^2.
    """
    second = mean_sq + var
    return target_sq if not second > 0 else target_sq - mean_dot_target**2 / second


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
