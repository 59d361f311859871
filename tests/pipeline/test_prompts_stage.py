"""``bvpo prompts`` through its command line: every kind of source, every drop counted, and one line for every mistake."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bvpo.cli import main
from bvpo.config import load_config
from bvpo.experiment import begin_stage, read_manifest
from bvpo.records import Message, Prompt
from bvpo.strict import read_jsonl

LONG = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May"


class Run:
    """One experiment folder and its config; calling it runs the verb."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "experiments" / "mine"
        self.config = folder / "mine.toml"

    def __call__(self, toml: str, *flags: str) -> int:
        head = f'name = "mine"\nroot = "{self.folder}/experiments"\n[model]\npath = "{self.folder}/model"\n[prompts]\n'
        self.config.write_text(head + toml)
        return main(["prompts", str(self.config), *flags])

    @property
    def prompts(self) -> list[Prompt]:
        return list(read_jsonl(self.output / "prompts.jsonl", Prompt))

    @property
    def texts(self) -> list[str]:
        return [prompt.messages[-1].content for prompt in self.prompts]

    @property
    def dropped(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.output / "prompts.dropped.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------ sources


def write_text(path: Path, texts: list[str]) -> str:
    path.with_suffix(".txt").write_text("\n\n".join(texts) + "\n")
    return "data.txt"


def write_jsonl(path: Path, texts: list[str]) -> str:
    jsonl(path.with_suffix(".jsonl"), [{"id": n, "instruction": text, "other": n} for n, text in enumerate(texts)])
    return "data.jsonl"


def write_messages(path: Path, texts: list[str]) -> str:
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": t}]} for t in texts]
    jsonl(path.with_suffix(".jsonl"), rows)
    return "data.jsonl"


def write_json(path: Path, texts: list[str]) -> str:
    path.with_suffix(".json").write_text(json.dumps([{"prompt": text} for text in texts], indent=1))
    return "data.json"


def write_csv(path: Path, texts: list[str]) -> str:
    with open(path.with_suffix(".csv"), "w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer"], *[[text, "?"] for text in texts]])
    return "data.csv"


def write_parquet(path: Path, texts: list[str]) -> str:
    rows = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"prompt": rows}), path.with_suffix(".parquet"))
    return "data.parquet"


def write_saved(path: Path, texts: list[str]) -> str:
    from datasets import Dataset

    Dataset.from_dict({"prompt": texts}).save_to_disk(path)
    return "data"


def write_saved_splits(path: Path, texts: list[str]) -> str:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"x": ["no"]}), "mine": Dataset.from_dict({"x": texts})}).save_to_disk(path)
    return "data?split=mine&column=x"


@pytest.mark.parametrize(
    "write",
    [write_text, write_jsonl, write_messages, write_json, write_csv, write_parquet, write_saved, write_saved_splits],
)
def test_every_kind_of_source(write: Callable[[Path, list[str]], str], run: Run) -> None:
    """Mutation: a reader that skips, repeats, reorders or changes rows, or that ignores the options of a source."""
    texts = [
        "What is the capital of France?",
        "Name three primes — größer als 10.",
        'Say "hi, you"',
        "Why is the sky blue?",
    ]
    source = write(run.folder / "data", texts)
    assert run(f'sources = ["{source}"]') == 0
    assert run.texts == texts
    assert len({prompt.id for prompt in run.prompts}) == 4
    assert run.dropped == []


