"""docs/architecture.md: the functions it names exist where it says, and its walk runs."""

from __future__ import annotations

import ast
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
# [`name`](../bvpo/file.py), the name being a function, a class, or Class.method
NAMED = re.findall(r"\[`([A-Za-z_][\w.]*)`\]\(\.\./(bvpo/[\w/]+\.py)\)", TEXT)


# What stands in an experiment's folder; bvpo/experiment/folder.py alone says where.
FILES = (
    "prompts.jsonl", "prompts.dropped.jsonl", "quads.jsonl", "pairing.json", "verdicts.jsonl", "results.json",
    "report.html", "held_out.jsonl", "declared.json", "tuned.json", "run.json", "manifest.json", "config.toml", "log.txt",
    "analysis.json",
)  # fmt: skip
FOLDERS = ("samples", "failed", "scores", "judge", "train", "final", "preferences", "reference", "eval")


def joined_paths(file: Path) -> set[str]:
    """Names of an experiment's files anywhere in the code, of its folders where a path is joined, and the folder itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value in FILES:
            found.add(str(node.value))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            right = node.right
            if isinstance(right, ast.Constant) and str(right.value).partition("/")[0] in FOLDERS:
                found.add(str(right.value))
            if ast.unparse(node).endswith("config.root) / config.name"):
                found.add("root / name")
    return found


def test_one_room_knows_the_experiment_folder() -> None:
    """Mutation: `folder / "samples"` or "prompts.jsonl" in any stage. The folder of a tiny model is no experiment."""
    files = [path for path in (ROOT / "bvpo").rglob("*.py") if path.parts[-2] not in ("experiment", "tiny")]
    assert len(files) > 100
    assert {str(path.relative_to(ROOT)): names for path in files if (names := joined_paths(path))} == {}
    assert {"prompts.jsonl", "samples"} <= joined_paths(ROOT / "tests" / "look_fixtures.py"), "the check sees them"


@cache
def defined(path: str) -> set[str]:
    """Functions, classes and methods of a file."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inside = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{item.name}" for item in inside if isinstance(item, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("name", "path"), sorted(set(NAMED)))
def test_named_code_exists(name: str, path: str) -> None:
    """Mutation: any function that the page names renamed or moved."""
    assert name in defined(path), f"{PAGE.name} names {name} in {path}"


def test_the_walk_needs_four_files() -> None:
    """Mutation: a fifth stop on the way, or a code sample without its file."""
    stops = re.findall(r"^### \d\. .*`(bvpo/[\w/]+\.py)`$", TEXT, re.MULTILINE)
    assert len(stops) == len(set(stops)) == 4
    assert {path for _, path in NAMED} >= set(stops)


def test_the_walk_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet with its assertions, in order. Mutations: a branch's closing marker unscored; the tree's rows or
    positions off by one; a loss at the reference other than log 2."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "docs" / "examples" / "first_run.py"), run_name="__main__")
    namespace: dict[str, Any] = {}
    walk = TEXT.split("\n## The record store\n")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", walk, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), namespace)
