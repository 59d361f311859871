"""Estimators of one response's log-probability, as every state that the random part of a response can be in.

In: a :class:`State`, a world at given parameters. Out: :class:`Responses`: for each prompt and answer the probabilities of
the states, what the loss is given there, and its gradient. The gradients are weights on a few *atoms* of each prompt, the
gradients of log pi(r, y | x), log pi(r | x) and of the KL divergence along a trace; :mod:`bvpo.lab.exact` needs no more than
the atoms' inner products. Adding an estimator is adding a function here.

Shapes as in :mod:`bvpo.lab.policies`; S states of a response; A atoms of a prompt (R Y joint, then R trace, then R KL).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bvpo.lab.policies import EMPTY, F64, LogProbs, log_probs, sum_over_path
from bvpo.lab.worlds import Sampling, World
from bvpo.method.losses import kl_from_logits


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """A world at parameters ``theta`` [P]."""

    world: World
    theta: Tensor

    def with_sampling(self, sampling: Sampling) -> State:
        """The same parameters under other samples, which the atoms do not depend on."""
        other = State(world=replace(self.world, sampling=sampling), theta=self.theta)
        other.__dict__.update(atoms=self.atoms, gram=self.gram)
        return other

    @cached_property
    def probs(self) -> LogProbs:
        return log_probs(self.world.policy.tree, *self.world.policy.logits(self.theta))

    @cached_property
    def atoms(self) -> Tensor:
        """[X, A, P]."""
        tree = self.world.policy.tree
        steps, answers = self.world.policy.jacobian(self.theta)
        traces = sum_over_path(tree, steps)
        joint = traces[:, :, None] + answers
        # grad KL(ref || policy) at a node: the reference cannot move, so minus the expected score
        node_kl = -torch.einsum("xnc,xncp->xnp", self.world.reference_probs.steps.exp(), steps)
        return torch.cat([joint.flatten(1, 2), traces, self._along_path(node_kl)], dim=1)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the atoms of one prompt: [X, A, A]."""
        return self.atoms @ self.atoms.transpose(1, 2)

    @cached_property
    def trace_kl(self) -> Tensor:
        """KL(reference || policy) summed over the steps of each trace: [X, R]."""
        return self._along_path(kl_from_logits(self.world.reference_probs.steps, self.probs.steps))

    def _along_path(self, per_node: Tensor) -> Tensor:
        """[X, N, ...] -> [X, R, ...]: whatever a step chose, its node counts."""
        num = self.world.policy.tree.num_choices
        return sum_over_path(self.world.policy.tree, per_node.unsqueeze(2).expand(-1, -1, num, *per_node.shape[2:]))

    def joint_atoms(self, weights: Tensor) -> Tensor:
        """[X, Y, S, R] weights on the gradients of log pi(r, y | x), y the response's own -> [X, Y, S, A]."""
        x, y, s, r = weights.shape
        out = torch.zeros(x, y, s, r, y, dtype=F64)
        for answer in range(y):
            out[:, answer, :, :, answer] = weights[:, answer]
        return F.pad(out.flatten(3), (0, 2 * r))

    def trace_atoms(self, weights: Tensor, *, kl: bool = False) -> Tensor:
        """[X, Y, S, R] weights on the gradients of log pi(r | x), or of the KL along r -> [X, Y, S, A]."""
        y, r = weights.shape[1], weights.shape[3]
        return F.pad(weights, (r * y + r, 0) if kl else (r * y, r))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Responses:
    """What one response may look like to a loss.

    ``prob``, ``logp``, ``ref``, ``length``: [X, Y, S]; ``push`` [X, Y, S, A]: the gradient of ``logp``. Terms added to the
    loss outside of it, such as anchors: ``chosen_push`` and ``rejected_push`` [X, Y, S, A], their gradients when the
    response is the chosen or the rejected one. ``tokens`` [X, Y]: scored tokens it costs, on average.
    """

    prob: Tensor
    logp: Tensor
    ref: Tensor
    length: Tensor
    push: Tensor
    tokens: Tensor
    chosen_push: Tensor | None = None
    rejected_push: Tensor | None = None


def _by_answer(values: Tensor) -> Tensor:
    """[X, R, Y] -> [X, Y, R]."""
    return values.transpose(1, 2)


def marginal(state: State) -> Responses:
    """log pi(y | x), exactly: the response of the ideal loss. Its length is the answer's."""
    probs, policy = state.probs, state.world.policy
    posterior = _by_answer(probs.joint - probs.marginal[:, None]).exp()
    shape = (*probs.marginal.shape, 1)
    length = policy.answer_lengths[None, :, None].expand(shape)
    return Responses(
        prob=torch.ones(shape, dtype=F64),
        logp=probs.marginal[..., None],
        ref=state.world.reference_probs.marginal[..., None],
        length=length,
        push=state.joint_atoms(posterior[:, :, None]),
        tokens=length[..., 0].to(F64),
    )


