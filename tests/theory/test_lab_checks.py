"""The laboratory's checks hold on the shipped code, and each of them fails when what it guards is broken."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bvpo.core import estimators
from bvpo.core.losses import LOSSES
from bvpo.lab import bias, descent, runs, theorems
from bvpo.lab.policies import Tabular


@pytest.fixture(scope="module")
def cases() -> list[theorems.Case]:
    return theorems.state_moments(0, quick=True)


def test_theorem_1_sees_a_wrong_mixture(monkeypatch):
    """Mutation (made here): the trace view's weight is alpha squared."""
    assert theorems.theorem_1(0, quick=True).holds
    honest = runs.mix_views
    monkeypatch.setattr(runs, "mix_views", lambda sums, counts, alpha: honest(sums, counts, alpha**2))
    monkeypatch.setattr(theorems, "every_loss", lambda: {"dpo": theorems.DPO})
    assert not theorems.theorem_1(0, quick=True).holds


def test_theorem_2_sees_a_wrong_closed_form(monkeypatch, cases):
    """Mutation (made here): the cross term of the biases, or the cross-covariance, left out."""
    assert theorems.theorem_2(0, quick=True).holds and theorems.theorem_2_in_full_worlds(cases).holds
    honest = estimators.alpha_star
    for field in ("bias_dot", "cov"):
        monkeypatch.setattr(estimators, "alpha_star", lambda m, f=field: honest(replace(m, **{f: 0.0})))
        assert not theorems.theorem_2_in_full_worlds(cases).holds, field


def test_corollary_1_and_proposition_1(cases):
    """Mutation: no clip (the boundary worlds leave [0, 1]); noise of the data counted as noise of the traces."""
    assert all(verdict.holds for verdict in theorems.corollary_1(cases))
    assert theorems.proposition_1(0).holds


def test_boundary_worlds_see_a_missing_clip(monkeypatch):
    """Mutation (made here): alpha* without its clip."""
    assert theorems.boundary_cases().holds
    monkeypatch.setattr(estimators, "alpha_star", estimators.alpha_star_unclipped)
    assert not theorems.boundary_cases().holds


def test_theorem_4_sees_eta_l_ignored(monkeypatch, cases):
    """Mutation (made here): the per-step optimum is the MSE's at every eta L."""
    assert all(verdict.holds for verdict in theorems.theorem_4(cases))
    monkeypatch.setattr(estimators, "alpha_star_step", lambda m, *, eta_l: estimators.alpha_star(m))
    assert [verdict.holds for verdict in theorems.theorem_4(cases)][:2] == [True, False]


def test_theorem_3_sees_a_step_that_is_too_large(monkeypatch):
    """One enumerated step against the descent bound. Mutation (made here): a smoothness constant that is far too small."""
    assert descent.one_step(0).holds
    honest = Tabular.smoothness
    monkeypatch.setattr(descent, "ALPHAS", (1.0,))
    monkeypatch.setattr(Tabular, "smoothness", lambda self, beta: honest(self, beta) / 100)
    assert not descent.one_step(0).holds


def test_theorem_3_on_a_grid():
    """Every cell of alpha and eta L. Mutation: variance of one quad instead of the batch's would hide a violation."""
    cells = list(descent.grid(0, steps=5, runs=1))
    assert len(cells) == len(descent.ALPHAS) * len(descent.ETA_LS)
    assert descent.on_the_grid(cells).holds
    assert all(0 < cell.ratio < 1 for cell in cells)


def test_bias_table_sees_a_false_promise(monkeypatch):
    """Mutation (made here): a registry entry that promises b_t = 0 and does not keep it, or the reverse."""
    entries = list(bias.trace_biases(0, ("small tabular",)))
    assert all(verdict.holds for verdict in bias.at_the_reference(entries))
    for name, promise in (("rdpo", True), ("dpo", False)):
        broken = replace(LOSSES[name], zero_trace_bias_at_reference=promise)
        with monkeypatch.context() as patch:
            patch.setitem(LOSSES, name, broken)
            assert not all(verdict.holds for verdict in bias.at_the_reference(entries)), name


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
