"""The closed forms of bvpo.method.estimators on random joint distributions of two gradients, with hypothesis."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.method import estimators
from bvpo.method.estimators import Moments

GRID = np.linspace(0, 1, 401)


def sample(seed: int, *, shift: float = 1.0, num: int = 6, size: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``num`` equally likely values of (g_t, g_e), each [num, size], and mu [size]."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(num, size))  # correlates the views
    trace = shift * rng.normal(size=size) + common + rng.normal(size=(num, size)) * rng.uniform(0, 3)
    empty = shift * rng.normal(size=size) + common * rng.uniform(-1, 1) + rng.normal(size=(num, size))
    return trace, empty, rng.normal(size=size)


def moments_of(trace: np.ndarray, empty: np.ndarray, mu: np.ndarray) -> Moments:
    b_t, b_e = trace.mean(0) - mu, empty.mean(0) - mu
    around_t, around_e = trace - trace.mean(0), empty - empty.mean(0)
    return Moments(
        bias_trace_sq=b_t @ b_t,
        bias_empty_sq=b_e @ b_e,
        bias_dot=b_t @ b_e,
        var_trace=(around_t**2).sum(1).mean(),
        var_empty=(around_e**2).sum(1).mean(),
        cov=(around_t * around_e).sum(1).mean(),
    )


seeds = st.integers(0, 10**6)
etas = st.floats(0.01, 4)


@given(seeds, st.floats(0, 1))
def test_mse_is_the_mean_squared_error(seed, alpha):
    """Bias and variance from their definitions, and both together. Mutation: a cross term without its 2, or with the
    other view's weight."""
    trace, empty, mu = sample(seed)
    m = moments_of(trace, empty, mu)
    mixed = alpha * trace + (1 - alpha) * empty
    assert estimators.mse(m, alpha) == pytest.approx(((mixed - mu) ** 2).sum(1).mean(), rel=1e-9)
    assert estimators.bias_sq(m, alpha) == pytest.approx(((mixed.mean(0) - mu) ** 2).sum(), rel=1e-9, abs=1e-12)
    assert estimators.variance(m, alpha) == pytest.approx(mixed.var(0).sum(), rel=1e-9)
    assert m.gap_sq == pytest.approx(((trace - empty) ** 2).sum(1).mean(), rel=1e-9)


@given(seeds, etas)
def test_optima_are_minima(seed, eta_l):
    """No alpha of a fine grid is better; the regret says so. Mutation: eta L on one side of the fraction only; no clip."""
    m = moments_of(*sample(seed))
    best = estimators.alpha_star_step(m, eta_l=eta_l)
    assert 0 <= best <= 1
    floor = estimators.step_term(m, best, eta_l=eta_l)
    assert (estimators.step_term(m, GRID, eta_l=eta_l) >= floor * (1 - 1e-12)).all()
    assert estimators.step_regret(m, best, eta_l=eta_l) == pytest.approx(1, rel=1e-12)
    assert estimators.step_regret(m, 0.5, eta_l=eta_l) >= 1 - 1e-12
    assert estimators.alpha_star_step(m, eta_l=1.0) == estimators.alpha_star(m)
    assert estimators.error_floor(m) <= min(estimators.mse(m, 0.0), estimators.mse(m, 1.0))


@given(seeds, st.integers(1, 4096), etas)
def test_batch_over_eta_l(seed, batch, eta_l):
    """A batch of B at eta L asks for the alpha of a batch of B / eta L. Mutation: covariances times the batch."""
    m = moments_of(*sample(seed))
    same = estimators.alpha_star(m.at_batch(batch / eta_l))
    assert estimators.alpha_star_step(m.at_batch(batch), eta_l=eta_l) == pytest.approx(same, abs=1e-12)


@given(seeds, st.floats(1e-3, 1e3))
def test_scale_law(seed, scale):
    """Gradients c times as large (a loss times c): errors times c^2, the same alpha. Mutation: mixed units in a fraction."""
    trace, empty, mu = sample(seed)
    m, scaled = moments_of(trace, empty, mu), moments_of(scale * trace, scale * empty, scale * mu)
    assert estimators.alpha_star(scaled) == pytest.approx(estimators.alpha_star(m), abs=1e-9)
    assert estimators.mse(scaled, 0.3) == pytest.approx(scale**2 * estimators.mse(m, 0.3), rel=1e-9)


@given(seeds)
def test_views_exchanged(seed):
    """With the views exchanged, 1 - alpha. Mutation: a formula that favours a view."""
    trace, empty, mu = sample(seed)
    straight, crossed = moments_of(trace, empty, mu), moments_of(empty, trace, mu)
    assert estimators.alpha_star(crossed) == pytest.approx(1 - estimators.alpha_star(straight), abs=1e-9)


@given(seeds)
def test_limits(seed):
    """Large batches leave the biases, tiny ones the noise; an unbiased trace view then gets all the weight.
    Mutation: biases that shrink with the batch."""
    trace, empty, mu = sample(seed)
    m = moments_of(trace, empty, mu)
    b_t, b_e = trace.mean(0) - mu, empty.mean(0) - mu
    only_bias = np.clip((b_e @ b_e - b_t @ b_e) / ((b_t - b_e) ** 2).sum(), 0, 1)
    assert estimators.alpha_star(m.at_batch(1e15)) == pytest.approx(only_bias, abs=1e-6)
    gap_var = (trace - empty).var(0).sum()
    only_noise = np.clip((m.var_empty - m.cov) / gap_var, 0, 1)
    assert estimators.alpha_star(m.at_batch(1e-15)) == pytest.approx(only_noise, abs=1e-6)
    unbiased = moments_of(trace - b_t, empty, mu)
    assert estimators.alpha_star(unbiased.at_batch(1e15)) == pytest.approx(1, abs=1e-6)


@given(seeds)
@settings(max_examples=30)
def test_best_rescaled(seed):
    """The smallest error over scales, by a search. Mutation: |E g|^2 where E|g|^2 belongs."""
    trace, _, mu = sample(seed)
    mean, var = trace.mean(0), trace.var(0).sum()
    found = estimators.best_rescaled(mu @ mu, mean @ mean, mean @ mu, var)
    scales = np.linspace(-3, 3, 6001)
    errors = ((scales[:, None] * mean - mu) ** 2).sum(1) + scales**2 * var
    assert found == pytest.approx(errors.min(), rel=1e-4, abs=1e-6)
    assert found <= mu @ mu


def test_nothing_to_choose():
    """g_t = g_e: any alpha is as good; the paper's is named. Mutation: 0 / 0."""
    same = Moments(bias_trace_sq=1.0, bias_empty_sq=1.0, bias_dot=1.0, var_trace=2.0, var_empty=2.0, cov=2.0)
    assert same.gap_sq == 0
    assert estimators.alpha_star(same) == estimators.UNDETERMINED == 0.5
    assert estimators.regret(same, 0.9) == 1
    exact = Moments(bias_trace_sq=0.0, bias_empty_sq=1.0, bias_dot=0.0, var_trace=0.0, var_empty=0.0, cov=0.0)
    assert estimators.alpha_star(exact) == 1 and estimators.regret(exact, 0.5) == math.inf
    assert astuple(exact.at_batch(7)) == astuple(exact)
