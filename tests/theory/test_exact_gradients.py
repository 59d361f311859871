"""The enumerated moments against brute force over every quad, and what theory says of shipped losses on random worlds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.config import AnchorConfig, LossConfig
from bvpo.lab.catalog import DPO, every_loss, world_of
from bvpo.lab.exact import estimate, moments, views
from bvpo.lab.responses import State, empty, joint, marginal, with_kl_anchor, with_nll_anchor
from bvpo.lab.runs import Training, batch_gradient, marginal_gradient, marginal_loss, quad_gradients
from bvpo.lab.worlds import QuadBatch, Sampling, drifted, make_world
from bvpo.method.estimators import alpha_star
from bvpo.method.losses import LOSSES

CONSTANT_SLOPE = ("dpo", "ipo", "hinge", "robust")  # at the reference, whatever the pair: see docs/losses.md
seeds = st.integers(0, 10**6)
few = settings(max_examples=12)


def part(quads: QuadBatch, index) -> QuadBatch:
    return QuadBatch(**{name: getattr(quads, name)[index] for name in QuadBatch.__slots__})


def training(loss: LossConfig = DPO, alpha: float = 0.5, **more) -> Training:
    return Training(loss=loss, alpha=alpha, batch=1, learning_rate=1.0, **more)


@pytest.mark.parametrize("shared", [False, True], ids=["own answers", "shared answers"])
@pytest.mark.parametrize("name", every_loss())
def test_moments_equal_brute_force(name, shared):
    """All six numbers from the gradient of every quad by autograd. Mutation: a slope on the wrong side; covariances between
    the views taken given the pair where the answers are the views' own."""
    world = make_world(
        world_of("two traces", 0).policy, 1, sampling=Sampling(temperature=0.8), shared=shared
    )  # fmt: skip
    theta, loss = drifted(world, 0.6, 2), every_loss()[name]
    quads, prob = world.every_quad()
    assert prob.sum().item() == pytest.approx(1)
    trace, empty_view = (quad_gradients(world, theta, quads, loss, alpha) for alpha in (1.0, 0.0))
    mu = marginal_gradient(world, theta, loss)
    found = views(State(world=world, theta=theta), loss)
    torch.testing.assert_close(found.target.mean, mu, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.trace.mean, prob @ trace, rtol=1e-9, atol=1e-13)
    assert found.target.loss == pytest.approx(marginal_loss(world, theta, loss).item(), rel=1e-12)
    b_t, b_e = prob @ trace - mu, prob @ empty_view - mu
    around_t, around_e = trace - prob @ trace, empty_view - prob @ empty_view
    m = found.moments
    expected = {
        "bias_trace_sq": b_t @ b_t,
        "bias_empty_sq": b_e @ b_e,
        "bias_dot": b_t @ b_e,
        "var_trace": prob @ around_t.square().sum(1),
        "var_empty": prob @ around_e.square().sum(1),
        "cov": prob @ (around_t * around_e).sum(1),
    }
    scale = m.var_trace
    for field, value in expected.items():
        assert getattr(m, field) == pytest.approx(value.item(), rel=1e-8, abs=1e-10 * scale), field


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_anchored_moments_equal_brute_force(kind):
    """Each quad's gradient through the shipped anchors. Mutation: the rejected trace in the NLL; one trace in the KL."""
    world = world_of("two traces", 1)
    theta, weight = drifted(world, 0.6, 2), 0.07
    quads, prob = world.every_quad()
    setting = training(alpha=1.0, anchor=AnchorConfig(kind=kind, weight=weight))  # type: ignore[arg-type]
    unique, where = torch.unique(
        torch.stack([quads.prompt, quads.chosen, quads.rejected, quads.chosen_trace, quads.rejected_trace]),
        dim=1,
        return_inverse=True,
    )
    own = torch.stack(
        [
            batch_gradient(world, theta, part(quads, (where == i).nonzero()[:1, 0]), setting)
            for i in range(unique.shape[1])
        ]
    )[where]
    state = State(world=world, theta=theta)
    anchored = {"nll": with_nll_anchor, "kl": with_kl_anchor}[kind](joint(state), state, weight)
    found = estimate(state, anchored, world.trace_pairs, DPO)
    torch.testing.assert_close(found.mean, prob @ own, rtol=1e-9, atol=1e-13)
    assert found.second == pytest.approx((prob @ own.square().sum(1)).item(), rel=1e-10)
    plain = estimate(state, joint(state), world.trace_pairs, DPO)
    assert found.second != pytest.approx(plain.second, rel=1e-3), "the anchor must matter"


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_the_kl_anchor_is_silent_at_the_reference(kind):
    """There its gradient is zero for every trace; the NLL's is not. Mutation: the anchor scored on sampled tokens."""
    world = world_of("small transformer", 0)
    state = State(world=world, theta=world.reference)
    anchored = {"nll": with_nll_anchor, "kl": with_kl_anchor}[kind](joint(state), state, 1.0)
    plain, found = (estimate(state, r, world.trace_pairs, DPO) for r in (joint(state), anchored))
    gap = (found.mean - plain.mean).norm() / plain.mean.norm()
    assert gap < 1e-12 if kind == "kl" else gap > 0.1
    assert (
        found.variance == pytest.approx(plain.variance, rel=1e-9) if kind == "kl" else found.variance > plain.variance
    )


def test_prompts_without_pairs_have_no_part():
    """Held-out prompts: no quads, no share in any mean. Mutation: 0 / 0 for them."""
    world = replace(world_of("held-out transformer", 0), held_out=4)
    found = views(State(world=world, theta=drifted(world, 0.1, 1)), DPO)
    assert torch.isfinite(found.trace.mean).all() and found.target.loss > 0
    assert world.draw(200, torch.Generator().manual_seed(0)).prompt.max() == 3
    torch.testing.assert_close(found.target.mean, marginal_gradient(world, drifted(world, 0.1, 1), DPO))


