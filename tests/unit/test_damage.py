"""Damaged files end in one line: a seeded part of ``make prove-fuzz``, and each fault that it found by itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from models_fixtures import save_tiny_model

from benchmarks.mutators import damaged_toml
from bvpo.config import dump_toml, load_config
from bvpo.evaluation.metrics import Verdict
from bvpo.strict import MAX_DEPTH, UserError, from_dict, parse_json, read_text

ROOT = Path(__file__).resolve().parents[2]


def test_damaged_configs(tmp_path: Path) -> None:
    """Mutation: any guard of the TOML reader removed, or a setting that is not written back as it was read."""
    whole = (ROOT / "experiments" / "vignette.toml").read_text(encoding="utf-8")
    path, taken = tmp_path / "c.toml", 0
    for number in range(200):
        path.write_bytes(damaged_toml(random.Random(number), whole))
        try:
            config = load_config(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        path.write_text(dump_toml(config), encoding="utf-8")
        assert load_config(path) == config
        taken += 1
    assert 0 < taken < 200


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "9" * 5000, "0x" + "f" * 6000, "[" * 101 + "]" * 101])
def test_toml_that_is_too_much(value: str, tmp_path: Path) -> None:
    """Mutation: RecursionError, or int()'s ValueError at reading or at writing, let through."""
    path = tmp_path / "c.toml"
    path.write_text(f"name = {value}\n")
    with pytest.raises(UserError, match=r"\A[^\n]*c\.toml: [^\n]*\Z"):
        load_config(path)


def test_shards_that_are_none(tmp_path: Path) -> None:
    """Mutation: a range that only fails when it is looked at."""
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\n[model]\npath = "m"\n[sample]\nshard = "1979"\n')
    with pytest.raises(UserError, match=r"sample\.shard"):
        load_config(path)


def test_json_that_is_too_much() -> None:
    """Mutation: the digits of an integer, or the depth that writing cannot follow, not limited."""
    with pytest.raises(UserError, match="f: an integer of more than 4300 digits"):
        parse_json("9" * 5000, "f")
    with pytest.raises(UserError, match="f: nested too deeply"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "f")
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_text_of_another_encoding(tmp_path: Path) -> None:
    """Mutation: a UnicodeDecodeError let through."""
    (tmp_path / "t").write_bytes(b"\xff\xfea")
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(tmp_path / "t")


def test_verdicts_are_numbers() -> None:
    """Mutation: ``dict[str, Any]`` for the values, which float() meets later."""
    row = {"prompt_id": "p", "mode": "thinking", "index": 0, "values": {"m": "high"}, "tokens": 1, "trace_tokens": 1}
    with pytest.raises(UserError, match=r"values\.m"):
        from_dict(Verdict, {**row, "closed": True})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!"),
        ("config.json", b"[1]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer_config.json", b'{"model_max_length": []}'),
    ],
)
def test_broken_models(name: str, content: bytes, tmp_path: Path) -> None:
    """Mutation: only OSError and ValueError taken for the fault of the files."""
    from bvpo.models import ModelSource, load_model, plan_model

    folder = save_tiny_model(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"\A[^\n]*model[^\n]*\Z"):
        load_model(plan_model(ModelSource(path=str(folder), device="cpu")))
