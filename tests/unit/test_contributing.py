"""The worked examples that CONTRIBUTING.md links run as they stand."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bvpo.cli import VERBS
from bvpo.engines.base import ENGINES, Generation, Request, create_engine
from bvpo.formats import FORMATS
from bvpo.scorers.base import SCORERS, Scorer
from bvpo.strict import UserError
from tests.engine_checks import check_engine
from tests.formats_fixtures import FAMILIES, tokenizer_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registries() -> Iterator[None]:
    """The example must not stay behind for other tests."""
    before = [(registry, dict(registry)) for registry in (FORMATS, FAMILIES, ENGINES, SCORERS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)  # type: ignore[arg-type]
    tokenizer_of.cache_clear()


def run_section(title: str, namespace: dict[str, object], *, num_blocks: int) -> dict[str, object]:
    """Runs the Python blocks of a section of docs/extending.md, one after another; what they leave behind."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    text = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == num_blocks
    for block in blocks:
        exec(compile(block, title, "exec"), namespace)
    return namespace


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The namespace of a module that a registry can import by its name."""
    made = ModuleType("example_of_a_page")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made.__dict__


@pytest.mark.usefixtures("registries")
def test_adding_an_engine(module: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """docs/extending.md: its code runs, and its engine keeps the contract. Mutation: a page gone stale."""
    run_section("Add an engine", module, num_blocks=3)
    assert capsys.readouterr().out.count("\n") == 3
    with pytest.raises(UserError, match="unknown option 'txt'; did you mean 'text'"):
        create_engine("chain", {"txt": (1,)})


@pytest.mark.usefixtures("registries")
def test_adding_a_scorer(module: dict[str, object]) -> None:
    """docs/extending.md: its code runs. Mutation: a page gone stale."""
    run_section("Add a scorer", module, num_blocks=2)
    assert isinstance(module["scorer"], Scorer)


class BrokenEngine:
    """An engine of the page with one fault."""

    def __init__(self, inner: Any, fault: str) -> None:
        self.inner, self.fault, self.caps = inner, fault, inner.caps

    def fingerprint(self) -> dict[str, Any]:
        return {"engine": "broken"} if self.fault == "no weights" else self.inner.fingerprint()

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        for number, request in enumerate(requests):
            if self.fault == "seed of the place":
                request = replace(request, seed=number)
            if self.fault == "one seed":
                request = replace(request, seed=1)
            if self.fault == "no limit":
                request = replace(request, params=replace(request.params, max_new_tokens=8))
            for generation in self.inner.generate([request]):
                if self.fault == "lost" and number == 3:
                    continue
                if self.fault == "no logprobs":
                    generation = replace(generation, logprobs=None)
                yield generation
                if self.fault == "twice":
                    yield generation


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "fault", ["seed of the place", "one seed", "no limit", "lost", "twice", "no logprobs", "no weights"]
)
def test_the_checks_of_engines_find_faults(module: dict[str, Any], fault: str) -> None:
    """Mutation: any check of tests/engine_checks.py left out."""
    run_section("Add an engine", module, num_blocks=3)
    impossible = replace(module["requests"][0], key="no", prompt_ids=(4,))
    check_engine(module["engine"], module["requests"], impossible=impossible)
    with pytest.raises(AssertionError):
        check_engine(BrokenEngine(module["engine"], fault), module["requests"], impossible=impossible)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registries")
def test_adding_a_format() -> None:
    """docs/extending.md: its code runs, and its family gets a golden table. Mutation: a page gone stale."""
    from tests.formats_doc import family_table, golden_lines

    run_section("Add a reasoning format", {}, num_blocks=3)
    trace, empty, unscored, *_ = golden_lines("acme")
    assert "║ I" in trace and "║ </reason>" in empty and "║ Yes" in unscored
    assert "| `acme` | Acme-7B-Reasoner |" in family_table()


def test_contributing_links_every_section() -> None:
    """Mutation: a section on adding something that CONTRIBUTING.md does not name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (Add .*)$", page, re.MULTILINE)
    assert len(titles) == 4
    assert all(f"(docs/extending.md#{title.lower().replace(' ', '-')})" in text for title in titles)


def test_readme_names_commands_that_exist() -> None:
    """Mutations: a target that the Makefile lost, a verb that is not there, a page that is too long to start with."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)", readme, re.MULTILINE)
    assert {"vignette", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert len(re.sub(r"^ *<!--.*?-->\n", "", readme, flags=re.DOTALL | re.MULTILINE).splitlines()) < 150
    shown = re.findall(r"^    bvpo (\w+) ", readme, re.MULTILINE)
    assert set(shown) <= set(VERBS)
