"""The laboratory's checks hold on the shipped code, and each of them fails when what it guards is broken."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bvpo.lab import bias, descent, theorems
from bvpo.lab.exact import Estimate
from bvpo.lab.policies import Tabular
from bvpo.lab.worlds import Sampling
from bvpo.method import estimators
from bvpo.method.losses import LOSSES


@pytest.fixture(scope="module")
def cases() -> list[theorems.Case]:
    return theorems.state_moments(0, quick=True)


@pytest.fixture(scope="module")
def single() -> list[descent.Measured]:
    """The runs in which one term decides; their bounds are computed anew whenever they are asked for."""
    return [descent.measure(cell) for cell in descent.one_term(0)]


def test_theorem_2_sees_a_wrong_closed_form(monkeypatch, cases):
    """Mutation (made here): the cross term of the biases, or the cross-covariance, left out."""
    assert theorems.theorem_2(0, quick=True).holds and theorems.theorem_2_in_full_worlds(cases).holds
    honest = estimators.alpha_star
    for field in ("bias_dot", "cov"):
        monkeypatch.setattr(estimators, "alpha_star", lambda m, f=field: honest(replace(m, **{f: 0.0})))
        assert not theorems.theorem_2_in_full_worlds(cases).holds, field
    assert not theorems.theorem_2(0, quick=True).holds


def test_corollary_1(cases, monkeypatch):
    """Mutation (made here): alpha* is the other view's weight, or ignores how the views' noise goes together."""
    assert all(verdict.holds for verdict in theorems.corollary_1(cases))
    honest = estimators.alpha_star_unclipped
    monkeypatch.setattr(estimators, "alpha_star_unclipped", lambda m: 1 - honest(m))
    broken = {verdict.key: verdict.holds for verdict in theorems.corollary_1(cases)}
    assert not any(holds for key, holds in broken.items()), broken


def test_proposition_1_sees_a_wrong_part(monkeypatch):
    """Mutation (made here): a bias of 0; a variance that is linear in alpha."""
    assert theorems.proposition_1(0).holds
    for part, broken in (("bias_sq", lambda m, a: 0.0), ("variance", lambda m, a: m.var_trace * a)):
        with monkeypatch.context() as patch:
            patch.setattr(estimators, part, broken)
            assert not theorems.proposition_1(0).holds, part


def test_theorem_1_over_data_sees_noise_of_the_traces_forgotten(monkeypatch):
    """Mutation (made here): what random traces contribute is left out of the split."""
    assert theorems.theorem_1_over_data(0).holds
    monkeypatch.setattr(Estimate, "variance_given_data", 0.0)
    assert not theorems.theorem_1_over_data(0).holds


def test_boundary_worlds_see_a_missing_clip(monkeypatch):
    """Mutation (made here): alpha* without its clip."""
    assert theorems.boundary_cases().holds
    monkeypatch.setattr(estimators, "alpha_star", estimators.alpha_star_unclipped)
    assert not theorems.boundary_cases().holds


def test_theorem_4_sees_eta_l_ignored(monkeypatch, cases):
    """Mutation (made here): the per-step optimum is the MSE's at every eta L, or that of 1 / (eta L); alpha* is the optimum
    at eta L = 0.1, or lacks its biases' cross term."""
    assert all(verdict.holds for verdict in theorems.beyond_theorem_4(cases)) and theorems.theorem_4(0).holds
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "alpha_star_step", lambda m, *, eta_l: estimators.alpha_star(m))
        assert not next(iter(theorems.beyond_theorem_4(cases))).holds
    best, honest = estimators.alpha_star_step, estimators.alpha_star
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "alpha_star_step", lambda m, *, eta_l: best(m, eta_l=1 / eta_l))
        assert "eta_l_direction" in failing(cases)
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "alpha_star", lambda m: honest(m.scale_covariances(0.1)))
        assert "eta_l_regret" in failing(cases)
    monkeypatch.setattr(estimators, "alpha_star", lambda m: honest(replace(m, bias_dot=0.0)))
    assert not theorems.theorem_4(0).holds


