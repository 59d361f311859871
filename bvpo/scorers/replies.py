"""Replies of a judge, kept in a folder of records: a request that was answered once is never sent again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bvpo.experiment import RecordStore, RecordWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReply:
    """One reply, named by the content of its request. ``served_by`` is the model that the endpoint says gave it."""

    key: str
    reply: str
    served_by: str


class ReplyStore:
    """The replies in one folder; experiments may share it, and run at the same time. Nothing is written before there is
    a reply to keep."""

    def __init__(self, folder: Path) -> None:
        self._store = RecordStore(folder, JudgeReply, key=lambda reply: reply.key)
        self._writer: RecordWriter[JudgeReply] | None = None
        self._known: dict[str, str] = {}
        self.served_by: Counter[str] = Counter()
        for row in self._store.columns("key", "reply", "served_by"):
            self._known[row["key"]] = row["reply"]

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, reply: str, served_by: str) -> None:
        self._known[key] = reply
        self.served_by[served_by] += 1
        if self._writer is None:
            self._writer = self._store.open_writer()
        self._writer.append(JudgeReply(key=key, reply=reply, served_by=served_by))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
