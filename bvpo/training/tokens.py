"""Quads in tokens: what they are, and how they lie on disk.

:class:`TokenQuad` is one shared prefix and up to four branches. :class:`TokenDataset` reads many of them from a
memory-mapped Arrow file; :class:`TokenWriter` streams them into one. How text and sampled ids become tokens, and which
pairs are dropped on the way, is :mod:`bvpo.training.tokenizing`'s business.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.int32]

SCHEMA_VERSION = 1
_BOUNDS = 13  # prefix length, then per branch: length (-1 = absent), scored_from, answer_from
_SCHEMA = pa.schema(
    [("id", pa.string()), ("ids", pa.list_(pa.int32())), ("bounds", pa.list_(pa.int32(), _BOUNDS))],
    metadata={"bvpo": f"tokens {SCHEMA_VERSION}"},
)
_BATCH_QUADS = 512
_BATCH_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """One response: ``ids`` = unscored prompt tail + scored tokens; ``answer_from`` indexes its first answer token."""

    ids: Ids
    scored_from: int
    answer_from: int


Branches = tuple[Branch | None, Branch | None, Branch | None, Branch | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenQuad:
    """A quad in tokens: ``prefix_ids`` [P >= 1] shared by all branches, which come in the order trace chosen, trace
    rejected, empty chosen, empty rejected. The last prefix token predicts the first token of every branch."""

    id: str
    prefix_ids: Ids
    branches: Branches

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree row: the prefix once, and every branch."""
        return len(self.prefix_ids) + sum(len(b.ids) for b in self.branches if b is not None)

    @property
    def has_view(self) -> tuple[bool, bool]:
        """Whether the quad has a pair in each view, in the order of ``VIEWS``."""
        return self.branches[0] is not None, self.branches[2] is not None


