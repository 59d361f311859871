"""Lays out the token sequences of a micro-batch for one forward pass.

In: tokenised quads (a shared prefix and up to four branches each). Out: a :class:`Layout` - model inputs, the attention
plan, and for every scored token the row of hidden states that predicts it. Four layouts give the same log-probs:

``tree``    one row; each prefix once, then its branches, with positions restarting at the end of the prefix. A branch
            attends to its prefix and to itself.
``packed``  one row; every branch carries its own copy of the prefix. No sharing, no padding.
``padded``  one row per branch, right padding, the model's own attention. Right padding never precedes a real token, so
            it works for most causal models, also those that keep a recurrent state.
``single``  the branches as in ``packed``, each given to the model by itself: no padding and no neighbour that could
            change its numbers. Right by definition, and slow; the others are measured against it.

This module knows nothing of losses or models. Shape legend: R rows, T tokens per row, N scored tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bvpo.training.tokens import Branch, TokenQuad

NUM_BRANCHES = 4  # trace.chosen, trace.rejected, empty.chosen, empty.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Queries ``[start, stop)`` of the packed row; their keys are ``[prefix_start, prefix_stop)`` followed by themselves."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Which tokens of the packed row see which, in a form that kernels with separate query and key lengths accept.

    ``keys`` lists the positions of all keys, span after span; ``query_starts``/``key_starts`` are cumulative int32
    lengths (one more entry than spans). Queries are the row itself, in order.
    """

    spans: tuple[Span, ...]
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int

    def to(self, device: torch.device) -> AttentionPlan:
        return replace(
            self,
            keys=self.keys.to(device, non_blocking=True),
            query_starts=self.query_starts.to(device, non_blocking=True),
            key_starts=self.key_starts.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Model inputs of one forward pass and where its scored tokens are.

    ``rows_N`` indexes the hidden states flattened to [R*T, hidden]: row ``rows_N[i]`` predicts token ``targets_N[i]``.
    Scored tokens are grouped in segments: for each present branch its trace part (through the closing marker), then its
    answer part. ``slots[j]`` says which quad and branch the segments ``2j`` and ``2j + 1`` belong to
    (``slot_index`` [2, slots] is the same on the device).
    """

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    attention_mask_RT: Tensor | None
    plan: AttentionPlan | None
    rows_N: Tensor
    targets_N: Tensor
    segment_sizes: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]
    slot_index: Tensor
    num_quads: int
    lengths: tuple[int, ...] | None = None  # of the sequences in the row, where the model sees them one at a time

    @property
    def num_tokens(self) -> int:
        """Tokens that the model processes, padding included."""
        return self.input_ids_RT.numel()

    def to(self, device: torch.device) -> Layout:
        mask = self.attention_mask_RT
        return replace(
            self,
            input_ids_RT=self.input_ids_RT.to(device, non_blocking=True),
            position_ids_RT=self.position_ids_RT.to(device, non_blocking=True),
            attention_mask_RT=None if mask is None else mask.to(device, non_blocking=True),
            plan=None if self.plan is None else self.plan.to(device),
            rows_N=self.rows_N.to(device, non_blocking=True),
            slot_index=self.slot_index.to(device, non_blocking=True),
            targets_N=self.targets_N.to(device, non_blocking=True),
        )


def present_branches(quads: Sequence[TokenQuad]) -> list[tuple[int, int, Branch]]:
    """All (quad position, branch index, branch) in order."""
    return [
        (q, b, branch) for q, quad in enumerate(quads) for b, branch in enumerate(quad.branches) if branch is not None
    ]


def segment_sizes(branches: Sequence[tuple[int, int, Branch]]) -> tuple[int, ...]:
    sizes: list[int] = []
    for _, _, branch in branches:
        sizes += [branch.answer_from - branch.scored_from, len(branch.ids) - branch.answer_from]
    return tuple(sizes)


def build_tree(quads: Sequence[TokenQuad]) -> Layout:
    """Each prefix once, its branches behind it. Returns a one-row layout."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: list[Span] = []
    rows: list[np.ndarray] = []
    cursor = 0
    for quad in quads:
        num_prefix = len(quad.prefix_ids)
        prefix = (cursor, cursor + num_prefix)
        ids.append(quad.prefix_ids)
        positions.append(np.arange(num_prefix))
        spans.append(Span(start=prefix[0], stop=prefix[1]))
        cursor = prefix[1]
        for branch in quad.branches:
            if branch is None:
                continue
            num = len(branch.ids)
            ids.append(branch.ids)
            positions.append(np.arange(num_prefix, num_prefix + num))
            spans.append(Span(start=cursor, stop=cursor + num, prefix_start=prefix[0], prefix_stop=prefix[1]))
            row = np.arange(cursor - 1, cursor + num - 1)
            row[0] = prefix[1] - 1  # the last prefix token predicts every branch's first token
            rows.append(row[branch.scored_from :])
            cursor += num
    return _one_row(quads, ids, positions, spans, rows)


def build_packed(quads: Sequence[TokenQuad]) -> Layout:
    """Every branch with its own copy of the prefix. Returns a one-row layout."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: list[Span] = []
    rows: list[np.ndarray] = []
    cursor = 0
    for q, _, branch in present_branches(quads):
        prefix = quads[q].prefix_ids
        num = len(prefix) + len(branch.ids)
        ids += [prefix, branch.ids]
        positions.append(np.arange(num))
        spans.append(Span(start=cursor, stop=cursor + num))
        rows.append(np.arange(cursor + len(prefix) + branch.scored_from - 1, cursor + num - 1))
        cursor += num
    return _one_row(quads, ids, positions, spans, rows)


def build_padded(quads: Sequence[TokenQuad]) -> Layout:
    """One row per branch, padded on the right with token 0, which the attention mask hides."""
    branches = present_branches(quads)
    sequences = [np.concatenate([quads[q].prefix_ids, branch.ids]) for q, _, branch in branches]
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    rows: list[np.ndarray] = []
    for r, ((q, _, branch), sequence) in enumerate(zip(branches, sequences, strict=True)):
        ids[r, : len(sequence)] = sequence
        mask[r, : len(sequence)] = 1
        first = r * width + len(quads[q].prefix_ids) + branch.scored_from
        rows.append(np.arange(first - 1, r * width + len(sequence) - 1))
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    return Layout(
        input_ids_RT=torch.from_numpy(ids),
        position_ids_RT=torch.from_numpy(positions),
        attention_mask_RT=torch.from_numpy(mask),
        plan=None,
        rows_N=_long(rows),
        targets_N=_targets(branches),
        segment_sizes=segment_sizes(branches),
        slots=tuple((q, b) for q, b, _ in branches),
        slot_index=torch.tensor([(q, b) for q, b, _ in branches]).t(),
        num_quads=len(quads),
    )


def build_single(quads: Sequence[TokenQuad]) -> Layout:
    """The packed row without a plan: it is cut into its sequences before the model sees it."""
    packed = build_packed(quads)
    assert packed.plan is not None
    return replace(packed, plan=None, lengths=tuple(span.stop - span.start for span in packed.plan.spans))


LAYOUTS: dict[str, Callable[[Sequence[TokenQuad]], Layout]] = {
    "tree": build_tree,
    "packed": build_packed,
    "padded": build_padded,
    "single": build_single,
}


def split_branches(quad: TokenQuad) -> list[TokenQuad]:
    """One single-branch quad per branch, each keeping its place among the four (for per-sequence backward)."""
    singles = []
    for b, branch in enumerate(quad.branches):
        if branch is not None:
            only = tuple(branch if i == b else None for i in range(NUM_BRANCHES))
            singles.append(replace(quad, branches=only))
    return singles


def plan_attention(spans: Sequence[Span]) -> AttentionPlan:
    keys = [np.r_[span.prefix_start : span.prefix_stop, span.start : span.stop] for span in spans]
    num_queries = [span.stop - span.start for span in spans]
    num_keys = [len(key) for key in keys]
    return AttentionPlan(
        spans=tuple(spans),
        keys=_long(keys),
        query_starts=torch.tensor(np.cumsum([0, *num_queries]), dtype=torch.int32),
        key_starts=torch.tensor(np.cumsum([0, *num_keys]), dtype=torch.int32),
        max_queries=max(num_queries),
        max_keys=max(num_keys),
    )


def _one_row(
    quads: Sequence[TokenQuad],
    ids: list[np.ndarray],
    positions: list[np.ndarray],
    spans: list[Span],
    rows: list[np.ndarray],
) -> Layout:
    branches = present_branches(quads)
    return Layout(
        input_ids_RT=_long(ids)[None],
        position_ids_RT=_long(positions)[None],
        attention_mask_RT=None,
        plan=plan_attention(spans),
        rows_N=_long(rows),
        targets_N=_targets(branches),
        segment_sizes=segment_sizes(branches),
        slots=tuple((q, b) for q, b, _ in branches),
        slot_index=torch.tensor([(q, b) for q, b, _ in branches]).t(),
        num_quads=len(quads),
    )


def _targets(branches: Sequence[tuple[int, int, Branch]]) -> Tensor:
    return _long([branch.ids[branch.scored_from :] for _, _, branch in branches])


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
