"""Live file -> shards, and damaged shard -> what is left of it; each step leaves a store that reads the same.

In: a claimed live file and the lines to keep. Out: shards named ``stamp.NNN.hash.parquet`` (draft, fsync, rename, fsync
of the folder), then the live file is gone. A process killed in between leaves both: the keys tell that they are equal.
Which lines win and who may seal is the store's decision.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bvpo.experiment.index import Positions
from bvpo.experiment.lines import Key, digest
from bvpo.experiment.live import LiveFile
from bvpo.experiment.shards import ROW_GROUP, Damage, Shard, open_shard_writer, to_table
from bvpo.experiment.writer import LIVE_SUFFIX
from bvpo.files import disk_errors, sync_file, sync_folder
from bvpo.strict import FieldError, from_dict

R = TypeVar("R")

_DRAFT_SUFFIX = ".parquet.draft"


def remove_drafts(folder: Path) -> None:
    """Deletes what a killed process left half-written; the caller holds the store's seal lock."""
    with disk_errors(folder, "removing unfinished shards"):
        for path in folder.glob(f"*{_DRAFT_SUFFIX}"):
            path.unlink()


def seal_file(
    live: LiveFile, cls: type[R], key: Callable[[R], Key], wanted: Positions, shard_records: int
) -> list[Path]:
    """Writes the wanted lines of a claimed live file as shards and removes the file; returns the shards."""
    stamp = live.path.name.removesuffix(LIVE_SUFFIX)
    shards = [
        _write_shard(live, cls, key, wanted[start : start + shard_records], f"{stamp}.{number:03d}")
        for number, start in enumerate(range(0, len(wanted), shard_records))
    ]
    with disk_errors(live.path, "removing the sealed file"):
        sync_folder(live.path.parent)  # the shards' names are durable before the lines go
        live.path.unlink(missing_ok=True)  # a writer that lost the race for a new file removes it itself
        sync_folder(live.path.parent)
    return shards


def to_record(cls: type[R], file: LiveFile | Shard, position: int, row: dict[str, Any]) -> R:
    """A stored row as a record; an error names the file and line (looked up only then)."""
    try:
        return from_dict(cls, row)
    except FieldError as error:
        raise error.at(file.where(position)) from None


def _write_shard(live: LiveFile, cls: type[R], key: Callable[[R], Key], wanted: Positions, name: str) -> Path:
    draft = live.path.parent / f"{name}{_DRAFT_SUFFIX}"
    with _removed_on_error(draft), disk_errors(draft, "sealing records"):
        with open_shard_writer(draft, cls) as writer:
            for start in range(0, len(wanted), ROW_GROUP):
                rows = live.read(wanted[start : start + ROW_GROUP])
                records = [to_record(cls, live, offset, row) for offset, row in rows]
                idents = [digest(key(record)) for record in records]
                writer.write_table(to_table(cls, idents, records))
        return _publish(draft, name)


def shard_is_whole(path: Path) -> bool:
    """Whether a shard's content is what its name says; reads the whole file."""
    with disk_errors(path, "verifying it"):
        return path.name.split(".")[-2] == _content_hash(path)


def rewrite_damaged(shard: Shard) -> list[Damage]:
    """Replaces a damaged shard by the row groups that can still be read; the old file stays as ``*.damaged``."""
    name = ".".join(shard.path.name.split(".")[:2])
    folder = shard.path.parent
    draft = folder / f"{name}{_DRAFT_SUFFIX}"
    with _removed_on_error(draft), disk_errors(draft, "rewriting a damaged shard"):
        with open_shard_writer(draft, shard.cls) as writer:
            num_saved = 0
            for table in shard.tables():
                writer.write_table(table)
                num_saved += len(table)
        if num_saved:
            _publish(draft, name)
        draft.unlink(missing_ok=True)
        os.replace(shard.path, folder / f"{shard.path.name}.damaged")
        sync_folder(folder)
    return shard.damaged


def _publish(draft: Path, name: str) -> Path:
    """Gives a finished draft its final name, which carries the hash of its content."""
    sync_file(draft)
    path = draft.with_name(f"{name}.{_content_hash(draft)}.parquet")
    os.replace(draft, path)
    sync_folder(path.parent)
    return path


def _content_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


@contextmanager
def _removed_on_error(draft: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