def failing(cases):
    return {verdict.key for verdict in theorems.beyond_theorem_4(cases) if not verdict.holds}


def test_theorem_3_sees_a_step_that_is_too_large(monkeypatch):
    """One enumerated step against the descent bound. Mutation (made here): a smoothness constant that is far too small."""
    assert descent.one_step(0).holds
    honest = Tabular.smoothness
    monkeypatch.setattr(descent, "ALPHAS", (1.0,))
    monkeypatch.setattr(Tabular, "smoothness", lambda self, beta: honest(self, beta) / 100)
    assert not descent.one_step(0).holds


def test_theorem_3_on_a_grid(monkeypatch):
    """Every cell of alpha and eta L, both forms. Mutations: a ratio that is turned over; only the noise on the right."""
    cells = [descent.measure(cell) for cell in descent.grid(0, steps=5, runs=1)]
    assert len(cells) == len(descent.ALPHAS) * len(descent.ETA_LS)
    assert all(verdict.holds for verdict in descent.both_forms(cells, "grid", ""))
    assert all(0 < cell.uniform_ratio <= cell.ratio < 1 for cell in cells)
    only_noise(monkeypatch)
    assert not any(verdict.holds for verdict in descent.both_forms(cells, "grid", ""))


def test_theorem_3_in_a_transformer(monkeypatch):
    """Mutation (made here): only the noise on the right."""
    cells = descent.transformer_runs(0, steps=3, runs=1)
    assert descent.in_the_transformer(cells).holds
    only_noise(monkeypatch)
    assert not descent.in_the_transformer(cells).holds


def only_noise(monkeypatch):
    one, other = descent.descent_bound, descent.uniform_bound
    monkeypatch.setattr(estimators, "bias_sq", lambda m, alpha: 0.0)
    monkeypatch.setattr(descent, "descent_bound", lambda cell, progress, at: one(cell, 0.0, at))
    monkeypatch.setattr(descent, "uniform_bound", lambda cell, distance, at: other(cell, 0.0, at))


TERMS = {
    "no progress, eq. 3": ("descent_bound", lambda honest: lambda cell, progress, at: honest(cell, 0.0, at)),
    "no distance, eq. 4": ("uniform_bound", lambda honest: lambda cell, distance, at: honest(cell, 0.0, at)),
    "half the distance, eq. 4": ("uniform_bound", lambda honest: lambda cell, far, at: honest(cell, far / 2, at)),
    "no bias, eq. 4": ("uniform_bound", lambda honest: lambda *given: (honest(*given)[0], 0.0, honest(*given)[2])),
    "no noise, eq. 4": ("uniform_bound", lambda honest: lambda *given: (*honest(*given)[:2], 0.0)),
}


@pytest.mark.parametrize("name", TERMS)
def test_theorem_3_sees_a_missing_term(monkeypatch, single, name):
    """Mutation (made here): a term of either form of the bound left out, or half of it."""
    place, broken = TERMS[name]
    monkeypatch.setattr(descent, place, broken(getattr(descent, place)))
    verdicts = list(descent.both_forms(single, "one_term", ""))
    assert [verdict.holds for verdict in verdicts] == ["eq. 3" not in name, "eq. 4" not in name]


@pytest.mark.parametrize("part", ["bias_sq", "variance"])
def test_theorem_3_sees_half_of_the_per_step_term(monkeypatch, single, part):
    """Mutation (made here): no bias, or no noise, in either form."""
    monkeypatch.setattr(estimators, part, lambda m, alpha: 0.0)
    verdicts = list(descent.both_forms(single, "one_term", ""))
    assert not any(verdict.holds for verdict in verdicts)


def test_theorem_3_holds_where_one_term_decides(single):
    """Mutation: the bound's runs and its smoothness constant of different losses."""
    assert all(verdict.holds for verdict in descent.both_forms(single, "one_term", ""))


