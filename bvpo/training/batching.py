"""Which quads make up each optimizer step, and how they are spread over ranks and micro-batches.

In: the token count and the present views of every quad. Out: an :class:`EpochPlan` whose ``step(i)`` is a pure
function of the arguments, so a resumed run needs no state beyond the step number. An optimizer step is exactly
``quads_per_step`` quads whatever the number of ranks; the token budget only partitions it, and the pair counts are
global so that each view's mean can be taken over the whole step. A quad with several traces is one quad here, and so is
never split. Nothing here loads tokens or touches a device.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from bvpo.records import VIEWS, View
from bvpo.strict import UserError

LastStep = Literal["keep", "drop"]
MicroBatch = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: ``micro_batches[rank][micro]`` are quad indices; ``pairs`` counts pairs over all ranks."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    pairs: dict[View, int]
    num_quads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """How much longer a step takes than a perfectly even split would; both are 1.0 at best.

    ``ranks``: tokens of the fullest rank over the mean rank (what counts when ranks meet once per step, as in DDP).
    ``lockstep``: sum over micro-batches of the fullest rank's tokens, over the mean rank (what counts when ranks meet
    in every micro-batch, as in FSDP and ZeRO-3).
    """

    ranks: float
    lockstep: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpochPlan:
    """The steps of one epoch; build it with :func:`plan_epoch`. ``num_dropped`` quads fell to the last-step policy."""

    num_steps: int
    num_dropped: int
    quads_per_step: int
    tokens_per_micro_batch: int | None
    world_size: int
    order: npt.NDArray[np.int64] = field(repr=False)
    num_tokens: npt.NDArray[np.int64] = field(repr=False)
    has_view: npt.NDArray[np.bool_] = field(repr=False)
    num_rows: npt.NDArray[np.int64] | None = field(repr=False, default=None)

    def quads(self, i: int) -> npt.NDArray[np.int64]:
        """Indices of the quads of step ``i``, in epoch order; they do not depend on ``world_size``."""
        if not 0 <= i < self.num_steps:
            raise IndexError(f"step {i} of an epoch with {self.num_steps} steps")
        return self.order[i * self.quads_per_step : (i + 1) * self.quads_per_step]

    def step(self, i: int) -> StepPlan:
        """The full plan of step ``i``: every rank has the same number of micro-batches, padded with ``()``."""
        indices = self.quads(i)
        sizes: list[int] = self.num_tokens[indices].tolist()
        ranks = _balance(indices.tolist(), sizes, self.world_size)
        bins = [_micro_batches(rank, self.tokens_per_micro_batch, self.num_rows) for rank in ranks]
        depth = max(len(rank) for rank in bins)
        counts = self.has_view[indices].sum(axis=0)
        return StepPlan(
            micro_batches=tuple(tuple(rank) + ((),) * (depth - len(rank)) for rank in bins),
            pairs={view: int(count) for view, count in zip(VIEWS, counts, strict=True)},
            num_quads=len(indices),
        )

    def imbalance(self, i: int) -> Imbalance:
        """The imbalance statistic of step ``i``."""
        return imbalance(self.step(i), self.num_tokens)


def plan_epoch(
    num_tokens: npt.ArrayLike,
    has_view: npt.ArrayLike,
    *,
    quads_per_step: int,
    tokens_per_micro_batch: int | None,
    world_size: int,
    seed: int,
    epoch: int,
    last_step: LastStep,
    num_rows: npt.ArrayLike | None = None,
) -> EpochPlan:
    """Plan epoch ``epoch`` over ``num_tokens`` [N] and ``has_view`` [N, 2] (columns in the order of ``VIEWS``).

    ``num_tokens`` is what a quad alone takes. With ``num_rows`` [N] these are padded rows: each quad has so many of equal
    width, and a micro-batch is as wide as its widest. ``tokens_per_micro_batch=None`` makes one quad per micro-batch; a quad
    longer than the budget gets its own. The last step, when ``quads_per_step`` does not divide N, is shorter (``keep``) or
    left out and counted (``drop``).
    """
    tokens = np.asarray(num_tokens, dtype=np.int64)
    views = np.asarray(has_view, dtype=np.bool_)
    total = len(tokens)
    if views.shape != (total, len(VIEWS)):
        raise ValueError(f"has_view has shape {views.shape}, expected ({total}, {len(VIEWS)})")
    _check_positive(quads_per_step=quads_per_step, world_size=world_size, tokens_per_micro_batch=tokens_per_micro_batch)
    if last_step not in ("keep", "drop"):
        raise UserError(f"last_step: got {last_step!r}, expected 'keep' or 'drop'")
    full, rest = divmod(total, quads_per_step)
    num_steps = full + (1 if rest and last_step == "keep" else 0)
    if num_steps == 0:
        rule = f"; last_step='drop' leaves out a step of fewer than {quads_per_step}" if total else ""
        raise UserError(f"no optimizer step can be made from {total} quads{rule}")
    return EpochPlan(
        num_steps=num_steps,
        num_dropped=rest if last_step == "drop" else 0,
        quads_per_step=quads_per_step,
        tokens_per_micro_batch=tokens_per_micro_batch,
        world_size=world_size,
        order=epoch_order(total, seed=seed, epoch=epoch),
        num_tokens=tokens,
        has_view=views,
        num_rows=None if num_rows is None else np.asarray(num_rows, dtype=np.int64),
    )


def epoch_order(total: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of ``range(total)`` for one epoch.

    Ranks raw Philox words instead of calling ``Generator.permutation``: numpy keeps a bit generator's stream stable
    between releases, but not the methods of ``Generator``, and a resumed run must see the same order.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(total)
    return np.argsort(words, kind="stable")


def imbalance(step: StepPlan, num_tokens: npt.ArrayLike) -> Imbalance:
    """Compare the step's split over ranks and micro-batches with a perfectly even one."""
    tokens = np.asarray(num_tokens, dtype=np.int64)
    loads = np.array([[tokens[list(micro)].sum() for micro in rank] for rank in step.micro_batches], dtype=np.float64)
    mean = loads.sum() / len(loads)
    return Imbalance(ranks=float(loads.sum(axis=1).max() / mean), lockstep=float(loads.max(axis=0).sum() / mean))


