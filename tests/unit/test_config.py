"""The config: layers and their precedence, exact errors with file and line, ranges, and a dump that reads back equal."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo import config as config_module
from bvpo.config import (
    AlphaConfig,
    AnchorConfig,
    DataConfig,
    ExperimentConfig,
    LoraSettings,
    LossConfig,
    ModelConfig,
    TrainConfig,
    dump_toml,
    load_config,
    validate,
)
from bvpo.config.layers import build, field_docs, is_optional, parse_flags, read_toml, settings
from bvpo.config.ranges import Range, marks
from bvpo.config.toml import UNSET, key_lines
from bvpo.records import Quad
from bvpo.strict import FieldError, UserError, field_types, from_dict
from tests.strategies import values_of

ROOT = Path(__file__).resolve().parents[2]
BASE = 'name = "a"\n[model]\npath = "m"\n'
MINIMAL = ExperimentConfig(name="a", model=ModelConfig(path="m"))

Load = Callable[..., ExperimentConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Reads TOML text plus flags."""

    def read(text: str, *flags: str) -> ExperimentConfig:
        path = tmp_path / "c.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, flags)

    return read


@pytest.fixture
def complaint(load: Load, tmp_path: Path) -> Callable[..., str]:
    """The message of a refused config, with the folder taken off."""

    def read(text: str, *flags: str) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *flags)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return read


def all_sections(cls: type = ExperimentConfig) -> list[type]:
    """Every config class, found from the root."""
    nested = [tp for tp in field_types(cls).values() if is_dataclass(tp)]
    return [cls, *(section for tp in nested for section in all_sections(tp))]  # type: ignore[arg-type]


def test_precedence_defaults_then_file_then_flags(load: Load) -> None:
    """Mutation: swapping the layers in `load_config`, or replacing a section instead of merging field by field."""
    text = BASE + "[train]\nlearning_rate = 1e-6\nmax_length = 100\n[train.hf]\na = 1\nb = 2\n"
    config = load(text, "--train.max_length", "200", "--train.hf.b", "3")
    expected = TrainConfig(learning_rate=1e-6, max_length=200, hf={"a": 1, "b": 3})
    assert config == replace(MINIMAL, train=expected)
    assert config.train.quads_per_step == 128


