"""A world: a policy, the reference that wrote the data, a teacher's preferences, and so the exact distribution of quads.

In: a policy, how the reference samples (temperature, nucleus, longest trace) and a seed. Out: the probability of every pair
of answers in either view, and of every trace behind an answer; quads drawn from the same distribution. A quad is one prompt
with a pair per view, as in training. Nothing here knows a loss.

Shapes as in :mod:`bvpo.lab.policies`; Q = Y (Y - 1) ordered pairs of answers; B quads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bvpo.lab.policies import EMPTY, F64, LogProbs, Policy, log_probs, sum_over_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the reference writes responses. ``max_trace_tokens``: a longer trace is cut, has no answer and is never paired."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_trace_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuadBatch:
    """B drawn quads: prompt, and per view the answers (and traces) of the chosen and the rejected response; all [B]."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_trace: Tensor
    rejected_trace: Tensor
    empty_chosen: Tensor
    empty_rejected: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """``rewards`` [X, Y] are the teacher's; ``shared``: the empty view is given the trace view's own answers, instead of
    answers that the reference wrote after an empty trace (the paper's D_e, and the default). The last ``held_out`` prompts
    have no pairs: what happens to them is what training does to everything else."""

    policy: Policy
    reference: Tensor
    rewards: Tensor
    sampling: Sampling = field(default_factory=Sampling)
    shared: bool = False
    held_out: int = 0

    @property
    def num_trained(self) -> int:
        return len(self.rewards) - self.held_out

    @cached_property
    def pair_index(self) -> tuple[Tensor, Tensor]:
        """Chosen and rejected answer of every ordered pair: two [Q]."""
        num = self.rewards.shape[1]
        chosen, rejected = torch.cartesian_prod(torch.arange(num), torch.arange(num)).unbind(1)
        keep = chosen != rejected
        return chosen[keep], rejected[keep]

    @cached_property
    def reference_probs(self) -> LogProbs:
        """The reference as it is, which is what losses compare with: sampling does not change it."""
        return log_probs(self.policy.tree, *self.policy.logits(self.reference))

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor]:
        """What the reference writes: probability of each trace that ends in time [X, R], and of answers [X, R, Y]."""
        tree, how = self.policy.tree, self.sampling
        steps, answers = (
            _truncate(logits / how.temperature, how.top_p) for logits in self.policy.logits(self.reference)
        )
        traces = sum_over_path(tree, steps).exp()
        if how.max_trace_tokens is not None:
            traces = traces * (tree.lengths <= how.max_trace_tokens)
        return traces / traces.sum(1, keepdim=True), answers.exp()

    @cached_property
    def trace_given_answer(self) -> Tensor:
        """q(r | x, y): [X, Y, R]; zero where the answer is never written."""
        traces, answers = self.sampled
        joint = (traces[:, :, None] * answers).transpose(1, 2)
        total = joint.sum(-1, keepdim=True)
        return joint / torch.where(total > 0, total, 1.0)

    @cached_property
    def trace_pairs(self) -> Tensor:
        """Probability of prompt and pair in the trace view: [X, Q], one in all."""
        traces, answers = self.sampled
        return self._pairs((traces[:, :, None] * answers).sum(1))

    @cached_property
    def empty_pairs(self) -> Tensor:
        """The same in the empty view."""
        return self.trace_pairs if self.shared else self._pairs(self.sampled[1][:, EMPTY])

    def _pairs(self, answers: Tensor) -> Tensor:
        """Two answers are drawn; equal ones make no pair; the teacher prefers by Bradley and Terry's rule."""
        chosen, rejected = self.pair_index
        prefer = torch.sigmoid(self.rewards[:, chosen] - self.rewards[:, rejected])
        weight = answers[:, chosen] * answers[:, rejected] * prefer
        trained = torch.arange(len(weight)) < self.num_trained
        return trained[:, None] * weight / weight.sum(1, keepdim=True) / self.num_trained

    def draw(self, num: int, generator: torch.Generator) -> QuadBatch:
        """Independent quads."""
        chosen, rejected = self.pair_index
        prompt = torch.randint(self.num_trained, (num,), generator=generator)
        pair = _pick(self.trace_pairs[prompt], generator)
        other = pair if self.shared else _pick(self.empty_pairs[prompt], generator)
        return QuadBatch(
            prompt=prompt,
            chosen=chosen[pair],
            rejected=rejected[pair],
            chosen_trace=_pick(self.trace_given_answer[prompt, chosen[pair]], generator),
            rejected_trace=_pick(self.trace_given_answer[prompt, rejected[pair]], generator),
            empty_chosen=chosen[other],
            empty_rejected=rejected[other],
        )

    def every_quad(self) -> tuple[QuadBatch, Tensor]:
        """All of them with their probabilities; for worlds of a few thousand."""
        q, r = len(self.pair_index[0]), self.policy.tree.num_traces
        others = 1 if self.shared else q
        sizes = (self.num_trained, q, r, r, others)
        prompt, pair, trace_w, trace_l, other = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).unbind(1)
        chosen, rejected = self.pair_index
        quads = QuadBatch(
            prompt=prompt,
            chosen=chosen[pair],
            rejected=rejected[pair],
            chosen_trace=trace_w,
            rejected_trace=trace_l,
            empty_chosen=chosen[pair if self.shared else other],
            empty_rejected=rejected[pair if self.shared else other],
        )
        prob = self.trace_pairs[prompt, pair]
        prob = prob * self.trace_given_answer[prompt, quads.chosen, trace_w]
        prob = prob * self.trace_given_answer[prompt, quads.rejected, trace_l]
        return quads, prob if self.shared else prob * self.empty_pairs[prompt, other] * sizes[0]


def make_world(policy: Policy, seed: int, *, sampling: Sampling | None = None, shared: bool = False) -> World:
    """A random reference and a random teacher (rewards of standard deviation 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    reference = policy.initial(generator)
    rewards = 1.5 * torch.randn(policy.num_prompts, len(policy.answer_lengths), generator=generator, dtype=F64)
    how = sampling or Sampling()
    return World(policy=policy, reference=reference, rewards=rewards, sampling=how, shared=shared)


def drifted(world: World, sigma: float, seed: int) -> Tensor:
    """Parameters at a random distance from the reference: normal noise of standard deviation ``sigma`` on each."""
    noise = torch.randn(len(world.reference), generator=torch.Generator().manual_seed(seed), dtype=F64)
    return world.reference + sigma * noise


def _truncate(logits: Tensor, top_p: float) -> Tensor:
    """Log-probs of nucleus sampling: the likeliest choices until their sum reaches ``top_p``, renormalised."""
    logps = logits.log_softmax(-1)
    if top_p >= 1:
        return logps
    ranked, order = logps.exp().sort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(logps, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked < top_p)
    return logps.masked_fill(~keep, -torch.inf).log_softmax(-1)


def _pick(weights: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
