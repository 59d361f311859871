"""Where a base lies: its folder, and the cache that spares training the same base again.

In: the settings and a folder. Out: the folder with a base in it: left alone if it holds this one, copied from the cache if
it was ever made on this machine, else made. In the cache a base is named by its settings, the code that makes it and the
libraries that compute it. Folders appear whole or not at all. How a base is made is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bvpo.config import TinyConfig
from bvpo.experiment import differences
from bvpo.files import disk_errors, folder_lock, make_folder, sync_file, sync_folder
from bvpo.keys import content_hash
from bvpo.strict import UserError, to_dict

logger = logging.getLogger(__name__)

DESCRIPTION = "tiny.json"
CACHE_VARIABLE = "BVPO_CACHE"
Make = Callable[[Path, dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Found:
    """What ``tiny.json`` says of the base, and where it came from: here, cache or made."""

    description: dict[str, Any]
    origin: str


def identity(tiny: TinyConfig, *, first_try: bool = False) -> dict[str, Any]:
    """All that decides the weights and files of a base. A ``first_try`` is one with fewer steps than the config asks for."""
    sources = sorted(file for file in Path(__file__).parent.glob("*.py") if file.name != Path(__file__).name)
    code = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}  # without loading them
    said = {"settings": to_dict(tiny), "code": code, "libraries": libraries}
    return {**said, "first_try": True} if first_try else said


def cache_folder() -> Path:
    """``BVPO_CACHE``, else ``bvpo`` in the user's cache: ``XDG_CACHE_HOME`` if that is a whole path, or ~/.cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (users if users.is_absolute() else Path.home() / ".cache") / "bvpo"


def ensure_base(folder: Path, tiny: TinyConfig, make: Make, limit: int | None = None) -> Found:
    """The base of these settings in ``folder``; ``make(draft, identity)`` fills an empty folder with one.

    ``limit`` is the most training steps: a first try, which any other base may replace, and which replaces none.
    """
    if (present := present_base(folder, tiny, limit)) is not None:
        return Found(present, "here")
    first_try = limit is not None and limit < tiny.steps
    wanted = identity(limited(tiny, limit), first_try=first_try)
    cached = cache_folder() / "tiny" / content_hash(wanted)[:16]
    for parent in (cached.parent, folder.parent):
        _require_writable(parent)  # now rather than after the training
    with folder_lock(cached.parent, cached.name):  # of several processes one trains, and the others find it
        origin = "cache" if _is_whole(cached) else "made"
        if origin == "made":
            _appear(cached, lambda draft: make(draft, wanted))
    _appear(folder, lambda draft: _copy(cached, draft))
    found = read_description(folder)
    assert found is not None, f"{folder} has no {DESCRIPTION}"
    return Found(found, origin)


def limited(tiny: TinyConfig, limit: int | None) -> TinyConfig:
    return tiny if limit is None else replace(tiny, steps=min(limit, tiny.steps))


def present_base(folder: Path, tiny: TinyConfig, limit: int | None = None) -> dict[str, Any] | None:
    """The description of the base that is in ``folder`` already; ``None`` where one may be put. Refuses what else is there.

    Settings must agree. Other code or libraries are only said: they would make another base, but this one is as good.
    """
    with disk_errors(folder, "looking into it"):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        present = read_description(folder) if folder.is_dir() else None
    if present is None:
        raise UserError(f"{folder}: is there and holds no base of `bvpo tiny`; set model.path to another folder")
    settings = to_dict(limited(tiny, limit) if present.get("first_try") else tiny)
    changed = differences({"tiny": present.get("settings", {})}, {"tiny": settings})
    if changed and present.get("first_try"):
        return None
    if changed:
        raise UserError(
            f"{folder}: holds a base with other settings: {', '.join(changed)}; restore them, remove the folder, or set "
            f"model.path to another"
        )
    if present.get("first_try") and (limit is None or limit >= tiny.steps):
        return None
    if (file := _changed_file(folder, present)) is not None:
        raise UserError(f"{folder / file}: is not as `bvpo tiny` wrote it; remove the folder to have it made anew")
    now = identity(tiny)
    for name in differences(*({k: said.get(k) for k in ("code", "libraries")} for said in (present, now))):
        logger.info("note         the base was made by another version: %s", name)
    return present


def read_description(folder: Path) -> dict[str, Any] | None:
    """``tiny.json``; ``None`` where there is none. Its being there means that the folder is whole."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / DESCRIPTION}: cannot be read ({error}); remove the folder to make it anew"
        ) from None
    return found if isinstance(found, dict) else None


def _is_whole(cached: Path) -> bool:
    """Whether the cache holds this base undamaged; damaged ones are made anew."""
    try:
        said = read_description(cached)
    except UserError:
        return False
    return said is not None and _changed_file(cached, said) is None


def _changed_file(folder: Path, said: Mapping[str, Any]) -> str | None:
    """The first file that is gone or not as it was written; files that came later do not count."""
    for name, written in said.get("files", {}).items():
        try:
            with open(folder / name, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return name
        if found != written:
            return name
    return None


def _require_writable(folder: Path) -> None:
    make_folder(folder)
    with disk_errors(folder, "making room for the base"), tempfile.NamedTemporaryFile(dir=folder):
        pass


def _copy(source: Path, draft: Path) -> None:
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, draft / file.name)


def _appear(folder: Path, write: Callable[[Path], Any]) -> None:
    """Writes into a draft beside the folder and renames it, in place of whatever :func:`ensure_base` let be replaced."""
    with disk_errors(folder, "writing the base"):
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        old = draft.with_name(f"{draft.name}.old")
        try:
            write(draft)
            draft.chmod(0o755)
            for file in draft.iterdir():
                sync_file(file)
            if folder.exists():
                folder.rename(old)
            draft.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
