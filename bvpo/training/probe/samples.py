"""One look at the gradients of some quads: each view of each quad by itself, kept as sketches.

In: the model as a step finds it, and the data set's quads to look at. Out: :class:`Rows`, the same on all ranks. Nothing is
left behind: no gradient, no random number drawn. Sharded models (FSDP2) cannot tell ranks' gradients apart, so there a row
is the mean over one quad per rank; elsewhere ranks share the quads out, and the rows do not depend on how many there are.
What the rows say about noise is :mod:`bvpo.method.online_alpha`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from bvpo.records import VIEWS, View
from bvpo.training.gradients import StepRunner, parts
from bvpo.training.layout import NUM_BRANCHES
from bvpo.training.objective import Weights
from bvpo.training.probe.sketching import BUCKETS, CountSketch
from bvpo.training.steps import StepDataset, make_micro_batch
from bvpo.training.tokens import TokenQuad

LEAST_ROWS, MOST_QUADS = 4, 32
"""Rows of a look where the step has as many quads, and quads of a look at most; between them half of the step."""
_ONE_PAIR = Weights(views={"trace": 1.0, "empty": 1.0}, anchor=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a look runs: ``views`` of ``quads`` (the data set's, by group), ``quads_per_row`` consecutive ones as one row.
    ``siblings`` are pairs (row, quad with another trace pair of the row's prompt)."""

    views: tuple[View, ...]
    quads: tuple[int, ...]
    quads_per_row: int = 1
    siblings: tuple[tuple[int, int], ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.quads) // self.quads_per_row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Sketches [rows, buckets] per view, those of the siblings' trace pairs, and each row's mean |log-ratio to the
    reference| of its trace-view responses [rows] (0 without a reference)."""

    sketches: dict[View, npt.NDArray[np.float64]]
    siblings: npt.NDArray[np.float64]
    drift: npt.NDArray[np.float64]


def choose(
    indices: Sequence[int], has_view: npt.NDArray[np.bool_], quads_per_row: int, rng: np.random.Generator
) -> Plan | None:
    """A random part of a step's quads: of those with both views or, where there are hardly any, with one.
    None where fewer than two rows come together."""
    present = has_view[list(indices)]
    wanted = max(LEAST_ROWS * quads_per_row, min(MOST_QUADS, len(indices) // 2))
    wishes: tuple[tuple[View, ...], ...] = (VIEWS, ("trace",), ("empty",))
    for views in wishes:
        found = np.asarray(indices)[present[:, [VIEWS.index(view) for view in views]].all(axis=1)]
        num = min(wanted, len(found)) // quads_per_row * quads_per_row
        if num >= 2 * quads_per_row:
            quads = tuple(int(i) for i in rng.permutation(found)[:num])
            return Plan(views=views, quads=quads, quads_per_row=quads_per_row)
    return None


def same_prompt(steps: StepDataset, quad: int) -> int | None:
    """A neighbour of this quad in the data set with another trace pair of its prompt; pairing writes them side by side."""
    tokens, has_view = steps.tokens, steps.tokens.group_has_view

    def prefix(i: int) -> npt.NDArray[np.int32]:
        return tokens[int(tokens.group_starts[i])].prefix_ids

    near = [i for i in (quad + 1, quad - 1) if 0 <= i < tokens.num_groups and has_view[i, 0]]
    return next((i for i in near if np.array_equal(prefix(i), prefix(quad))), None)


def take(
    model: nn.Module,
    runner: StepRunner,
    steps: StepDataset,
    plan: Plan,
    seed: Sequence[int],
    buckets: int = BUCKETS,
) -> Rows:
    """Runs the plan. Called on all ranks alike; rows of the same ``seed`` (the sketches' signs) can be compared."""
    accelerator, sharded = runner.accelerator, is_sharded(model)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    assert not (sharded and plan.siblings), "a row of several quads has no sibling"
    taker = _Taker.of(model, runner, (*seed, rank) if sharded else seed, buckets)
    mine = plan.quads[rank::ranks] if sharded else plan.quads
    wanted = [(quad, plan.views) for quad in mine] + [(quad, ("trace",)) for _, quad in plan.siblings]
    rows = torch.zeros(len(wanted), 2 * buckets + 1, dtype=taker.sketch.dtype, device=accelerator.device)
    with _unchanged(taker.params, accelerator.device):
        for i, (quad, views) in enumerate(wanted):
            if sharded or i % ranks == rank:
                rows[i] = taker.row(steps, quad, views)
    if ranks > 1:  # shards of one gradient, or rows that only one rank has filled
        rows = accelerator.reduce(rows, reduction="sum")
    found = rows.double().cpu().numpy()  # type: ignore[union-attr]
    main = found[: plan.num_rows]
    where = {"trace": slice(0, buckets), "empty": slice(buckets, 2 * buckets)}
    return Rows(
        sketches={view: main[:, where[view]] for view in plan.views},
        siblings=found[plan.num_rows :, where["trace"]],
        drift=main[:, -1] / plan.quads_per_row,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taker:
    """Gradients of single pairs with respect to what is trained."""

    model: nn.Module
    runner: StepRunner
    params: list[nn.Parameter]
    sketch: CountSketch

    @classmethod
    def of(cls, model: nn.Module, runner: StepRunner, seed: Sequence[int], buckets: int) -> _Taker:
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whose hooks would wait for a synchronisation that never comes
        params = [p for p in model.parameters() if p.requires_grad]
        wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        sketch = CountSketch(seed, runner.accelerator.device, wide, buckets)
        return cls(model=model, runner=runner, params=params, sketch=sketch)

    def row(self, steps: StepDataset, index: int, views: Sequence[View]) -> Tensor:
        """[2 * buckets + 1]: sketches of the trace and of the empty pair's gradient, and the drift."""
        size = self.sketch.buckets
        values = torch.zeros(2 * size + 1, dtype=self.sketch.dtype, device=self.runner.accelerator.device)
        for view in views:
            v = VIEWS.index(view)
            sketch, drift = self._pair(steps, index, v)
            values[v * size : (v + 1) * size] = sketch
            if view == "trace" and drift is not None:
                values[-1] = drift
        return values

    def _pair(self, steps: StepDataset, index: int, v: int) -> tuple[Tensor, Tensor | None]:
        rows = [row for row in steps.rows([index])[0] if steps.tokens.has_view[row, v]]
        quads = [_only(steps.tokens[row], v) for row in rows]
        reference = None if steps.reference is None else steps.reference[rows]
        single = make_micro_batch(quads, self.runner.layout, reference, groups=[index] * len(rows))
        sums, scalars = parts(self.runner, self.model, single.to(self.runner.accelerator.device), _ONE_PAIR)
        sketch = torch.stack([self.sketch(self._gradient(scalar)) for scalar in scalars]).sum(0)
        if sums.reference is None:
            return sketch, None
        ratios = (sums.policy.detach() - sums.reference)[:, 2 * v : 2 * v + 2].sum(-1)
        return sketch, ratios.abs().mean()

    def _gradient(self, scalar: Tensor) -> Sequence[Tensor]:
        if not isinstance(self.params[0], DTensor):
            # Not backward(): that would run the hooks of DDP and of optimizers that step inside of it.
            return torch.autograd.grad(scalar, self.params, allow_unused=True, materialize_grads=True)
        scalar.backward()  # FSDP2 reduces gradients, to means over ranks, in hooks of the backward pass alone
        shards: list[Any] = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for parameter in self.params:
            parameter.grad = None
        return [shard.to_local() for shard in shards]


def _only(quad: TokenQuad, v: int) -> TokenQuad:
    branches: Any = tuple(quad.branches[b] if b // 2 == v else None for b in range(NUM_BRANCHES))
    return dataclasses.replace(quad, branches=branches)


@contextlib.contextmanager
def _unchanged(params: Sequence[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Puts random states and gradients back."""
    gradients = [p.grad for p in params]
    for parameter in params:
        parameter.grad = None
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (or another user of DTensors) holds the trained parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def why_impossible(model: nn.Module, runner: StepRunner) -> str | None:
    """Set-ups whose single gradients cannot be had without touching the training, or have not been shown to be right."""
    accelerator = runner.accelerator
    if accelerator.scaler is not None:
        return "fp16 scales the loss, and single pairs would overflow or vanish in it; use bf16"
    if not is_sharded(model):
        if runner.is_sharded:
            return "gradients belong to DeepSpeed or FSDP1; use DDP or FSDP2"
        if any(_recomputes_reentrantly(module) for module in model.modules()):
            return "reentrant gradient checkpointing cannot differentiate one loss by itself; use use_reentrant = False"
        return None
    for parameter in model.parameters():
        if parameter.requires_grad and not _is_plain_shard(parameter, accelerator.num_processes):
            return "parameters are replicated or sharded along several dimensions; plain FSDP2 over all ranks works"
    return None


def _recomputes_reentrantly(module: nn.Module) -> bool:
    call: Any = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(module, "gradient_checkpointing", False) and bool(getattr(call, "keywords", {}).get("use_reentrant"))


def _is_plain_shard(parameter: Any, ranks: int) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size() == ranks
        and len(parameter.placements) == 1
        and isinstance(parameter.placements[0], Shard)
    )