def test_paper_settings_are_the_defaults() -> None:
    """Mutation: any default moved. Paper, section 5: AdamW, batch 128, 1 epoch, length 4096, cosine, 10 %, lr 7e-7."""
    train = TrainConfig()
    assert (train.quads_per_step, train.epochs, train.max_length) == (128, 1.0, 4096)
    assert (train.learning_rate, train.lr_scheduler, train.warmup_ratio, train.alpha.value) == (
        7e-7,
        "cosine",
        0.1,
        0.5,
    )
    assert (train.loss.name, train.over_long, train.trace_estimator, train.score_empty_block) == (
        "dpo",
        "drop",
        "joint",
        True,
    )


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--train.loss.beta", "0.2"], "train.loss.beta", 0.2),
        (["--train.loss.beta=1"], "train.loss.beta", 1.0),
        (["--train.max_steps", "-1"], "train.max_steps", -1),
        (["--train.max-steps=7"], "train.max_steps", 7),
        (["--train.lora.enabled", "true"], "train.lora.enabled", True),
        (["--train.lora.enabled"], "train.lora.enabled", True),
        (["--train.lora.enabled", "--seed", "3"], "train.lora.enabled", True),
        (["--train.score_empty_block", "false"], "train.score_empty_block", False),
        (["--train.report_to", "tensorboard,wandb"], "train.report_to", ("tensorboard", "wandb")),
        (["--train.report_to", ""], "train.report_to", ()),
        (["--train.save_total_limit", "none"], "train.save_total_limit", None),
        (["--model.revision", "v1"], "model.revision", "v1"),
        (["--train.layout", "tree"], "train.layout", "tree"),
        (["--train.hf.torch_compile", "true"], "train.hf", {"torch_compile": True}),
        (["--train.hf.hub_model_id", "me/x"], "train.hf", {"hub_model_id": "me/x"}),
        (["--train.hf.fsdp_config.a", "[1, 2]"], "train.hf", {"fsdp_config": {"a": [1, 2]}}),
    ],
)
def test_flags_convert_by_type(load: Load, flags: list[str], field: str, value: Any) -> None:
    """Mutation: `bool(text)` (then 'false' is true), `text.split(',')` of '' (then ('',)), hyphens not accepted."""
    node: Any = load(BASE, *flags)
    for part in field.split("."):
        node = getattr(node, part)
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[train]\nlearnin_rate = 1\n",
            "c.toml:5: unknown field 'train.learnin_rate'; did you mean 'train.learning_rate'?",
        ),
        ("[train]\nlimit = 3\n", "c.toml:5: unknown field 'train.limit'; did you mean 'data.limit'?"),
        ("[trian]\n", "c.toml:4: unknown field 'trian'; did you mean 'train'?"),
        (
            "[train]\n\n# rate\nlearning_rate = 'a'\n",
            "c.toml:7: field 'train.learning_rate': got 'a' (str), expected a number",
        ),
        ("[train]\nloss = {beta = true}\n", "c.toml:5: field 'train.loss.beta': got true (bool), expected a number"),
        ("[train]\nloss.beta = 'x'\n", "c.toml:5: field 'train.loss.beta': got 'x' (str), expected a number"),
        ("[data]\nlimit = 1.5\n", "c.toml:5: field 'data.limit': got 1.5 (float), expected an integer or 'none'"),
        ("[train.loss]\nbeta = inf\n", "c.toml:5: field 'train.loss.beta': got inf (float), expected a finite number"),
        ("[train.loss]\nbeta = nan\n", "c.toml:5: field 'train.loss.beta': got nan (float), expected a finite number"),
        ("[train]\nreport_to = ['a', 3]\n", "c.toml:5: field 'train.report_to[1]': got 3 (int), expected a string"),
        (
            "[train]\nlayout = 'trie'\n",
            "c.toml:5: field 'train.layout': got 'trie' (str), expected one of 'auto', 'tree', 'packed', 'padded'",
        ),
        ("[train.hf]\nday = 2026-11-20\n", "c.toml:5: field 'train.hf.day': got"),
        ("train = 3\n", "c.toml:4: unknown field 'model.train'; did you mean 'train'?"),
        ("[train]\nx = \n", "c.toml:5: not valid TOML: Invalid value"),
        ("oops", "c.toml:4: not valid TOML"),
        ("[train.loss]\nbeta = -1\n", "c.toml:5: field 'train.loss.beta': got -1.0 (float), expected a number above 0"),
        ("[train.alpha]\nend = 0.1\n", "c.toml:5: field 'train.alpha.end': got 0.1 (float), but schedule 'constant'"),
        ("[train.alpha]\nschedule = 'linear'\n", "c.toml:4: field 'train.alpha.end': not set"),
    ],
)
def test_file_errors_name_line_field_and_value(complaint: Callable[..., str], text: str, said: str) -> None:
    """Mutation: line numbers from 0, looking up only the full dotted key, or letting tomllib's own error through."""
    assert complaint(BASE + text).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.loss.beta", "x"], "command line: field 'train.loss.beta': got 'x', expected a number"),
        (["--train.loss.beta", "nan"], "command line: field 'train.loss.beta': got 'nan', expected a number"),
        (["--train.max_length", "1.5"], "command line: field 'train.max_length': got '1.5', expected an integer"),
        (
            ["--train.lora.enabled", "yes"],
            "command line: field 'train.lora.enabled': got 'yes', expected true or false",
        ),
        (["--beta", "1"], "command line: unknown flag '--beta'; did you mean '--train.loss.beta'?"),
        (["--train.los.beta", "1"], "command line: unknown flag '--train.los.beta'; did you mean '--train.loss.beta'?"),
        (["--zzzzz", "1"], "command line: unknown flag '--zzzzz'; --help lists the flags"),
        (["--train.loss", "1"], "command line: '--train.loss' is a section"),
        (
            ["--train.loss.beta.x", "1"],
            "command line: unknown flag '--train.loss.beta.x'; 'train.loss.beta' has no fields",
        ),
        (["--train.loss.beta"], "command line: --train.loss.beta needs a value, expected a number"),
        (["beta", "1"], "command line: got 'beta', expected --section.field value"),
        (
            ["--train.loss.beta", "0"],
            "command line: field 'train.loss.beta': got 0.0 (float), expected a number above 0",
        ),
        (
            ["--train.hf.learning_rate", "1"],
            "command line: field 'train.hf.learning_rate': is a setting of bvpo itself",
        ),
    ],
)
def test_flag_errors_name_the_flag(complaint: Callable[..., str], flags: list[str], said: str) -> None:
    """Mutation: taking the address of the file for a value that a flag set."""
    assert complaint(BASE + "[train.loss]\nbeta = 0.3\n", *flags).startswith(said)


