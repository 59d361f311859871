"""From log-prob sums to the training loss: L = alpha * L_trace + (1 - alpha) * L_empty (BVPO eq. 2), plus the anchor.

In: policy and reference sums per branch and part, scored lengths, and the weight of one pair of each view. Out: the
micro-batch's share of the step's loss, and statistics as one tensor that stays on the device until the next log entry.
This is where the views, the trace estimator, the registry's losses and the anchor meet; it runs no model.

Index legend: Q quads; branches 0..3 = trace chosen, trace rejected, empty chosen, empty rejected; parts 0 = trace
(through the closing marker), 1 = answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bvpo.config import AnchorConfig, LossConfig
from bvpo.method.losses import PairLogps, nll_anchor, resolve_loss
from bvpo.method.mixing import Weights, mix_views
from bvpo.method.traces import TraceGroups, marginal_pairs, mean_pairs
from bvpo.records import VIEWS, View
from bvpo.strict import UserError
from bvpo.training.policy import ANSWER, TRACE

TraceEstimator = Literal["joint", "answer", "traces"]

# Sums over pairs, per view; "count" turns them into means.
STATISTICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "lengths/chosen",
    "lengths/rejected",
    "anchor",
    "count",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Log-prob sums of Q quads: policy [Q, 4, 2], reference [Q, 4, 2] or None, lengths [Q, 4, 2], KL [Q, 4]."""

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    kl: Tensor


