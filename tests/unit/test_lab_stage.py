"""The verb ``lab``: what it prints and writes, and its exit codes. The numbers themselves are checked in tests/theory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bvpo.lab import experiment
from bvpo.lab.results import Findings, Line, Plot, Table, Verdict
from bvpo.stages import lab
from bvpo.strict import UserError

GOOD = Verdict(key="nine", statement="Theorem 9", checked="a < b & c", value=3e-13, bound=1e-12)


def part(*verdicts: Verdict):
    """A part of the laboratory that finds the same at once."""
    line = Line(label="B = 8", x=(0.0, 0.5, 1.0), y=(4.0, 1.0, 2.0), mark=(0.5, 1.0))
    found = Findings(
        verdicts=verdicts,
        tables=(
            Table(title="A table", note="How to read it.", header=("name", "n"), rows=(("x", 1e-31), ("y", 0.25))),
        ),
        plots=(Plot(title="A plot", caption="Why.", x_label="alpha", y_label="error", lines=(line,), log_y=True),),
    )
    return {"only": lambda seed, *, quick: found}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch):
    def use(*verdicts: Verdict) -> None:
        found = part(*verdicts)
        monkeypatch.setattr(experiment, "PARTS", found)
        monkeypatch.setattr(lab, "PARTS", found)

    return use


def test_prints_and_writes(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a number that is only on the page; the page loads something; model text not escaped."""
    parts(GOOD)
    assert lab.main(["--out", str(tmp_path / "new"), "--seed", "7", "--quick"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Theorem 9 +a < b & c +3e-13 +<= 1e-12 holds", out) and "1 of 1 checks hold" in out
    values = json.loads((tmp_path / "new/lab.json").read_text())
    assert values["seed"] == 7 and values["quick"] is True and values["holds"] is True
    assert values["findings"]["verdicts"][0] | {"holds": True} == values["findings"]["verdicts"][0]
    assert values["findings"]["tables"][0]["rows"] == [["x", 1e-31], ["y", 0.25]]
    page = (tmp_path / "new/lab.html").read_text()
    assert "a &lt; b &amp; c" in page and "A table" in page and "<svg" in page
    assert not re.search(r"(?:src|href)=[\"']https?:", page)


def test_a_failure_is_seen(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: exit code 0 for a statement that does not hold; a NaN that counts as holding."""
    wrong = Verdict(key="nine", statement="Theorem 9", checked="x", value=float("nan"), bound=1.0)
    reached = Verdict(key="nine", statement="Theorem 9", checked="y", value=0.5, bound=1.0, at_least=True)
    parts(GOOD, wrong, reached)
    assert lab.main(["--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILS") == 2 and "1 of 3 checks hold" in out
    assert (tmp_path / "lab.html").read_text().count("FAILS") == 2


def test_the_same_findings_give_the_same_files(parts, tmp_path: Path) -> None:
    """Mutation: a date or a duration in the files. Threads are given back."""
    parts(GOOD)
    before = torch.get_num_threads()
    for name in ("a", "b"):
        lab.main(["--out", str(tmp_path / name)])
    for file in ("lab.json", "lab.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--seed", "x"], ["config.toml"], ["--quik"]])
def test_mistakes_are_one_line(argv: list[str]) -> None:
    """Mutation: argparse's own usage dump and exit."""
    with pytest.raises(UserError, match="bvpo lab --help"):
        lab.main(argv)


def test_rounding_reads_zero() -> None:
    """Mutation: 5.8e-32 in a table, which nobody can compare with 0.08."""
    assert [lab.cell(v) for v in (5.8e-32, -1e-16, 0.0812345, 12345.6, 7, "x")] == [
        "0", "0", "0.0812", "12,346", "7", "x",
    ]  # fmt: skip
