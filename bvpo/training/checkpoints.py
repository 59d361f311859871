"""Checkpoints that are finished or none: a marker, written last, lists every file of the folder with its size and hash.

In: a folder that all ranks have written. Out: the marker; the newest checkpoint that is as its marker says; fewer
checkpoints. One without a marker was cut short and is passed over. Order is by step number, never by a file's time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bvpo.files import disk_error, sync_file, sync_folder, write_atomically
from bvpo.strict import OtherSettings, UserError

logger = logging.getLogger(__name__)

MARKER = "bvpo_run.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What torch's and safetensors' own writers say where Python would raise an OSError.
_WRITERS = (
    "No space left on device",
    "PytorchStreamWriter failed",
    "inline_container.cc",
    "os error 27",
    "os error 122",
)


def seal(folder: Path, identity: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Makes what is in the folder durable, then says with one rename that it is whole."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.name != MARKER:
            sync_file(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    text = json.dumps({"identity": dict(identity), "progress": dict(progress), "files": files}, default=str, indent=1)
    write_atomically(folder / MARKER, text + "\n")
    sync_folder(folder.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damage(folder: Path) -> str:
    """What keeps the run from going on from this checkpoint; empty if nothing does."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in marker["files"].items()}
        _ = marker["identity"].items(), marker["progress"].items()
    except FileNotFoundError:
        return f"no {MARKER}, so not a finished checkpoint of bvpo"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if _hash(path) != digest:
            return f"{name} is not as it was written"
    if "trainer_state.json" not in files or not any(_is_optimizer(name) for name in files):
        return "it holds a model only (save_only_model), nothing to go on from"
    return ""


def _is_optimizer(name: str) -> bool:
    return "optim" in name.lower()  # optimizer.pt, FSDP's optimizer_0/..., DeepSpeed's ..._optim_states.pt


def checkpoints(root: Path) -> list[Path]:
    """By step, oldest first; finished or not."""
    found = [(int(match[1]), path) for path in root.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def newest(root: Path) -> str:
    """The newest checkpoint that is whole, or ''. Passed-over ones are named; none whole but a damaged one is refused."""
    problems: dict[Path, str] = {}
    for folder in reversed(checkpoints(root)):
        problem = damage(folder)
        if not problem:
            for passed, why in problems.items():
                logger.warning("%s is passed over: %s", passed, why)
            return str(folder)
        problems[folder] = problem
    for folder, why in problems.items():
        if (folder / MARKER).exists():
            raise UserError(
                f"{folder}: {why}, and no other checkpoint is whole; delete {root.name}/checkpoint-* to start over"
            )
    for folder in problems:
        logger.warning("%s was cut short while it was written, and is deleted; training starts over", folder)
    return ""


def read(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The progress that a checkpoint holds besides transformers' files; refuses another run's, or a broken one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint")
    if problem := damage(folder):
        raise UserError(f"{folder}: {problem}; delete it or name another")
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    before, now = marker["identity"], json.loads(json.dumps(dict(identity), default=str))
    changed = [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    if changed:
        raise OtherSettings(f"{folder}: checkpoint of another run, cannot resume ({'; '.join(changed)})")
    return marker["progress"]


def discard(folder: Path) -> None:
    """Deletes a checkpoint; its marker goes first, so that a kill in between leaves none that looks whole."""
    if folder.is_dir():
        (folder / MARKER).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)


def rotate(root: Path, limit: int | None, best: str | None) -> None:
    """Keeps the newest ``limit`` finished checkpoints (and the best one). Called when the newest has its marker."""
    finished = [folder for folder in checkpoints(root) if (folder / MARKER).is_file()]
    kept = set(finished[-limit:]) if limit and limit > 0 else set(finished)
    if best is not None and Path(best) in finished and Path(best) not in kept:
        if len(kept) > 1:
            kept.discard(min(kept, key=finished.index))
        kept.add(Path(best))
    for folder in checkpoints(root):
        if folder not in kept:
            discard(folder)


@contextmanager
def full_disk(path: Path, doing: str) -> Iterator[None]:
    """A full disk in one line, whichever library's writer met it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if isinstance(error, OSError) and error.errno in full:
            raise disk_error(error, path, doing) from error
        if any(text in str(error) for text in _WRITERS):
            raise disk_error(OSError(errno.ENOSPC, ""), path, doing) from error
        raise
