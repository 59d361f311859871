"""TOML as text: writing a config out, and finding the line of a key (``tomllib`` reads, but tells no lines).

In: a config dataclass, or the text of a file that ``tomllib`` accepted. Out: TOML that reads back as an equal config,
or key -> line number. ``None`` is written as ``"none"``, because TOML has no null. Checks nothing but writability.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from bvpo.strict import FieldError, convert, field_types

UNSET = "none"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED_KEY = rf"{_KEY_PART}(?:\s*\.\s*{_KEY_PART})*"
_TABLE_LINE = re.compile(rf"\s*\[\s*({_DOTTED_KEY})\s*\]\s*(?:#.*)?$")
_KEY_LINE = re.compile(rf"\s*({_DOTTED_KEY})\s*=")


def dump_toml(config: Any) -> str:
    """Every setting, so that reading the text again gives an equal config."""
    return "\n".join(_dump_section(config, "")).strip() + "\n"


def _dump_section(config: Any, prefix: str) -> Iterator[str]:
    if prefix:
        yield f"\n[{prefix}]"
    hints = field_types(type(config))
    for name, tp in hints.items():
        if not is_dataclass(tp):
            field = f"{prefix}.{name}" if prefix else name
            yield f"{name} = {toml_value(getattr(config, name), field)}"
    for name, tp in hints.items():
        if is_dataclass(tp):
            yield from _dump_section(getattr(config, name), f"{prefix}.{name}" if prefix else name)


def toml_value(value: Any, field: str) -> str:
    if value is None:
        return f'"{UNSET}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(convert(type(value), value, "", field))
    if isinstance(value, str):
        return _toml_string(value, field)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_free_value(v, field) for v in value)}]"
    assert isinstance(value, dict), f"{field}: a config cannot hold {value!r}"
    entries = [f"{_toml_key(k, field)} = {_free_value(v, f'{field}.{k}')}" for k, v in value.items()]
    return f"{{{', '.join(entries)}}}"


def _free_value(value: Any, field: str) -> str:
    if value is None:
        raise FieldError("", field, f"field {field!r}: TOML has no null; leave the entry out")
    return toml_value(value, field)


def _toml_string(text: str, field: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FieldError("", field, f"field {field!r}: got {text!r}, expected text that UTF-8 can hold")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str, field: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_string(key, field)


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line number (from 1). Enough of a scanner for error messages: ``tomllib`` has judged the syntax."""
    lines: dict[str, int] = {}
    table: tuple[str, ...] = ()
    open_quote = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if open_quote:
            if open_quote in line:
                open_quote = ""
            continue
        if header := _TABLE_LINE.match(line):
            table = _split_key(header[1])
            lines.setdefault(".".join(table), number)
        elif key := _KEY_LINE.match(line):
            parts = (*table, *_split_key(key[1]))
            for end in range(len(table) + 1, len(parts) + 1):
                lines.setdefault(".".join(parts[:end]), number)
        for quote in ('"""', "'''"):
            if line.count(quote) % 2:
                open_quote = quote
                break
    return lines


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY_PART, dotted))
