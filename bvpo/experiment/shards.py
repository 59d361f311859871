"""Sealed shards: records as Parquet columns that pandas, DuckDB or ``datasets`` read as they are.

In: records of one dataclass with the digests of their keys. Out: a zstd Parquet file with page checksums, and from it
digests (one column), records (row group by row group) or what is damaged. Numbers, texts and lists of numbers are plain
columns, anything nested is JSON text. A record that its columns cannot hold exactly is kept whole in ``_json``.
Which file is sealed when, and under which name, is decided elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import numpy as np

from bvpo.experiment.index import Ids, Positions, unpack
from bvpo.experiment.lines import ID_BYTES
from bvpo.strict import field_types, parse_json, to_dict, to_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ID_COLUMN = "_id"
JSON_COLUMN = "_json"
ROW_GROUP = 1000

Kind = Literal["plain", "numbers", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Records that can no longer be read: ``where`` is ``path:line`` or ``path: rows a-b``."""

    where: str
    num_records: int | None
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@cache
def _columns(cls: type) -> dict[str, tuple[Kind, pa.DataType]]:
    """Field name -> how it is held and its Arrow type."""
    import pyarrow as pa

    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    # token ids fit 32 bits; a record whose integers do not goes to the JSON column
    items = {int: pa.int32(), float: pa.float64()}

    def column(tp: Any) -> tuple[Kind, pa.DataType]:
        origin, args = get_origin(tp), get_args(tp)
        if origin in (Union, UnionType):
            some = [a for a in args if a is not NoneType]
            return column(some[0]) if len(some) == 1 else ("json", pa.string())
        if origin is Literal and all(isinstance(a, str) for a in args):
            return "plain", pa.string()
        if tp in scalars:
            return "plain", scalars[tp]
        if origin is tuple and len(args) == 2 and args[1] is Ellipsis and args[0] in items:
            return "numbers", pa.list_(items[args[0]])
        return "json", pa.string()

    return {name: column(tp) for name, tp in field_types(cls).items()}


def schema(cls: type) -> pa.Schema:
    """The Arrow schema of a record class."""
    import pyarrow as pa

    assert is_dataclass(cls)
    columns = [(name, tp) for name, (_, tp) in _columns(cls).items()]
    head = [(ID_COLUMN, pa.binary(ID_BYTES)), (JSON_COLUMN, pa.string())]
    return pa.schema(head + columns, metadata={"bvpo.record": cls.__name__})


def open_shard_writer(path: Path, cls: type) -> pq.ParquetWriter:
    """A Parquet writer with the settings every shard has."""
    import pyarrow.parquet as pq

    # byte-stream split beats dictionaries for token ids and for float32-valued log-probs held as doubles
    split = [f"{name}.list.element" for name, (kind, _) in _columns(cls).items() if kind == "numbers"]
    repeated = [name for name, tp in field_types(cls).items() if get_origin(tp) is Literal or name == "scorer"]
    return pq.ParquetWriter(
        path,
        schema(cls),
        compression="zstd",
        use_dictionary=repeated,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=split,  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
        write_statistics=False,
        store_schema=True,
    )


def to_table(cls: type, idents: Sequence[bytes], records: Sequence[Any]) -> pa.Table:
    """One row group of records."""
    import pyarrow as pa

    try:
        return _table(cls, idents, [to_dict(record) for record in records], [None] * len(records))
    except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid):
        pass  # some record holds what a column cannot, such as a lone surrogate: find out which
    rows: list[Mapping[str, Any]] = []
    whole: list[str | None] = []
    for ident, record in zip(idents, records, strict=True):
        row = to_dict(record)
        try:
            _table(cls, [ident], [row], [None])
            rows.append(row)
            whole.append(None)
        except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid):
            rows.append({})
            whole.append(to_json(record))
    return _table(cls, idents, rows, whole)