class Objective:
    """The loss of a micro-batch. Built once per run: unknown names and unused parameters fail here, before training."""

    def __init__(self, loss: LossConfig, estimator: TraceEstimator, anchor: AnchorConfig) -> None:
        self._loss, self._hyperparameters = resolve_loss(loss)
        self._estimator = estimator
        self._anchor = anchor
        self.needs_reference = self._loss.needs_reference
        self.needs_kl = anchor.kind == "kl"
        if estimator == "traces" and not self.needs_reference:
            raise UserError(
                f"trace_estimator: 'traces' weighs traces by their probability over the reference's, and loss {loss.name!r} "
                "has no reference; use another loss, or 'joint'"
            )

    @classmethod
    def of(cls, args: Any, anchor: AnchorConfig | None = None) -> Objective:
        """That of a trainer's arguments, with their anchor or another."""
        return cls(args.loss_config(), args.trace_estimator, anchor or args.anchor_config())

    @property
    def loss_at_reference(self) -> float | None:
        """The loss of every pair at policy = reference, where the registry declares one."""
        declared = self._loss.at_reference
        return None if declared is None else declared(**self._hyperparameters)

    def move_at_reference(self, nats: float, length: int) -> float:
        """How far the loss of a pair moves from there when its log-ratio margin is off by that much."""
        half = torch.tensor([nats / 2, -nats / 2], dtype=torch.float64)
        zero, lengths = torch.zeros_like(half), torch.full((2,), length)
        pair = PairLogps(
            chosen=half,
            rejected=-half,
            ref_chosen=zero,
            ref_rejected=zero,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
        )
        start = self.loss_at_reference
        assert start is not None
        return float((self._loss.fn(pair, **self._hyperparameters).loss - start).abs().max())

    def __call__(
        self, sums: Sums, present: tuple[Tensor, Tensor], weights: Weights, groups: TraceGroups | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the weighted loss (a scalar) and the statistics [2, len(STATISTICS)] as sums over pairs.

        ``groups`` says which of the quads with a trace pair (``present[0]``) hold traces of the same answers; without it
        each stands for itself. Only the estimator 'traces' reads it.
        """
        statistics = sums.policy.new_zeros(len(VIEWS), len(STATISTICS), requires_grad=False)
        losses: dict[View, Tensor] = {}
        anchor_sum: Tensor | None = None
        for v, view in enumerate(VIEWS):
            if len(present[v]):
                losses[view], anchor, statistics[v] = self._view(sums, v, view, present[v], groups)
                anchor_sum = anchor_sum if anchor is None else anchor
        # Adding 0 * sum keeps every rank's graph connected when a micro-batch has no pair of some view.
        return 0.0 * sums.policy.sum() + mix_views(losses, weights, anchor_sum), statistics

    def _view(
        self, sums: Sums, v: int, view: View, index: Tensor, groups: TraceGroups | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sum of the pairs' losses, sum of the anchor's terms where the view has one, and statistics."""
        chosen, rejected = 2 * v, 2 * v + 1
        policy, lengths = sums.policy[index], sums.lengths[index]
        reference = None if sums.reference is None else sums.reference[index].to(policy.dtype)
        logps = PairLogps(
            chosen=self._scored(policy[:, chosen], view),
            rejected=self._scored(policy[:, rejected], view),
            ref_chosen=None if reference is None else self._scored(reference[:, chosen], view),
            ref_rejected=None if reference is None else self._scored(reference[:, rejected], view),
            chosen_lengths=self._scored(lengths[:, chosen], view),
            rejected_lengths=self._scored(lengths[:, rejected], view),
        )
        anchor = self._anchor_terms(policy[:, chosen], sums.kl[index], view)
        compared = logps
        if view == "trace" and self._estimator == "traces":
            groups = groups or TraceGroups.of(range(len(index))).to(index.device)
            compared, logps = marginal_pairs(logps, groups), mean_pairs(logps, groups)
            anchor = None if anchor is None else groups.mean(anchor)
        result = self._loss.fn(compared, **self._hyperparameters)
        anchor_sum = None if anchor is None else anchor.sum()
        return result.loss.sum(), anchor_sum, self._statistics(logps, result, anchor)

    def _scored(self, parts: Tensor, view: View) -> Tensor:
        """[B, 2] part sums -> [B] sums over the tokens that the view's log-ratio is made of."""
        if view == "trace" and self._estimator == "answer":
            return parts[:, ANSWER]
        return parts[:, TRACE] + parts[:, ANSWER]

    def _anchor_terms(self, chosen: Tensor, kl: Tensor, view: View) -> Tensor | None:
        """One anchor value per trace pair: NLL of the chosen response, or KL summed over both responses' tokens."""
        if view != "trace" or self._anchor.kind == "none":
            return None
        if self._anchor.kind == "nll":
            return nll_anchor(chosen[:, TRACE], chosen[:, ANSWER], self._anchor.tokens)
        return kl[:, 0] + kl[:, 1]

    @staticmethod
    def _statistics(logps: PairLogps, result, anchor: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        margins = result.chosen_rewards - result.rejected_rewards
        nothing = torch.zeros_like(logps.chosen)
        kl = nothing
        if logps.ref_chosen is not None and logps.ref_rejected is not None:
            # Both responses were sampled from the reference, so the mean of -(log-ratio) estimates KL(reference || policy).
            kl = (logps.ref_chosen - logps.chosen + logps.ref_rejected - logps.rejected) / 2
        columns = [
            result.loss,
            result.chosen_rewards,
            result.rejected_rewards,
            margins,
            # Ties count half, so that an untrained policy reads 0.5 and not 0.
            (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype),
            logps.chosen,
            logps.rejected,
            kl,
            logps.chosen_lengths.to(margins.dtype),
            logps.rejected_lengths.to(margins.dtype),
            nothing if anchor is None else anchor,
            torch.ones_like(margins),
        ]
        return torch.stack([column.detach().sum() for column in columns])


def describe(statistics: Tensor) -> dict[str, float]:
    """Means per view from summed statistics [2, K]; one device synchronisation. Views without pairs are left out."""
    rows = statistics.tolist()
    metrics: dict[str, float] = {}
    for view, row in zip(VIEWS, rows, strict=True):
        values = dict(zip(STATISTICS, row, strict=True))
        count = values.pop("count")
        if not count:
            continue
        metrics |= {f"{view}/{name}": value / count for name, value in values.items()}
        metrics[f"{view}/pairs"] = count
    return metrics
