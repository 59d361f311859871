"""``manifest.json``: what an experiment folder was made with, and the refusal to go on with something else.

In: per stage, its settings, fingerprints (engine, scorer, data) and, at the end, counts and shard hashes. Out: one JSON
file, replaced atomically, and a one-line error that shows what changed. Progress is never read from here: the data
itself says what is done.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bvpo import __version__
from bvpo.files import folder_lock, make_folder, write_atomically
from bvpo.strict import OtherSettings, UserError, convert, from_dict, read_json, to_dict

MANIFEST = "manifest.json"
SCHEMA = 1
_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "numpy",
    "pyarrow",
    "openai",
    "vllm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEntry:
    """What one stage was run with, and what came out; ``finished`` is null while it has work left."""

    config: dict[str, Any]
    fingerprints: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, Any] = field(default_factory=dict)
    started: str
    finished: str | None = None

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; an empty one where there is none."""
        return convert(dict[str, Any], self.config.get(name, {}), MANIFEST, f"config.{name}")

    def count(self, name: str, default: int = 0) -> int:
        return convert(int, self.counts.get(name, default), MANIFEST, f"counts.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All stages of one experiment folder, by verb."""

    schema: int = SCHEMA
    created: str
    stages: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> StageEntry | None:
        entry = self.stages.get(name)
        return None if entry is None else from_dict(StageEntry, entry, f"{MANIFEST}: stages.{name}")


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest; an empty one where there is none yet."""
    path = folder / MANIFEST
    if not path.exists():
        return Manifest(created=_now())
    data = read_json(path)
    found = data.get("schema")
    if found != SCHEMA:
        raise UserError(f"{path}: field 'schema': got {found!r}, expected {SCHEMA} (written by another bvpo version)")
    manifest = from_dict(Manifest, data, str(path))
    for name in manifest.stages:
        from_dict(StageEntry, convert(dict[str, Any], manifest.stages[name], str(path), f"stages.{name}"), str(path))
    return manifest


def check_stage(
    folder: Path, stage: str, *, config: Mapping[str, Any], fingerprints: Mapping[str, Any] | None = None
) -> StageEntry | None:
    """The stage's entry if it ran here before; :class:`OtherSettings` naming each difference if with others."""
    entry = read_manifest(folder).stage(stage)
    if entry is None:
        return None
    changed = differences(entry.config, config) + differences(entry.fingerprints, fingerprints or {})
    if changed:
        raise OtherSettings(
            f"{folder}: {stage} was started here with other settings: {_listing(changed)}; "
            f"restore them, or give the experiment another name"
        )
    return entry


def begin_stage(
    folder: Path, stage: str, *, config: Mapping[str, Any], fingerprints: Mapping[str, Any] | None = None
) -> StageEntry:
    """Checks like :func:`check_stage`, then records that the stage runs here. Processes may start at once."""
    make_folder(folder)
    with folder_lock(folder, "manifest"):
        entry = check_stage(folder, stage, config=config, fingerprints=fingerprints)
        if entry is None:
            entry = StageEntry(config=dict(config), fingerprints=dict(fingerprints or {}), started=_now())
        entry = replace(entry, versions=versions(), finished=None)
        _write(folder, stage, entry)
        return entry


def finish_stage(
    folder: Path, stage: str, *, counts: Mapping[str, Any], shards: Mapping[str, Any] | None = None
) -> StageEntry:
    """Records what came out of a stage that :func:`begin_stage` recorded."""
    with folder_lock(folder, "manifest"):
        entry = read_manifest(folder).stage(stage)
        assert entry is not None, f"{stage} was never begun in {folder}"
        entry = replace(entry, counts=dict(counts), shards=dict(shards or {}), finished=_now())
        _write(folder, stage, entry)
        return entry


def forget_stage(folder: Path, stage: str) -> None:
    """Drops a stage's entry: its output is gone, so its settings bind nobody."""
    with folder_lock(folder, "manifest"):
        manifest = read_manifest(folder)
        if stage in manifest.stages:
            rest = {name: entry for name, entry in manifest.stages.items() if name != stage}
            _save(folder, replace(manifest, stages=rest))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``sampling.temperature: 0.8 -> 0.6`` for every value that differs, nested names joined by dots."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{name}: {_shown(before, name)} -> {_shown(after, name)}"
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or before[name] != after[name]
    ]


def versions() -> dict[str, str]:
    """bvpo, Python and the installed libraries that decide results; imports none of them."""
    found = {"bvpo": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.loads(json.dumps(value))  # as the file holds it: a tuple equals the list it became


def _shown(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "(not set)"
    text = json.dumps(values[name], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listing(changed: list[str], most: int = 6) -> str:
    more = len(changed) - most
    return "; ".join(changed[:most]) + (f"; and {more} more" if more > 0 else "")


def _write(folder: Path, stage: str, entry: StageEntry) -> None:
    manifest = read_manifest(folder)
    _save(folder, replace(manifest, stages={**manifest.stages, stage: to_dict(entry)}))


def _save(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(to_dict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / MANIFEST, text + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
