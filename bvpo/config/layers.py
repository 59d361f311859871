"""Layers of settings over a config dataclass: TOML file and command line in, one frozen config out.

Works on any tree of keyword-only dataclasses (``bvpo.config`` holds the real one). Each layer is checked by itself
and strictly, so an error can name the line of the file or the flag it came from. The word ``none`` unsets an optional
setting, because TOML has no null. Ranges and combinations of settings are not judged here but in ``bvpo.config``.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import os
import re
import tomllib
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from bvpo.config.toml import UNSET, key_lines, toml_value
from bvpo.strict import (
    MAX_DEPTH,
    FieldError,
    UserError,
    convert,
    expectation,
    field_types,
    from_dict,
    is_deep,
    read_text,
    show,
)

T = TypeVar("T")
COMMAND_LINE = "command line"
_MAX_BITS = 14_000  # 4,215 decimal digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Checked settings of one source: nested values, and for each dotted field the place it was set."""

    values: dict[str, Any]
    source: str
    lines: dict[str, int]

    def sets(self, field: str) -> bool:
        node: Any = self.values
        for part in field.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def where(self, field: str) -> str:
        """``path:line`` of the nearest enclosing key, or the source alone."""
        parts = re.sub(r"\[\d+\]", "", field).split(".")
        for end in range(len(parts), 0, -1):
            line = self.lines.get(".".join(parts[:end]))
            if line is not None:
                return f"{self.source}:{line}"
        return self.source


def is_optional(tp: Any) -> bool:
    """Whether ``none`` is a value of this type."""
    return get_origin(tp) in (Union, types.UnionType) and type(None) in get_args(tp)


def read_toml(cls: type, path: str | os.PathLike[str]) -> Layer:
    """The settings of one TOML file, every key and type checked against ``cls``."""
    text = read_text(path)
    table = parse_toml(text, str(path))
    layer = Layer(values=table, source=str(path), lines=key_lines(text))
    try:
        values = _check(cls, table, "")
    except _Unknown as error:
        nearest = nearest_setting(cls, error.field)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise FieldError(layer.where(error.field), error.field, f"unknown field {error.field!r}{hint}") from None
    except FieldError as error:
        # TOML has no null, so the expectation must not offer one
        raise FieldError(
            layer.where(error.field), error.field, error.problem.replace(" or null", " or 'none'")
        ) from None
    return Layer(values=values, source=layer.source, lines=layer.lines)


def read_tables(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """A TOML file that holds tables of settings by some name, unchecked but for its form."""
    tables = parse_toml(read_text(path), str(path))
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name!r}: got {show(table)}, expected a table")
    return tables


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; a :class:`UserError` starting with ``where`` and the line otherwise."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace("(at end of document)", f"(at line {len(text.splitlines())}, column 0)")
        line = re.search(r" \(at line (\d+), column \d+\)$", message)
        where, problem = (f"{where}:{line[1]}", message[: line.start()]) if line else (where, message)
        raise UserError(f"{where}: not valid TOML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply (more than {MAX_DEPTH})") from None
    except ValueError as error:  # of int() and of dates
        raise UserError(f"{where}: not valid TOML: {error}") from None
    if is_deep(table):
        raise UserError(f"{where}: nested too deeply (more than {MAX_DEPTH})")
    if _has_huge_integer(table):
        raise UserError(f"{where}: an integer of more than {_MAX_BITS} bits")
    return table