def test_the_records_hold_what_the_source_says(run: Run) -> None:
    """Mutation: ids, roles or provenance lost on the way."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": " a "}]
    jsonl(run.folder / "a.jsonl", [{"messages": turns, "n": 7}])
    assert run('sources = ["a.jsonl"]\nid_column = "n"\nnear_duplicates = "none"') == 0
    messages = (Message(role="system", content="s"), Message(role="user", content=" a "))
    assert run.prompts == [Prompt(id="7", messages=messages, split="train", meta={"source": "a.jsonl:1"})]


def test_several_sources_with_their_own_options(run: Run) -> None:
    """Mutation: options of one source used for another, or a file whose name holds a question mark not found."""
    jsonl(run.folder / "a.jsonl", [{"q": "first one", "prompt": "wrong"}])
    jsonl(run.folder / "what?.jsonl", [{"prompt": "second one"}])
    assert run('sources = ["a.jsonl?column=q", "what?.jsonl"]') == 0
    assert run.texts == ["first one", "second one"]


# ------------------------------------------------------------------------------------------------ drops


def test_every_drop_is_counted_with_its_reason(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation: a drop that is not written, a reason not counted, or a check that runs before an earlier one."""
    rows: list[Any] = [
        {"messages": "How do magnets work, and why do they stick to the fridge?"},
        {"messages": "how do magnets work,  and why do they stick to the fridge?"},
        {"messages": "How do magnets work, and why do they stick to the fridge door?"},
        {"messages": None},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": "x" * 500},
        {"messages": f"Tell me: {LONG}. How many?"},
        {"messages": "Is this kept?"},
    ]
    jsonl(run.folder / "a.jsonl", rows)
    jsonl(run.folder / "bench.jsonl", [{"Question": "short"}, {"Question": LONG}])
    with caplog.at_level(logging.INFO, logger="bvpo"):
        logging.getLogger("bvpo").propagate = True
        assert run('sources = ["a.jsonl"]\nmax_chars = 400\ndecontaminate = ["bench.*"]') == 0
    assert run.texts == [rows[0]["messages"], "Is this kept?"]
    assert [(drop["reason"], drop["source"]) for drop in run.dropped] == [
        ("empty", "a.jsonl:4"),
        ("malformed", "a.jsonl:5"),
        ("wrong_roles", "a.jsonl:6"),
        ("last_turn_not_user", "a.jsonl:7"),
        ("too_long_chars", "a.jsonl:8"),
        ("exact_duplicate", "a.jsonl:2"),
        ("near_duplicate", "a.jsonl:3"),
        ("contaminated", "a.jsonl:9"),
    ]
    assert run.dropped[-1]["detail"].startswith("bench.jsonl:2: natalia sold clips")
    assert run.dropped[5]["detail"] == f"of {run.prompts[0].id}"
    entry = read_manifest(run.output).stage("prompts")
    assert entry is not None and entry.finished is not None
    assert entry.counts["read"] == 10
    assert entry.counts["kept"] == 2
    assert sum(entry.counts["dropped"].values()) == 8
    assert set(entry.fingerprints["data"]) == {"a.jsonl"}
    assert "10 read, 2 kept" in caplog.text
    assert "1 of them contain an item of bench.jsonl" in caplog.text


def test_the_last_assistant_turn_can_be_stripped(run: Run) -> None:
    """Mutation: stripping a turn that is not the assistant's."""
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    jsonl(run.folder / "a.jsonl", [{"messages": turns}, {"messages": "only a question"}])
    assert run('sources = ["a.jsonl"]\nlast_assistant = "strip"') == 0
    assert run.texts == ["ask", "only a question"]


