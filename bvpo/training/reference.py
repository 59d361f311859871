"""Where reference log-probs come from: a disk cache filled once, a held model, or the policy with its adapter off.

In: the frozen reference and token quads. Out: log-prob sums per branch and part, in the very layout and precision of
training (in bf16 the same sequence moves by hundredths of a nat between layouts, which would bias every margin).
Cached values do not depend on alpha, beta or the loss, so sweeps and reruns skip the pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bvpo.strict import UserError
from bvpo.training.layout import LAYOUTS, Layout, split_branches
from bvpo.training.logprobs import Head, HeadTransform
from bvpo.training.policy import ANSWER, BranchRequest, ReferenceRows, branch_outputs
from bvpo.training.refcache import ReferenceCache, quad_key
from bvpo.training.tokens import TokenDataset, TokenQuad

logger = logging.getLogger(__name__)

FLUSH_EVERY = 256  # micro-batches between writes, so that a killed reference pass loses little


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients, restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


def adapter_off(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The base model under a PEFT adapter; without an adapter there is nothing to turn off."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def reference_sums(model: nn.Module, layout: Layout, chunk: int) -> Tensor:
    """Part sums [Q, 4, 2] of a frozen model."""
    return branch_outputs(model, layout, chunk=chunk)[..., : ANSWER + 1]


def reference_rows(model: nn.Module, unwrapped: Any, layout: Layout, selected: Tensor) -> ReferenceRows:
    """What the KL anchor needs of the reference: hidden states of the selected rows, and its head."""
    request = BranchRequest(layout=layout, want="hidden", selected=selected)
    hidden = model(input_ids=layout.input_ids_RT, position_ids=layout.position_ids_RT, bvpo=request)
    if hasattr(unwrapped, "disable_adapter"):
        return ReferenceRows(hidden=hidden, head=None)
    head = Head.of(unwrapped.get_output_embeddings(), HeadTransform.from_config(unwrapped.config))
    return ReferenceRows(hidden=hidden, head=head)


class ReferencePass:
    """Fills a cache for datasets, one micro-batch at a time, split over ranks, resumable."""

    def __init__(
        self,
        cache: ReferenceCache,
        *,
        layout: str,
        chunk: int,
        tokens_per_micro_batch: int | None,
        rank: int,
        world_size: int,
        autocast: Callable[..., contextlib.AbstractContextManager[Any]],
        device: torch.device,
        show_progress: bool,
        one_branch_at_a_time: bool = False,
    ) -> None:
        self._cache = cache
        self._layout, self._chunk, self._budget = layout, chunk, tokens_per_micro_batch
        self._rank, self._world_size = rank, world_size
        self._autocast, self._device, self._show = autocast, device, show_progress
        self._one_branch_at_a_time = one_branch_at_a_time

    def values(self, dataset: TokenDataset, model: nn.Module) -> np.ndarray:
        """[N, 4, 2] for the whole dataset; computes what the cache lacks with ``model`` (called on all ranks alike)."""
        keys = _keys(dataset)
        if self.missing(keys):
            self._compute(dataset, keys, model)
        values = self._cache.lookup(keys)
        _require_complete(values, dataset.has_view)
        return values

    def is_complete(self, dataset: TokenDataset) -> bool:
        """Whether :meth:`values` would compute nothing."""
        return not self.missing(_keys(dataset))

    def missing(self, keys: Sequence[bytes]) -> int:
        return len(self._cache.missing(keys))

    def _compute(self, dataset: TokenDataset, keys: Sequence[bytes], model: nn.Module) -> None:
        wanted = set(self._cache.missing(keys))
        sizes, rows = dataset.row_tokens(self._layout)
        widths = sizes if rows is None else sizes // rows
        todo = sorted((i for i, key in enumerate(keys) if key in wanted), key=lambda i: -int(widths[i]))
        groups = _group(todo, widths, rows, self._budget)
        rounds = -(-len(groups) // self._world_size)
        logger.info("reference log-probs: %d of %d quads to compute", len(todo), len(keys))
        bar = tqdm(total=rounds, desc="reference log-probs", disable=not self._show, unit="batch")
        found: dict[bytes, np.ndarray] = {}
        with frozen(model), adapter_off(model), self._autocast():
            for r in range(rounds):
                # Every rank runs a forward in every round (FSDP gathers weights together); extra ones repeat work.
                group = groups[min(r * self._world_size + self._rank, len(groups) - 1)]
                quads = [dataset[i] for i in group]
                sums = self._sums(model, quads)
                found |= {keys[i]: sums[q] for q, i in enumerate(group)}
                bar.update()
                if (r + 1) % FLUSH_EVERY == 0 or r + 1 == rounds:
                    self._share(found)
                    found = {}
        bar.close()

    def _sums(self, model: nn.Module, quads: Sequence[TokenQuad]) -> np.ndarray:
        if self._one_branch_at_a_time:  # the memory promise of backward = "sequence" covers the reference pass too
            (quad,) = quads
            sums = sum(self._forward(model, [single]) for single in split_branches(quad))
            assert isinstance(sums, np.ndarray)
        else:
            sums = self._forward(model, quads)
        present = np.array([[branch is not None for branch in quad.branches] for quad in quads])
        return np.where(present[..., None], sums, np.nan)

    def _forward(self, model: nn.Module, quads: Sequence[TokenQuad]) -> np.ndarray:
        layout = LAYOUTS[self._layout](quads).to(self._device)
        return reference_sums(model, layout, self._chunk).double().cpu().numpy()

    def _share(self, found: dict[bytes, np.ndarray]) -> None:
        everything = [found]
        if self._world_size > 1:
            gathered: list[Any] = [None] * self._world_size
            torch.distributed.all_gather_object(gathered, found)
            everything = gathered
        for part in everything:
            if part:
                self._cache.add(list(part), np.stack(list(part.values())))
        if self._rank == 0:
            self._cache.flush()


def _keys(dataset: TokenDataset) -> list[bytes]:
    return [quad_key(dataset[i]) for i in range(len(dataset))]


def _group(indices: Sequence[int], widths: np.ndarray, rows: np.ndarray | None, budget: int | None) -> list[list[int]]:
    """Consecutive quads of similar length, longest first, as many as fit the token budget. ``rows`` of quads in padded rows:
    each is as wide as the group's first."""
    groups: list[list[int]] = []
    room = width = 0
    for i in indices:
        size = int(widths[i]) if rows is None else int(rows[i]) * width
        if not groups or budget is None or size > room:
            groups.append([i])
            width = int(widths[i])
            room = (budget or 0) - width * (1 if rows is None else int(rows[i]))
        else:
            groups[-1].append(i)
            room -= size
    return groups


def _require_complete(values: np.ndarray, has_view: np.ndarray) -> None:
    for v in (0, 1):
        rows = values[has_view[:, v], 2 * v : 2 * v + 2]
        if not np.isfinite(rows).all():
            raise UserError("reference log-probs: some are missing or not finite; delete the reference cache and rerun")
