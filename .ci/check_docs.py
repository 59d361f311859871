"""Checks what the pages claim: links, make targets, commands and paths must exist, numbers must be those of their files.

In: every Markdown file of the repository, the module docstrings of ``bvpo``, benchmarks/results. Out: one line per fault
and exit code 1, or one closing line. Prose is not judged.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".venv", ".git", ".hypothesis", ".pytest_cache", ".ruff_cache", "build", "dist", "experiments"}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MAKE = re.compile(r"\bmake ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)")
VERB = re.compile(r"(?:^|[\s$])(?:python -m )?bvpo ([a-z]+)\b")
TREE_PATH = re.compile(
    r"(?:bvpo|tests|docs|recipes|benchmarks|\.ci)/[A-Za-z0-9_./-]*[A-Za-z0-9_]/?"
    r"|[A-Za-z0-9_-]+\.(?:md|toml)|Makefile|constraints\.txt"
)
# pages may name these files of an experiment folder, and the config a reader writes
NOT_OURS = re.compile(r"^(?:config|CONFIG|mine|my[_-].*)\.toml$")


def main() -> int:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    verbs = known_verbs()
    faults: list[str] = []
    pages = [p for p in sorted(ROOT.rglob("*.md")) if not SKIP & set(p.relative_to(ROOT).parts)]
    for page in pages:
        name = page.relative_to(ROOT)
        for number, line, in_block in numbered(page.read_text(encoding="utf-8")):
            faults += [f"{name}:{number}: {fault}" for fault in line_faults(page, line, in_block, targets, verbs)]
    modules = sorted((ROOT / "bvpo").rglob("*.py"))
    for module in modules:
        source = module.read_text(encoding="utf-8")
        if source.strip() and not ast.get_docstring(ast.parse(source)):
            faults.append(f"{module.relative_to(ROOT)}:1: no module docstring")
    faults += number_faults()
    for fault in faults:
        print(fault)
    print(f"docs: {len(pages)} pages and {len(modules)} modules checked, {len(faults)} faults")
    return 1 if faults else 0


def number_faults() -> list[str]:
    """Of the pages that quote results: tables that differ from the files, numbers that do, numbers without a source."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import quotes, tables

    found: list[str] = []
    for name in tables.WITH_TABLES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if tables.render(text) != text:
            found.append(f"{name}: a table differs from benchmarks/results; run python benchmarks/tables.py")
        if name in tables.PAGES:
            found += quotes.faults(name, text)
    return found


def known_verbs() -> set[str]:
    sys.path.insert(0, str(ROOT))
    from bvpo.cli import VERBS

    return set(VERBS)


def numbered(text: str) -> Iterator[tuple[int, str, bool]]:
    """Line number, line, and whether it stands in a fenced block."""
    in_block = False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.lstrip().startswith("```"):
            in_block = not in_block
            continue
        yield number, line, in_block


def line_faults(page: Path, line: str, in_block: bool, targets: set[str], verbs: set[str]) -> Iterator[str]:
    if in_block:
        commands = [line] if not line.lstrip().startswith("#") else []
    else:
        for match in LINK.finditer(line):
            yield from link_faults(page, match[1] or match[2])
        commands = CODE.findall(line)
        for code in commands:
            if TREE_PATH.fullmatch(code) and not NOT_OURS.match(code) and not exists(page, code):
                yield f"`{code}` does not exist"
    for command in commands:
        for match in MAKE.finditer(command):
            yield from (f"no make target {t!r}" for t in match[1].split() if t not in targets)
        # a command stands at the start of a line or of a `code span`; `import bvpo` is none
        if (match := VERB.match(command.strip())) and match[1] not in verbs:
            yield f"no verb {match[1]!r} in `bvpo`"


def link_faults(page: Path, target: str) -> Iterator[str]:
    if re.match(r"[a-z]+:", target):
        return
    file, _, anchor = target.partition("#")
    path = (page.parent / file) if file else page
    if not path.exists():
        yield f"link to {target!r}: no such file"
    elif anchor and path.suffix == ".md" and anchor not in anchors(path):
        yield f"link to {target!r}: no such heading"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub spells their anchors."""
    found: set[str] = set()
    for _, line, in_block in numbered(page.read_text(encoding="utf-8")):
        if not in_block and (match := re.match(r"#+\s+(.*)", line)):
            text = re.sub(r"[^\w\- ]", "", match[1].lower().replace("`", ""))
            found.add(text.strip().replace(" ", "-"))
    return found


def exists(page: Path, path: str) -> bool:
    return (ROOT / path).exists() or (page.parent / path).exists()


if __name__ == "__main__":
    sys.exit(main())
