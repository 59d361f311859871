"""docs/hyperparameters.md says what the program reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hyperparameters_doc import DOC, FIXED, RENAMED, tables, trainer_fields, with_generated_parts

from bvpo.config import ExperimentConfig, load_config
from bvpo.config.layers import settings

# A value away from the default for every setting that the trainer's fields come from, and what the field then is.
CHANGED = {
    "train.epochs": ("2.5", 2.5),
    "train.learning_rate": ("1e-5", 1e-5),
    "train.lr_scheduler": ("linear", "linear"),
    "train.warmup_ratio": ("0.25", 0.25),
    "train.logging_steps": ("7", 7),
    "train.loss.name": ("rdpo", "rdpo"),
    "train.loss.beta": ("0.3", 0.3),
    "train.loss.label_smoothing": ("0.1", 0.1),
    "train.loss.gamma": ("0.7", 0.7),
    "train.loss.length_weight": ("0.2", 0.2),
    "train.alpha.value": ("0.9", 0.9),
    "train.alpha.schedule": ("linear", "linear"),
    "train.alpha.end": ("0.2", 0.2),
    "train.anchor.kind": ("nll", "nll"),
    "train.anchor.tokens": ("both", "both"),
    "train.anchor.weight": ("0.05", 0.05),
    "train.trace_estimator": ("answer", "answer"),
    "train.max_length": ("99", 99),
    "train.over_long": ("refuse", "refuse"),
    "train.score_empty_block": ("false", False),
    "train.quads_per_step": ("6", 6),
    "train.tokens_per_micro_batch": ("500", 500),
    "train.dropout": ("true", True),
    "train.last_step": ("drop", "drop"),
    "train.layout": ("padded", "padded"),
    "train.backward": ("sequence", "sequence"),
    "train.precision": ("fp32", "fp32"),
    "train.reference": ("held", "held"),
    "train.reference_cache": ("refs", "refs"),
    "train.head_chunk": ("32", 32),
    "train.telemetry_steps": ("7", 7),
}
# What cannot be set together with these.
APART = {"train.alpha.every": ("3", 3)}


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


def test_fields_of_the_trainer_come_from_the_named_settings(tmp_path: Path) -> None:
    """Mutations: two settings swapped on the way into BVPOConfig; a setting that no field takes."""
    from bvpo.training.arguments import arguments_from

    path = tmp_path / "c.toml"
    path.write_text('name = "a"\n[model]\npath = "m"\n', encoding="utf-8")
    flags = [word for setting, (text, _) in CHANGED.items() for word in (f"--{setting}", text)]
    config = load_config(path, [*flags, "--train.hf.use_cpu", "true"])
    args = arguments_from(config.train, output_dir=str(tmp_path), seed=1, reasoning_format="qwen3")
    assert args.reasoning_format == "qwen3"
    fields = {name: setting for name, _, setting, _ in trainer_fields() if setting.startswith("train.")}
    assert set(fields.values()) == set(CHANGED) | set(APART)
    together = {name: setting for name, setting in fields.items() if setting in CHANGED}
    assert {name: getattr(args, name) for name in together} == {name: CHANGED[s][1] for name, s in together.items()}
    auto = [word for setting, (text, _) in APART.items() for word in (f"--{setting}", text)]
    config = load_config(path, [*auto, "--train.alpha.schedule", "auto", "--train.hf.use_cpu", "true"])
    assert arguments_from(config.train, output_dir=str(tmp_path), seed=1).alpha_every == APART["train.alpha.every"][1]


@pytest.mark.parametrize("name", [*RENAMED, *FIXED])
def test_generator_names_real_fields(name: str) -> None:
    """Mutation: a name that BVPOConfig no longer has."""
    from bvpo.training.arguments import BVPOConfig

    assert name in BVPOConfig.__dataclass_fields__
