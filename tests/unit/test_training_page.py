"""docs/training.md: its commands print what it shows, its Python runs, its tables name what exists."""

from __future__ import annotations

import logging
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bvpo.cli import main
from bvpo.strict import parse_json
from bvpo.training.arguments import BVPOConfig
from bvpo.training.objective import STATISTICS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
# What another machine prints differently: throughput, duration, and hashes of what the tokenizer library wrote.
VARYING = [(r"[\d,]+ tok/s", "N tok/s"), (r"in [\d.]+ s,", "in N s,"), (r"tokens-[0-9a-f]{32}", "tokens-HASH")]
NUMBER = re.compile(r"[+-]?\d[\d,]*\.?\d*(?:e[+-]\d+)?")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def shown() -> list[tuple[str, list[str]]]:
    """(command, lines of its output) of every console block, in order."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def run(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a command prints: messages and steps, then the error line."""
    program, *words = shlex.split(command)
    capsys.readouterr()
    if program == "python":
        runpy.run_path(words[0], run_name="__main__")
        return []
    handler = logging.StreamHandler(sys.stdout)  # messages go to stderr otherwise, among the progress bars
    logger = logging.getLogger("bvpo")
    logger.addHandler(handler)
    before, logger.level = logger.level, logging.INFO
    try:
        main(words)
    finally:
        logger.removeHandler(handler)
        logger.level = before
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("bvpo: error: ")]
    return [line.rstrip() for line in out.splitlines() if line.strip()] + errors


def same(shown_line: str, line: str) -> bool:
    """Equal words, and numbers that differ by rounding only."""
    for pattern, name in VARYING:
        shown_line, line = re.sub(pattern, name, shown_line), re.sub(pattern, name, line)
    if NUMBER.sub("#", shown_line) != NUMBER.sub("#", line):
        return False
    pairs = zip(NUMBER.findall(shown_line), NUMBER.findall(line), strict=True)
    numbers = [tuple(float(text.replace(",", "")) for text in pair) for pair in pairs]
    return all(abs(a - b) <= 0.02 + 0.02 * abs(a) for a, b in numbers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    (path / "docs").symlink_to(ROOT / "docs")
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page shows a run on the CPU; a GPU rounds to bf16")
@pytest.mark.filterwarnings("ignore")
def test_commands_print_what_the_page_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutations: any message, default or number of the walk-through changed without the page."""
    monkeypatch.chdir(folder)
    commands = shown()
    assert [command.split()[0] for command, _ in commands] == ["python", "bvpo", "bvpo", "bvpo", "bvpo"]
    for command, expected in commands:
        lines = run(command, capsys)
        if "error" in "".join(expected):
            lines = [line for line in lines if line.startswith("bvpo: error")]
        assert len(lines) == len(expected), (command, lines)
        for one, other in zip(expected, lines, strict=True):
            assert same(one, other), f"{command}\nshown: {one}\nnow:   {other}"
    files = {path.name.split("-")[0] for path in (folder / "experiments/first/train").iterdir() if path.name[0] != "."}
    table = set(re.findall(r"^\| `train/([\w.]+)", TEXT, re.MULTILINE))
    assert files == {name.split("-")[0] for name in table}


@pytest.mark.filterwarnings("ignore")
def test_python_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: an argument of the trainer renamed."""
    monkeypatch.chdir(folder)
    if not Path("experiments/first/model").is_dir():
        runpy.run_path("docs/examples/first_run.py", run_name="__main__")
    (block,) = blocks("python")
    exec(compile(block, "training.md", "exec"), {})
    assert Path("experiments/api/final/adapter_model.safetensors").is_file()
    lines = Path("experiments/api/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entry = parse_json(lines[0], "metrics.jsonl")
    assert isinstance(entry, dict)
    documented = _metrics()
    logged = {name for name in entry if name not in ("step", "epoch")}
    assert logged <= documented, "a metric without a row in the table"
    assert documented - logged <= {"mfu", "noise/same_prompt", "noise/cosine"}, "a row without a metric"


def _metrics() -> set[str]:
    """Every name that the two tables of metrics explain."""
    views, steps = (re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for part in TEXT.split("| per ")[1:3])
    per_view = {name for row in views for name in re.findall(r"`([\w/]+)`", row)}
    assert per_view == (set(STATISTICS) - {"count"}) | {"pairs"}
    per_step = {name for row in steps[: steps.index("`mfu`") + 1] for name in re.findall(r"`([\w/]+)`", row)}
    return per_step | {f"{view}/{name}" for view in ("trace", "empty") for name in per_view}


def test_resuming_names_what_is_compared() -> None:
    """Mutation: a field that resuming compares and the page does not name, or the other way round."""
    from transformers import TrainingArguments

    from bvpo.training.arguments import DECIDES

    text = TEXT.split("and of `TrainingArguments`:")[1].split("So a run that ran out")[0]
    assert set(re.findall(r"`(\w+)`", text)) == DECIDES & set(TrainingArguments.__dataclass_fields__)


def test_table_for_trl_users_names_real_fields() -> None:
    """Mutation: a field that either side does not have."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    rows = TEXT.split("| `trl.DPOConfig` |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    theirs: Any = trl.DPOConfig.__dataclass_fields__
    for row in rows:
        left, right = row.split("|")[1:3]
        for name in re.findall(r"`(\w+)`", left):
            assert name in theirs, name
        for name in re.findall(r"`(\w+)`", right):
            assert name in BVPOConfig.__dataclass_fields__, name
