"""One record as one checked line of a live file: ``{"crc":"..","id":"..","record":{..}}``.

In: the 16-byte digest of a record's key and its JSON. Out: the line, and back again, with everything that does not
match its checksum left out. The layout is fixed-width up to the record, so scanning for keys parses no JSON; the line
itself is plain JSON, so any tool reads the file. Nothing here opens, truncates or locks a file on its own account.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

ID_BYTES = 16
_HEAD = b'{"crc":"'
_MID = b'","id":"'
_BODY = b'","record":'
_CRC_AT = len(_HEAD)
_CRC_END = _CRC_AT + 8
_ID_AT = _CRC_END + len(_MID)
_ID_END = _ID_AT + 2 * ID_BYTES
_BODY_AT = _ID_END + len(_BODY)

Key = str | tuple[str, ...]


def digest(key: Key) -> bytes:
    """The 16 bytes that stand for a key in files and in memory."""
    parts = [key] if isinstance(key, str) else list(key)
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:ID_BYTES]


def encode_line(ident: bytes, record_json: bytes) -> bytes:
    """The line of a record, newline included; the checksum covers all that follows it."""
    tail = b"".join((_MID, ident.hex().encode(), _BODY, record_json, b"}"))
    return b"%s%08x%s\n" % (_HEAD, zlib.crc32(tail), tail)


@dataclass(frozen=True, slots=True)
class Line:
    """A line whose checksum holds: where it starts in the file, whose record it is, and the record's JSON."""

    offset: int
    number: int
    ident: bytes
    record_json: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """Bytes that are no intact line; ``torn`` says that the file ends within them."""

    offset: int
    number: int
    size: int
    torn: bool


def _intact(line: bytes) -> tuple[bytes, bytes] | None:
    """(ident, record JSON) of a line without its newline, or None."""
    if not line.startswith(_HEAD) or line[_ID_END:_BODY_AT] != _BODY:
        return None
    if b"%08x" % zlib.crc32(memoryview(line)[_CRC_END:]) != line[_CRC_AT:_CRC_END]:
        return None
    return bytes.fromhex(line[_ID_AT:_ID_END].decode()), line[_BODY_AT:-1]


def _recover(line: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Intact records inside a damaged line: when a newline is hit, two good records look like one bad line."""
    start = 0
    while start >= 0:
        following = line.find(_HEAD, start + 1)
        found = _intact(line[start : following - 1] if following > 0 else line[start:])
        if found:
            yield start, *found
        start = following


def read_lines(stream: IO[bytes]) -> Iterator[Line | BadLine]:
    """Every line from the stream's position to its end, numbered from 1, damaged ones marked."""
    offset = stream.tell()
    for number, raw in enumerate(stream, start=1):
        if raw.endswith(b"\n"):
            found = _intact(raw[:-1])
            if found:
                yield Line(offset, number, *found)
            else:
                pieces = list(_recover(raw[:-1]))
                if len(pieces) < max(1, raw.count(_HEAD)):
                    yield BadLine(offset, number, len(raw), torn=False)
                for shift, ident, record_json in pieces:
                    yield Line(offset + shift, number, ident, record_json)
        else:
            yield BadLine(offset, number, len(raw), torn=True)
        offset += len(raw)


def line_at(stream: IO[bytes], offset: int) -> bytes | None:
    """The record JSON of the line that starts at ``offset``, or None if it is damaged by now."""
    stream.seek(offset)
    raw = stream.readline().removesuffix(b"\n")
    found = _intact(raw)
    if found:
        return found[1]
    return next((record_json for shift, _, record_json in _recover(raw) if shift == 0), None)


def tail_start(stream: IO[bytes]) -> int:
    """Where the unterminated end of the file begins: its size when the last line is whole."""
    end = stream.seek(0, 2)
    position = end
    while position > 0:
        start = max(0, position - (1 << 16))
        stream.seek(start)
        found = stream.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
