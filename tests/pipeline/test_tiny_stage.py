"""``bvpo tiny`` as a user runs it, with so few steps that it takes seconds: files, determinism, sampling, messages."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bvpo import cli
from bvpo.config import load_config
from bvpo.engines.base import Request, Sampling, create_engine
from bvpo.formats import end_ids, resolve_format, view_prompt
from bvpo.records import VIEWS, Message
from bvpo.tiny.reward import grade

CONFIG = """
name = "a"

[model]
path = "{folder}/base"

[tiny]
steps = 4
batch_size = 4
hidden = 16
heads = 2
mlp = 24
num_prompts = 8
num_tuning = 4
num_benchmark = 6
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config, the base and the cache it came through."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "c.toml").write_text(CONFIG.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BVPO_CACHE", str(folder / "cache"))
        assert cli.main(["tiny", str(folder / "c.toml")]) == 0
    return folder


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("BVPO_CACHE", str(made / "cache"))
    monkeypatch.setattr(logging.getLogger("bvpo"), "propagate", True)

    def call(*words: str) -> tuple[int, str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="bvpo"):
            code = cli.main(["tiny", str(made / "c.toml"), *words])
        return code, caplog.text

    return call


def test_files(made: Path) -> None:
    """Mutation: weights that are not safetensors, rows that `bvpo prompts` cannot read, a clock or path in tiny.json."""
    base = made / "base"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "prompts.jsonl"}
    assert names | {"tuning.jsonl", "benchmark.jsonl", "tiny.json"} <= {file.name for file in base.iterdir()}
    rows = {
        name: [json.loads(line) for line in (base / f"{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "tuning", "benchmark")
    }
    assert [len(rows[name]) for name in rows] == [8, 4, 6]
    assert all(set(row) == {"id", "messages"} for row in (*rows["prompts"], *rows["tuning"]))
    for row in rows["benchmark"]:
        assert grade(row["messages"], row["reference"], row) == 1.0
    said = json.loads((base / "tiny.json").read_text())
    for kind in ("prompts", "benchmark"):
        for mode in ("thinking", "nothinking"):
            accuracy = said["measured"][kind][mode]["accuracy"]
            assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1 and accuracy["n"] > 0
    assert str(made) not in json.dumps(said) and said["settings"]["steps"] == 4


def test_it_is_a_real_qwen2(made: Path) -> None:
    """Mutation: a model that only our own code can load, or one without the tied head that its size is counted with."""
    model = AutoModelForCausalLM.from_pretrained(made / "base", use_safetensors=True)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.tie_word_embeddings
    said = json.loads((made / "base" / "tiny.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == said["parameters"]


def test_it_samples_through_the_engine(made: Path) -> None:
    """Mutation: a tokenizer or end token with which sampling does not work in one of the views."""
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    fmt = resolve_format(tokenizer, "auto")
    sampling = Sampling(max_new_tokens=12, stop_token_ids=tuple(end_ids(tokenizer, fmt)))
    row = json.loads((made / "base" / "prompts.jsonl").read_text().splitlines()[0])
    messages = [Message(**message) for message in row["messages"]]
    requests = [
        Request(key=view, prompt_ids=view_prompt(tokenizer, fmt, messages, view).prompt_ids, seed=1, params=sampling)
        for view in VIEWS
    ]
    engine = create_engine("embedded", {"model": str(made / "base")})
    found = {generation.key: generation for generation in engine.generate(requests)}
    engine.close()
    assert set(found) == set(VIEWS) and all(g.error is None and g.token_ids for g in found.values())


def test_the_same_again_is_the_same(made: Path, run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mutation: a seed that is not passed on (weights, corpus, prompts), or a clock in a file."""
    monkeypatch.setenv("BVPO_CACHE", str(tmp_path / "elsewhere"))
    code, _ = run("--model.path", str(tmp_path / "again"))
    assert code == 0
    for file in (made / "base").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    code, _ = run("--model.path", str(tmp_path / "other"), "--tiny.seed", "5")
    assert code == 0
    for name in ("model.safetensors", "prompts.jsonl", "benchmark.jsonl"):
        assert (tmp_path / "other" / name).read_bytes() != (made / "base" / name).read_bytes()


def test_here_then_cache(made: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: training a base that is in place or in the cache."""
    monkeypatch.setattr("bvpo.tiny.sft.train", lambda *args: pytest.fail("trained"))
    code, said = run()
    assert code == 0 and "was here already" in said
    code, said = run("--model.path", str(tmp_path / "copy"))
    assert code == 0 and "copied from the cache" in said


def test_dry_run_says_the_cost(run, tmp_path: Path) -> None:
    """Mutation: a dry run that writes, or one that counts another model than the one that is made."""
    code, said = run("--model.path", str(tmp_path / "new"), "--dry-run")
    assert code == 0 and not (tmp_path / "new").exists()
    assert "parameters" in said and "4 steps, about" in said and "nothing was made" in said


def test_thirty_million_parameters(run, tmp_path: Path) -> None:
    """Mutation: a documented configuration that no longer parses, or is of another size."""
    path = Path(__file__).parents[2] / "docs" / "examples" / "tiny-30m.toml"
    assert load_config(path).tiny.device == "cuda"
    words = ["tiny", str(path), "--model.path", str(tmp_path / "new"), "--dry-run"]
    from bvpo.tiny.base import estimate

    assert 28e6 < estimate(load_config(path).tiny).parameters < 32e6
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tiny.modulus", "5"), "holds a base with other settings: tiny.modulus: 7 -> 5"),
        (("--tiny.modulus", "1"), "field 'tiny.modulus': got 1"),
        (
            ("--model.format", "qwen3", "--model.path", "NEW"),
            "model.format: got 'qwen3', expected 'auto' or 'r1-distill'",
        ),
        (("--tiny.device", "cuda:77", "--model.path", "NEW"), "tiny.device: got 'cuda:77', which this machine has not"),
        (
            ("--tiny.device", "toaster", "--model.path", "NEW"),
            "tiny.device: got 'toaster', expected cpu, cuda or cuda:N",
        ),
        (("--tiny.num_prompts", "10000000", "--model.path", "NEW"), "expected at most"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path: Path, capsys: pytest.CaptureFixture[str], words, said: str) -> None:
    """Mutation: a traceback, exit code 1, or training before the check."""
    code, _ = run(*(str(tmp_path / "new") if word == "NEW" else word for word in words))
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and err.startswith("bvpo: error:") and said in err
    assert not (tmp_path / "new").exists()


def test_limit_is_a_first_try(run, tmp_path: Path) -> None:
    """Mutation: --limit ignored, or a first try that stands in the way of the real one."""
    where = ("--model.path", str(tmp_path / "base"))
    assert run(*where, "--limit", "1")[0] == 0
    assert json.loads((tmp_path / "base" / "tiny.json").read_text())["settings"]["steps"] == 1
    assert run(*where)[0] == 0
    assert json.loads((tmp_path / "base" / "tiny.json").read_text())["settings"]["steps"] == 4