def test_required_fields_may_come_from_either_layer(load: Load, complaint: Callable[..., str]) -> None:
    """Mutation: judging required fields per layer; or naming the section instead of the missing field."""
    assert load('name = "a"', "--model.path", "m") == MINIMAL
    assert complaint('name = "a"') == "c.toml: missing field 'model.path', expected a string"


def test_missing_or_undecodable_file(tmp_path: Path) -> None:
    """Mutation: letting OSError or UnicodeDecodeError through."""
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "no.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_key_lines_skips_multiline_text() -> None:
    """Mutation: reading keys inside a triple-quoted string."""
    text = 'a = """\nb = 1\n"""\n["q d".x] # note\nb.c = 2\n'
    assert key_lines(text) == {"a": 1, "q d.x": 4, "q d.x.b": 5, "q d.x.b.c": 5}


# TOML holds no null, no lone surrogates and no integers above 64 bits that others can read
writable_text = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: text != UNSET)
free_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | writable_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(writable_text, inner, max_size=3),
    max_leaves=6,
)


@given(values_of(ExperimentConfig, free_values, writable_text))
def test_dump_reproduces_the_config(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig) -> None:
    """Mutation: leaving out None values (save_total_limit's default is 2), or not escaping \\x7f in strings."""
    path = tmp_path_factory.mktemp("dump") / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8", newline="\n")
    assert build(ExperimentConfig, [read_toml(ExperimentConfig, path)]) == config


def test_dump_refuses_what_toml_cannot_hold() -> None:
    """Mutation: writing `None` inside a free table as the text 'none', which reads back as text."""
    with pytest.raises(FieldError, match=r"train\.hf\.x"):
        dump_toml(replace(MINIMAL, train=TrainConfig(hf={"x": None})))
    with pytest.raises(FieldError, match="UTF-8"):
        dump_toml(replace(MINIMAL, name="\ud800"))


def test_no_default_is_the_unset_word() -> None:
    """Mutation: an optional text field whose default is 'none': it would read back as not set."""
    for section in all_sections():
        for f in fields(section):
            assert f.default != UNSET or not is_optional(field_types(section)[f.name]), f"{section.__name__}.{f.name}"


