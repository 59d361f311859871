"""Compares the numbers in the sentences of the pages with the dated files under benchmarks/results/ that they come from.

A comment after the text names the source of each of its numbers in order, ``<!-- from: EXPRESSION; ... -->``; the last
column of a table headed "file: field" does the same, visibly. CONTRIBUTING.md shows how. Tables as a whole: tables.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.tables import RESULTS, newest

MARK = re.compile(r"<!-- from: (.*?) -->", re.DOTALL)
FIXED = re.compile(r"<!-- fixed: (.*?) -->", re.DOTALL)
# what holds no measured number: blocks of code, code, targets of links, other comments; and tables, which are generated
DATED = re.compile(r"([a-z][a-z0-9-]*)-\d{4}-\d\d-\d\d\.json")
GENERATED = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
_CODE = r"^( *)```.*?^\1```$|`[^`\n]*`|\]\([^)]*\)"
SILENT = re.compile(rf"{GENERATED.pattern}|{_CODE}|<!-- (?!from:).*?-->", re.DOTALL | re.MULTILINE)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*\.?\d+(?:e-?\d+)?)"
# a number that is no part of a word or name, with its interval where it has one
NUMBER = re.compile(rf"(?<![\w.,+-])(?>({_NUMBER}))(?![A-Za-z])(?: \[({_NUMBER}), ({_NUMBER})\]| ± ({_NUMBER})|( %))?")


@dataclass(frozen=True)
class Measured:
    """A number of a results file, with its interval over seeds (or prompts) and its values by seed if it has them."""

    value: float
    low: float | None = None
    high: float | None = None
    by_seed: dict[str, float] | None = None

    def __neg__(self) -> Measured:
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Measured(-self.value, low, high)

    def __sub__(self, other: Any) -> Measured:
        """Paired by seed where both have seeds, with a t interval."""
        if not (self.by_seed and isinstance(other, Measured) and other.by_seed):
            return Measured(self.value - float(other))
        from bvpo.evaluation.metrics import mean_over_seeds

        pairs = {seed: {"": value - other.by_seed[seed]} for seed, value in self.by_seed.items()}
        found = mean_over_seeds(pairs)
        assert found.value is not None
        return Measured(found.value, found.seed_low, found.seed_high, found.by_seed)

    def __truediv__(self, other: Any) -> Measured:
        return Measured(self.value / float(other))

    def __float__(self) -> float:
        return self.value


def measured(found: Any) -> Any:
    """A record with a value as :class:`Measured`, a list or another record as :class:`Node`, anything else as it is."""
    if isinstance(found, dict) and "result" in found:
        found = found["result"]
    if isinstance(found, dict) and "value" in found:
        low, high = (found.get(f"seed_{end}", found.get(end)) for end in ("low", "high"))
        return Measured(found["value"], low, high, found.get("by_seed"))
    if isinstance(found, str) and (match := NUMBER.fullmatch(found)):
        value, low, high, half = (float(part) if part else None for part in match.group(1, 2, 3, 4))
        assert value is not None
        return Measured(value, low, high) if half is None else Measured(value, value - half, value + half)
    return Node(found) if isinstance(found, dict | list) else found


class Node:
    """A part of a results file: ``.field`` or ``["field"]`` of a record, ``["some words"]`` of a list of records.

    The record of a list is the one that has each of the words as a value; ``key=word`` asks for the word at that key. A
    text that is a value as a whole counts as one word; of several texts, each is the beginning of a value.
    """

    def __init__(self, found: Any) -> None:
        self.found = found

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def all(self, name: str) -> list[Any]:
        """A field of every record of a list."""
        return [row[name] for row in self.found]

    def sum(self, side: str, name: str) -> float:
        """Of a list of interleaved pairs, over one side."""
        return sum(pair[side][name] for pair in self.found)

    def median_ratio(self, one: str, other: str, name: str) -> float:
        """Of a list of interleaved pairs, of one side over the other."""
        return median(pair[one][name] / pair[other][name] for pair in self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(self.found, dict) or isinstance(key, int):
            return measured(self.found[key])
        if isinstance(key, tuple):
            matches = [row for row in self.found if all(starts(row, text) for text in key)]
        else:
            matches = [row for row in self.found if key in row.values() or has_words(row, key.split())]
        if len(matches) != 1:
            raise LookupError(f"{len(matches)} records for {key!r}")
        return measured(matches[0])

    def cell(self, row: str, column: str) -> Any:
        """Of a table with a header and rows that are lists."""
        (found,) = [cells for cells in self.found["rows"] if has_words(dict(enumerate(cells)), [row])]
        return measured(found[self.found["header"].index(column)])


def starts(row: dict[str, Any], text: str) -> bool:
    key, equals, value = text.partition("=")
    if equals and key in row:
        return str(row[key]) == value
    return any(isinstance(value, str) and value.startswith(text) for value in row.values())


def has_words(row: dict[Any, Any], words: list[str]) -> bool:
    for word in words:
        key, equals, value = word.partition("=")
        if not (row.get(key) == value if equals and key in row else word in row.values()):
            return False
    return True


class Files(dict[str, Any]):
    """The names an expression may use: a kind of results (dashes as underscores), ``paper``, and a few functions."""

    def __missing__(self, name: str) -> Any:
        if name == "paper":
            return Node(json.loads((RESULTS.parent / "paper.json").read_text(encoding="utf-8")))
        return Node(newest(name.replace("_", "-")))


def gain(table: Node, column: str, over: str = "") -> Measured:
    """The largest gain of BVPO over the best other method (or the one named), over the models of a table of the paper."""
    gains = []
    for model in {row["model"] for row in table.found}:
        rows = {row["method"]: row[column] for row in table.found if row["model"] == model}
        gains.append(rows.pop("BVPO") - (rows[over] if over else max(rows.values())))
    return Measured(max(gains))


FUNCTIONS = {
    "gain": gain,
    "abs": abs,
    "len": len,
    "max": max,
    "min": min,
}


def value_of(expression: str) -> Any:
    # the pages are as much ours as this file is, so their expressions are Python
    return eval(expression, {"__builtins__": {}}, Files(FUNCTIONS))


def differs(text: re.Match[str], found: Any) -> str | None:
    """What the page says and the file does not, or None. Each number is compared at the digits that it is written with."""
    number, low, high, half, percent = text.groups()
    if not isinstance(found, Measured):
        found = Measured(float(found))
    scale = 100 if percent else 1
    wanted = [(number, found.value * scale)]
    if low:
        wanted += [(low, found.low), (high, found.high)]
    if half:
        wanted.append((half, None if found.low is None or found.high is None else (found.high - found.low) / 2))
    for said, value in wanted:
        if value is None or not same(said, float(value)):
            return f"{said} where the file has {value}"
    return None


def same(said: str, value: float) -> bool:
    digits, _, power = said.replace(",", "").partition("e")
    decimals = len(digits.partition(".")[2])
    half = 0.5 * 10.0**-decimals * 10.0 ** int(power or 0)
    return abs(float(said.replace(",", "")) - value) <= half * (1 + 1e-9)


def blank(text: str, silent: re.Pattern[str] = SILENT) -> str:
    """The text with what is silent replaced by spaces, so that positions stay."""
    return silent.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def faults(name: str, text: str) -> Iterator[str]:
    """One line for each number of a page that its source does not have, and each decimal without a source."""
    fixed = {word.strip() for match in FIXED.finditer(text) for word in match[1].split(",")}
    for match in DATED.finditer(blank(text, GENERATED)):
        if match[0] != (there := newest(match[1])["file"]):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: {match[0]} is named, and the numbers come from {' and '.join(there)}"
    shown = blank(text)
    sourced: list[tuple[int, int, str]] = [*rows_with_sources(text)]
    for match in MARK.finditer(shown):
        sourced.append((block_start(shown, match.start()), match.start(), match[1]))
    for start, end, sources in sourced:
        line = text.count("\n", 0, end) + 1
        numbers = [found for found in NUMBER.finditer(shown[start:end]) if found[0] not in fixed]
        yield from (f"{name}:{line}: {fault}" for fault in compare(numbers, sources))
        shown = shown[:start] + re.sub(r"[^\n]", " ", shown[start:end]) + shown[end:]
    shown = MARK.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), shown)
    for match in NUMBER.finditer(shown):
        if ("." in match[0] or match[5]) and match[0] not in fixed:
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: {match[0]} names no source (from:) and is not declared as fixed"


def block_start(shown: str, end: int) -> int:
    """Where the text that a comment speaks of begins: after the last blank line, comment, bullet or bar of a table."""
    before = shown[:end]
    bullet = max((match.start() for match in re.finditer(r"^ *[-*] |^\|", before, re.MULTILINE)), default=0)
    return max(before.rfind("\n\n"), before.rfind("-->") + 3 if "-->" in before else 0, bullet)


def rows_with_sources(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and sources of each row of a table whose last column is headed "file: field"."""
    at, inside = 0, False
    for line in text.splitlines(keepends=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if inside and cells and not set(line.strip()) <= set("|-"):
            yield (
                at,
                at + line.rindex(cells[-1]) if cells[-1] else at + len(line),
                "; ".join(re.findall(r"`([^`]+)`", cells[-1].replace("\\|", "|"))),
            )
        inside = bool(cells) and (inside or cells[-1] == "file: field")
        at += len(line)


def compare(numbers: list[re.Match[str]], sources: str) -> Iterator[str]:
    expressions = [" ".join(some.split()) for some in sources.split(";") if some.strip()]
    if len(expressions) != len(numbers):
        yield f"{len(numbers)} numbers ({', '.join(found[0] for found in numbers)}) and {len(expressions)} sources"
        return
    for number, expression in zip(numbers, expressions, strict=True):
        try:
            fault = differs(number, value_of(expression))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            yield f"{number[0]!r} from {expression!r}: {fault}"