def test_length_in_tokens_of_the_model(run: Run) -> None:
    """Mutation: counting characters, special tokens, or another tokenizer's tokens."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(run.folder / "model")
    jsonl(run.folder / "a.jsonl", [{"text": "a b c d"}, {"text": "one two three four five"}])
    assert run('sources = ["a.jsonl"]\nmax_tokens = 4') == 0
    assert run.texts == ["a b c d"]
    assert run.dropped[0]["detail"] == "5 tokens"


def test_benchmark_fields_can_be_named(run: Run) -> None:
    """Mutation: texts found in the usual fields although others are named, or lists of turns left out."""
    jsonl(run.folder / "a.jsonl", [{"text": LONG}, {"text": "nothing to see here"}])
    bench = [{"question": LONG, "hidden": "unrelated"}]
    jsonl(run.folder / "b.jsonl", bench)
    assert run('sources = ["a.jsonl"]\ndecontaminate = ["b.jsonl"]\ndecontaminate_fields = ["hidden"]') == 0
    assert len(run.texts) == 2
    jsonl(run.folder / "b.jsonl", [{"turns": ["unrelated", LONG]}])
    assert run('sources = ["a.jsonl"]\ndecontaminate = ["b.jsonl"]') == 0
    assert run.texts == ["nothing to see here"]


# ------------------------------------------------------------------------------------------------ running again


def questions(start: int, stop: int) -> list[dict[str, str]]:
    return [{"text": f"Question {n}: {' '.join(f'w{n * k % 97}' for k in range(3, 15))}"} for n in range(start, stop)]


def test_the_same_input_gives_the_same_bytes(run: Run) -> None:
    """Mutation: an order or an id that depends on hashing or time."""
    jsonl(run.folder / "a.jsonl", questions(0, 200))
    outputs = []
    for _ in range(2):
        assert run('sources = ["a.jsonl"]\nvalidation_fraction = 0.1\ntest_fraction = 0.2') == 0
        outputs.append((run.output / "prompts.jsonl").read_bytes())
    assert outputs[0] == outputs[1]
    assert load_config(run.output / "config.toml") == load_config(run.config)


def test_added_prompts_move_no_split(run: Run) -> None:
    """Mutation: splits by position or by share of the whole."""
    toml = 'sources = ["a.jsonl"]\nvalidation_fraction = 0.1\ntest_fraction = 0.2'
    jsonl(run.folder / "a.jsonl", questions(50, 150))
    assert run(toml) == 0
    before = {prompt.id: prompt.split for prompt in run.prompts}
    assert len(set(before.values())) == 3
    jsonl(run.folder / "a.jsonl", questions(0, 300))
    assert run(toml) == 0
    after = {prompt.id: prompt.split for prompt in run.prompts}
    assert len(after) > 250
    assert {id: after[id] for id in before} == before


def test_limit_and_dry_run(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation: a dry run that writes, or a limit that is not the beginning of the whole."""
    jsonl(run.folder / "a.jsonl", questions(0, 50))
    toml = 'sources = ["a.jsonl"]'
    with caplog.at_level(logging.INFO, logger="bvpo"):
        assert run(toml, "--dry-run", "--limit", "7") == 0
    assert "would get 7 prompts; nothing was written" in caplog.text
    assert not run.output.exists()
    assert run(toml, "--limit", "7") == 0
    first = run.prompts
    assert len(first) == 7
    assert run(toml) == 0
    assert run.prompts[:7] == first
    assert len(run.prompts) == 50