def test_defaults_are_valid() -> None:
    """Mutation: a range that excludes its own default."""
    validate(MINIMAL)
    for section in (DataConfig, TrainConfig, LossConfig, AlphaConfig, AnchorConfig, LoraSettings):
        validate(section())


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (LossConfig(beta=0.0), "beta"),
        (LossConfig(label_smoothing=0.5), "label_smoothing"),
        (LossConfig(gamma=-0.1), "gamma"),
        (LossConfig(length_weight=-1.0), "length_weight"),
        (AlphaConfig(value=1.01), "value"),
        (AlphaConfig(schedule="cosine", end=-0.01), "end"),
        (AnchorConfig(kind="nll"), "weight"),
        (AnchorConfig(weight=0.1), "weight"),
        (LoraSettings(rank=0), "rank"),
        (LoraSettings(dropout=1.0), "dropout"),
        (LoraSettings(target_modules=()), "target_modules"),
        (DataConfig(eval_fraction=1.0), "eval_fraction"),
        (DataConfig(limit=0), "limit"),
        (DataConfig(quads="a", trace="b"), "quads"),
        (DataConfig(eval_quads="a", eval_fraction=0.1), "eval_fraction"),
        (TrainConfig(quads_per_step=0), "quads_per_step"),
        (TrainConfig(max_steps=0), "max_steps"),
        (TrainConfig(learning_rate=0.0), "learning_rate"),
        (TrainConfig(warmup_ratio=1.1), "warmup_ratio"),
        (TrainConfig(adam_beta2=1.0), "adam_beta2"),
        (TrainConfig(tokens_per_micro_batch=0), "tokens_per_micro_batch"),
        (TrainConfig(reference="adapter"), "reference"),
        (TrainConfig(hf={"learning_rate": 1}), "hf.learning_rate"),
        (TrainConfig(hf={"x": None}), "hf.x"),
        (TrainConfig(loss=LossConfig(beta=-1.0)), "loss.beta"),
        (replace(MINIMAL, name="a/b"), "name"),
        (replace(MINIMAL, seed=-1), "seed"),
        (replace(MINIMAL, model=ModelConfig(path="")), "model.path"),
        (replace(MINIMAL, train=TrainConfig(eval="steps")), "train.eval"),
    ],
)
def test_out_of_range_or_contradicting(config: Any, field: str) -> None:
    """Mutation: any bound moved past the value, or a contradiction dropped."""
    with pytest.raises(FieldError) as caught:
        validate(config)
    assert caught.value.field == field and f"'{field}'" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(beta=1e-12, label_smoothing=0.499, gamma=0.0),
        AlphaConfig(value=0.0),
        AlphaConfig(schedule="linear", value=1.0, end=0.0),
        AnchorConfig(kind="kl", weight=0.1),
        TrainConfig(max_steps=1, warmup_ratio=0.0, max_grad_norm=0.0, save_total_limit=None),
        TrainConfig(reference="adapter", lora=LoraSettings(enabled=True, rank=1)),
        replace(MINIMAL, train=TrainConfig(eval="epoch"), data=DataConfig(eval_fraction=0.1)),
    ],
)
def test_edges_of_the_ranges_are_allowed(config: Any) -> None:
    """Mutation: `>=` turned into `>` at a bound that the documentation includes."""
    validate(config)


def test_every_number_has_a_range() -> None:
    """Mutation: adding a number without saying which values make sense."""
    for section in all_sections():
        for name, tp in field_types(section).items():
            if tp in (int, float, int | None, float | None):
                assert name in marks(section, Range), f"{section.__name__}.{name} has no range"


def test_every_field_and_section_is_documented() -> None:
    """Mutation: a field without the string below it: --help and the table would show an empty line."""
    for section in all_sections():
        assert section.__doc__ and not section.__doc__.startswith(f"{section.__name__}("), section.__name__
        docs = field_docs(section)
        for name, tp in field_types(section).items():
            assert is_dataclass(tp) or docs.get(name), f"{section.__name__}.{name} is not documented"


def test_settings_cover_every_leaf_once() -> None:
    """Mutation: `settings` skipping the sections of sections."""
    listed = [s.field for s in settings(ExperimentConfig)]
    assert len(listed) == len(set(listed))
    assert {"name", "train.loss.beta", "train.lora.rank", "train.hf"} <= set(listed)
    for setting in settings(ExperimentConfig):
        if setting.default is not None and setting.type != "table":
            text = setting.default.strip('"')
            parse_flags(ExperimentConfig, [f"--{setting.field}={text.strip('[]').replace(chr(34), '')}"])


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
)
def test_configs_on_pages_load(load: Load, page: str) -> None:
    """Mutation: renaming a setting that a page still shows."""
    blocks = re.findall(r"^```toml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for block in blocks:
        table = tomllib.loads(block)
        flags = [] if "name" in table else ["--name", "page"]
        flags += [] if "path" in table.get("model", {}) else ["--model.path", "m"]
        load(block, *flags)


def test_quad_of_the_readme_is_one() -> None:
    """Mutation: renaming a field of the records that the README shows."""
    blocks = re.findall(
        r"^```json\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    quad = from_dict(Quad, json.loads(blocks[0]))
    assert quad.trace is not None and quad.empty is not None


def test_config_classes_are_exported() -> None:
    """Mutation: a section class that `__all__` forgets."""
    assert {section.__name__ for section in all_sections()} <= set(config_module.__all__)
