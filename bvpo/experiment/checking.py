"""Whether a store still holds what was put into it: every line's checksum, every shard's hash, every shard that was there.

In: a store, and the shards that a finished stage named in the manifest. Out: what is damaged or missing, in words. It
repairs only when asked to, and then makes nothing up: what is lost is dropped, so that its stage makes it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bvpo.experiment.recordstore import RecordStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCheck:
    """What was read of one store and what is wrong with it; ``dropped`` is what a repair gave up."""

    store: str
    num_records: int
    num_shards: int
    num_live: int
    num_bytes: int
    problems: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def check_store(store: RecordStore[Any], name: str, expected: Iterable[str], *, repair: bool = False) -> StoreCheck:
    """Reads every byte of a store. ``expected`` are names of shards; one that a repair replaced is not missed."""
    dropped = store.repair(full=True) if repair else []
    problems = [str(damage) for damage in store.verify()]
    there = store.shard_hashes()
    for shard in sorted(set(expected) - there.keys()):
        if not (store.folder / f"{shard}.damaged").exists():
            problems.append(f"{store.folder / shard}: missing; the manifest says that it was here")
    stats = store.stats()
    return StoreCheck(
        store=name,
        num_records=stats.num_records,
        num_shards=stats.num_shards,
        num_live=stats.num_live,
        num_bytes=stats.num_bytes,
        problems=tuple(problems),
        dropped=tuple(str(damage) for damage in dropped),
    )