# --- properties on random worlds --------------------------------------------------------------------------------------


@given(seeds)
@few
def test_alpha_limits_and_linearity(seed):
    """A batch's gradient at alpha 1 and 0 is the view's own, and linear in between. Mutation: weights exchanged."""
    world = world_of("two traces", seed)
    theta, quads = drifted(world, 0.5, seed), world.draw(5, torch.Generator().manual_seed(seed))
    trace, empty_view = (quad_gradients(world, theta, quads, DPO, alpha).mean(0) for alpha in (1.0, 0.0))
    for alpha in (0.0, 0.3, 1.0):
        mixed = batch_gradient(world, theta, quads, training(alpha=alpha))
        torch.testing.assert_close(mixed, alpha * trace + (1 - alpha) * empty_view, rtol=1e-9, atol=1e-13)


@given(seeds, st.sampled_from(sorted(LOSSES)), st.permutations(range(5)))
@few
def test_order_and_repetition_of_pairs(seed, name, order):
    """A step is a mean over its quads: order does not matter, and twice the same quads are the same step.
    Mutation: a sum instead of a mean, or any coupling between pairs."""
    world, setting = world_of("two traces", seed), training(every_loss()[name])
    theta, quads = drifted(world, 0.5, seed), world.draw(5, torch.Generator().manual_seed(seed))
    straight = batch_gradient(world, theta, quads, setting)
    shuffled = batch_gradient(world, theta, part(quads, torch.tensor(order)), setting)
    twice = batch_gradient(world, theta, part(quads, torch.tensor([*order, *order])), setting)
    torch.testing.assert_close(shuffled, straight, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(twice, straight, rtol=1e-9, atol=1e-13)


@given(seeds, st.sampled_from(CONSTANT_SLOPE))
@few
def test_swap_symmetry(seed, name):
    """A teacher with the opposite taste: at the reference the exact gradients change sign and the noise stays.
    Mutation: a loss that treats chosen and rejected differently; preferences that do not depend on the teacher."""
    world = world_of("two traces", seed)
    other = replace(world, rewards=-world.rewards)
    loss = every_loss()[name]
    one, two = (views(State(world=w, theta=w.reference), loss) for w in (world, other))
    for view in ("trace", "empty", "target"):
        torch.testing.assert_close(getattr(one, view).mean, -getattr(two, view).mean, rtol=1e-9, atol=1e-12)
        assert getattr(one, view).second == pytest.approx(getattr(two, view).second, rel=1e-9)


@given(seeds, st.sampled_from(sorted(LOSSES)))
@few
def test_gradient_signs(seed, name):
    """At the reference a step against mu raises what the teacher prefers: E over pairs of log pi(y_w) - log pi(y_l).
    Mutation: a flipped sign in a loss; rejected and chosen exchanged in the pairs."""
    world, loss = world_of("two traces", seed), every_loss()[name]
    mu = marginal_gradient(world, world.reference, loss)
    chosen, rejected = world.pair_index

    def preferred(theta: torch.Tensor) -> float:
        logps = State(world=world, theta=theta).probs.marginal
        return float((world.trace_pairs * (logps[:, chosen] - logps[:, rejected])).sum())

    step = 1e-4 / mu.norm()
    assert preferred(world.reference - step * mu) > preferred(world.reference)


@given(seeds, st.floats(0.01, 5))
@few
def test_scale_laws(seed, beta):
    """At the reference DPO's gradients are proportional to beta, so alpha* does not depend on it.
    Mutation: beta outside the sigmoid only, or inside only."""
    world = world_of("two traces", seed)
    state = State(world=world, theta=world.reference)
    base, scaled = views(state, LossConfig(beta=1.0)), views(state, LossConfig(beta=beta))
    torch.testing.assert_close(scaled.trace.mean, beta * base.trace.mean, rtol=1e-9, atol=1e-13)
    assert scaled.moments.var_trace == pytest.approx(beta**2 * base.moments.var_trace, rel=1e-9)
    for batch in (1, 64):
        stars = [alpha_star(found.moments.at_batch(batch)) for found in (base, scaled)]
        assert stars[0] == pytest.approx(stars[1], abs=1e-9)


@given(seeds, st.sampled_from(sorted(name for name, entry in LOSSES.items() if entry.zero_trace_bias_at_reference)))
@few
def test_no_trace_bias_at_the_reference(seed, name):
    """b_t = 0 in any world at T = 1; at T = 0.5 it is not. Mutation: traces drawn without regard to their answer."""
    loss = every_loss()[name]
    for temperature, unbiased in ((1.0, True), (0.5, False)):
        world = make_world(world_of("tiny tabular", 0).policy, seed, sampling=Sampling(temperature=temperature))
        found = views(State(world=world, theta=world.reference), loss)
        ratio = found.moments.bias_trace_sq / found.target_sq
        assert ratio <= 1e-20 if unbiased else ratio >= 1e-7


def test_the_view_that_is_exact_gets_everything():
    """With the marginal itself in the trace view's place and many quads, alpha* is 1. Mutation: mu from the other view."""
    world = world_of("small tabular", 0)
    state = State(world=world, theta=drifted(world, 0.5, 1))
    target = estimate(state, marginal(state), world.trace_pairs, DPO)
    other = estimate(state, empty(state), world.empty_pairs, DPO)
    m = moments(target, other, target)
    assert m.bias_trace_sq == 0
    assert alpha_star(m.at_batch(1e9)) == pytest.approx(1, abs=1e-6) and alpha_star(m) < 1