def test_changed_settings_are_refused_once_something_was_sampled(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: replacing prompts under existing samples, or refusing although nothing was sampled yet."""
    jsonl(run.folder / "a.jsonl", questions(0, 20))
    assert run('sources = ["a.jsonl"]') == 0
    assert run('sources = ["a.jsonl"]\nngram_words = 12') == 0
    (run.output / "samples").mkdir()
    (run.output / "samples" / "x.jsonl").touch()
    assert run('sources = ["a.jsonl"]\nngram_words = 12') == 0
    before = (run.output / "prompts.jsonl").read_bytes()
    jsonl(run.folder / "a.jsonl", questions(0, 10))
    capsys.readouterr()
    assert run('sources = ["a.jsonl"]\nngram_words = 11') == 2
    error = capsys.readouterr().err
    assert "prompts was started here with other settings: prompts.ngram_words: 12 -> 11; data.a.jsonl: " in error
    assert (run.output / "prompts.jsonl").read_bytes() == before


def test_stages_share_the_manifest(run: Run) -> None:
    """Mutation: one stage's entry overwriting another's."""
    jsonl(run.folder / "a.jsonl", questions(0, 5))
    begin_stage(run.output, "train", config={"x": 1})
    assert run('sources = ["a.jsonl"]') == 0
    assert sorted(read_manifest(run.output).stages) == ["prompts", "train"]


# ------------------------------------------------------------------------------------------------ mistakes


def bad_utf8(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')


def content(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "a.jsonl").write_text(text)


MISTAKES: list[tuple[Callable[[Path], Any], str, str]] = [
    (content(""), "", "prompts.sources: nothing to read; name files, folders or Hub data sets"),
    (content(""), 'sources = ["b.jsonl"]', "b.jsonl: no such file or folder"),
    (content(""), 'sources = ["a.jsonl"]', "prompts: none of the 0 prompts is left"),
    (content('{"text": "a"}\n{"text"\n'), 'sources = ["a.jsonl"]', "a.jsonl:2: not valid JSON"),
    (content('{"text": "a"}\n[]\n'), 'sources = ["a.jsonl"]', "a.jsonl:2: got [] (list), expected an object"),
    (
        content('{"text": 5}'),
        'sources = ["a.jsonl"]',
        "a.jsonl:1: field 'text': got 5 (int), expected a string or a list",
    ),
    (
        content('{"text": "a"}\n{"txt": "a"}'),
        'sources = ["a.jsonl"]',
        "a.jsonl:2: missing field 'text'; did you mean 'txt'?",
    ),
    (content('{"body": "a"}'), 'sources = ["a.jsonl"]', "a.jsonl:1: found no prompt column among 'body'; name it with"),
    (
        content('{"text": "a"}'),
        'sources = ["a.jsonl?colum=x"]',
        "'a.jsonl?colum=x': option 'colum'; did you mean 'column'?",
    ),
    (content('{"text": "a"}'), 'sources = ["a.jsonl?id=n"]', "a.jsonl:1: missing field 'n'"),
    (content('{"text": "a", "n": 1.5}'), 'sources = ["a.jsonl?id=n"]', "a.jsonl:1: field 'n': got 1.5 (float)"),
    (
        content('{"text": "one", "n": 1}\n{"text": "two", "n": 1}'),
        'sources = ["a.jsonl?id=n"]',
        "a.jsonl:2: id '1' already names another prompt (a.jsonl:1)",
    ),
    (bad_utf8, 'sources = ["a.jsonl"]', "a.jsonl:2: not UTF-8 text"),
    (
        content('{"text": "a"}'),
        'sources = ["a.jsonl"]\ndecontaminate = ["b*"]',
        "prompts.decontaminate: 'b*': no such file",
    ),
    (
        content('{"text": "a"}\n{"n": 1}'),
        'sources = ["x.txt"]\ndecontaminate = ["a.jsonl"]',
        "a.jsonl:2: no text in the fields question, problem",
    ),
    (content(""), 'sources = ["model"]', "model: not a folder of datasets.save_to_disk"),
    (content(""), 'sources = ["mine.toml"]', "mine.toml: unknown kind of file"),
    (
        content(""),
        'sources = ["some-org/some-set"]',
        "'some-org/some-set' is no file here, and as a data set of the Hub",
    ),
    (content('{"text": "a"}'), 'sources = ["a.jsonl"]\nmax_tokens = 4', "prompts.max_tokens: the tokenizer"),
    (
        content(""),
        'sources = ["a.jsonl"]\nngram_words = 1',
        "field 'prompts.ngram_words': got 1 (int), expected 2 or more",
    ),
    (content(""), 'sources = ["x.txt"]\ndecontaminate_fields = ["a"]', "set, but no benchmark files are"),
    (content(""), "validation_fraction = 0.5\ntest_fraction = 0.5", "leaves nothing to train on"),
]


@pytest.mark.parametrize(("prepare", "toml", "expected"), MISTAKES, ids=[expected[:40] for _, _, expected in MISTAKES])
def test_mistakes_are_one_line(
    prepare: Callable[[Path], Any], toml: str, expected: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: a traceback, two lines, an exit code other than 2, or no word of where; nothing is written."""
    prepare(run.folder)
    (run.folder / "model").mkdir()
    (run.folder / "x.txt").write_text("a question\n")
    assert run(toml) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bvpo: error")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not run.output.exists()


def test_parquet_that_is_none(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: the library's error shown as it is."""
    (run.folder / "a.parquet").write_text("no parquet at all")
    assert run('sources = ["a.parquet"]') == 2
    assert "bvpo: error: a.parquet: cannot be read as Parquet" in capsys.readouterr().err
