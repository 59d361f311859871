"""The generated parts of ``docs/hyperparameters.md``: one table per section of the config, and the trainer's own fields.

``python -m tests.hyperparameters_doc`` rewrites them; ``tests/unit/test_hyperparameters.py`` fails when they are stale.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.config.layers import Setting, section_docs, settings
from bvpo.config.ranges import Range, marks
from bvpo.strict import field_types

DOC = Path(__file__).parent.parent / "docs" / "hyperparameters.md"
# Expectations that say no more than "not empty".
_VAGUE = {"something"}
# Overridden because transformers' default makes no sense here; no setting of ours sets them.
FIXED = ("logging_nan_inf_filter", "remove_unused_columns")


def section_classes(cls: type = ExperimentConfig, prefix: str = "") -> dict[str, type]:
    """Section name (empty for the top of the file) -> its class."""
    found = {prefix: cls}
    for name, tp in field_types(cls).items():
        if dataclasses.is_dataclass(tp):
            found |= section_classes(tp, f"{prefix}.{name}".lstrip("."))  # type: ignore[arg-type]
    return found


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def values_of(setting: Setting, cls: type) -> str:
    """The choices or the type, then the range."""
    check = marks(cls, Range).get(setting.field.rpartition(".")[2])
    expected = [check.expected] if check and check.expected not in _VAGUE else []
    return "; ".join([code(setting.type), *map(cell, expected)])


def tables() -> str:
    """Every setting, section by section, in the order of a config file."""
    docs, classes = section_docs(ExperimentConfig), section_classes()
    parts: list[str] = []
    for section, cls in classes.items():
        rows = [s for s in settings(ExperimentConfig) if s.section == section]
        if not rows:
            continue
        title = f"`[{section}]`" if section else "Top of the file"
        lines = [
            f"### {title}",
            "",
            cell(docs[section]),
            "",
            "| setting | values | default | meaning |",
            "|---|---|---|---|",
        ]
        for s in rows:
            default = "required" if s.default is None else code(s.default)
            name = code(s.field.rpartition(".")[2])
            lines.append(f"| {name} | {values_of(s, cls)} | {default} | {cell(s.doc)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def trainer_fields() -> Iterator[tuple[str, Any, str, str]]:
    """(field of BVPOConfig, default, setting in the TOML file, help) for what BVPOConfig adds or overrides."""
    from bvpo.training.arguments import SETTINGS, BVPOConfig

    names = {s.argument: f"train.{s.field}" for s in SETTINGS}
    names |= {"reasoning_format": "model.format", "custom_format": "model.custom_format"}
    own = set(BVPOConfig.__annotations__)
    for f in dataclasses.fields(BVPOConfig):
        if f.name in own and f.name not in FIXED:
            yield f.name, f.default, names[f.name], f.metadata["help"]


def trainer_table() -> str:
    lines = ["| field | default | in the TOML file | meaning |", "|---|---|---|---|"]
    for name, default, setting, text in trainer_fields():
        lines.append(f"| {code(name)} | {code(repr(default))} | {code(setting)} | {cell(text)} |")
    return "\n".join(lines) + "\n"


def with_generated_parts(doc: str) -> str:
    """The page with its generated parts replaced."""
    for part, text in (("settings", tables()), ("trainer", trainer_table())):
        begin, end = f"<!-- {part}: generated -->\n", f"<!-- {part}: end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        assert re.search(pattern, doc, flags=re.DOTALL), f"{DOC.name} lost its {part} part"
        doc = re.sub(pattern, lambda _, new=begin + text + end: new, doc, flags=re.DOTALL)
    return doc


if __name__ == "__main__":
    DOC.write_text(with_generated_parts(DOC.read_text(encoding="utf-8")), encoding="utf-8")