class TokenDataset:
    """Tokenised quads in ``folder``: ``tokens.arrow`` (memory-mapped), ``drops.jsonl`` and ``summary.json``.

    ``ds[i]`` reads one quad without loading others; only ``num_tokens`` [N], ``num_sequence_tokens`` [N] (the prefix counted
    for each response, as a trainer without a tree would compute it) and ``has_view`` [N, 2] stay in memory. Rows
    ``group_starts[g]`` to ``group_starts[g + 1]`` are one quad with several traces; mostly every row is a group by itself.
    ``drops`` counts lost pairs as ``"view/reason"``. Made by :func:`bvpo.training.tokenizing.prepare_tokens`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self.fingerprint: str = summary["fingerprint"]
        self.drops: Counter[str] = Counter(summary["drops"])
        self.num_dropped_quads: int = summary["num_dropped_quads"]
        self.num_left_out: int = summary.get("num_left_out", 0)  # members of groups that the estimator does not take
        path = self.folder / "tokens.arrow"
        if path.stat().st_size != summary["bytes"]:
            raise OSError(f"{path} has {path.stat().st_size} bytes, expected {summary['bytes']}")
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_MappedBatch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches])
        empty = [np.empty((0, _BOUNDS), dtype=np.int32)]
        bounds = np.concatenate([batch.bounds for batch in self._batches] or empty)
        lengths = [np.diff(batch.offsets) for batch in self._batches]
        self.num_tokens: npt.NDArray[np.int64] = np.concatenate([*lengths, np.empty(0, dtype=np.int64)]).astype(
            np.int64
        )
        self.has_view: npt.NDArray[np.bool_] = bounds[:, [1, 7]] >= 0
        num_branches = (bounds[:, [1, 4, 7, 10]] >= 0).sum(axis=1)
        longest = np.maximum(bounds[:, [1, 4, 7, 10]].max(axis=1, initial=0), 0)
        self._widths: npt.NDArray[np.int64] = (bounds[:, 0] + longest).astype(np.int64)
        self._branches: npt.NDArray[np.int64] = num_branches
        self.longest: int = int(self._widths.max(initial=0))  # prompt and response
        self.num_sequence_tokens: npt.NDArray[np.int64] = self.num_tokens + bounds[:, 0] * (num_branches - 1)
        # Only data with several traces says so, so that files from before groups existed are still read.
        sizes = summary.get("groups") or [1] * len(self)
        self.group_starts: npt.NDArray[np.int64] = np.cumsum([0, *sizes])
        if self.group_starts[-1] != len(self):
            raise ValueError(f"{path} has {len(self)} quads, its groups {self.group_starts[-1]}")

    @property
    def num_groups(self) -> int:
        return len(self.group_starts) - 1

    @property
    def has_groups(self) -> bool:
        """Whether a group has more than one row."""
        return self.num_groups < len(self)

    @property
    def group_tokens(self) -> npt.NDArray[np.int64]:
        """``num_tokens`` of whole groups; [G]."""
        return self._of_groups(np.add, self.num_tokens)

    def row_tokens(self, layout: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """Tokens that each quad puts through the model, padding included, and for padded rows their number; [N]."""
        if layout == "padded":
            return self._branches * self._widths, self._branches
        return self.num_sequence_tokens if layout in ("packed", "single") else self.num_tokens, None

    def run_tokens(self, layout: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """The same of whole groups; [G]."""
        if layout != "padded":
            return self._of_groups(np.add, self.row_tokens(layout)[0]), None
        rows = self._of_groups(np.add, self._branches)
        return rows * self._of_groups(np.maximum, self._widths), rows

    def _of_groups(self, function: np.ufunc, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return function.reduceat(values, self.group_starts[:-1]) if self.has_groups else values

    @property
    def group_has_view(self) -> npt.NDArray[np.bool_]:
        """``has_view`` of whole groups; [G, 2]."""
        return np.logical_or.reduceat(self.has_view, self.group_starts[:-1]) if self.has_groups else self.has_view

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenQuad:
        if not -len(self) <= index < len(self):
            raise IndexError(f"quad {index} of {len(self)}")
        index %= len(self)
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[batch].quad(index - int(self._starts[batch]))

    def __iter__(self) -> Iterator[TokenQuad]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path]]:
        return TokenDataset, (self.folder,)  # workers map the file again instead of receiving its content


class _MappedBatch:
    """One record batch as views of the mapped file; nothing is copied until a quad is used."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.names = batch.column(0)
        tokens: Any = batch.column(1)
        self.offsets: npt.NDArray[np.int32] = tokens.offsets.to_numpy()
        self.values: Ids = tokens.values.to_numpy()
        rows: Any = batch.column(2)
        self.bounds: npt.NDArray[np.int32] = rows.values.to_numpy().reshape(-1, _BOUNDS)

    def __len__(self) -> int:
        return len(self.names)

    def quad(self, row: int) -> TokenQuad:
        ids = self.values[self.offsets[row] : self.offsets[row + 1]]
        prefix, *rest = self.bounds[row].tolist()
        at = prefix
        branches: list[Branch | None] = []
        for length, scored_from, answer_from in (rest[0:3], rest[3:6], rest[6:9], rest[9:12]):
            if length < 0:
                branches.append(None)
                continue
            branches.append(Branch(ids=ids[at : at + length], scored_from=scored_from, answer_from=answer_from))
            at += length
        first, second, third, fourth = branches
        return TokenQuad(id=self.names[row].as_py(), prefix_ids=ids[:prefix], branches=(first, second, third, fourth))


class TokenWriter:
    """Streams quads into ``folder/tokens.arrow`` in record batches; ``close`` syncs the file and returns its size."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokens.arrow"
        self.num_quads = 0
        self._rows: list[TokenQuad] = []
        self._tokens = 0
        self._sink = pa.OSFile(str(self.path), "wb")
        self._arrow = pa.ipc.new_file(self._sink, _SCHEMA)

    def add(self, quad: TokenQuad) -> None:
        self.num_quads += 1
        self._rows.append(quad)
        self._tokens += quad.num_tokens
        if len(self._rows) >= _BATCH_QUADS or self._tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> int:
        self._flush()
        self._arrow.close()
        self._sink.close()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def _flush(self) -> None:
        if not self._rows:
            return
        parts = [part for q in self._rows for part in (q.prefix_ids, *(b.ids for b in q.branches if b is not None))]
        offsets = np.cumsum([0] + [q.num_tokens for q in self._rows]).astype(np.int32)
        bounds = np.array([_bounds(q) for q in self._rows], dtype=np.int32)
        columns = [
            pa.array([q.id for q in self._rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts))),
            pa.FixedSizeListArray.from_arrays(pa.array(bounds.reshape(-1)), _BOUNDS),
        ]
        self._arrow.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._rows.clear()
        self._tokens = 0


def _bounds(quad: TokenQuad) -> list[int]:
    flat = [len(quad.prefix_ids)]
    for branch in quad.branches:
        flat += [-1, 0, 0] if branch is None else [len(branch.ids), branch.scored_from, branch.answer_from]
    return flat
