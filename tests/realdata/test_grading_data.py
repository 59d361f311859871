"""The number grader against the references of public benchmarks (not part of the repository; skipped without)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bvpo.evaluation.grading import number

DATA = Path(__file__).parents[3] / "shared" / "bench-data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"public benchmark data is not at ../shared/{DATA.name}")


@pytest.mark.parametrize(("name", "refused"), [("gsm8k", 0), ("aime24", 0), ("amc23", 0), ("math500", 126)])
def test_references_are_numbers_or_refused(name: str, refused: int) -> None:
    """Mutation: formulas of MATH-500 read as their last digits, or a plain number among the references refused, in a box or
    as the end of a sentence."""
    found = 0
    for line in (DATA / name / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = str(row["answer"]).rpartition("####")[2].strip()
        try:
            for form in ("\\boxed{{{}}}", "The answer is {}.", "so $x = {}$", "**{}** apples", "\\({}\\)"):
                assert number([], form.format(gold), {"answer": row["answer"]}) == 1.0, (form, gold)
        except ValueError:
            found += 1
    assert found == refused
