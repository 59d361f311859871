"""Strict conversion between frozen dataclasses and JSON: what every file of an experiment goes through.

In: a dataclass (nested dataclasses, ``tuple[X, ...]``, unions, ``Literal``, ``dict[str, X]``, scalars) and plain JSON
values. Out: records, or one :class:`UserError` naming file, line, field, value and what was expected. Nothing is
guessed: an unknown key, a missing field, a string for a number, NaN or a repeated key is refused. An integer is
accepted where a number is expected; ``true`` is never an integer. Field *values* (ranges) are not judged here.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Converter = Callable[[Any], Any]

_NUMBERS = frozenset({int, float})
_SCALARS = frozenset({str, int, float, bool, type(None)})
MAX_DEPTH = 100
"""Of lists and objects within one another: what is read must be checked, compared and written again, all by recursion."""
_EXPECTED = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


# Behind the host: what stands for the port and is no number, and a query.
_ODD_PORT = re.compile(r"\A([^/:@\[]+):(?=[^'\",;)\]])(?!\d{1,5}(?:[/:'\"?#\]),;]|$)).*", re.DOTALL)
_QUERY = re.compile(r"\A([^?'\"]+\?)[^'\"]+")


def without_secrets(text: str) -> str:
    """The text without the passwords and queries of the addresses in it."""
    return re.sub(r"\S+", lambda word: _public(word[0]), text) if "//" in text or "@" in text else text


def _public(word: str) -> str:
    """All before the last ``@`` of an address may be its password."""
    start, slashes, rest = word.partition("//")
    if slashes:
        _, at, host = rest.rpartition("@")
        rest = f"***@{host}" if at else _QUERY.sub(r"\1***", _ODD_PORT.sub("***", rest))
        return f"{start}//{rest}"
    name, at, host = word.rpartition("@")
    return f"***@{host}" if at and ":" in name else word


# What reorders text on screen, so that it reads otherwise than it is.
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_KEPT = frozenset("\n\t")


def visible(text: str) -> str:
    """The text with every character that a terminal or browser would act on, instead of showing it, written out."""
    if text.isprintable():
        return text
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if char in _KEPT or char.isprintable():
        return char
    category = unicodedata.category(char)
    if char in _DIRECTION or category in ("Cc", "Cs", "Cn", "Co"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char  # separators and joiners that only look unprintable


class UserError(ValueError):
    """A mistake of the user's, told in one line; the command line prints it without a traceback and exits with 2.
    Passwords in addresses are left out of it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class OtherSettings(UserError):
    """What was started under other settings is not gone on with: the same command will be refused again."""


