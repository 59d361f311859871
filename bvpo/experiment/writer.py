"""One process's append file: records in, durable lines out.

Each writer owns a file of its own and holds its lock; the kernel frees the lock when the process dies, so others can
tell a working writer from a dead one. ``append`` hands the line to the operating system at once (a killed process loses
at most the line it was writing); ``fsync`` comes every ``sync_records`` records or ``sync_seconds`` seconds (a power
failure loses at most that group). It does not look for duplicates: the store keeps the first record of a key.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, NoReturn, TypeVar

from bvpo.experiment.lines import Key, digest, encode_line
from bvpo.files import disk_error, disk_errors, sync_folder, try_lock
from bvpo.strict import UserError, to_json

R = TypeVar("R")

LIVE_SUFFIX = ".jsonl"


def host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "-", socket.gethostname()) or "host"


def new_stamp() -> str:
    """``time-host-pid-random``: sorts by time, and says whose file it is."""
    return f"{time.time_ns():020d}-{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


class RecordWriter(Generic[R]):
    """Appends records to a file of its own; a context manager. Safe to share between threads."""

    def __init__(
        self,
        folder: Path,
        key: Callable[[R], Key],
        *,
        sync_records: int = 100,
        sync_seconds: float = 1.0,
        max_bytes: int = 1 << 28,
    ) -> None:
        self.folder, self.num_records = folder, 0
        self._key, self._sync_records, self._max_bytes = key, sync_records, max_bytes
        self._guard = threading.RLock()
        self._failure: UserError | None = None
        self._closed = False
        self._open()
        self._stop = threading.Event()
        self._clock = threading.Thread(target=self._keep_synced, args=(sync_seconds,), daemon=True, name="bvpo-store")
        self._clock.start()

    def append(self, record: R) -> None:
        """Stores one record; a full disk leaves the file as it was before the call."""
        line = encode_line(digest(self._key(record)), to_json(record).encode())
        with self._guard:
            self._check()
            try:
                write_all(self._handle, line)
            except OSError as error:
                self._fail(disk_error(error, self.path, "storing a record"), error)
            self._size += len(line)
            self._unsynced += 1
            self.num_records += 1
            if self._unsynced >= self._sync_records:
                self.sync()
            if self._size >= self._max_bytes:
                self._release()
                self._open()

    def sync(self) -> None:
        """Returns when every record appended so far is on the disk."""
        with self._guard:
            self._check()
            if not self._unsynced:
                return
            try:
                os.fsync(self._handle)
                mine = os.stat(self.path).st_ino == os.fstat(self._handle).st_ino
            except FileNotFoundError:
                mine = False
            except OSError as error:
                self._fail(disk_error(error, self.path, "syncing records"), error)
            if not mine:
                # a file system whose locks end at the machine lets another machine take a working writer for a dead one
                self._fail(UserError(f"{self.path}: removed while this process was writing it; run again"), None)
            self._unsynced = 0

    def close(self) -> None:
        """Syncs and gives the file up; an empty one is removed."""
        self._stop.set()
        if threading.current_thread() is not self._clock:
            self._clock.join()
        with self._guard:
            if self._closed:
                return
            try:
                if self._failure is None:
                    self.sync()
            finally:
                self._closed = True
                self._release(sync=False)

    def __enter__(self) -> RecordWriter[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        while True:
            path = self.folder / f"{new_stamp()}{LIVE_SUFFIX}"
            with disk_errors(path, "opening a file for records"):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
                try:
                    # between creation and lock a sealing process may have taken the empty file for a dead writer's
                    ours = try_lock(handle) and os.fstat(handle).st_nlink > 0
                    sync_folder(self.folder)
                except OSError:
                    os.close(handle)
                    raise
            if ours:
                self.path, self._handle, self._size, self._unsynced = path, handle, 0, 0
                return
            path.unlink(missing_ok=True)
            os.close(handle)

    def _release(self, sync: bool = True) -> None:
        if sync:
            self.sync()
        if self._size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        assert not self._closed, "the writer is closed"

    def _fail(self, error: UserError, cause: OSError | None) -> NoReturn:
        """Ends the writer: half a line is cut off, later calls repeat the error."""
        self._failure = error
        with contextlib.suppress(OSError):  # the next run cuts the torn line off instead
            os.ftruncate(self._handle, self._size)
        raise error from cause

    def _keep_synced(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with self._guard:
                if self._closed or self._failure is not None:
                    return
                try:
                    self.sync()
                except UserError:
                    return  # kept in _failure: the next append raises it