def _balance(indices: Sequence[int], sizes: Sequence[int], world_size: int) -> list[list[tuple[int, int]]]:
    """Longest-processing-time: each (size, index), longest first, goes to the rank with the fewest tokens so far.

    Guarantees ``max rank load <= mean + max item``; ties fall to the lower index and the lower rank.
    """
    items = sorted(zip(sizes, indices, strict=True), key=lambda item: (-item[0], item[1]))
    ranks: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    if world_size == 1:
        return [items]
    # The quad count breaks ties of the token count, so that equal quads spread evenly even when sizes are zero.
    heap = [(0, 0, rank) for rank in range(world_size)]
    for size, index in items:
        load, count, rank = heap[0]
        ranks[rank].append((size, index))
        heapq.heapreplace(heap, (load + size, count + 1, rank))
    return ranks


def _micro_batches(
    items: Sequence[tuple[int, int]], budget: int | None, num_rows: npt.NDArray[np.int64] | None
) -> list[MicroBatch]:
    """Pack (size, index) items, longest first, into micro-batches of at most ``budget`` tokens, fullest first.

    Best-fit decreasing: an item goes where it leaves the least room. Fullest first, so that ranks which run in lockstep
    meet with micro-batches of similar size.
    """
    if budget is None:
        return [(index,) for _, index in items]
    if num_rows is not None:
        return _padded_micro_batches([(size // int(num_rows[i]), int(num_rows[i]), i) for size, i in items], budget)
    bins: list[list[int]] = []
    loads: list[int] = []
    rooms: list[tuple[int, int]] = []  # sorted (room left, bin) of the bins that can still take something
    for size, index in items:
        at = bisect_left(rooms, (size, -1))
        if at == len(rooms):
            number = len(bins)
            bins.append([index])
            loads.append(size)
        else:
            _, number = rooms.pop(at)
            bins[number].append(index)
            loads[number] += size
        if loads[number] < budget:
            insort(rooms, (budget - loads[number], number))
    order = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    return [tuple(bins[number]) for number in order]


def _padded_micro_batches(items: Sequence[tuple[int, int, int]], budget: int) -> list[MicroBatch]:
    """(width, rows, index) items into micro-batches of at most ``budget`` tokens, padding included; largest first.

    Neighbours in width go together, so that little is padded.
    """
    bins: list[tuple[int, list[int]]] = []
    widest = rows = 0
    for width, count, index in sorted(items, key=lambda item: (-item[0], item[2])):
        if bins and (rows + count) * widest <= budget:
            rows += count
            bins[-1] = ((rows * widest), [*bins[-1][1], index])
        else:
            widest, rows = width, count
            bins.append((rows * widest, [index]))
    return [tuple(members) for _, members in sorted(bins, key=lambda found: -found[0])]


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}, expected a positive integer")