class FieldError(UserError):
    """A :class:`UserError` about one field; keeps the dotted ``field`` and the ``problem`` so a caller can re-address it."""

    def __init__(self, where: str, field: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.field = field
        self.problem = without_secrets(problem)

    def at(self, where: str) -> FieldError:
        """The same complaint with another address."""
        return FieldError(where, self.field, self.problem)


class _Mismatch(Exception):
    """Raised deep inside a conversion; each level prepends its part of the path, so the good case costs nothing."""

    def __init__(self, tell: Callable[[str], str], *path: str) -> None:
        self.tell = tell  # dotted field -> sentence
        self.path = list(path)

    def under(self, part: str) -> _Mismatch:
        self.path.insert(0, part)
        return self

    def error(self, where: str, prefix: str) -> FieldError:
        field = (prefix + "".join(self.path)).lstrip(".")
        return FieldError(where, field, self.tell(field))


def show(value: Any) -> str:
    """A value as an error message shows it: short, with its type, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (bool)"
    if isinstance(value, str) and "//" in value:  # a password may hold a space, and must not be cut in the middle
        start, _, rest = value.partition("//")
        value = f"{start}//***@{rest.rpartition('@')[2]}" if "@" in rest else value
    # the decimal digits of a huge integer are refused by Python, its hexadecimal ones are not
    text = hex(value) if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    text = without_secrets(text)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when a valid name is near, else the list of valid names."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(names)}"


def unknown_field(field: str, key: str, valid: Iterable[str]) -> str:
    """The sentence for a key that no field has."""
    return f"unknown field {field!r}{did_you_mean(key, valid)}"


def expectation(tp: Any) -> str:
    """What a value of type ``tp`` is called in an error message."""
    origin, args = get_origin(tp), get_args(tp)
    if tp in _EXPECTED:
        return _EXPECTED[tp]
    if origin is Literal:
        return f"one of {', '.join(repr(a) for a in args)}"
    if origin in (Union, types.UnionType):
        words = [expectation(a) for a in args if a is not type(None)]
        return " or ".join([*words, "null"] if type(None) in args else words)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}"
    if origin is tuple:
        return f"a list (each {expectation(args[0])})"
    if origin is dict or is_dataclass(tp):
        return "an object"
    return "a JSON value"


def _wrong(value: Any, expected: str) -> _Mismatch:
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("a number", "a finite number")
    problem = f"got {show(value)}, expected {expected}"
    return _Mismatch(lambda field: f"field {field!r}: {problem}" if field else problem)


def _float(value: Any) -> float:
    if type(value) in _NUMBERS:
        try:
            number = float(value)
        except OverflowError:
            raise _wrong(value, "a number that fits 64 bits") from None
        if math.isfinite(number):
            return number
    raise _wrong(value, _EXPECTED[float])


def _exactly(tp: type) -> Converter:
    def convert(value: Any) -> Any:
        if type(value) is not tp:
            raise _wrong(value, _EXPECTED[tp])
        return value

    return convert


def _json_value(value: Any) -> Any:
    """Checks free-form content (``dict[str, Any]``): JSON values only, so that what was read can be written again."""
    kind = type(value)
    if kind is float:
        return _float(value)
    if kind in _SCALARS:
        return value
    if kind is list:
        return _each(value, _json_value)
    if kind is dict:
        return _table(value)
    raise _wrong(value, "a JSON value")


def _each(values: Iterable[Any], convert: Converter) -> list[Any]:
    out: list[Any] = []
    try:
        for value in values:
            out.append(convert(value))
    except _Mismatch as error:
        raise error.under(f"[{len(out)}]") from None
    return out


def _table(value: Any, convert_item: Converter = _json_value) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong(value, "an object")
    out: dict[str, Any] = {}
    for key, item in value.items():
        if type(key) is not str:
            raise _wrong(key, "a string as key")
        try:
            out[key] = convert_item(item)
        except _Mismatch as error:
            raise error.under(f".{key}") from None
    return out


def _literal(tp: Any) -> Converter:
    allowed = {(type(a), a) for a in get_args(tp)}

    def convert(value: Any) -> Any:
        # type and value: True must not pass for Literal[1]
        if type(value) not in _SCALARS or (type(value), value) not in allowed:
            raise _wrong(value, expectation(tp))
        return value

    return convert


def _sequence(item: Any) -> Converter:
    convert_item = converter(item)
    expected = f"a list (each {expectation(item)})"
    uniform = item if item in (int, str, bool) else None

    def convert(value: Any) -> tuple[Any, ...]:
        if type(value) is not list and type(value) is not tuple:
            raise _wrong(value, expected)
        if uniform is not None and set(map(type, value)) <= {uniform}:
            return tuple(value)  # thousands of token ids: checked in C
        return tuple(_each(value, convert_item))

    return convert


def _fixed_tuple(items: tuple[Any, ...]) -> Converter:
    converters = [converter(item) for item in items]

    def convert(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) != len(converters):
            raise _wrong(value, f"a list of {len(converters)}")
        steps = iter(converters)
        return tuple(_each(value, lambda v: next(steps)(v)))

    return convert


def _union(tp: Any) -> Converter:
    members = get_args(tp)
    some = [m for m in members if m is not type(None)]
    optional = len(some) < len(members)
    # float last: in `int | float` an integer stays an integer
    converters = [converter(m) for m in sorted(some, key=lambda m: m is float)]
    expected = expectation(tp)

    def convert(value: Any) -> Any:
        if value is None and optional:
            return None
        for try_member in converters:
            try:
                return try_member(value)
            except _Mismatch as error:
                if error.path:
                    raise  # the right kind of container with a fault inside: report the fault itself
        raise _wrong(value, expected)

    return convert


def _record(cls: Any) -> Converter:
    hints = field_types(cls)
    converters = {name: converter(tp) for name, tp in hints.items()}
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]

    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _wrong(value, "an object")
        out: dict[str, Any] = {}
        for key, item in value.items():
            convert_field = converters.get(key)
            if convert_field is None:
                raise _Mismatch(lambda field, key=key: unknown_field(field, str(key), converters), f".{key}")
            try:
                out[key] = convert_field(item)
            except _Mismatch as error:
                raise error.under(f".{key}") from None
        for name in required:
            if name not in out:
                raise _Mismatch(
                    lambda field, name=name: f"missing field {field!r}, expected {expectation(hints[name])}", f".{name}"
                )
        return cls(**out)

    return convert


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass, in declaration order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


@cache
def _left_out(cls: type) -> tuple[str, ...]:
    """Fields that are not written where they are None."""
    return tuple(f.name for f in fields(cls) if f.metadata.get("left_out_when_none"))


@cache
def converter(tp: Any) -> Converter:
    """The checking conversion from JSON values to ``tp``, built once per type."""
    origin, args = get_origin(tp), get_args(tp)
    if tp is float:
        return _float
    if tp in _EXPECTED:
        return _exactly(tp)
    if tp is Any:
        return _json_value
    if origin is Literal:
        return _literal(tp)
    if origin in (Union, types.UnionType):
        return _union(tp)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _sequence(args[0])
    if origin is tuple:
        return _fixed_tuple(args)
    if origin is dict and args[0] is str:
        convert_item = converter(args[1])
        return lambda value: _table(value, convert_item)
    if is_dataclass(tp):
        return _record(tp)
    raise TypeError(f"records cannot hold {tp!r}; see bvpo.strict for what they can")


def convert(tp: Any, value: Any, where: str = "", field: str = "") -> Any:
    """``value`` as a ``tp``, or a :class:`FieldError` about ``field``."""
    try:
        return converter(tp)(value)
    except _Mismatch as error:
        raise error.error(where, field) from None


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """A record from plain values; ``where`` (such as ``path:line``) starts the error message."""
    try:
        return converter(cls)(data)
    except _Mismatch as error:
        raise error.error(where, "") from None


def to_dict(record: Any) -> dict[str, Any]:
    """Plain values only (tuples become lists), every field present (but see ``bvpo.records.LEFT_OUT``)."""
    assert is_dataclass(record) and not isinstance(record, type), f"not a record: {record!r}"
    return _plain(record)


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is tuple or kind is list:
        return list(value) if set(map(type, value)) <= _SCALARS else [_plain(v) for v in value]
    if kind is dict:
        return {k: _plain(v) for k, v in value.items()}
    if is_dataclass(value):
        found = {name: _plain(getattr(value, name)) for name in field_types(kind)}
        for name in _left_out(kind):
            if found[name] is None:
                del found[name]
        return found
    raise TypeError(f"a record holds plain Python values only, got {kind.__module__}.{kind.__qualname__}")


def to_json(record: Any) -> str:
    """One line of JSON, non-ASCII text as it is; NaN and infinities are refused."""
    data = to_dict(record)
    try:
        line = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise FieldError("", "", f"{type(record).__name__} holds a NaN or an infinity, which JSON cannot") from None
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        # a lone surrogate cannot be written as UTF-8, but its \u escape can, and reads back equal
        return json.dumps(data, allow_nan=False)
    return line


class _BadJson(Exception):
    pass


def _no_constant(name: str) -> Any:
    raise _BadJson(f"{name} is not a JSON number; write null for a value that is missing")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise _BadJson(f"key {twice!r} appears twice")
    return out


def parse_json(text: str, where: str = "") -> Any:
    """Strict JSON: no NaN, no repeated keys; a :class:`UserError` starting with ``where`` otherwise."""
    prefix = f"{where}: " if where else ""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except _BadJson as error:
        raise UserError(f"{prefix}{error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{prefix}not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{prefix}nested too deeply (more than {MAX_DEPTH})") from None
    except ValueError:  # of int(), the one other thing that the parser calls
        raise UserError(f"{prefix}an integer of more than {sys.get_int_max_str_digits()} digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deep(value):
        raise UserError(f"{prefix}nested too deeply (more than {MAX_DEPTH})")
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie more than :data:`MAX_DEPTH` deep within one another."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nodes = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [item for items in nodes for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text, with or without a byte-order mark; a :class:`UserError` if it cannot be read or is no UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {show(value)}, expected an object")
    return value


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        return open(path, "rb")  # bytes: only \n ends a line (text mode would also split at \r)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_jsonl(path: str | os.PathLike[str], cls: type[T]) -> Iterator[T]:
    """Records of a JSON-lines file, one by one; errors start with ``path:line``. Empty lines hold no record."""
    with _open(path) as stream:
        for number, raw in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if text.strip():
                yield from_dict(cls, parse_json(text, where), where)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> int:
    """Writes the records and returns how many; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as stream:
            for record in records:
                stream.write(to_json(record) + "\n")
                count += 1
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return count
