"""Rows of plain values from wherever preference data lies: files, dataset folders, the Hub, or memory.

In: a path, a Hub name, a ``datasets.Dataset`` or a list. Out: :class:`Rows`: random access to dictionaries, a name for
each row that an error message can start with (``file:line``), and a fingerprint of the whole content. JSON files are
read directly, so that errors name the line; everything else goes through ``datasets``. What the columns mean is the
caller's business.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bvpo.strict import UserError, parse_json, read_text, show


class Rows(Protocol):
    """Random access to rows of plain values."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content of all rows."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def where(self, index: int) -> str:
        """What an error message about this row starts with."""
        ...


class JsonlRows:
    """A JSON-lines file, memory-mapped; one scan finds the lines and hashes the file. Blank lines hold no row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes: mmap.mmap | bytes = b""
        with path.open("rb") as file:
            if path.stat().st_size:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._lines: list[tuple[int, int, int]] = []  # number, start, end
        start = number = 0
        while start < len(self._bytes):
            newline = self._bytes.find(b"\n", start)
            end = newline if newline >= 0 else len(self._bytes)
            number += 1
            if self._bytes[start:end].strip():
                self._lines.append((number, start, end))
            start = end + 1
        self.fingerprint = hashlib.blake2b(self._bytes, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, start, end = self._lines[index]
        where = self.where(index)
        try:
            text = self._bytes[start:end].decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        return _as_row(parse_json(text, where), where)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index][0]}"


class ListRows:
    """Rows that are in memory already; ``name`` starts the error messages."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self._rows, self._name = rows, name

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for row in self._rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _as_row(self._rows[index], self.where(index))

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


class DatasetRows:
    """A ``datasets.Dataset``. Nulls are left out: Arrow gives every row every column and every struct every field."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset.with_format(None), name

    @property
    def fingerprint(self) -> str:
        """Of the content: the dataset's own fingerprint follows the way it was made instead."""
        import pyarrow as pa

        digest = hashlib.blake2b(digest_size=16)
        for table in self._dataset.with_format("arrow").iter(batch_size=1000):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
                writer.write_table(table.replace_schema_metadata(None).combine_chunks())
            digest.update(sink.getvalue())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _without_nulls(self._dataset[index])

    def where(self, index: int) -> str:
        return f"{self._name}, row {index}"


def is_dataset(value: Any) -> bool:
    """Whether this is a ``datasets.Dataset`` (not an iterable one), told without importing ``datasets``."""
    return all(hasattr(value, name) for name in ("column_names", "with_format", "__len__", "__getitem__")) and not (
        isinstance(value, Mapping)
    )


def load_rows(source: str, split: str = "train", field: str = "data") -> Rows:
    """Open a local file (json, jsonl, parquet), a dataset folder, or a Hub dataset; ``field`` names the setting."""
    path = Path(source).expanduser()
    if path.is_dir():
        return DatasetRows(_load_folder(path, split, field), f"{source} ({split})")
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(f"{field}: no such file: {source}")
        if split != "train":
            raise UserError(f"{field}_split: got {split!r}, expected 'train': a single file has no splits")
        return _load_file(path)
    if path.exists():
        raise UserError(f"{field}: got {source!r}, expected a .json, .jsonl or .parquet file, a folder, or a Hub name")
    return DatasetRows(_load_dataset(source, field, split=split), f"{source} ({split})")


def _load_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        return DatasetRows(_load_dataset("parquet", "data", data_files=str(path), split="train"), str(path))
    if path.suffix == ".json" and path.read_bytes()[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return ListRows(parse_json(read_text(path), str(path)), str(path))
    return JsonlRows(path)


def _load_folder(path: Path, split: str, field: str) -> Any:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _load_dataset(str(path), field, split=split)
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{field}_split: got {split!r}, expected one of {', '.join(map(repr, loaded))} ({path})")
    return loaded[split]


def _load_dataset(name: str, field: str, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, **options)
    except Exception as error:  # `datasets` raises many kinds for a wrong name, split, file or connection
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{field}: cannot load {name!r}: {lines[0]}") from error


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: got {show(value)}, expected an object")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        # token ids: thousands of plain numbers that need no visit each
        return value if not value or isinstance(value[0], int) else [_without_nulls(item) for item in value]
    return value
