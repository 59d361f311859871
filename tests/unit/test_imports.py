"""What importing costs, and that no setting is dead: every config field is read by the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import bvpo
from bvpo.config import ExperimentConfig
from bvpo.strict import field_types

PACKAGE = Path(bvpo.__file__).parent
HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft", "matplotlib", "openai", "ray", "vllm")

# Fields whose reader is not written yet. An entry whose field is read fails the test: delete it then.
NOT_READ_YET: set[str] = set()


@pytest.mark.parametrize(
    "code",
    [
        "import bvpo",
        "import bvpo.records, bvpo.strict, bvpo.config.layers, bvpo.config.toml, bvpo.config, bvpo.command, bvpo.cli",
        "import bvpo.cli; bvpo.cli.main(['--help'])",
        "import bvpo; bvpo.Quad; bvpo.load_config",
    ],
)
def test_no_framework_is_loaded(code: str) -> None:
    """Mutation: `import torch` (or a module that needs it) at the top of any house module."""
    probe = f"{code}\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_instant() -> None:
    """Mutation: any heavy import on the way to `bvpo --help`. CPU time, best of 5: other load must not decide."""
    resource = pytest.importorskip("resource")
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "bvpo", "--help"], capture_output=True, check=True, cwd=PACKAGE.parent)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.5


def test_lazy_names() -> None:
    """Mutation: a name in `__all__` that `_HOME` does not know, or the reverse."""
    assert set(bvpo.__all__) == {*bvpo._HOME, "__version__"}
    assert set(dir(bvpo)) == set(bvpo.__all__)
    with pytest.raises(AttributeError, match="Quadd"):
        bvpo.__getattr__("Quadd")


@pytest.mark.parametrize("name", sorted(bvpo._HOME))
def test_lazy_names_resolve(name: str) -> None:
    """Mutation: renaming an exported class, or moving it to another module."""
    assert getattr(bvpo, name).__name__ == name


# ---------------------------------------------------------------------------------------------------------------------
# No setting that nothing reads. A read of `field` counts for a section only where the object is known to be that
# section: by annotation (`config: TrainConfig`), by the section's own name (`config.train.lora.rank`), or by assignment
# from one of these. So an unrelated `self.name` or `args.max_length` does not keep a dead setting alive.


def sections(cls: type = ExperimentConfig, names: tuple[str, ...] = ()) -> Iterator[tuple[type, tuple[str, ...]]]:
    """Each config class with the attribute names that lead to it."""
    yield cls, names
    for name, tp in field_types(cls).items():
        if is_dataclass(tp):
            yield from sections(tp, (name,))  # type: ignore[arg-type]


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def mentions(annotation: ast.expr | None, cls_name: str) -> bool:
    return annotation is not None and any(
        cls_name in (getattr(n, "id", None), getattr(n, "attr", None)) or getattr(n, "value", None) == cls_name
        for n in ast.walk(annotation)
    )


class Reads(ast.NodeVisitor):
    """Collects the fields of one config class that a scope reads; functions open a scope of their own."""

    def __init__(self, cls_name: str, paths: tuple[str, ...], known: set[str]) -> None:
        self.cls_name, self.paths, self.known = cls_name, paths, set(known)
        self.found: set[str] = set()
        self.by_name = False  # getattr(section, variable): then field names stand as text in the module

    def is_section(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return last_name(node.func) == self.cls_name
        if isinstance(node, ast.Attribute):
            return node.attr in self.paths or node.attr in self.known
        return isinstance(node, ast.Name) and node.id in self.known

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = {a.arg for a in arguments}
        inner = Reads(self.cls_name, self.paths, self.known - own)
        inner.known |= {a.arg for a in arguments if mentions(a.annotation, self.cls_name)}
        for statement in node.body:
            inner.visit(statement)
        self.found |= inner.found
        self.by_name |= inner.by_name

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        pairs = [(t, node.value) for t in node.targets]
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += list(zip(target.elts, value.elts, strict=False))
            elif last_name(target) and self.is_section(value):
                self.known.add(last_name(target))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if mentions(node.annotation, self.cls_name):
            self.known.add(last_name(node.target))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and self.is_section(node.value):
            self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if last_name(node.func) == "getattr" and len(node.args) >= 2 and self.is_section(node.args[0]):
            if isinstance(node.args[1], ast.Constant):
                self.found.add(str(node.args[1].value))
            else:
                self.by_name = True
        if last_name(node.func) in ("asdict", "to_dict") and node.args and self.is_section(node.args[0]):
            self.by_name = True
        self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        if last_name(node.cls) == self.cls_name:
            self.found |= set(node.kwd_attrs)
        self.generic_visit(node)


def fields_read(source: str, cls: Any, paths: tuple[str, ...]) -> set[str]:
    """The fields of ``cls`` that a module reads."""
    tree = ast.parse(source)
    reads = Reads(cls.__name__, paths, set())
    # attributes annotated in classes (self.settings: TrainConfig) are known in every method
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and mentions(statement.annotation, cls.__name__):
                    reads.known.add(last_name(statement.target))
    reads.visit(tree)
    names = set(field_types(cls))
    if reads.by_name:
        reads.found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return reads.found & names


def arguments_read() -> set[str]:
    """Settings of [train] as ``Class.field`` that the trainer reads as an argument, or that are transformers' own."""
    from bvpo.training.arguments import SETTINGS

    text = "\n".join(
        p.read_text(encoding="utf-8") for room in ("training", "stages") for p in (PACKAGE / room).rglob("*.py")
    )
    read = {s.field for s in SETTINGS if not s.own or re.search(rf"\bargs\.{s.argument}\b", text)}
    by_path = {paths: cls for cls, paths in sections()}
    return {
        f"{by_path[(section or 'train',)].__name__}.{name}" for section, _, name in (f.rpartition(".") for f in read)
    }


def test_every_config_field_is_read() -> None:
    """Mutation: a new setting in bvpo/config without a reader, or deleting the last reader of one."""
    sources = [p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py") if p.parent.name != "config"]
    unread: set[str] = set()
    for cls, paths in sections():
        read = set().union(*(fields_read(source, cls, paths) for source in sources))
        leaves = {name for name, tp in field_types(cls).items() if not is_dataclass(tp)}
        unread |= {f"{cls.__name__}.{name}" for name in leaves - read}
    unread -= arguments_read()
    assert unread == NOT_READ_YET, (
        f"nothing reads {sorted(unread - NOT_READ_YET)}; read now, delete from NOT_READ_YET: {sorted(NOT_READ_YET - unread)}"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(c: LoraSettings): return c.rank", {"rank"}),
        ("def f(config): return config.train.lora.rank", {"rank"}),
        ("def f(config):\n lora = config.train.lora\n return lora.rank", {"rank"}),
        ("class A:\n s: LoraSettings\n def f(self): return self.s.rank", {"rank"}),
        ("NAMES = ('rank',)\ndef f(c: LoraSettings): return [getattr(c, n) for n in NAMES]", {"rank"}),
        ("def f(args): return args.rank", set()),
        ("def f(c: LoraSettings): pass\ndef g(c): return c.rank", set()),
        ("def f(c: LoraSettings): c.rank = 1", set()),
        ("x = LoraSettings(rank=3)", set()),
        ("def f(args): return getattr(args, 'rank')", set()),
    ],
)
def test_the_scan_itself(source: str, expected: set[str]) -> None:
    """Mutation: counting every `.rank` in the package as a read; then no setting could ever be dead."""
    cls, paths = next((c, p) for c, p in sections() if c.__name__ == "LoraSettings")
    assert fields_read(source, cls, paths) == expected
