"""Files that survive a crash, locks that a dead process cannot keep, and disk errors in words.

In: paths and what is being done. Out: whole files or none, a lock or word of who has it, and one-line errors for a full
or read-only disk. POSIX only (``flock``). This module knows nothing of records.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bvpo.strict import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def disk_error(error: OSError, path: str | os.PathLike[str], doing: str) -> UserError:
    """What happened to a file, in one line, and what to do about it."""
    if error.errno in _FULL:
        return UserError(f"{path}: no space left on the disk while {doing}; free some and run the same command again")
    if error.errno == errno.EFBIG:
        return UserError(f"{path}: file-size limit reached while {doing}; raise it (ulimit -f) and run again")
    if error.errno in _READ_ONLY:
        return UserError(f"{path}: not writable while {doing} ({error.strerror}); check the folder's permissions")
    if error.errno in _NO_LOCKS:
        return UserError(f"{path}: this file system has no file locks; put the experiment folder on another one")
    return UserError(f"{path}: {error.strerror or error} while {doing}")


# What in a model folder can change a result, and what makers of a model leave beside it that no loader reads.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt")
_NOTES = ("tiny.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
_SMALL = 64 * 2**20  # bytes of weights that are read to tell two models apart; of larger ones the sizes must do


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide what the model says."""
    return sorted({p for pattern in _MODEL_FILES for p in folder.glob(pattern) if p.name not in _NOTES})


def hash_file(path: Path) -> str:
    with disk_errors(path, "reading it"), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_folder(folder: Path) -> str:
    """SHA-256 over names and contents of :func:`model_files`."""
    lines = "".join(f"{path.name}\0{hash_file(path)}\n" for path in model_files(folder))
    return hashlib.sha256(lines.encode()).hexdigest()


def model_mark(folder: Path) -> list[list[str | int]]:
    """Name, size and (of a small model) content of the files of a local model; nothing for a name on a hub."""
    sizes = {path: path.stat().st_size for path in model_files(folder)}
    small = sum(sizes.values()) <= _SMALL
    return [[path.name, size, hash_file(path) if small else ""] for path, size in sizes.items()]


@contextmanager
def disk_errors(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turns any ``OSError`` of the block into a :class:`UserError` about ``path``."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, doing) from error


def sync_folder(folder: Path) -> None:
    """Makes creations, renames and removals in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    with disk_errors(folder, "creating the folder"):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """The whole new file or the whole old one, whenever the machine stops."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path, "writing it"):
        try:
            with open(draft, "x", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, path)
            sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def try_lock(handle: int) -> bool:
    """Takes the exclusive lock of an open file unless someone holds it; the kernel frees it when the holder dies."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def folder_lock(folder: Path, name: str, *, refusal: str = "") -> Iterator[None]:
    """Holds ``folder/.name.lock``, waiting for it if need be; with a ``refusal``, that is raised instead of waiting."""
    path = folder / f".{name}.lock"
    with disk_errors(path, "taking the lock"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not refusal:
                fcntl.flock(handle, fcntl.LOCK_EX)
            elif not try_lock(handle):
                raise UserError(f"{folder}: {refusal}")
        except (OSError, UserError):
            os.close(handle)
            raise
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


_HELD: set[int] = set()


def _let_go() -> None:
    """In a forked child: a data loader's worker that outlives its killed parent must not keep the parent's lock."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)
