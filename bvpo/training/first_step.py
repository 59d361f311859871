"""What the first optimizer step of a run must show before any weight moves.

In: the log-prob sums of the step's micro-batches, its loss and its gradients. Out: nothing, or one line that says why
training would be silently wrong: a policy that does not compute what its reference does though both are the same weights,
a loss that does not start where it must, a gradient that is zero though the loss asks for one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bvpo.records import VIEWS
from bvpo.strict import UserError
from bvpo.training.objective import STATISTICS, Objective, Sums, Weights
from bvpo.training.steps import MicroBatch, StepBatch

# Nats by which a response of one token may differ between two runs of the same weights; n tokens may sqrt(n) times that.
_WIDE, _HALF = 2e-3, 0.1


class FirstStep:
    """Watches the micro-batches of one optimizer step and judges it. ``tolerance`` is None where the policy is not the
    reference to begin with: another reference was given, or an adapter that has been trained already."""

    def __init__(self, objective: Objective, tolerance: float | None) -> None:
        self._objective, self._tolerance = objective, tolerance
        self._gap, self._where = 0.0, ""
        self._longest = 1
        self._asks = False

    def watch(self, micro_batch: MicroBatch, sums: Sums, weights: Weights) -> None:
        """Takes note of one micro-batch."""
        if micro_batch.is_filler:
            return
        self._asks = self._asks or self._has_slope(micro_batch, sums, weights)
        if self._tolerance is None or sums.reference is None:
            return
        parts = (sums.policy.detach().double() - sums.reference.double()).abs()
        gaps = (parts / sums.lengths.clamp(min=1).sqrt()).amax(2).nan_to_num(nan=math.inf)
        self._longest = max(self._longest, int(sums.lengths.sum(2).max()))
        quad, branch = divmod(int(gaps.argmax()), gaps.shape[1])
        gap = float(gaps[quad, branch])
        if gap > self._gap:
            self._gap = gap
            self._where = (
                f"quad {micro_batch.quads[quad].id!r}, {VIEWS[branch // 2]} view, {('chosen', 'rejected')[branch % 2]} "
                f"response: {float(parts[quad, branch].sum()):.3g} nats over {int(sums.lengths[quad, branch].sum())} tokens"
            )

    def _has_slope(self, micro_batch: MicroBatch, sums: Sums, weights: Weights) -> bool:
        """Whether the loss wants another log-prob of any response; a pair of twins has gradients that cancel."""
        leaves = [sums.policy.detach().requires_grad_(), sums.kl.detach().requires_grad_()]
        cut = Sums(policy=leaves[0], reference=sums.reference, lengths=sums.lengths, kl=leaves[1])
        with torch.enable_grad():
            loss, _ = self._objective(cut, micro_batch.present_index, weights, micro_batch.trace_groups)
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for row, quad in enumerate(micro_batch.quads):
            for v in (0, 1):
                pair = quad.branches[2 * v : 2 * v + 2]
                if pair[0] is None or pair[1] is None or np.array_equal(pair[0].ids, pair[1].ids):
                    continue
                if any(bool((slope[row, 2 * v : 2 * v + 2].abs() > 1e-30).any()) for slope in slopes):
                    return True
        return False

    def judge(
        self, step: StepBatch, weights: Weights, found: Tensor, accelerator: Any, model: nn.Module | None
    ) -> bool:
        """Whether the step has shown all there is to see. ``found`` [1 + 2 * STATISTICS] is this rank's loss share and
        statistics; ``model`` holds the gradients, None where they cannot be read."""
        has_gradient = model is not None and _has_gradient(model)
        is_apart = self._tolerance is not None and self._gap > self._tolerance
        flags = found.new_tensor([self._asks, has_gradient, is_apart])
        total = accelerator.reduce(torch.cat([found, flags]).double(), reduction="sum").tolist()
        asks, has_gradient, is_apart = (bool(value) for value in total[-3:])
        if is_apart:
            raise UserError(
                "the policy does not compute what the reference does, though it has not been trained yet ("
                f"{self._where or 'seen by another process'}){self._start(step, weights, total)}: the model depends on its "
                "batch, or the adapter is not zero at the start (pissa, loftq); take another layout, or give ref_model"
            )
        if self._tolerance is not None:
            self._require_start(step, weights, total)
        if model is not None and asks and not has_gradient:
            raise UserError(
                "the gradient is exactly zero in all trained parameters, though the loss asks for a change: the model's "
                "forward pass does not carry gradients here (a quantised base on a CPU, or a part under no_grad)"
            )
        return has_gradient or model is None

    def _start(self, step: StepBatch, weights: Weights, total: list[float]) -> str:
        expected = self._expected(step, weights, total)
        return "" if expected is None else f", the loss is {total[0]:.4f} and not {expected:.4f}"

    def _expected(self, step: StepBatch, weights: Weights, total: list[float]) -> float | None:
        """alpha * L_trace + (1 - alpha) * L_empty + anchor, with both losses as the registry declares them."""
        start = self._objective.loss_at_reference
        if start is None:
            return None
        anchor = total[1 + VIEWS.index("trace") * len(STATISTICS) + STATISTICS.index("anchor")]
        return start * sum(weights.views[view] * step.pairs[view] for view in VIEWS) + weights.anchor * anchor

    def _require_start(self, step: StepBatch, weights: Weights, total: list[float]) -> None:
        expected = self._expected(step, weights, total)
        if expected is None:
            return
        allowed = self._objective.move_at_reference(2 * self._gap * math.sqrt(2 * self._longest), self._longest)
        if not abs(total[0] - expected) <= allowed + 1e-4 * max(1.0, abs(expected)):
            raise UserError(
                f"the first loss is {total[0]:.6g}, but with policy = reference it must be {expected:.6g}: the mixture of "
                "the views is not what the settings say; please report this"
            )


def tolerance(model: nn.Module, mixed_precision: str, device: torch.device) -> float:
    """By precision: nats per square root of a response's tokens."""
    is_half = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    is_tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return _HALF if is_half or is_tf32 or mixed_precision != "no" else _WIDE


def starts_at_reference(model: Any, peft_config: Any) -> bool:
    """Whether an adapter, if there is one, changes nothing yet: asked for as such, or one that was given and is zero."""
    if not hasattr(model, "peft_config"):
        return True
    if peft_config is not None:
        names = ("init_lora_weights", "init_weights", "init_ia3_weights")
        return all(getattr(peft_config, name, True) is not False for name in names)
    matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(matrices) and not any(bool(p.detach().count_nonzero()) for p in matrices)


def _has_gradient(model: nn.Module) -> bool:
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        if gradient is not None and bool(getattr(gradient, "_local_tensor", gradient).count_nonzero()):
            return True
    return False
