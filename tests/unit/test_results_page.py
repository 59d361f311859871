"""docs/results.md: every field of results.json is on the page, so that the documented schema cannot go stale."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from bvpo.evaluation import results

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def reachable(record: Any, found: dict[str, type]) -> dict[str, type]:
    """The record and every record in its fields, by name."""
    if dataclasses.is_dataclass(record) and isinstance(record, type):
        if record.__name__ not in found:
            found[record.__name__] = record
            for hint in typing.get_type_hints(record).values():
                reachable(hint, found)
    else:
        for part in typing.get_args(record):
            reachable(part, found)
    return found


RECORDS = reachable(results.Results, {})


def documented(section: str) -> set[str]:
    """The names in the first column of the section's table."""
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("name", sorted({*RECORDS, *SECTIONS}))
def test_the_schema_is_documented(name: str) -> None:
    """Mutation: a field added to a record, renamed or removed without a word on the page; a record without a section."""
    assert name in RECORDS, f"docs/results.md: section '## {name}' is of no record of results.json; remove it"
    assert name in SECTIONS, f"docs/results.md: add a section '## {name}' with a table of its fields, and link it"
    fields = {field.name for field in dataclasses.fields(RECORDS[name])}
    there = documented(SECTIONS[name])
    missing, gone = sorted(fields - there), sorted(there - fields)
    assert not missing, f"docs/results.md, section '## {name}': add a row '| `{missing[0]}` | what it is |' ({missing})"
    assert not gone, f"docs/results.md, section '## {name}': {name} has no {gone}; remove or rename the rows"


def test_links_lead_somewhere() -> None:
    """Mutation: a record linked that has no section; the page not linked from where people look."""
    assert set(re.findall(r"\]\(#(\w+)\)", TEXT)) <= {name.lower() for name in SECTIONS}
    for place in ("README.md", "docs/run.md"):
        assert "results.md)" in (ROOT / place).read_text(encoding="utf-8"), f"{place} does not link docs/results.md"