def test_least_loss_is_reached_by_the_teachers_own_ratios(single):
    """A long run comes near it and never below. Mutation: chosen and rejected exchanged, or the pairs' weights left out."""
    found = single[0]
    least = descent.least_loss(found.cell.world)
    assert least <= found.last <= least + 0.02 * (found.first - least)


ADAPTIVE = {
    "the other view's weight": lambda honest: lambda m, *, eta_l: 1 - honest(m, eta_l=eta_l),
    "eta L ignored": lambda honest: lambda m, *, eta_l: honest(m, eta_l=1.0),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_adaptive_checks_see_a_wrong_alpha(monkeypatch, name):
    """Mutation (made here): alpha_k of the wrong view, or of eta L = 1; a bound without progress."""
    cells = list(descent.adaptive(0, steps=3, runs=1))
    measured = [descent.measure(cell) for cell in cells]
    assert all(verdict.holds for verdict in descent.adaptive_verdicts(measured))
    with monkeypatch.context() as patch:
        honest = descent.descent_bound
        patch.setattr(descent, "descent_bound", lambda cell, progress, at: honest(cell, 0.0, at))
        assert not next(iter(descent.adaptive_verdicts(measured))).holds
    monkeypatch.setattr(estimators, "alpha_star_step", ADAPTIVE[name](estimators.alpha_star_step))
    found = {v.key: v.holds for v in descent.adaptive_verdicts([descent.measure(cell) for cell in cells])}
    assert not found["adaptive_step"], found
    if name == "the other view's weight":
        assert not found["adaptive_bound"], found


def test_bias_table_sees_a_false_promise(monkeypatch):
    """Mutation (made here): a registry entry that promises b_t = 0 and does not keep it, or the reverse."""
    entries = list(bias.trace_biases(0, ("small tabular",)))
    assert all(verdict.holds for verdict in bias.at_the_reference(entries))
    for name, promise in (("rdpo", True), ("dpo", False)):
        broken = replace(LOSSES[name], zero_trace_bias_at_reference=promise)
        with monkeypatch.context() as patch:
            patch.setitem(LOSSES, name, broken)
            assert not all(verdict.holds for verdict in bias.at_the_reference(entries)), name
    # and samples that are all drawn at T = 1, from an estimator that is always the joint one
    monkeypatch.setattr(bias, "SAMPLINGS", dict.fromkeys(bias.SAMPLINGS, Sampling()))
    monkeypatch.setattr(bias, "_CUT_TABULAR", Sampling())
    monkeypatch.setitem(bias.TRACE_ESTIMATORS, "answer", bias.TRACE_ESTIMATORS["joint"])
    found = bias.at_the_reference(list(bias.trace_biases(0, ("small tabular",))))
    assert {"b_t_other_sampling", "b_t_answer_estimator"} <= {verdict.key for verdict in found if not verdict.holds}


def test_monte_carlo_sees_a_wrong_temperature(monkeypatch):
    """Mutation (made here): responses drawn at another temperature than the enumeration believes."""
    assert all(verdict.holds for verdict in bias.monte_carlo(0, num=500))
    honest = bias.draw_by_token

    def hotter(world, num, generator):
        return honest(replace(world, sampling=replace(world.sampling, temperature=2.0)), num, generator)

    monkeypatch.setattr(bias, "draw_by_token", hotter)
    assert not all(verdict.holds for verdict in bias.monte_carlo(0, num=500))


def test_the_example_of_the_page():
    """docs/lab.md. Mutation: a renamed function."""
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})


def test_golden_section():
    """Inside and at either end. Mutation: the interval shrinks to the wrong side."""
    for low in (-0.5, 0.0, 0.3, 0.777, 1.0, 1.5):
        found = theorems.golden_section(lambda x, low=low: (x - low) ** 2)
        assert found == pytest.approx(min(1.0, max(0.0, low)), abs=1e-7)


def test_the_same_seed_gives_the_same_numbers():
    """Mutation: a generator that is not seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = list(bias.monte_carlo(3, num=250))
        torch.manual_seed(2)
        assert list(bias.monte_carlo(3, num=250)) == one
