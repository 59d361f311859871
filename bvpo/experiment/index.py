"""Which keys a store holds and where each first stands: 28 bytes a record, whatever the records weigh.

In: per file, the 16-byte digests of its records in order, with their positions. Out: a set of digests that also says,
for each, the file and position of its first record; later records of the same key are counted and never found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np
import numpy.typing as npt

from bvpo.experiment.lines import ID_BYTES

Ids = npt.NDArray[np.uint64]  # [n, 2], the two big-endian halves of a digest
Positions = npt.NDArray[np.int64]  # [n], a byte offset or a row number


def unpack(digests: bytes | bytearray) -> Ids:
    """Concatenated digests as an array; the order of the rows is the byte order of the digests."""
    return np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


class KeyIndex(Set[bytes]):
    """A frozen set of digests with the place of each; see :meth:`build`."""

    def __init__(self, ids: Ids, file: npt.NDArray[np.int32], position: Positions, num_duplicates: int) -> None:
        # two columns, each contiguous: searching a strided one copies it at every look-up
        self._high, self._low = np.ascontiguousarray(ids[:, 0]), np.ascontiguousarray(ids[:, 1])
        self._file, self._position = file, position
        self.num_duplicates = num_duplicates

    @classmethod
    def build(cls, parts: Sequence[tuple[Ids, Positions]]) -> KeyIndex:
        """From the files of a store in their order; the first record of a key wins."""
        if not parts:
            return cls(np.empty((0, 2), np.uint64), np.empty(0, np.int32), np.empty(0, np.int64), 0)
        ids = np.concatenate([ids for ids, _ in parts])
        position = np.concatenate([position for _, position in parts])
        file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(position) for _, position in parts])
        order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: equal digests stay in file order
        ids = ids[order]
        first = np.ones(len(ids), dtype=bool)
        first[1:] = (ids[1:] != ids[:-1]).any(axis=1)
        order = order[first]
        return cls(ids[first], file[order], position[order], len(first) - len(order))

    def __len__(self) -> int:
        return len(self._high)

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), 4096):
            rows = slice(start, start + 4096)
            block = np.stack((self._high[rows], self._low[rows]), axis=1).astype(">u8").tobytes()
            for at in range(0, len(block), ID_BYTES):
                yield block[at : at + ID_BYTES]

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self._row(digest) is not None

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """(file, position) of a digest, or None."""
        row = self._row(digest)
        return None if row is None else (int(self._file[row]), int(self._position[row]))

    def positions(self, file: int) -> Positions:
        """Sorted positions in one file at which a first record stands."""
        return np.sort(self._position[self._file == file])

    def select(self, digests: Iterable[bytes]) -> KeyIndex:
        """The part of the index with these digests; unknown ones are left out."""
        rows = {row for digest in digests if (row := self._row(digest)) is not None}
        return self._take(np.array(sorted(rows), dtype=np.int64))

    def of_file(self, file: int) -> KeyIndex:
        """The part of the index whose first records stand in one file."""
        return self._take(np.flatnonzero(self._file == file))

    def _take(self, rows: npt.NDArray[np.int64]) -> KeyIndex:
        ids = np.stack((self._high[rows], self._low[rows]), axis=1)
        return KeyIndex(ids, self._file[rows], self._position[rows], 0)

    def _row(self, digest: bytes) -> int | None:
        high, low = unpack(digest)[0]
        row = int(np.searchsorted(self._high, high))
        while row < len(self._high) and self._high[row] == high:
            if self._low[row] == low:
                return row
            row += 1
        return None
