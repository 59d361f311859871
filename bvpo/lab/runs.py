"""Gradients and SGD on drawn quads, through the shipped losses and mixing and autograd: nothing enumerated.

In: a world, parameters, drawn quads, alpha, a loss, and an anchor if one is wanted. Out: the gradient of the batch, or the
parameters that a run visits. The exact part of the laboratory (:mod:`bvpo.lab.exact`) shares no code with this module but
the losses, so that each can check the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bvpo.config import AnchorConfig, LossConfig
from bvpo.lab.policies import EMPTY, LogProbs, log_probs
from bvpo.lab.worlds import QuadBatch, World
from bvpo.method.losses import PairLogps, kl_from_logits, nll_anchor, pair_loss
from bvpo.method.mixing import Weights, mix_views
from bvpo.records import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What an SGD run minimises, and how: plain SGD, no momentum, every step on new quads."""

    loss: LossConfig
    alpha: float
    batch: int
    learning_rate: float
    anchor: AnchorConfig = field(default_factory=AnchorConfig)


def view_losses(world: World, probs: LogProbs, quads: QuadBatch, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """The loss of each quad's pair in the trace view and in the empty view: two [B], differentiable by ``probs``."""
    policy, reference = world.policy, world.reference_probs
    traces, answers = policy.tree.lengths, policy.answer_lengths

    def of(trace_w: Tensor, answer_w: Tensor, trace_l: Tensor, answer_l: Tensor) -> Tensor:
        one, other = (quads.prompt, trace_w, answer_w), (quads.prompt, trace_l, answer_l)
        logps = PairLogps(
            chosen=probs.joint[one],
            rejected=probs.joint[other],
            ref_chosen=reference.joint[one],
            ref_rejected=reference.joint[other],
            chosen_lengths=traces[trace_w] + answers[answer_w],
            rejected_lengths=traces[trace_l] + answers[answer_l],
        )
        return pair_loss(loss, logps).loss

    none = torch.full_like(quads.prompt, EMPTY)
    trace_view = of(quads.chosen_trace, quads.chosen, quads.rejected_trace, quads.rejected)
    return trace_view, of(none, quads.empty_chosen, none, quads.empty_rejected)


def anchor_terms(world: World, probs: LogProbs, quads: QuadBatch, anchor: AnchorConfig) -> Tensor:
    """The anchor's value on each quad's trace pair, over trace tokens as in training: [B]."""
    if anchor.kind == "nll":
        chosen = probs.traces[quads.prompt, quads.chosen_trace]
        return nll_anchor(chosen, torch.zeros_like(chosen), "trace")
    per_node = kl_from_logits(world.reference_probs.steps, probs.steps)  # [X, N]
    tree = world.policy.tree
    along = (per_node[:, tree.nodes] * tree.on_path).sum(-1)  # [X, R]
    return along[quads.prompt, quads.chosen_trace] + along[quads.prompt, quads.rejected_trace]


def marginal_loss(world: World, theta: Tensor, loss: LossConfig) -> Tensor:
    """The ideal loss, on log pi(y | x) = log sum_r pi(r, y | x) over the trace view's pairs; a scalar, differentiable."""
    policy, (chosen, rejected) = world.policy, world.pair_index
    logps, ref = log_probs(policy.tree, *policy.logits(theta)).marginal, world.reference_probs.marginal
    lengths = policy.answer_lengths.expand(len(logps), -1)
    values = pair_loss(
        loss,
        PairLogps(
            chosen=logps[:, chosen].flatten(),
            rejected=logps[:, rejected].flatten(),
            ref_chosen=ref[:, chosen].flatten(),
            ref_rejected=ref[:, rejected].flatten(),
            chosen_lengths=lengths[:, chosen].flatten(),
            rejected_lengths=lengths[:, rejected].flatten(),
        ),
    ).loss
    return (world.trace_pairs.flatten() * values).sum()


def marginal_gradient(world: World, theta: Tensor, loss: LossConfig) -> Tensor:
    """mu, the gradient of :func:`marginal_loss`: [P]."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_loss(world, theta, loss), theta)
    return gradient


def batch_loss(world: World, theta: Tensor, quads: QuadBatch, training: Training) -> Tensor:
    """The loss of an optimizer step: both views mixed, and the anchor; a scalar."""
    probs = log_probs(world.policy.tree, *world.policy.logits(theta))
    trace_view, empty_view = view_losses(world, probs, quads, training.loss)
    counts: dict[View, int] = {"trace": len(quads), "empty": len(quads)}
    anchor = None
    if training.anchor.kind != "none":
        anchor = anchor_terms(world, probs, quads, training.anchor).sum()
    weights = Weights.of(training.alpha, counts, training.anchor.weight)
    return mix_views({"trace": trace_view.sum(), "empty": empty_view.sum()}, weights, anchor)


def batch_gradient(world: World, theta: Tensor, quads: QuadBatch, training: Training) -> Tensor:
    """Its gradient: [P]."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(batch_loss(world, theta, quads, training), theta)
    return gradient


def full_gradient(world: World, theta: Tensor, training: Training) -> Tensor:
    """Of a batch without end: the mean of every quad's mixed gradient."""
    quads, prob = world.every_quad()
    return prob @ quad_gradients(world, theta, quads, training.loss, training.alpha)


def sgd(
    world: World,
    start: Tensor,
    training: Training,
    *,
    steps: int,
    seed: int,
    alpha_of: Callable[[Tensor], float] | None = None,
    endless: bool = False,
) -> list[Tensor]:
    """The ``steps + 1`` points of a run. ``alpha_of`` chooses alpha at each point; ``endless`` batches have no noise."""
    generator = torch.Generator().manual_seed(seed)
    points = [start.detach()]
    for _ in range(steps):
        now = points[-1]
        at = training if alpha_of is None else replace(training, alpha=alpha_of(now))
        gradient = (
            full_gradient(world, now, at)
            if endless
            else batch_gradient(world, now, world.draw(at.batch, generator), at)
        )
        points.append(now - training.learning_rate * gradient)
    return points


def quad_gradients(world: World, theta: Tensor, quads: QuadBatch, loss: LossConfig, alpha: float) -> Tensor:
    """Every quad's own gradient of the mixed loss, a batch of one each: [B, P]. Alpha 1 and 0 give the views' own."""
    theta = theta.detach().requires_grad_()
    probs = log_probs(world.policy.tree, *world.policy.logits(theta))
    trace_view, empty_view = view_losses(world, probs, quads, loss)
    mixed = mix_views({"trace": trace_view, "empty": empty_view}, Weights.of(alpha, {"trace": 1, "empty": 1}))
    every = torch.eye(len(mixed), dtype=mixed.dtype)
    return torch.autograd.grad(mixed, theta, every, is_grads_batched=True)[0]
