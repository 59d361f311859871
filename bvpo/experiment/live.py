"""Live files: what writers left as checked lines and nobody has sealed yet.

In: the path of a live file. Out: its keys, its records, what is damaged in it, and whether a writer still works on it.
A file belongs to its writer while the writer's lock is held; only then free files are cut (a torn last line) or sealed.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bvpo.experiment.index import Ids, Positions, unpack
from bvpo.experiment.lines import BadLine, line_at, read_lines, tail_start
from bvpo.experiment.shards import Damage
from bvpo.experiment.writer import LIVE_SUFFIX, host_name
from bvpo.files import disk_errors, try_lock
from bvpo.strict import UserError, parse_json

_STAMP = re.compile(r"\d{20}-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{6}")
# Locks of some network file systems end at the machine: a file of another machine that changed this lately is in use.
_FOREIGN_SECONDS = 60.0


class LiveFile:
    """An unsealed file, opened for reading. ``damaged``, ``torn_bytes``, ``num_bytes`` are known after :meth:`keys`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[Damage] = []
        self.torn_bytes = 0
        self.num_bytes = 0

    def keys(self) -> tuple[Ids, Positions]:
        """Digests and byte offsets of the intact lines; checks every byte of the file."""
        self.damaged, self.torn_bytes = [], 0
        found, offsets = bytearray(), array("q")
        with open(self.path, "rb", buffering=1 << 20) as stream:
            for line in read_lines(stream):
                if not isinstance(line, BadLine):
                    found += line.ident
                    offsets.append(line.offset)
                elif line.torn:
                    self.torn_bytes = line.size
                else:
                    self.damaged.append(self._damage(line.number))
            self.num_bytes = stream.tell()
        return unpack(found), np.array(offsets, dtype=np.int64)

    def read(self, wanted: Positions, names: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset, plain values) of the lines that start at the wanted offsets."""
        with open(self.path, "rb", buffering=1 << 20) as stream:
            for offset in wanted.tolist():
                text = line_at(stream, offset)
                if text is None:
                    self.damaged.append(self._damage(self.line_number(offset)))
                    continue
                row = parse_json(text.decode(), str(self.path))
                if names is not None and not all(name in row for name in names):
                    raise UserError(f"{self.path}:{self.line_number(offset)}: expected fields {', '.join(names)}")
                yield offset, row if names is None else {name: row[name] for name in names}

    def line_number(self, offset: int) -> int:
        with open(self.path, "rb") as stream:
            return stream.read(offset).count(b"\n") + 1

    def where(self, offset: int) -> str:
        return f"{self.path}:{self.line_number(offset)}"

    def _damage(self, number: int) -> Damage:
        return Damage(where=f"{self.path}:{number}", num_records=1, problem="damaged record (checksum does not match)")


def is_active(path: Path) -> bool:
    """Whether a working writer (or a sealing process) holds the file."""
    if _recent_elsewhere(path):
        return True
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True  # gone: its writer removed an empty file
    return False


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Holds the lock of a live file that no writer holds; false when one does, or when the file is gone."""
    try:
        with disk_errors(path, "opening it"):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            yield False
            return
        raise
    try:
        with disk_errors(path, "taking its lock"):
            free = not _recent_elsewhere(path) and try_lock(handle) and os.fstat(handle).st_nlink > 0
        yield free
    finally:
        os.close(handle)


def cut_torn_tail(path: Path) -> int:
    """Cuts an unfinished last line off; returns the bytes cut. The caller holds the claim."""
    with disk_errors(path, "cutting off its unfinished last line"), open(path, "r+b") as stream:
        keep = tail_start(stream)
        torn = stream.seek(0, 2) - keep
        if torn:
            stream.truncate(keep)
            os.fsync(stream.fileno())
        return torn


def _recent_elsewhere(path: Path) -> bool:
    stamp = _STAMP.fullmatch(path.name.removesuffix(LIVE_SUFFIX))
    if stamp is None or stamp["host"] == host_name():
        return False
    try:
        return time.time() - path.stat().st_mtime < _FOREIGN_SECONDS
    except FileNotFoundError:
        return False
