"""Forward and backward over the micro-batches of one optimizer step.

In: the (possibly wrapped) model, a step's micro-batches, the weight of one pair of each view. Out: gradients on the
model, the step's loss share and statistics. Two ways to hold the graph, with equal results: a micro-batch at once, or one
sequence at a time with cached gradients. Nothing here steps an optimizer or logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from bvpo.strict import UserError
from bvpo.training import policy, reference
from bvpo.training.layout import split_branches
from bvpo.training.objective import Objective, Sums, Weights
from bvpo.training.policy import ANSWER, KL, branch_outputs
from bvpo.training.steps import MicroBatch, StepBatch, make_micro_batch
from bvpo.training.tokens import TokenQuad

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRunner:
    """Everything a step needs besides model and data. ``reference_model`` is None unless a reference is held; ``watch``
    sees the sums of every micro-batch."""

    objective: Objective
    accelerator: Accelerator
    autocast: Callable[..., contextlib.AbstractContextManager[Any]]
    reference_model: Any
    layout: str
    backward: str
    chunk: int
    anchor_tokens: Any
    is_sharded: bool
    watch: Callable[[MicroBatch, Sums, Weights], None] | None = None

    def run(self, model: nn.Module, step: StepBatch, weights: Weights) -> tuple[Tensor, Tensor, int]:
        """Accumulates the step's gradients; returns this rank's loss share, statistics and processed tokens."""
        losses: list[Tensor] = []
        statistics: list[Tensor] = []
        num_tokens = 0
        for is_last, micro_batch in mark_last(step.micro_batches):
            loss, sums = _BACKWARDS[self.backward](
                self, model, micro_batch.to(self.accelerator.device), weights, is_last
            )
            losses.append(loss)
            statistics.append(torch.zeros_like(sums) if micro_batch.is_filler else sums)
            num_tokens += 0 if micro_batch.is_filler else micro_batch.layout.num_tokens
        return torch.stack(losses).sum(), torch.stack(statistics).sum(0), num_tokens

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Policy and reference log-prob sums of a micro-batch; only the policy's carry gradients."""
        layout = micro_batch.layout
        request: dict[str, Any] = {"chunk": self.chunk}
        held = self.reference_model if self.reference_model is not None else model
        bare = self.accelerator.unwrap_model(held)
        if self.objective.needs_kl:
            selected, sizes = policy.select_rows(layout, self.anchor_tokens)
            selected = selected.to(layout.rows_N.device)
            with reference.frozen(held), reference.adapter_off(bare):
                rows = reference.reference_rows(held, bare, layout, selected)
            request |= {"selected": selected, "selected_sizes": sizes, "reference": rows}
        ref_sums = micro_batch.reference_Q42
        if ref_sums is None and self.objective.needs_reference:
            with reference.frozen(held), reference.adapter_off(bare):
                ref_sums = reference.reference_sums(held, layout, self.chunk)
        out = branch_outputs(model, layout, **request)
        if torch.is_grad_enabled() and not out.requires_grad:
            raise UserError(
                "model: no gradient reaches its log-probs; a part of it runs under no_grad, or all is frozen"
            )
        return Sums(policy=out[..., : ANSWER + 1], reference=ref_sums, lengths=micro_batch.lengths_Q42, kl=out[..., KL])

    def loss(self, model: nn.Module, micro_batch: MicroBatch, weights: Weights) -> tuple[Tensor, Tensor, Sums]:
        """The micro-batch's share of the step's loss, its statistics, and the sums they came from."""
        with self.autocast():
            sums = self.sums(model, micro_batch)
        if self.watch is not None:
            self.watch(micro_batch, sums, weights)
        loss, statistics = self.objective(sums, micro_batch.present_index, weights, micro_batch.trace_groups)
        return (0.0 * loss if micro_batch.is_filler else loss), statistics, sums

    def send_back(self, loss: Tensor, *, is_last: bool) -> None:
        """Backward; ranks synchronise in the last one of a step."""
        # DDP and FSDP average over ranks; our weights already hold global counts, so undo the average.
        scaled = loss * self.accelerator.num_processes
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        kwargs = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        self.accelerator.backward(scaled, **kwargs)

    def synchronising(self, model: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Where gradients of a backward are kept local, if they may be."""
        eager = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        # Unsynchronised FSDP would keep whole gradients on every device: reduce each micro-batch instead.
        if is_last or eager or self.is_sharded:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)


def _backward_micro_batch(
    runner: StepRunner, model: nn.Module, micro_batch: MicroBatch, weights: Weights, is_last: bool
) -> tuple[Tensor, Tensor]:
    """One graph for the micro-batch."""
    with runner.synchronising(model, is_last=is_last):
        loss, statistics, _ = runner.loss(model, micro_batch, weights)
        runner.send_back(loss, is_last=is_last)
    return loss.detach(), statistics


def _backward_sequence(
    runner: StepRunner, model: nn.Module, micro_batch: MicroBatch, weights: Weights, is_last: bool
) -> tuple[Tensor, Tensor]:
    """One graph per sequence: the loss couples sequences only through a few sums, so their gradients are cached.

    Pass 1 finds dL/d(sums) without a graph; pass 2 runs each branch alone and sends its share of that gradient back.
    """
    cut = _cut(runner, model, micro_batch, weights)
    for is_last_branch, (row, single) in mark_last(cut.singles):
        final = is_last and is_last_branch
        with runner.synchronising(model, is_last=final):
            runner.send_back(cut.share(runner, model, row, single), is_last=final)
    return cut.loss.detach(), cut.statistics


_BACKWARDS = {"micro_batch": _backward_micro_batch, "sequence": _backward_sequence}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cut:
    """A micro-batch's loss, cut at the sums of its branches: their values, and the loss's derivatives by them. ``singles``
    are the branches, each with the position of its quad."""

    loss: Tensor
    statistics: Tensor
    sums: Sums
    d_policy: Tensor
    d_kl: Tensor
    singles: Sequence[tuple[int, TokenQuad]]

    def share(self, runner: StepRunner, model: nn.Module, row: int, single: TokenQuad) -> Tensor:
        """A scalar with the gradient that the loss has through this branch; its graph holds one sequence."""
        alone = make_micro_batch([single], runner.layout, None).to(self.d_policy.device)
        # Reference sums are not needed again; zeros keep a held reference from running.
        d_policy, d_kl = self.d_policy[row : row + 1], self.d_kl[row : row + 1]
        alone = dataclasses.replace(alone, reference_Q42=torch.zeros_like(d_policy))
        with runner.autocast():
            own = runner.sums(model, alone)
        return (own.policy * d_policy).sum() + (own.kl * d_kl).sum()


def _cut(runner: StepRunner, model: nn.Module, micro_batch: MicroBatch, weights: Weights) -> _Cut:
    with torch.no_grad():
        _, _, sums = runner.loss(model, micro_batch, weights)
    leaves = [sums.policy.detach().requires_grad_(), sums.kl.detach().requires_grad_()]
    leaf_sums = dataclasses.replace(sums, policy=leaves[0], kl=leaves[1])
    loss, statistics = runner.objective(leaf_sums, micro_batch.present_index, weights, micro_batch.trace_groups)
    d_policy, d_kl = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    if micro_batch.is_filler:
        loss, d_policy, d_kl = 0.0 * loss, 0.0 * d_policy, 0.0 * d_kl
    singles = [(row, single) for row, quad in enumerate(micro_batch.quads) for single in split_branches(quad)]
    return _Cut(loss=loss, statistics=statistics, sums=sums, d_policy=d_policy, d_kl=d_kl, singles=singles)


def parts(
    runner: StepRunner, model: nn.Module, micro_batch: MicroBatch, weights: Weights
) -> tuple[Sums, Iterator[Tensor]]:
    """The micro-batch's log-prob sums, and scalars whose gradients add up to its loss's: what a step would send back, for
    those who want the gradient and not the step. At most one graph is alive, as large as the step's own."""
    if runner.backward == "sequence":
        cut = _cut(runner, model, micro_batch, weights)
        return cut.sums, (cut.share(runner, model, row, single) for row, single in cut.singles)
    loss, _, sums = runner.loss(model, micro_batch, weights)
    return sums, iter([loss])


def mark_last(items: Sequence[T]) -> Iterator[tuple[bool, T]]:
    """(is this the last one?, item)."""
    final = len(items) - 1
    for i, item in enumerate(items):
        yield i == final, item
