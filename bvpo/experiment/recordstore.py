"""The store of samples and scores: append-only, named by content, safe to kill at any moment.

In: records of one dataclass. Out: each key's first record, whichever process wrote it and however often. A folder holds
live files (checked JSON lines, one per writer) and sealed shards (Parquet); what is done is read from these alone, so
there is no index to lose. The store never looks into other files of the folder and never changes a record.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from bvpo.experiment.index import KeyIndex
from bvpo.experiment.lines import Key, digest
from bvpo.experiment.live import LiveFile, claim, cut_torn_tail, is_active
from bvpo.experiment.sealing import remove_drafts, rewrite_damaged, seal_file, shard_is_whole, to_record
from bvpo.experiment.shards import Damage, Shard
from bvpo.experiment.writer import LIVE_SUFFIX, RecordWriter
from bvpo.files import disk_errors, folder_lock, make_folder
from bvpo.records import Sample, Score
from bvpo.strict import UserError, field_types

R = TypeVar("R")
logger = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<stamp>\d{20}-.+-[0-9a-f]{6})(\.(?P<seq>\d{3})\.(?P<hash>[0-9a-f]{32})\.parquet|\.jsonl)")

KEYS: dict[type, Callable[[Any], Key]] = {
    Sample: lambda sample: sample.key,
    Score: lambda score: (score.sample_key, score.scorer),
}
"""Record class -> its key; other classes bring their own ``key=``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What a store holds. ``damaged`` records are not in ``num_records``: the next run makes them again."""

    num_records: int
    num_duplicates: int
    num_shards: int
    num_live: int
    num_active: int
    num_bytes: int
    torn_bytes: int
    damaged: tuple[Damage, ...]

    def __str__(self) -> str:
        text = f"{self.num_records} records in {self.num_shards} shards and {self.num_live} live files"
        notes = [
            (self.num_active, f"{self.num_active} writers at work"),
            (self.num_duplicates, f"{self.num_duplicates} duplicates ignored"),
            (self.torn_bytes, f"{self.torn_bytes} bytes of unfinished records ignored"),
            (self.damaged, f"{len(self.damaged)} damaged places"),
        ]
        return "; ".join([text, *(note for count, note in notes if count)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SealReport:
    """What sealing did; ``num_busy`` files still belong to a writer and were left alone."""

    num_records: int = 0
    num_duplicates: int = 0
    num_files: int = 0
    num_busy: int = 0
    damaged: tuple[Damage, ...] = ()


class RecordStore(Generic[R]):
    """Records of ``cls`` in ``folder`` as they were when it was opened; :meth:`refresh` looks again.

    Memory is 28 bytes a record, whatever the records weigh. Reading needs no write access and takes no lock.
    """

    def __init__(self, folder: str | Path, cls: type[R], key: Callable[[R], Key] | None = None) -> None:
        if key is None and cls not in KEYS:
            raise TypeError(f"{cls.__name__} has no key of its own; pass key=")
        self.folder, self.cls = Path(folder), cls
        self._key: Callable[[R], Key] = key or KEYS[cls]
        self._files: list[LiveFile | Shard] = []
        self._index = KeyIndex.build([])
        self.refresh()

    # ------------------------------------------------------------------------------------------------ reading

    def refresh(self) -> None:
        """Reads the keys of all files: one column of each shard, every line of each live file."""
        for _ in range(5):
            try:
                files = self._list()
                parts = [file.keys() for file in files]
            except FileNotFoundError:
                continue  # another process sealed a live file between the listing and the reading
            for file in self._files:
                if isinstance(file, Shard):
                    file.close()
            self._files, self._index = files, KeyIndex.build(parts)
            return
        raise UserError(f"{self.folder}: files keep disappearing while they are read; is something deleting them?")

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: Key) -> bool:
        return digest(key) in self._index

    def keys(self) -> KeyIndex:
        """The digests (:func:`bvpo.experiment.digest`) of all keys, as a frozen set."""
        return self._index

    def get(self, key: Key) -> R | None:
        """The record of one key. Slow in a shard (a row group is read); many keys: ``iter(only=keys)``."""
        return next(self.iter(only=[key]), None)

    def iter(self, only: Iterable[Key] | None = None) -> Iterator[R]:
        """Each key's first record, in file order; memory does not grow with the store.

        ``only`` restricts to these keys (unknown ones are left out). What proves to be damaged is logged and skipped.
        """
        for file, position, row in self._rows(only, None):
            yield to_record(self.cls, file, position, row)

    def __iter__(self) -> Iterator[R]:
        return self.iter()

    def columns(self, *names: str, only: Iterable[Key] | None = None) -> Iterator[dict[str, Any]]:
        """Some fields of each record as plain values; from shards, only these columns are read."""
        unknown = [name for name in names if name not in field_types(self.cls)]
        if unknown or not names:
            raise ValueError(f"{self.cls.__name__} has no fields {unknown}; it has {list(field_types(self.cls))}")
        for _, _, row in self._rows(only, names):
            yield row

    def _rows(
        self, only: Iterable[Key] | None, names: Sequence[str] | None
    ) -> Iterator[tuple[LiveFile | Shard, int, dict[str, Any]]]:
        index = self._index if only is None else self._index.select(digest(key) for key in only)
        for number, file in enumerate(list(self._files)):
            wanted = index.positions(number)
            if not len(wanted):
                continue
            known = len(file.damaged)
            try:
                for position, row in file.read(wanted, names):
                    yield file, position, row
            except FileNotFoundError:
                yield from self._rows_sealed_meanwhile(file.path, index.of_file(number), names)
            for damage in file.damaged[known:]:
                logger.warning(
                    "%s; skipped: repair(full=True) drops it, the stage that wrote it makes it again", damage
                )

    def _rows_sealed_meanwhile(
        self, live: Path, wanted: KeyIndex, names: Sequence[str] | None
    ) -> Iterator[tuple[Shard, int, dict[str, Any]]]:
        """The records of a live file that another process sealed after this store was opened."""
        stamp = live.name.removesuffix(LIVE_SUFFIX)
        shards = [file for file in self._list() if isinstance(file, Shard) and file.path.name.startswith(f"{stamp}.")]
        here = KeyIndex.build([shard.keys() for shard in shards]).select(wanted)
        if len(here) < len(wanted):
            raise UserError(f"{live}: removed while it was read; run the same command again")
        for number, shard in enumerate(shards):
            for position, row in shard.read(here.positions(number), names):
                yield shard, position, row

    def _list(self) -> list[LiveFile | Shard]:
        """All files in the order that decides which record of a key is the first: by writer, sealed before live.

        Sealing keeps a writer's stamp, so it never changes the order.
        """
        if not self.folder.is_dir():
            return []
        with disk_errors(self.folder, "listing it"):
            names = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        names.sort(key=lambda match: (match["stamp"], match["seq"] is None, match.string))
        paths = [(self.folder / match.string, match["seq"] is None) for match in names]
        return [LiveFile(path) if live else Shard(path, self.cls) for path, live in paths]

    # ------------------------------------------------------------------------------------------------ writing

    def open_writer(
        self, *, sync_records: int = 100, sync_seconds: float = 1.0, max_bytes: int = 1 << 28
    ) -> RecordWriter[R]:
        """A writer with a file of its own; any number of processes may have one. Cuts torn lines of dead ones."""
        make_folder(self.folder)
        self.repair()
        return RecordWriter(
            self.folder, self._key, sync_records=sync_records, sync_seconds=sync_seconds, max_bytes=max_bytes
        )

    def seal(self, shard_records: int = 50_000) -> SealReport:
        """Turns the live files of finished and dead writers into shards, duplicates and damaged lines left out."""
        if not self.folder.is_dir():
            return SealReport()
        totals: Counter[str] = Counter()
        damaged: list[Damage] = []
        with folder_lock(self.folder, "seal"):
            remove_drafts(self.folder)
            files = self._list()
            busy = {file.path for file in files if isinstance(file, LiveFile) and is_active(file.path)}
            files = [file for file in files if file.path not in busy]
            parts = [file.keys() for file in files]
            index = KeyIndex.build(parts)
            for number, file in enumerate(files):
                if isinstance(file, Shard):
                    continue
                with claim(file.path) as free:
                    # a file caught between its creation and its lock looked free and may have grown since
                    if not free or file.path.stat().st_size != file.num_bytes:
                        busy.add(file.path)
                        continue
                    wanted = index.positions(number)
                    seal_file(file, self.cls, self._key, wanted, shard_records)
                if file.torn_bytes:
                    _report_torn(file.path, file.torn_bytes)
                damaged += file.damaged
                totals.update(records=len(wanted), duplicates=len(parts[number][1]) - len(wanted), files=1)
        for damage in damaged:
            logger.warning("%s; left out of the shard, it will be made again", damage)
        self.refresh()
        return SealReport(
            num_records=totals["records"],
            num_duplicates=totals["duplicates"],
            num_files=totals["files"],
            num_busy=len(busy),
            damaged=tuple(damaged),
        )

    # ------------------------------------------------------------------------------------------------ checking

    def stats(self) -> StoreStats:
        """Counts as of the last :meth:`refresh`; who is at work is looked up now."""
        live = [file for file in self._files if isinstance(file, LiveFile) and file.path.exists()]
        active = {file.path for file in live if is_active(file.path)}
        return StoreStats(
            num_records=len(self._index),
            num_duplicates=self._index.num_duplicates,
            num_shards=len(self._files) - len(live),
            num_live=len(live),
            num_active=len(active),
            num_bytes=sum(file.path.stat().st_size for file in self._files if file.path.exists()),
            torn_bytes=sum(file.torn_bytes for file in live if file.path not in active),
            damaged=tuple(damage for file in self._files for damage in file.damaged),
        )

    def shard_hashes(self) -> dict[str, str]:
        """Shard name -> the first 128 bits of its SHA-256, which its name carries; :meth:`verify` compares contents."""
        names = [match for file in self._files if (match := _NAME.fullmatch(file.path.name)) and match["hash"]]
        return {match.string: match["hash"] for match in names}

    def verify(self) -> list[Damage]:
        """Reads every byte and returns what does not match its checksum."""
        found: list[Damage] = []
        for file in self._list():
            if isinstance(file, LiveFile):
                file.keys()
            elif not shard_is_whole(file.path):
                for _ in file.read(None):
                    pass
                if not file.damaged:
                    file.damaged.append(
                        Damage(where=str(file.path), num_records=0, problem="content does not match its name")
                    )
            found += file.damaged
        return found

    def repair(self, full: bool = False) -> list[Damage]:
        """Cuts off the unfinished last lines of dead writers; with ``full``, also rewrites damaged shards without the
        records that are lost (the damaged file stays as ``*.damaged``). Returns what was lost from shards."""
        for file in self._list():
            if isinstance(file, LiveFile):
                with claim(file.path) as free:
                    if free and (torn := cut_torn_tail(file.path)):
                        _report_torn(file.path, torn)
        if not full:
            return []
        lost: list[Damage] = []
        with folder_lock(self.folder, "seal"):
            for file in self._list():
                if isinstance(file, Shard) and not shard_is_whole(file.path):
                    lost += rewrite_damaged(file)
        for damage in lost:
            logger.warning("%s; dropped, it will be made again", damage)
        self.refresh()
        return lost


def _report_torn(path: Path, num_bytes: int) -> None:
    logger.warning("%s: a writer died while storing a record: %d unfinished bytes cut off", path, num_bytes)
