"""The laboratory's own instruments: probabilities, Jacobians, samples and smoothness of the worlds that it enumerates."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.config import AnchorConfig, LossConfig
from bvpo.lab.bias import draw_by_token
from bvpo.lab.catalog import POLICIES, world_of
from bvpo.lab.policies import EMPTY, Tabular, autograd_jacobian, log_probs
from bvpo.lab.responses import State, importance, joint
from bvpo.lab.runs import anchor_terms, marginal_loss
from bvpo.lab.worlds import Sampling, _truncate, drifted


@pytest.mark.parametrize(("name", "longest"), [("small tabular", 20), ("small transformer", 2)])
def test_probabilities_sum_to_one(name, longest):
    """Mutation: a trace that is counted twice or left out of the tree; the marker forgotten."""
    world = world_of(name, 3, sampling=Sampling(temperature=0.8, top_p=0.95, max_trace_tokens=longest))
    probs = State(world=world, theta=drifted(world, 0.3, 4)).probs
    one = torch.ones(world.policy.num_prompts, dtype=torch.float64)
    torch.testing.assert_close(probs.joint.exp().sum((1, 2)), one)
    torch.testing.assert_close(probs.marginal.exp().sum(1), one)
    torch.testing.assert_close(world.sampled[0].sum(1), one)
    assert world.trace_pairs.sum().item() == pytest.approx(1) == world.empty_pairs.sum().item()
    assert world.policy.tree.lengths[EMPTY] == 1


def test_traces_of_the_transformer_are_all_strings():
    """Against a walk of our own over token strings. Mutation: nodes and traces in different orders."""
    policy = POLICIES["small transformer"]
    world = world_of("small transformer", 0)
    steps = world.reference_probs.steps
    strings = [s for length in range(3) for s in itertools.product(range(3), repeat=length)]
    assert policy.tree.num_traces == len(strings) == 13 and policy.tree.num_nodes == 4
    nodes = {(): 0, (0,): 1, (1,): 2, (2,): 3}
    for trace, string in enumerate(strings):
        expected = sum(steps[:, nodes[string[:d]], symbol] for d, symbol in enumerate(string))
        expected = expected + (steps[:, nodes[string], 3] if len(string) < 2 else 0)
        torch.testing.assert_close(world.reference_probs.traces[:, trace], expected)
        assert policy.tree.lengths[trace] == len(string) + 1


def test_the_transformer_does_not_look_ahead():
    """The choice after a prefix is the same whatever follows; a prompt's logits are its own. Mutation: no causal mask."""
    world = world_of("small transformer", 0)
    whole = world.policy.logits(world.reference)
    part = world.policy.logits(world.reference, slice(2, 3))
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[2:3], other)
    moved = world.reference.clone()
    moved[4 * 10 : 7 * 10] += 1.0  # the embeddings of the symbols: no influence on the choice after the prompt
    torch.testing.assert_close(world.policy.logits(moved)[0][:, 0], whole[0][:, 0])
    assert not torch.allclose(world.policy.logits(moved)[0][:, 1], whole[0][:, 1])


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_tabular_jacobian_in_closed_form(seed):
    """Against autograd. Mutation: the shared part of the logits left out."""
    policy = Tabular(num_prompts=2, num_traces=3, num_answers=3)
    theta = policy.initial(torch.Generator().manual_seed(seed))
    for closed, automatic in zip(policy.jacobian(theta), autograd_jacobian(policy, theta), strict=True):
        torch.testing.assert_close(closed, automatic, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 3.0]), st.floats(0, 4))
@settings(max_examples=25)
def test_smoothness_is_an_upper_bound(seed, beta, sigma):
    """Every Hessian eigenvalue of the marginal DPO loss, anywhere, is below the proven constant; Theorem 3 rests on it.
    Mutation: the curvature term or the number of prompts left out of the constant."""
    world = world_of("two traces", seed)
    assert isinstance(world.policy, Tabular)
    loss = LossConfig(beta=beta)
    point = drifted(world, sigma, seed + 1)
    hessian: torch.Tensor = torch.autograd.functional.hessian(lambda theta: marginal_loss(world, theta, loss), point)  # type: ignore[assignment]
    largest = torch.linalg.eigvalsh(hessian).abs().max().item()
    assert largest <= world.policy.smoothness(beta) * (1 + 1e-9)
    assert largest >= 1e-4 * world.policy.smoothness(beta), "the bound says nothing"


