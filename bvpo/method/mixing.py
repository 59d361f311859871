"""The weight between the two views, and how their losses become one number: in training, evaluation and laboratory.

In: per-view sums of pair losses (local to one micro-batch on one rank), the *global* pair counts of the optimizer step,
and alpha. Out: this micro-batch's share of  L_c = alpha * L_t + (1 - alpha) * L_e  (BVPO, arXiv 2510.05095, eq. 2), plus
the anchor's; summed over micro-batches and ranks the shares are exactly L_c. Nothing here communicates, counts or steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bvpo.config import AlphaConfig, validate
from bvpo.records import VIEWS, View
from bvpo.strict import UserError, did_you_mean


class AlphaSource(Protocol):
    """Where the trainer gets alpha from: a schedule, or an online estimate.

    The trainer asks for ``value`` before each optimizer step and hands what a look at the gradients found to ``observe``.
    """

    def value(self, progress: float) -> float:
        """Alpha in [0, 1] for one optimizer step; ``progress`` is 0 at the first step of the run and 1 at the last."""
        ...

    def observe(self, ingredients: Mapping[str, float]) -> None:
        """Take note of one look at the gradients: the ``noise/`` numbers, by the names that docs/training.md lists."""
        ...


@dataclass(frozen=True, slots=True)
class ScheduledAlpha:
    """Alpha from the configured schedule alone; what it observes changes nothing."""

    config: AlphaConfig

    def __post_init__(self) -> None:
        check_alpha(self.config)

    def value(self, progress: float) -> float:
        return alpha_at(self.config, progress)

    def observe(self, ingredients: Mapping[str, float]) -> None:
        """A schedule is fixed in advance."""


# share of the way from ``value`` to ``end`` that is behind us when ``progress`` of the run is
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


def alpha_at(config: AlphaConfig, progress: float) -> float:
    """Scheduled alpha; ``progress`` = step / (steps - 1), so the first step gets ``value`` and the last one ``end``."""
    check_alpha(config)
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: got {progress!r}, expected 0 (first step) to 1 (last step)")
    end = config.value if config.end is None else config.end
    way = _SCHEDULES[config.schedule](progress)
    # this form, unlike value + way * (end - value), hits both ends exactly
    return (1 - way) * config.value + way * end


def check_alpha(config: AlphaConfig) -> None:
    """Refuse an unknown schedule, a weight outside [0, 1], and an ``end`` that the schedule lacks or would not read."""
    if config.schedule == "auto":
        raise UserError("field 'alpha.schedule': 'auto' is estimated during training and has no value in advance")
    if config.schedule not in _SCHEDULES:
        raise UserError(f"field 'alpha.schedule': no {config.schedule!r}{did_you_mean(config.schedule, _SCHEDULES)}")
    validate(config)


def view_weight(alpha: float, view: View, count: int) -> float:
    """The factor on one pair's loss: its view's share of the mixture over the view's global pair count.

    0 for a view without pairs in this step; the other view's share stays as it is (docs/losses.md, "Empty views").
    """
    assert 0 <= alpha <= 1, f"alpha {alpha} outside [0, 1]"
    assert view in VIEWS, f"unknown view {view!r}"
    assert count >= 0, f"negative pair count {count}"
    share = alpha if view == "trace" else 1 - alpha  # BVPO eq. 2
    return share / count if count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What one pair counts: alpha / N_trace and (1 - alpha) / N_empty with the step's global pair counts; and what the
    anchor of one trace pair does."""

    views: dict[View, float]
    anchor: float

    @classmethod
    def of(cls, alpha: float, pairs: Mapping[View, int], anchor_weight: float = 0.0) -> Weights:
        num_trace = pairs["trace"]
        return cls(
            views={view: view_weight(alpha, view, pairs[view]) for view in VIEWS},
            anchor=anchor_weight / num_trace if num_trace else 0.0,
        )


def mix_views(loss_sums: Mapping[View, Tensor], weights: Weights, anchor_sum: Tensor | None = None) -> Tensor:
    """This micro-batch's share of L_c: the sum over views of weight * local sum of pair losses; a scalar for scalars.

    ``loss_sums``: the local sums; a view without local pairs may be left out. ``anchor_sum``: the anchor's over the local
    trace pairs. A view of weight 0 still hangs on the graph (its gradient is exactly zero), so that every rank runs the
    same backward passes.
    """
    assert set(loss_sums) <= set(VIEWS), f"unknown views {sorted(set(loss_sums) - set(VIEWS))}"
    parts: list[Tensor] = []
    for view in VIEWS:  # a fixed order, so that the sum's rounding does not depend on the caller's dict
        if view in loss_sums:
            parts.append(weights.views[view] * loss_sums[view])
        if view == "trace" and anchor_sum is not None:
            parts.append(weights.anchor * anchor_sum)
    return sum(parts[1:], start=parts[0]) if parts else torch.zeros(())
