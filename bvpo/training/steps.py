"""The batches of training: one item per optimizer step, made of micro-batches that are ready for the model.

In: a token dataset, reference values aligned with it, and an epoch plan. Out: :class:`StepBatch` items, one per optimizer
step and rank. A step knows the *global* number of pairs of each view, so no rank has to ask the others before it can
weigh its own. Ranks with fewer micro-batches get fillers of weight zero, because collective operations must match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bvpo.method.traces import TraceGroups
from bvpo.records import View
from bvpo.training.batching import EpochPlan, plan_epoch
from bvpo.training.layout import LAYOUTS, NUM_BRANCHES, Layout
from bvpo.training.tokens import TokenDataset, TokenQuad


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Q quads in one layout. ``present_index[v]`` are the positions of the quads that have view v (0 trace, 1 empty).

    ``reference_Q42`` holds cached reference sums (NaN where a branch is missing) or is None; ``lengths_Q42`` counts
    scored tokens. ``trace_groups`` says which of ``present_index[0]`` are traces of the same answers; None where none are.
    ``is_filler`` batches only keep ranks in step and carry no weight.
    """

    quads: tuple[TokenQuad, ...]
    layout: Layout
    present_index: tuple[Tensor, Tensor]
    lengths_Q42: Tensor
    reference_Q42: Tensor | None
    trace_groups: TraceGroups | None = None
    is_filler: bool = False

    def to(self, device: torch.device) -> MicroBatch:
        reference = self.reference_Q42
        return replace(
            self,
            layout=self.layout.to(device),
            present_index=tuple(index.to(device, non_blocking=True) for index in self.present_index),  # type: ignore[arg-type]
            lengths_Q42=self.lengths_Q42.to(device, non_blocking=True),
            reference_Q42=None if reference is None else reference.to(device, non_blocking=True),
            trace_groups=None if self.trace_groups is None else self.trace_groups.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One rank's share of one optimizer step; ``pairs`` are global counts, ``indices`` the data set's quads (groups, where
    some have several traces) of the whole step, over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    pairs: dict[View, int]
    num_quads: int
    indices: tuple[int, ...]


def make_micro_batch(
    quads: Sequence[TokenQuad],
    layout: str,
    reference: np.ndarray | None,
    is_filler: bool = False,
    groups: Sequence[int] | None = None,
) -> MicroBatch:
    """``groups`` [Q] names the group of each quad; without it none has several traces."""
    lengths = np.zeros((len(quads), NUM_BRANCHES, 2), dtype=np.int64)
    present: tuple[list[int], list[int]] = ([], [])
    for q, quad in enumerate(quads):
        for b, branch in enumerate(quad.branches):
            if branch is not None:
                lengths[q, b] = branch.answer_from - branch.scored_from, len(branch.ids) - branch.answer_from
        for v in (0, 1):
            if quad.branches[2 * v] is not None:
                present[v].append(q)
    return MicroBatch(
        quads=tuple(quads),
        layout=LAYOUTS[layout](quads),
        present_index=(torch.tensor(present[0], dtype=torch.long), torch.tensor(present[1], dtype=torch.long)),
        lengths_Q42=torch.from_numpy(lengths),
        reference_Q42=None if reference is None else torch.from_numpy(np.nan_to_num(reference)),
        trace_groups=None if groups is None else TraceGroups.of([groups[q] for q in present[0]]),
        is_filler=is_filler,
    )


class StepDataset(Dataset[dict[str, StepBatch]]):
    """Item i is this rank's share of optimizer step i of the current epoch. ``set_epoch`` reshuffles."""

    def __init__(
        self,
        tokens: TokenDataset,
        *,
        layout: str,
        quads_per_step: int,
        tokens_per_micro_batch: int | None,
        world_size: int,
        rank: int,
        seed: int,
        last_step: Any,
    ) -> None:
        self.tokens = tokens
        self.layout = layout
        self.rank = rank
        self.reference: np.ndarray | None = None  # [N, 4, 2], set once the reference pass is done
        self._plan_args = {
            "quads_per_step": quads_per_step,
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "world_size": world_size,
            "seed": seed,
            "last_step": last_step,
        }
        self.plan: EpochPlan
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        num_tokens, num_rows = self.tokens.run_tokens(self.layout)
        views = self.tokens.group_has_view
        self.plan = plan_epoch(num_tokens, views, epoch=epoch, num_rows=num_rows, **self._plan_args)

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, index: int) -> dict[str, StepBatch]:
        step = self.plan.step(index)
        shares = step.micro_batches[self.rank]
        fallback = self.plan.quads(index)[:1]
        # Fillers first: the last backward of a step is the one that synchronises gradients.
        shares = tuple(sorted(shares, key=len)) if () in shares else shares
        micro_batches = tuple(self._micro_batch(share or tuple(fallback), is_filler=not share) for share in shares)
        indices = tuple(int(i) for i in self.plan.quads(index))
        return {
            "step": StepBatch(micro_batches=micro_batches, pairs=step.pairs, num_quads=step.num_quads, indices=indices)
        }

    def _micro_batch(self, indices: Sequence[int], is_filler: bool) -> MicroBatch:
        rows, groups = self.rows(indices)
        quads = [self.tokens[i] for i in rows]
        reference = None if self.reference is None else self.reference[rows]
        return make_micro_batch(quads, self.layout, reference, is_filler, groups)

    def rows(self, indices: Sequence[int]) -> tuple[list[int], list[int] | None]:
        """The data set's rows of these quads, and the quad that each belongs to where some have several."""
        if not self.tokens.has_groups:
            return [int(i) for i in indices], None
        starts = self.tokens.group_starts
        both = [(row, int(i)) for i in indices for row in range(int(starts[i]), int(starts[i + 1]))]
        return [row for row, _ in both], [quad for _, quad in both]


def only_item(items: list[dict[str, StepBatch]]) -> dict[str, StepBatch]:
    """The collate function: a step is already a batch."""
    (item,) = items
    return item