def test_nucleus_sampling():
    """The likeliest choices until top_p is reached, at least one. Mutation: one choice too few or too many."""
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]], dtype=torch.float64).log()
    for top_p, kept in ((1.0, [0.5, 0.1, 0.3, 0.1]), (0.8, [0.625, 0, 0.375, 0]), (0.51, [0.625, 0, 0.375, 0])):
        torch.testing.assert_close(_truncate(logits, top_p).exp()[0], torch.tensor(kept, dtype=torch.float64))
    assert _truncate(logits, 0.2).exp()[0].tolist() == [1, 0, 0, 0]


def test_sampling_by_token_agrees_with_the_enumeration():
    """Frequencies of 40,000 drawn quads, each cell within 5 standard errors; both ways of drawing.
    Mutation: temperature on sequences instead of steps; a tie redrawn on one side only."""
    world = world_of("tiny transformer", 5, sampling=Sampling(temperature=0.8))
    num = 40_000
    chosen, rejected = world.pair_index
    expected = _scatter(world.trace_pairs, chosen, rejected)
    trace = (expected.sum(2)[:, :, None] * world.trace_given_answer).sum(1)
    for draw in (draw_by_token, lambda w, n, g: w.draw(n, g)):
        quads = draw(world, num, torch.Generator().manual_seed(0))
        _within(quads.prompt * 9 + quads.chosen * 3 + quads.rejected, expected.flatten())
        _within(quads.prompt * 4 + quads.chosen_trace, trace.flatten())
        empty = _scatter(world.empty_pairs, chosen, rejected)
        _within(quads.prompt * 9 + quads.empty_chosen * 3 + quads.empty_rejected, empty.flatten())


def _scatter(pairs: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(pairs), 3, 3, dtype=torch.float64)
    out[:, chosen, rejected] = pairs
    return out


def _within(cells: torch.Tensor, expected: torch.Tensor, bound: float = 5.0) -> None:
    num = len(cells)
    found = torch.bincount(cells, minlength=len(expected)) / num
    error = (expected * (1 - expected) / num).sqrt() + 1e-12
    assert ((found - expected).abs() <= bound * error).all()


def test_kl_of_traces_and_its_gradient():
    """The atoms' KL gradient is autograd's through the shipped anchor. Mutation: KL(policy || reference); a step more."""
    world = world_of("small transformer", 1)
    theta = drifted(world, 0.3, 2)
    state = State(world=world, theta=theta)
    quads = world.draw(5, torch.Generator().manual_seed(0))
    leaf = theta.clone().requires_grad_()
    probs = log_probs(world.policy.tree, *world.policy.logits(leaf))
    values = anchor_terms(world, probs, quads, AnchorConfig(kind="kl", weight=1.0))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    num_traces, num_answers = world.policy.tree.num_traces, len(world.policy.answer_lengths)
    first = num_traces * num_answers + num_traces
    atoms = sum(state.atoms[quads.prompt, first + trace] for trace in (quads.chosen_trace, quads.rejected_trace))
    torch.testing.assert_close(atoms.sum(0), gradient, rtol=1e-9, atol=1e-11)
    exact = state.trace_kl[quads.prompt, quads.chosen_trace] + state.trace_kl[quads.prompt, quads.rejected_trace]
    torch.testing.assert_close(exact, values.detach())


@pytest.mark.parametrize("num", [1, 2, 3])
def test_importance_weights_are_unbiased(num):
    """E[mean of pi / ref over traces given the answer] = pi(y) / ref(y), the probabilities of the multisets sum to one, and
    one trace is the joint estimator. Mutation: multisets counted as sequences, or a mean of logarithms."""
    world = world_of("tiny tabular", 2)
    state = State(world=world, theta=drifted(world, 0.8, 3))
    found = importance(state, num)
    torch.testing.assert_close(found.prob.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    ratio = (found.prob * (found.logp - found.ref).exp()).sum(-1)
    torch.testing.assert_close(ratio, (state.probs.marginal - world.reference_probs.marginal).exp())
    torch.testing.assert_close(found.push.sum(-1), torch.ones_like(found.prob))
    if num == 1:
        whole = joint(state)
        torch.testing.assert_close(found.logp - found.ref, whole.logp - whole.ref)
        torch.testing.assert_close(found.push, whole.push)
        torch.testing.assert_close(found.tokens, whole.tokens)
