"""Exact moments of the gradient that a shipped loss gives on one random quad, by enumeration.

In: a state, the states of its responses, the probabilities of the pairs, and any loss of the registry. Out:
:class:`Estimate`: mean, second moment and everything in between of the gradient, and the six numbers that the theory needs
(:func:`moments`). The losses are called through ``bvpo.method.losses.pair_loss`` and differentiated by autograd, so nothing
here knows their formulas. Values of one quad; a batch of B has the same mean and 1 / B of the covariance.

Shapes as in :mod:`bvpo.lab.responses`; Q pairs of answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.lab.responses import Responses, State, empty, joint, marginal
from bvpo.method.estimators import Moments
from bvpo.method.losses import PairLogps, pair_loss

_MOST_VALUES = 2_000_000  # of one tensor over pairs of states: what a chunk holds


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """The gradient g of one view's loss on one random pair.

    ``coef`` [X, Q, A]: E[g | prompt, pair] as weights on the prompt's atoms; ``pairs`` [X, Q] their probabilities;
    ``second_by_prompt`` [X]: E[|g|^2 | prompt]; ``loss``: the expected loss; ``tokens``: scored tokens of a pair, on
    average.
    """

    state: State
    coef: Tensor
    pairs: Tensor
    second_by_prompt: Tensor
    loss: float
    tokens: float

    @cached_property
    def prompt_coef(self) -> Tensor:
        """E[g | prompt] as weights on its atoms: [X, A]."""
        return torch.einsum("xq,xqa->xa", _given_prompt(self.pairs), self.coef)

    @cached_property
    def mean(self) -> Tensor:
        """E g: [P]."""
        return torch.einsum("x,xa,xap->p", self.pairs.sum(1), self.prompt_coef, self.state.atoms)

    @cached_property
    def second(self) -> float:
        """E|g|^2."""
        return float((self.pairs.sum(1) * self.second_by_prompt).sum())

    @cached_property
    def variance(self) -> float:
        """tr Cov(g) of one pair."""
        return self.second - float(self.mean @ self.mean)

    @cached_property
    def variance_given_data(self) -> float:
        """E tr Cov(g | prompt, pair): what the random traces alone contribute."""
        return self.second - self.dot_given_data(self)

    def dot_given_data(self, other: Estimate) -> float:
        """E[ E[g | data] . E[g' | data] ] over this estimate's pairs."""
        dots = torch.einsum("xqa,xab,xqb->xq", self.coef, self.state.gram, other.coef)
        return float((self.pairs * dots).sum())

    def dot_given_prompt(self, other: Estimate) -> float:
        """E[ E[g | prompt] . E[g' | prompt] ]."""
        dots = torch.einsum("xa,xab,xb->x", self.prompt_coef, self.state.gram, other.prompt_coef)
        return float((self.pairs.sum(1) * dots).sum())


def estimate(state: State, responses: Responses, pairs: Tensor, loss: LossConfig) -> Estimate:
    """Every pair of answers with every pair of their states; ``pairs`` [X, Q] as in :class:`bvpo.lab.worlds.World`."""
    chosen, rejected = state.world.pair_index
    x, q = pairs.shape
    index = torch.arange(x).repeat_interleave(q), chosen.repeat(x), rejected.repeat(x)
    halves = [None if push is None else push @ state.gram[:, None] for push in _pushes(responses)]
    chunk = max(1, _MOST_VALUES // responses.prob.shape[-1] ** 2)
    parts = [
        _chunk(responses, halves, tuple(column[start : start + chunk] for column in index), loss)
        for start in range(0, x * q, chunk)
    ]
    coef, second, value = (torch.cat(column) for column in zip(*parts, strict=True))
    tokens = responses.tokens[:, chosen] + responses.tokens[:, rejected]
    return Estimate(
        state=state,
        coef=coef.view(x, q, -1),
        pairs=pairs,
        second_by_prompt=(_given_prompt(pairs) * second.view(x, q)).sum(1),
        loss=float((pairs * value.view(x, q)).sum()),
        tokens=float((pairs * tokens).sum()),
    )


def _given_prompt(pairs: Tensor) -> Tensor:
    """[X, Q] probabilities of prompt and pair -> of the pair given the prompt; zeros for a prompt without pairs."""
    total = pairs.sum(1, keepdim=True)
    return pairs / torch.where(total > 0, total, 1.0)


def _pushes(responses: Responses) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return responses.push, responses.chosen_push, responses.rejected_push


def _chunk(
    responses: Responses, halves: list[Tensor | None], index: tuple[Tensor, ...], loss: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """For M pairs of answers: E[g | data] on atoms [M, A], E[|g|^2 | data] [M], E[loss | data] [M]."""
    prompt, chosen, rejected = index
    one, other = (prompt, chosen), (prompt, rejected)
    weight = responses.prob[one][:, :, None] * responses.prob[other][:, None, :]  # [M, S, S]
    value, slope_w, slope_l = slopes(
        loss,
        *torch.broadcast_tensors(
            responses.logp[one][:, :, None],
            responses.logp[other][:, None, :],
            responses.ref[one][:, :, None],
            responses.ref[other][:, None, :],
            responses.length[one][:, :, None],
            responses.length[other][:, None, :],
        ),
    )
    # the gradient is a sum of channels, factor * direction: (axis of the state it belongs to, factor, direction, half)
    own, for_chosen, for_rejected = _pushes(responses)
    plain = torch.ones((), dtype=weight.dtype)
    channels = [(1, slope_w, own, halves[0], one), (2, slope_l, own, halves[0], other)]
    if for_chosen is not None:
        channels.append((1, plain, for_chosen, halves[1], one))
    if for_rejected is not None:
        channels.append((2, plain, for_rejected, halves[2], other))
    coef = torch.zeros(len(prompt), responses.push.shape[-1], dtype=weight.dtype)
    second = torch.zeros(len(prompt), dtype=weight.dtype)
    for i, (axis, factor, push, half, side) in enumerate(channels):
        assert push is not None and half is not None
        amount = weight * factor
        coef = coef + torch.einsum("ms,msa->ma", amount.sum(3 - axis), push[side])
        for j, (other_axis, other_factor, other_push, _, other_side) in enumerate(channels[: i + 1]):
            assert other_push is not None
            both, twice = amount * other_factor, 1.0 if i == j else 2.0
            if axis == other_axis:
                dots = (half[side] * other_push[other_side]).sum(-1)
                second = second + twice * (both.sum(3 - axis) * dots).sum(-1)
                continue
            dots = half[side] @ other_push[other_side].transpose(1, 2)  # [M, S of this side, S of the other]
            second = second + twice * (both * (dots if axis == 1 else dots.transpose(1, 2))).sum((1, 2))
    return coef, second, (weight * value).sum((1, 2))


def slopes(
    loss: LossConfig,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A shipped loss and its derivatives by the two log-probs, element by element; all of one shape."""
    leaves = [chosen.flatten().detach().requires_grad_(), rejected.flatten().detach().requires_grad_()]
    logps = PairLogps(
        chosen=leaves[0],
        rejected=leaves[1],
        ref_chosen=ref_chosen.flatten(),
        ref_rejected=ref_rejected.flatten(),
        chosen_lengths=chosen_lengths.flatten(),
        rejected_lengths=rejected_lengths.flatten(),
    )
    values = pair_loss(loss, logps).loss
    found = torch.autograd.grad(values.sum(), leaves)
    return values.detach().view_as(chosen), found[0].view_as(chosen), found[1].view_as(chosen)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """The trace view, the empty view and the marginal loss in one state: ``target.mean`` is mu."""

    trace: Estimate
    empty: Estimate
    target: Estimate

    @cached_property
    def moments(self) -> Moments:
        return moments(self.trace, self.empty, self.target)

    @cached_property
    def target_sq(self) -> float:
        """|mu|^2, the unit in which errors are quoted."""
        return float(self.target.mean @ self.target.mean)


def views(state: State, loss: LossConfig, trace: Callable[[State], Responses] = joint) -> Views:
    """All three; ``trace`` is the trace view's estimator."""
    world = state.world
    return Views(
        trace=estimate(state, trace(state), world.trace_pairs, loss),
        empty=estimate(state, empty(state), world.empty_pairs, loss),
        target=estimate(state, marginal(state), world.trace_pairs, loss),
    )


def moments(trace: Estimate, empty_view: Estimate, target: Estimate) -> Moments:
    """Biases around mu = ``target.mean``, and the covariances of one quad.

    The views of a quad share the prompt. With answers of its own, the empty view depends on the trace view through the
    prompt alone; with the trace view's answers, through the pair. Given the data, its gradient is a constant either way.
    """
    b_t, b_e = trace.mean - target.mean, empty_view.mean - target.mean
    shared = trace.state.world.shared
    together = trace.dot_given_data(empty_view) if shared else trace.dot_given_prompt(empty_view)
    return Moments(
        bias_trace_sq=float(b_t @ b_t),
        bias_empty_sq=float(b_e @ b_e),
        bias_dot=float(b_t @ b_e),
        var_trace=trace.variance,
        var_empty=empty_view.variance,
        cov=together - float(trace.mean @ empty_view.mean),
    )
