"""log pi(y | x) from several traces: the importance-weighted estimate that a pair's loss is given in place of one trace's.

In: joint log-probabilities of B responses and their partition into groups of the same answer. Out: values per group. The
laboratory enumerates the same estimate over all draws (:func:`bvpo.lab.responses.importance`). Knows no model and no view.

Shapes: B responses (or pairs of them), G groups, K members of the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo.method.losses import PairLogps, log_ratios


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceGroups:
    """``members_GK`` are positions among the B responses, padded with 0 where ``present_GK`` is false."""

    members_GK: Tensor
    present_GK: Tensor

    @classmethod
    def of(cls, names: Sequence[int]) -> TraceGroups:
        """One group per distinct name, in the order of first appearance; ``names`` [B]."""
        places: dict[int, list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(name, []).append(place)
        width = max(map(len, places.values()), default=0)
        members = [own + [0] * (width - len(own)) for own in places.values()]
        present = [[True] * len(own) + [False] * (width - len(own)) for own in places.values()]
        shape = (len(places), width)
        return cls(
            members_GK=torch.tensor(members, dtype=torch.long).reshape(shape),
            present_GK=torch.tensor(present, dtype=torch.bool).reshape(shape),
        )

    def to(self, device: torch.device) -> TraceGroups:
        return TraceGroups(
            members_GK=self.members_GK.to(device, non_blocking=True),
            present_GK=self.present_GK.to(device, non_blocking=True),
        )

    def mean(self, values_B: Tensor) -> Tensor:
        """The members' mean; [G]."""
        kept = torch.where(self.present_GK, values_B[self.members_GK], 0.0)
        return kept.sum(-1) / self.present_GK.sum(-1)

    def log_mean_exp(self, values_B: Tensor) -> Tensor:
        """log (1/K sum_k exp(value_k)) over each group's own K members; the value itself, to the bit, where K = 1; [G]."""
        kept = torch.where(self.present_GK, values_B[self.members_GK], -math.inf)
        return kept.logsumexp(-1) - self.present_GK.sum(-1).to(values_B.dtype).log()


def marginal_pairs(logps: PairLogps, groups: TraceGroups) -> PairLogps:
    """Pairs of answers from pairs of responses, for losses that are functions of reference log-ratios.

    With r_k from the reference given the answer, pi(y | x) / ref(y | x) = E[pi(r, y | x) / ref(r, y | x)]; the mean over the
    draws (a trace that was drawn twice counts twice) estimates the ratio. Its logarithm stands in ``chosen`` and
    ``rejected``, and the reference is 0: a loss sees the difference alone. Lengths are the traces' means.
    """
    chosen, rejected = log_ratios(logps)
    nothing = logps.chosen.new_zeros(len(groups.members_GK))
    return PairLogps(
        chosen=groups.log_mean_exp(chosen),
        rejected=groups.log_mean_exp(rejected),
        ref_chosen=nothing,
        ref_rejected=nothing,
        chosen_lengths=groups.mean(logps.chosen_lengths.to(nothing.dtype)),
        rejected_lengths=groups.mean(logps.rejected_lengths.to(nothing.dtype)),
    )


def mean_pairs(logps: PairLogps, groups: TraceGroups) -> PairLogps:
    """The members' means of everything, for metrics."""
    dtype = logps.chosen.dtype
    return PairLogps(
        chosen=groups.mean(logps.chosen),
        rejected=groups.mean(logps.rejected),
        ref_chosen=None if logps.ref_chosen is None else groups.mean(logps.ref_chosen),
        ref_rejected=None if logps.ref_rejected is None else groups.mean(logps.ref_rejected),
        chosen_lengths=groups.mean(logps.chosen_lengths.to(dtype)),
        rejected_lengths=groups.mean(logps.rejected_lengths.to(dtype)),
    )
