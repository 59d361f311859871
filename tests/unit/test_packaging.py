"""pyproject.toml: an installed package holds what the code reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_files_beside_the_code_are_installed() -> None:
    """Mutation: templates that an editable install finds and ``pip install .`` leaves out: no page can be written."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in (ROOT / "bvpo").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files and not files - installed