def empty(state: State) -> Responses:
    """The empty view: log pi(empty trace, y | x), with the closing marker that was forced."""
    shape = (*state.probs.marginal.shape, 1)
    one = F.one_hot(torch.tensor(EMPTY), state.probs.traces.shape[1]).to(F64)
    policy = state.world.policy
    length = (policy.answer_lengths + policy.tree.lengths[EMPTY])[None, :, None].expand(shape)
    return Responses(
        prob=torch.ones(shape, dtype=F64),
        logp=state.probs.joint[:, EMPTY, :, None],
        ref=state.world.reference_probs.joint[:, EMPTY, :, None],
        length=length,
        push=state.joint_atoms(one.expand(*shape, -1)),
        tokens=length[..., 0].to(F64),
    )


def joint(state: State) -> Responses:
    """One sampled trace: log pi(r, y | x), as in the paper and in training (``trace_estimator = "joint"``)."""
    policy, prob = state.world.policy, state.world.trace_given_answer
    every = torch.eye(prob.shape[-1], dtype=F64).expand(*prob.shape, -1)
    length = (policy.tree.lengths + policy.answer_lengths[:, None]).expand(prob.shape)
    return Responses(
        prob=prob,
        logp=_by_answer(state.probs.joint),
        ref=_by_answer(state.world.reference_probs.joint),
        length=length,
        push=state.joint_atoms(every),
        tokens=(prob * length).sum(-1),
    )


def answer(state: State) -> Responses:
    """log pi(y | x, r) of one sampled trace, which itself is not scored (``trace_estimator = "answer"``)."""
    whole = joint(state)
    every = torch.eye(whole.prob.shape[-1], dtype=F64).expand(*whole.prob.shape, -1)
    return replace(
        whole,
        logp=_by_answer(state.probs.answers),
        ref=_by_answer(state.world.reference_probs.answers),
        length=state.world.policy.answer_lengths[:, None].expand(whole.prob.shape),
        push=whole.push - state.trace_atoms(every),
    )


def per_token(state: State) -> Responses:
    """The joint log-prob divided by its number of tokens, in any loss."""
    whole = joint(state)
    return replace(
        whole, logp=whole.logp / whole.length, ref=whole.ref / whole.length, push=whole.push / whole.length[..., None]
    )


def importance(state: State, num: int) -> Responses:
    """``num`` independent traces of the same answer, importance-weighted; for losses that compare with the reference.

    With traces from the reference given the answer, pi(y | x) / ref(y | x) = E[pi(r, y | x) / ref(r, y | x)]: the ratio is
    estimated by the mean over the traces, its logarithm is what the loss is given. One trace is :func:`joint`.
    """
    whole = joint(state)
    num_traces = whole.prob.shape[-1]
    draws = list(itertools.combinations_with_replacement(range(num_traces), num))
    sets = torch.tensor(draws)
    counts = F.one_hot(sets, num_traces).sum(1).to(F64)  # [S, R]
    ways = math.lgamma(num + 1) - torch.lgamma(counts + 1).sum(-1)
    logs = torch.where(whole.prob > 0, whole.prob.clamp(min=1e-300).log(), -torch.inf)
    prob = (ways + logs[..., sets].sum(-1)).exp()
    ratios = (whole.logp - whole.ref)[..., sets]  # [X, Y, S, K]
    share = ratios.softmax(-1)
    weights = torch.zeros(*prob.shape, num_traces, dtype=F64).scatter_add_(-1, sets.expand(*prob.shape, -1), share)
    reference = state.world.reference_probs.marginal[..., None].expand(prob.shape)
    length = (prob * counts_of(counts, whole.length)).sum(-1)
    return Responses(
        prob=prob,
        logp=reference + ratios.logsumexp(-1) - math.log(num),
        ref=reference,
        length=counts_of(counts, whole.length) / num,
        push=state.joint_atoms(weights),
        tokens=length,
    )


def counts_of(counts: Tensor, length: Tensor) -> Tensor:
    """Tokens of every multiset of traces: [X, Y, S] from [S, R] and [X, Y, R]."""
    return torch.einsum("sr,xyr->xys", counts, length.to(F64))


def with_nll_anchor(base: Responses, state: State, weight: float) -> Responses:
    """Adds weight * NLL of the chosen trace (:func:`bvpo.method.losses.nll_anchor`); ``base`` has one state per trace."""
    return replace(base, chosen_push=-weight * state.trace_atoms(_each_trace(base)))


def with_kl_anchor(base: Responses, state: State, weight: float) -> Responses:
    """Adds weight * KL(reference || policy) over the steps of both traces (:func:`bvpo.method.losses.kl_from_logits`)."""
    push = weight * state.trace_atoms(_each_trace(base), kl=True)
    return replace(base, chosen_push=push, rejected_push=push)


def _each_trace(base: Responses) -> Tensor:
    return torch.eye(base.prob.shape[-1], dtype=F64).expand(*base.prob.shape, -1)
