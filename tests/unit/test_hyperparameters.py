"""docs/hyperparameters.md says what the program reads."""

from __future__ import annotations

import pytest
from hyperparameters_doc import DOC, FIXED, tables, with_generated_parts

from bvpo.config import ExperimentConfig
from bvpo.config.layers import Setting, build, parse_flags, settings
from bvpo.config.toml import toml_value


def test_page_is_fresh() -> None:
    """Mutation: any default, type, range or text changed without the page (`python -m tests.hyperparameters_doc`)."""
    doc = DOC.read_text(encoding="utf-8")
    assert with_generated_parts(doc) == doc


def test_tables_hold_every_setting_once() -> None:
    """Mutation: a section that the generator skips."""
    text = tables()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(settings(ExperimentConfig))
    assert "| `beta` | `float`; a number above 0 | `0.1` |" in text


def changed(setting: Setting) -> str:
    """A value away from the default that is in range, as a flag takes it."""
    known = {
        "lr_scheduler": "linear",
        "warmup_ratio": "0.25",
        "max_steps": "7",
        "loss.name": "rdpo",
        "report_to": "wandb",
    }
    name = setting.field.removeprefix("train.")
    if name in known:
        return known[name]
    if "|" in setting.type and not set(setting.type.split("|")) & {"int", "float", "str"}:
        return next(word for word in setting.type.split("|") if word not in (setting.default or "").strip('"'))
    if setting.type == "bool":
        return "false" if setting.default == "true" else "true"
    return {"int": "9", "float": "0.3", "str": "x"}[setting.type.split("|")[0]]


@pytest.mark.parametrize(
    "setting", [s for s in settings(ExperimentConfig) if s.field.startswith("train.")], ids=lambda s: s.field
)
def test_fields_of_the_trainer_come_from_the_named_settings(setting: Setting) -> None:
    """Mutations: two settings swapped on the way into BVPOConfig; a setting that no field takes, or a default of its own."""
    from bvpo.training.arguments import _BY_FIELD, _train_settings

    field = setting.field.removeprefix("train.")
    if field.split(".")[0] in ("lora", "hf"):
        assert field not in _BY_FIELD
        return
    text = changed(setting)
    flags = ["--name", "a", "--model.path", "m", f"--{setting.field}", text]
    config = build(ExperimentConfig, [parse_flags(ExperimentConfig, flags)])
    expected = parse_flags(ExperimentConfig, [f"--{setting.field}", text]).values["train"]
    for part in field.split("."):
        expected = expected[part]
    assert _train_settings(config.train)[_BY_FIELD[field]] == expected
    assert setting.default is None or toml_value(expected, field) != setting.default


@pytest.mark.parametrize("name", FIXED)
def test_generator_names_real_fields(name: str) -> None:
    """Mutation: a name that BVPOConfig no longer has."""
    from bvpo.training.arguments import BVPOConfig

    assert name in BVPOConfig.__dataclass_fields__
