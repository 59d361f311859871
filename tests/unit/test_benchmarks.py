"""The benchmark scripts run, and the pages say what the results files say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import quotes, tables

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def fresh_files():
    tables.newest.cache_clear()
    yield
    tables.newest.cache_clear()


def red(name: str, text: str) -> bool:
    return tables.render(text) != text or bool(list(quotes.faults(name, text)))


@pytest.mark.parametrize("name", tables.PAGES)
def test_a_changed_digit_of_a_page_is_caught(name):
    """Mutations: a kind of text that the check does not read; a comparison with a tolerance; a number without a source."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not red(name, text)
    found = [m for m in quotes.NUMBER.finditer(CODE.sub(lambda m: " " * len(m[0]), text)) if "." in m[0]]
    fixed = {word.strip() for m in quotes.FIXED.finditer(text) for word in m[1].split(",")}
    measured = [m for m in found if m[0] not in fixed and m[1] not in fixed]
    assert len(measured) >= 5
    for match in measured[:: max(1, len(measured) // 25)]:
        at = match.end(1) - 1
        digit = str((int(text[at]) + 1) % 10)
        assert red(name, text[:at] + digit + text[at + 1 :]), f"{match[0]} at {text[:at].count(chr(10)) + 1}"


def test_a_changed_results_file_is_caught(tmp_path, monkeypatch):
    """Mutations: sources that are not read from the newest file of their kind; a page that still names the old one."""
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    newest = sorted((tmp_path / "results").glob("tournament-fresh-*.json"))[-1]
    text = re.sub(r'"value": -0\.139\d*', '"value": -0.11', newest.read_text())
    (tmp_path / "results" / "tournament-fresh-2999-01-01.json").write_text(text)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    for name in ("README.md", "docs/claims.md", "docs/estimators.md"):
        found = list(quotes.faults(name, (ROOT / name).read_text(encoding="utf-8")))
        assert any("-0.11" in fault or "0.11" in fault for fault in found), name
        assert name == "README.md" or any("is named" in fault for fault in found), name


def test_a_kind_without_results_is_a_fault(tmp_path, monkeypatch):
    """Mutation: a missing file excused, so that deleting one turns the check green."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert list(quotes.faults("page", "It is 0.5.\n<!-- from: vignette.seeds[0] -->\n"))


def test_kills_come_from_the_newest_file_that_has_them(tmp_path, monkeypatch):
    """Mutation: the newest file alone, which need not have every campaign."""
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    records, training = (tables.newest("kill", name) for name in ("sample, embedded engine", "train"))
    others = {name: row for name, row in records["campaigns"].items() if name != "train"}
    (tmp_path / "results" / "kill-2999-01-01.json").write_text(json.dumps(records | {"campaigns": others}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    tables.newest.cache_clear()
    assert "(kill-2999-01-01.json)" in tables.kills() and f"({training['file']})" in tables.kills()


@pytest.mark.parametrize("said", ["0.5", "-0.50", "+0.4", "0.5 [0.4, 0.6]", "0.5 ± 0.1", "50 %", "1e-3"])
def test_numbers_are_compared_at_the_digits_they_have(said):
    """Mutations: a tolerance in place of rounding; an interval or a sign that is not compared."""
    value = quotes.Measured(0.5, 0.25, 0.75)
    (match,) = quotes.NUMBER.finditer(said)
    assert match[0] == said
    assert (quotes.differs(match, value) is None) == (said in ("0.5", "50 %"))
    assert quotes.differs(match, quotes.Measured(0.0)) is not None


def run(*arguments):
    """Without a clock of its own: a loaded machine is slow, and a hang ends with the test's timeout."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_performance_page_is_written_from_the_results():
    """Mutation: a number edited by hand."""
    done = run("benchmarks/tables.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_trainer_benchmark_runs_in_small(tmp_path):
    """Both sides start at the same loss and are timed. Mutation: an argument of TRL's trainer that no longer exists."""
    pytest.importorskip("trl", reason="the peer is not installed")
    done = run("benchmarks/trainer.py", "--quick", "--pairs", "1", "--only", "step", "train")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cached reference" in done.stdout and "x TRL" in done.stdout


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_without_a_gpu():
    """Mutation: a layout or a column dropped."""
    done = run(
        "benchmarks/gpu_trainer.py", "--size", "tiny", "--layouts", "tree", "padded", "--steps", "1", "--quads", "2"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "matrix product" in done.stdout and "mfu_of_measured_matmul" in done.stdout