def _table(
    cls: type, idents: Sequence[bytes], rows: Sequence[Mapping[str, Any]], whole: Sequence[str | None]
) -> pa.Table:
    import pyarrow as pa

    arrays = [pa.array(idents, pa.binary(ID_BYTES)), pa.array(whole, pa.string())]
    for name, (kind, tp) in _columns(cls).items():
        values = [row.get(name) for row in rows]
        if kind == "json":
            texts = [None if v is None else json.dumps(v, ensure_ascii=False, allow_nan=False) for v in values]
            arrays.append(pa.array(texts, pa.string()))
        else:
            arrays.append(pa.array(values, tp))
    return pa.Table.from_arrays(arrays, schema=schema(cls))


class Shard:
    """A sealed file, opened for reading. ``damaged`` fills as reading finds what the checksums refuse."""

    def __init__(self, path: Path, cls: type) -> None:
        import pyarrow.parquet as pq

        self.path, self.cls = path, cls
        self.damaged: list[Damage] = []
        self._file: pq.ParquetFile | None = None
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            self.damaged.append(Damage(where=str(path), num_records=None, problem=f"unreadable shard ({_line(error)})"))

    def where(self, row: int) -> str:
        return f"{self.path}: row {row + 1}"

    def keys(self) -> tuple[Ids, Positions]:
        """Digests and row numbers; reads one column."""
        found, rows = bytearray(), []
        for start, stop, table in self._row_groups([ID_COLUMN], None):
            block = b"".join(table.column(0).to_pylist())
            found += block
            rows.append(np.arange(start, stop, dtype=np.int64))
        return unpack(found), np.concatenate(rows) if rows else np.empty(0, np.int64)

    def read(
        self, wanted: Positions | None, names: Sequence[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, plain values) of the wanted rows in order, of some or all fields."""
        present = set() if self._file is None else set(self._file.schema_arrow.names)
        fields = [n for n in (names or _columns(self.cls)) if n in present]
        for start, stop, table in self._row_groups([JSON_COLUMN, *fields], wanted):
            rows = np.arange(stop - start) if wanted is None else wanted[_between(wanted, start, stop)] - start
            columns = {name: self._values(table, name) for name in fields}
            whole = table.column(JSON_COLUMN).to_pylist()
            for row in rows.tolist():
                if whole[row] is None:
                    yield start + row, {name: values[row] for name, values in columns.items()}
                else:
                    record = parse_json(whole[row], self.where(start + row))
                    yield start + row, record if names is None else {name: record[name] for name in names}

    def tables(self) -> Iterator[pa.Table]:
        """The row groups that are intact, as they are."""
        for _, _, table in self._row_groups(None, None):
            yield table

    def _values(self, table: pa.Table, name: str) -> list[Any]:
        kind, _ = _columns(self.cls)[name]
        column = table.column(name)
        if kind == "json":
            return [None if text is None else json.loads(text) for text in column.to_pylist()]
        return _lists(column) if kind == "numbers" else column.to_pylist()

    def _row_groups(self, columns: list[str] | None, wanted: Positions | None) -> Iterator[tuple[int, int, pa.Table]]:
        """(first row, last row + 1, columns) of the row groups with wanted rows; damaged ones are noted."""
        stop = 0
        for group in range(0 if self._file is None else self._file.num_row_groups):
            assert self._file is not None
            start, stop = stop, stop + self._file.metadata.row_group(group).num_rows
            if wanted is not None and _between(wanted, start, stop) == slice(0, 0):
                continue
            try:
                table = self._file.read_row_group(group, columns=columns)
            except (OSError, ValueError) as error:
                where = f"{self.path}: rows {start + 1}-{stop}"
                damage = Damage(where=where, num_records=stop - start, problem=f"damaged ({_line(error)})")
                if damage not in self.damaged:
                    self.damaged.append(damage)
                continue
            yield start, stop, table

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _between(wanted: Positions, start: int, stop: int) -> slice:
    first, last = np.searchsorted(wanted, [start, stop]).tolist()
    return slice(first, last) if first < last else slice(0, 0)


def _lists(column: pa.ChunkedArray) -> list[list[Any] | None]:
    """Lists of numbers as Python lists: through numpy, ten times faster than value by value."""
    out: list[list[Any] | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).tolist()
        offsets = chunk.offsets.to_numpy().tolist()
        valid = chunk.is_valid().to_pylist()
        for ok, start, stop in zip(valid, offsets[:-1], offsets[1:], strict=True):
            out.append(values[start:stop] if ok else None)
    return out


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