def _has_huge_integer(value: Any) -> bool:
    """One that cannot be written out: hexadecimal digits may be any number, decimal ones may not."""
    if isinstance(value, (dict, list)):
        return any(map(_has_huge_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and value.bit_length() > _MAX_BITS


class _Unknown(FieldError):
    """An unknown key; the suggestion is added where the whole tree of settings is in sight."""


def _check(cls: type, table: Any, prefix: str) -> dict[str, Any]:
    """Checks a partial table: keys and types, but not that required fields are there (another layer may set them)."""
    if not isinstance(table, dict):
        raise FieldError("", prefix, f"field {prefix!r}: got {show(table)}, expected a section [{prefix}]")
    hints = field_types(cls)
    out: dict[str, Any] = {}
    for key, value in table.items():
        field = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            raise _Unknown("", field, field)
        tp = hints[key]
        if is_dataclass(tp):
            out[key] = _check(tp, value, field)  # type: ignore[arg-type]
        elif value == UNSET and is_optional(tp):
            out[key] = None
        else:
            out[key] = convert(tp, value, "", field)
    return out


def checked_table(cls: type, table: Any) -> dict[str, Any]:
    """A partial table of settings, every key and type checked like a file's; errors are :class:`FieldError`."""
    try:
        return _check(cls, table, "")
    except _Unknown as error:
        nearest = nearest_setting(cls, error.field)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise FieldError("", error.field, f"unknown field {error.field!r}{hint}") from None


def parse_flags(cls: type, argv: Sequence[str]) -> Layer:
    """``--section.field value`` or ``--section.field=value`` settings; a switch without value is ``true``."""
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{COMMAND_LINE}: got {word!r}, expected --section.field value")
        name, has_value, text = word[2:].partition("=")
        parts, tp = _resolve(cls, name)
        if not has_value:
            if tp is bool and (not words or words[0].startswith("--")):
                text = "true"
            elif not words:
                raise FieldError(COMMAND_LINE, name, f"--{name} needs a value, expected {_offer(tp)}")
            else:
                text = words.pop(0)
        node = values
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = _from_text(tp, text, ".".join(parts))
    return Layer(values=values, source=COMMAND_LINE, lines={})


def _resolve(cls: type, name: str) -> tuple[list[str], Any]:
    """The path and type of a flag. Hyphens may stand for underscores; below a free table any key goes."""
    parts = name.split(".")
    tp: Any = cls
    for depth, part in enumerate(parts):
        if not is_dataclass(tp):
            if get_origin(tp) is dict:
                return parts, Any
            raise FieldError(COMMAND_LINE, name, f"unknown flag '--{name}'; {'.'.join(parts[:depth])!r} has no fields")
        hints = field_types(tp)  # type: ignore[arg-type]
        part = part.replace("-", "_")
        if part not in hints:
            nearest = nearest_setting(cls, name)
            hint = f"; did you mean '--{nearest}'?" if nearest else "; --help lists the flags"
            raise FieldError(COMMAND_LINE, name, f"unknown flag '--{name}'{hint}")
        parts[depth], tp = part, hints[part]
    if is_dataclass(tp) or get_origin(tp) is dict:
        raise FieldError(COMMAND_LINE, name, f"'--{name}' is a section; set one of its fields: --{name}.FIELD VALUE")
    return parts, tp


def nearest_setting(cls: type, name: str) -> str | None:
    """The setting or section probably meant: the same last name elsewhere in the tree, or the nearest spelling."""
    leaves = [setting.field for setting in settings(cls)]
    valid = [*leaves, *(section for section in section_docs(cls) if section)]
    wanted = name.replace("-", "_")
    last = wanted.rpartition(".")[2]
    same_name = [field for field in valid if field.rpartition(".")[2] == last]
    near = difflib.get_close_matches(wanted, same_name or valid, n=1, cutoff=0.0 if same_name else 0.75)
    return near[0] if near else None


def _offer(tp: Any) -> str:
    return expectation(tp).replace("a list (each a string)", "words joined by commas").replace(" or null", " or 'none'")


def _from_text(tp: Any, text: str, field: str) -> Any:
    try:
        return _parse_text(tp, text)
    except ValueError:
        problem = f"field {field!r}: got {text!r}, expected {_offer(tp)}"
        raise FieldError(COMMAND_LINE, field, problem) from None


def _parse_text(tp: Any, text: str) -> Any:
    """A flag's text as a ``tp``; ``ValueError`` when it is not one."""
    origin, args = get_origin(tp), get_args(tp)
    if tp is Any:
        return _toml_or_text(text)
    if tp is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _refuse()
    if tp is int:
        return int(text)
    if origin is tuple:
        return tuple(_parse_text(args[0], part.strip()) for part in text.split(",")) if text else ()
    if is_optional(tp) and text == UNSET:
        return None
    if origin in (Union, types.UnionType):
        for member in sorted((a for a in args if a is not type(None)), key=lambda m: (m is str, m is float)):
            try:
                return _parse_text(member, text)
            except ValueError:
                continue
        _refuse()
    return convert(tp, float(text) if tp is float else text)


def _refuse() -> Any:
    raise ValueError


def _toml_or_text(text: str) -> Any:
    """Free settings: a TOML value where it reads as one (``true``, ``3``, ``[1, 2]``), else the text itself."""
    try:
        table = parse_toml(f"value = {text}", COMMAND_LINE)
    except UserError:
        return text
    return convert(Any, table["value"]) if len(table) == 1 else text


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """Later layers win, field by field; free tables are merged key by key."""
    out: dict[str, Any] = {}
    for layer in layers:
        _merge_into(out, layer.values)
    return out


def _merge_into(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge_into(target[key], value)
        else:
            target[key] = _copy(value)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def build(cls: type[T], layers: Sequence[Layer]) -> T:
    """Defaults < layers in order. Only a missing required field can still fail here."""
    try:
        return from_dict(cls, _with_sections(cls, merge(layers)))
    except FieldError as error:
        raise error.at(layers[0].source if layers else COMMAND_LINE) from None


def _with_sections(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Adds a table for each section that nobody mentions, so a missing field is named and not its section."""
    for name, tp in field_types(cls).items():
        if is_dataclass(tp):
            values[name] = _with_sections(tp, values.get(name, {}))  # type: ignore[arg-type]
    return values


def place_of(field: str, layers: Sequence[Layer]) -> str:
    """Where the winning value of a field was set."""
    for layer in reversed(layers):
        if layer.sets(field):
            return layer.where(field)
    return layers[0].where(field) if layers else COMMAND_LINE


# ---------------------------------------------------------------------------------------------------------------------
# describing


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as help pages and tables show it; ``default`` is ``None`` when the setting is required."""

    field: str
    type: str
    default: str | None
    doc: str

    @property
    def section(self) -> str:
        return self.field.rpartition(".")[0]


def settings(cls: type, prefix: str = "") -> list[Setting]:
    """All settings of a config class in the order of its TOML form: a section's own fields, then its sections."""
    hints, docs = field_types(cls), field_docs(cls)
    own: list[Setting] = []
    nested: list[Setting] = []
    for f in fields(cls):
        tp, field = hints[f.name], f"{prefix}{f.name}"
        if is_dataclass(tp):
            nested += settings(tp, f"{field}.")  # type: ignore[arg-type]
            continue
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        default = None if value is MISSING else toml_value(value, field)
        own.append(Setting(field=field, type=type_words(tp), default=default, doc=docs.get(f.name, "")))
    return own + nested


def section_docs(cls: type, section: str = "") -> dict[str, str]:
    """Section (the empty name is the top) -> the docstring of its class."""
    docs = {section: " ".join((inspect.getdoc(cls) or "").split())}
    for name, tp in field_types(cls).items():
        if is_dataclass(tp):
            docs |= section_docs(tp, f"{section}.{name}".lstrip("."))  # type: ignore[arg-type]
    return docs


def type_words(tp: Any) -> str:
    """A type as the help shows it: ``int``, ``a|b|c``, ``word,word``, ``float|none``."""
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return "|".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return "|".join(UNSET if a is type(None) else type_words(a) for a in args)
    if origin is tuple:
        return f"{type_words(args[0])},..."
    return "table" if origin is dict else tp.__name__


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string below it in the source: the one text for help page, table and editor."""
    tree = ast.parse(inspect.getsource(cls))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs
