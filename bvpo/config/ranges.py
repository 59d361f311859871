"""What a field of the config carries beside its type: its range, its name among the trainer's arguments, and whether it
decides the result of training. :func:`validate` checks ranges, then what each class says of its fields together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from bvpo.strict import FieldError, show

M = TypeVar("M")
Problems = Iterable[tuple[str, str]]
"""(field, problem) pairs of one section; a setting that nothing would read counts as a contradiction."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a value must fulfil beyond its type; a value that is not set (``None``) always passes."""

    passes: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True, slots=True)
class Argument:
    """The name of a [train] setting among the trainer's arguments, where it has another there. ``theirs``: it is one of
    transformers' own, whose default it keeps in Python."""

    name: str
    theirs: bool = False


@dataclass(frozen=True, slots=True)
class Free:
    """The mark of a [train] setting that never decides the result: a run may be resumed with another value."""


FREE = Free()


def at_least(low: float) -> Range:
    return Range(lambda v: v >= low, f"{low:g} or more")


def between(low: float, high: float) -> Range:
    return Range(lambda v: low <= v <= high, f"a number from {low:g} to {high:g}")


def below(low: float, high: float) -> Range:
    return Range(lambda v: low <= v < high, f"a number from {low:g} to below {high:g}")


def all_filled(what: str) -> Range:
    return Range(all, what)


def each_once(what: str) -> Range:
    return Range(lambda v: bool(v) and len(set(v)) == len(v), what)


POSITIVE = Range(lambda v: v > 0, "a number above 0")
SHARE = Range(lambda v: 0 < v <= 1, "a number above 0, up to 1")
SEED = Range(lambda v: 0 <= v < 2**32, "0 to 4294967295")
FILLED = Range(bool, "something")
NAME = Range(lambda v: v not in ("", ".", "..") and not set(v) & set("/\\:\0\n"), "a folder name without / \\ :")


@cache
def marks(cls: type, kind: type[M]) -> dict[str, M]:
    """Field name -> its mark of one kind (:class:`Range`, :class:`Argument`, :class:`Free`), of the fields that have one."""
    found = {}
    for name, tp in get_type_hints(cls, include_extras=True).items():
        for mark in getattr(tp, "__metadata__", ()):
            if isinstance(mark, kind):
                found[name] = mark
    return found


def validate(config: Any) -> None:
    """Raises :class:`FieldError` for a value out of range or settings that contradict each other.

    Takes the whole config or any section of it, so a config built in Python is checked by the same rules.
    """
    for problems in (range_problems, _contradictions):
        for name, problem in problems(config):
            raise FieldError("", name, f"field {name!r}: {problem}")


def range_problems(config: Any, prefix: str = "") -> Problems:
    """Every value of a section, and of those in it, that lies out of its range."""
    ranges = marks(type(config), Range)
    for f in fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            yield from range_problems(value, f"{name}.")
        elif value is not None and f.name in ranges and not ranges[f.name].passes(value):
            yield name, f"got {show(value)}, expected {ranges[f.name].expected}"


def section_problems(config: Any, prefix: str = "") -> Problems:
    """What the sections below a section say of their fields together."""
    for f in fields(config):
        if is_dataclass(getattr(config, f.name)):
            yield from _contradictions(getattr(config, f.name), f"{prefix}{f.name}.")


def _contradictions(config: Any, prefix: str = "") -> Problems:
    yield from section_problems(config, prefix)
    own = getattr(config, "contradictions", None)
    for name, problem in own() if own else ():
        yield f"{prefix}{name}", problem
