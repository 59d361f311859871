"""Reading what users bring: prompts from files, saved data sets or the Hub, and the texts of benchmark files.

In: a source such as ``prompts.jsonl``, ``folder?split=test`` or ``org/set?column=instruction``. Out: its rows one by one,
each with the place it came from, and a fingerprint of the content. What a row's value means, and whether it is a good
prompt, is decided by :mod:`bvpo.data.cleaning`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from bvpo.strict import UserError, did_you_mean, parse_json, show

PROMPT_COLUMNS = ("messages", "prompt", "conversation", "instruction", "question", "problem", "query", "text", "input")
ITEM_FIELDS = (
    "question",
    "problem",
    "prompt",
    "instruction",
    "turns",
    "input",
    "query",
    "sentence",
    "text",
    "messages",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where prompts come from and which columns count; ``id_column`` may be empty. ``config`` names one of several sets
    under one Hub name. ``with_rest``: the other columns are wanted, too."""

    path: str
    split: str = "train"
    column: str = "auto"
    id_column: str = ""
    config: str = ""
    with_rest: bool = False


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One value of the prompt column as it stands there; ``where`` names file and line (or row), ``rest`` holds the other
    columns where the source was asked for them."""

    where: str
    value: Any
    id: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)


_OPTIONS = {"split": "split", "column": "column", "id": "id_column", "config": "config"}


def parse_source(text: str, default: Source) -> Source:
    """``path?split=..&column=..&id=..``; what is not given comes from ``default``."""
    if "?" not in text or Path(text).exists():
        return replace(default, path=text)
    path, _, query = text.partition("?")
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS or not value:
            raise UserError(f"prompts.sources: {text!r}: option {name!r}{did_you_mean(name, _OPTIONS)}")
        options[_OPTIONS[name]] = value
    return replace(default, path=path, **options)


def read_source(source: Source) -> Iterator[SourceRow]:
    """The rows of a source in order; a :class:`UserError` for what cannot be read."""
    path = Path(source.path)
    if path.suffix in (".txt", ".text"):
        rows = ((where, {"text": line}) for where, line in _text_lines(path))
        yield from _select(rows, replace(source, column="text", id_column=""))
    elif path.suffix in _READERS:
        yield from _select(_READERS[path.suffix](path), source)
    elif path.is_dir():
        yield from _select(_dataset_rows(_load_folder(source), source), source)
    elif path.exists():
        raise UserError(f"{path}: unknown kind of file; expected {', '.join(_READERS)}, .txt, or a saved data set")
    else:
        yield from _select(_dataset_rows(_load_from_hub(source), source), source)


def fingerprint_source(source: Source) -> str:
    """Changes with the content: SHA-256 of a file or of a folder's files, the data set's own for the Hub."""
    path = Path(source.path)
    if path.is_file():
        return fingerprint_file(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = "\n".join(f"{file.relative_to(path)} {fingerprint_file(file)}" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return str(_load_from_hub(source)._fingerprint)


def fingerprint_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def benchmark_files(patterns: Sequence[str]) -> list[Path]:
    """The files of all patterns, each once; a pattern without a file is an error."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(path) for path in paths if Path(path).is_file()]
        if not files:
            raise UserError(f"prompts.decontaminate: {pattern!r}: no such file")
        found.update(dict.fromkeys(files))
    return list(found)


def read_benchmark(path: Path, fields: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(place, text) of each item; ``fields`` names the ones with texts, else the usual names of questions are taken.

    A list of texts (turns) gives one item each, a list of messages one item per user message.
    """
    if path.suffix in (".txt", ".text"):
        yield from _text_lines(path)
        return
    if path.suffix not in _READERS:
        raise UserError(f"{path}: unknown kind of benchmark file; expected {', '.join(_READERS)} or .txt")
    for where, row in _READERS[path.suffix](path):
        names = {name.casefold(): name for name in row}
        chosen = [names[name] for name in ITEM_FIELDS if name in names] if not fields else list(fields)
        texts = [text for name in chosen for text in _texts(row.get(name))]
        if not texts:
            expected = ", ".join(fields or ITEM_FIELDS)
            raise UserError(f"{where}: no text in the fields {expected} (it has: {', '.join(map(str, row))})")
        for text in dict.fromkeys(texts):
            yield where, text


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, Mapping) and value.get("role", "user") == "user":
        return _texts(value.get("content"))
    return []


def _select(rows: Iterator[tuple[str, Mapping[str, Any]]], source: Source) -> Iterator[SourceRow]:
    """The prompt column, and the id column where one is named, of each row."""
    column = source.column
    for where, row in rows:
        if column == "auto":
            found = next((name for name in PROMPT_COLUMNS if name in row), None)
            if found is None:
                raise UserError(
                    f"{where}: found no prompt column among {', '.join(map(repr, row))}; name it with prompts.column"
                )
            column = found
        for name in filter(None, (column, source.id_column)):
            if name not in row:
                raise UserError(f"{where}: missing field {name!r}{did_you_mean(name, map(str, row))}")
        value = row[column]
        if value is not None and not isinstance(value, (str, list, tuple)):
            raise UserError(
                f"{where}: field {column!r}: got {show(value)}, expected a string or a list of messages with role, content"
            )
        id = _row_id(row[source.id_column], where, source.id_column) if source.id_column else None
        used = (column, source.id_column)
        rest = {name: cell for name, cell in row.items() if name not in used} if source.with_rest else {}
        yield SourceRow(where, value, id, rest)


def _row_id(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: field {column!r}: got {show(value)}, expected a text or an integer")
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# files


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                where = f"{path}:{number}"
                try:
                    yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines with text; blank ones only separate."""
    return ((where, line) for where, line in _lines(path) if line.strip())


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _text_lines(path):
        yield where, _object(parse_json(line, where), where)


def _json_array(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    data = parse_json("\n".join(line for _, line in _lines(path)), str(path))
    if not isinstance(data, list):
        raise UserError(f"{path}: got {show(data)}, expected a list of objects (or JSON lines in a .jsonl file)")
    for number, row in enumerate(data, start=1):
        where = f"{path}: item {number}"
        yield where, _object(row, where)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: got {show(value)}, expected an object")
    return value


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            number = 2
            for row in reader:
                where, number = f"{path}:{number}", reader.line_num + 1
                if None in row or None in row.values():
                    raise UserError(f"{where}: expected {len(reader.fieldnames or ())} cells, as in the first line")
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}


_FILE_SUFFIXES = {*_READERS, ".txt", ".text", ".toml", ".gz", ".zst", ".arrow"}


# ---------------------------------------------------------------------------------------------------------------------
# the datasets library


def _dataset_rows(data: Any, source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name = f"{source.path}[{source.split}]"
    wanted = [source.id_column, *(PROMPT_COLUMNS if source.column == "auto" else [source.column])]
    present = [] if source.with_rest else [column for column in data.column_names if column in wanted]
    data = data.select_columns(present) if present else data  # the other columns may be large
    for number, row in enumerate(data, start=1):
        yield f"{name}: row {number}", row


def _load_folder(source: Source) -> Any:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(source.path)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.path}: not a folder of datasets.save_to_disk ({_first_line(error)})") from None
    if isinstance(loaded, Dataset):
        return loaded
    if source.split not in loaded:
        raise UserError(f"{source.path}: no split {source.split!r}{did_you_mean(source.split, map(str, loaded))}")
    return loaded[source.split]


def _load_from_hub(source: Source) -> Any:
    if not _may_be_hub_name(source.path):
        raise UserError(f"{source.path}: no such file or folder")
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.config or None, split=source.split)
    except Exception as error:  # the library raises many kinds: no network, no such set, no such split, gated
        raise UserError(
            f"prompts.sources: {source.path!r} is no file here, and as a data set of the Hub it cannot be loaded "
            f"({_first_line(error)})"
        ) from error


def _may_be_hub_name(path: str) -> bool:
    return not path.startswith(("/", ".", "~")) and path.count("/") <= 1 and Path(path).suffix not in _FILE_SUFFIXES


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
