"""Training data: every documented form loads, joins are exact and counted, and mistakes are told with their place."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from bvpo.config import DataConfig
from bvpo.data.preferences import ID_DIGITS, parse_preference, prompt_key
from bvpo.records import Message, Pair, Quad, Response
from bvpo.strict import UserError, to_dict, write_jsonl
from bvpo.training.data import QuadSource, load_quads, quads_from, split_quads, token_dataset
from bvpo.training.tokenizing import DROP_REASONS, TokenSettings, prepare_tokens, tokenize_quad
from bvpo.training.tokens import TokenQuad
from tests.formats_fixtures import format_of, tokenizer_of

DOCS = Path(__file__).parent.parent.parent / "docs"
EXAMPLES = DOCS / "examples"
FMT = format_of("r1-distill")
TOKENIZER = tokenizer_of("r1-distill")


@pytest.fixture(autouse=True)
def local_cache(tmp_path_factory, monkeypatch):
    """Arrow copies of local files go to a temporary folder, and progress bars stay quiet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf-cache")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def row(prompt: str = "p", tag: str = "") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"a{tag}</think>yes{tag}", "rejected": f"b{tag}</think>no{tag}"}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def quad(name: str, text: str | None = None) -> Quad:
    pair = Pair(view="empty", chosen=Response(answer="yes"), rejected=Response(answer="no"))
    return Quad(id=name, messages=(Message(role="user", content=text or name),), empty=pair)


# ---- the documentation -----------------------------------------------------------------------------------------------


def table(heading: str) -> dict[str, list[str]]:
    """First column (without backticks) -> the other columns of the first table after ``heading``."""
    lines = (DOCS / "data.md").read_text(encoding="utf-8").split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {cells[0].strip("`"): cells[1:] for cells in rows}


@pytest.mark.parametrize("record", [Quad, Message, Pair, Response])
def test_every_column_is_documented(record):
    """Guards: a field of a record that docs/data.md does not have, or one there that the code dropped."""
    assert set(table(f"**{record.__name__}**")) == {f.name for f in fields(record)}


def test_every_drop_reason_is_documented():
    """Guards: a reason in code that docs/data.md does not have, and the other way round."""
    assert {reason: cells[0] for reason, cells in table("## What is dropped").items()} == DROP_REASONS


def test_the_example_quads_load_and_become_tokens():
    """Guards: an example in the documentation that does not work."""
    source = load_quads(DataConfig(quads=str(EXAMPLES / "quads.jsonl")), FMT).train
    text, sampled, single = list(source)
    assert [q.id for q in (text, sampled, single)] == ["sky", "prime", "haiku"]
    assert text.empty is not None and text.empty.rejected.finished is False
    assert sampled.trace is not None and sampled.trace.chosen.token_ids
    assert single.empty is None
    settings = TokenSettings(max_length=400, vocab_size=len(TOKENIZER))
    for example in (text, sampled, single):
        tokens = tokenize_quad(example, TOKENIZER, FMT, settings)
        assert isinstance(tokens, TokenQuad) and tokens.has_view == (True, example.empty is not None)
    # the sampled example says what its ids spell
    assert TOKENIZER.decode(sampled.trace.chosen.token_ids[:-1]) == "\nso\n</think>\n\nYes."


def test_the_example_preference_sets_join():
    """Guards: an example in the documentation that does not work; a form of a TRL row that is read wrongly."""
    config = DataConfig(trace=str(EXAMPLES / "trace.jsonl"), empty=str(EXAMPLES / "empty.jsonl"))
    source = load_quads(config, FMT).train
    quads = {q.messages[-1].content: q for q in source}
    assert source.counts == {
        "trace_rows": 3, "empty_rows": 3, "joined": 2, "trace_only": 1, "empty_only": 1, "repeated_prompts": 0
    }  # fmt: skip
    sky, prime, haiku, gas = (quads[t] for t in quads)
    assert sky.trace.chosen == Response(
        trace="\nAir scatters short waves more.\n", answer="\n\nAir scatters blue light the most."
    )
    assert sky.empty.rejected == Response(answer="\n\nIt just is.")
    assert prime.trace.rejected == Response(trace="\nOdd numbers are not prime.\n", answer="\n\nNo.")
    assert prime.empty.chosen == Response(answer="\n\nYes.")
    assert haiku.empty is None and haiku.trace.chosen.answer == "\n\nA poem of three short lines."
    assert gas.trace is None and gas.messages == (Message(role="user", content="Name a noble gas."),)
    for q in quads.values():
        assert isinstance(tokenize_quad(q, TOKENIZER, FMT, TokenSettings(max_length=400)), TokenQuad)


def test_the_python_example_runs():
    """Guards: an example in the documentation that does not work."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "data.md").read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    assert [q.id for q in quads_from(names["quads"], FMT)] == ["sky"]
    (joined,) = quads_from(names["both"], FMT)
    assert joined.trace.chosen == Response(trace="\nYes.\n", answer="\n\nYes.") and joined.empty is None


# ---- joining ---------------------------------------------------------------------------------------------------------


def test_rows_of_one_prompt_meet_in_order(tmp_path):
    """Guards: pairing the last row instead of the first, losing surplus rows, equal ids for two quads."""
    trace = jsonl(tmp_path / "t.jsonl", [row("p", "1"), row("q", "2"), row("p", "3"), row("p", "4")])
    empty = jsonl(tmp_path / "e.jsonl", [{**row("r"), "chosen": "x", "rejected": "y"}] + [
        {"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}"} for i in (1, 2)
    ])  # fmt: skip
    source = load_quads(DataConfig(trace=trace, empty=empty), FMT).train
    seen = [(q.trace and q.trace.chosen.trace, q.empty and q.empty.chosen.answer) for q in source]
    assert seen == [("a1", "c1"), ("a2", None), ("a3", "c2"), ("a4", None), (None, "x")]
    assert source.counts == {
        "trace_rows": 4, "empty_rows": 3, "joined": 2, "trace_only": 2, "empty_only": 1, "repeated_prompts": 3
    }  # fmt: skip
    key = prompt_key((Message(role="user", content="p"),))[:ID_DIGITS]
    ids = [q.id for q in source]
    assert [ids[0], ids[2], ids[3]] == [key, f"{key}-2", f"{key}-3"] and len(set(ids)) == 5


def test_prompts_match_across_spellings_and_forms(tmp_path):
    """Guards: comparing raw strings; and matching what differs in role or inner text."""
    decomposed, composed = "Cafe\u0301?\r\nNow", "  Caf\u00e9?\nNow\n"
    assert prompt_key((Message(role="user", content=decomposed),)) == prompt_key(
        (Message(role="user", content=composed),)
    )
    source = quads_from({"trace": [row(decomposed)], "empty": [{**row(), "prompt": [user(composed)]}]}, FMT)
    assert source.counts["joined"] == 1
    base = (Message(role="user", content="a b"),)
    others = [(Message(role="user", content="a  b"),), (Message(role="system", content="a b"),), base * 2]
    assert len({prompt_key(m) for m in [base, *others]}) == 4


def test_sets_without_a_common_prompt_are_called_out(caplog):
    """Guards: silently training on two disjoint sets (wrong files, other prompt texts)."""
    with caplog.at_level(logging.WARNING):
        source = quads_from({"trace": [row("p")], "empty": [row("q")]}, FMT)
    assert "no prompt is in both" in caplog.text and len(list(source)) == 2


# ---- TRL rows --------------------------------------------------------------------------------------------------------

TALK = [user("p"), said("x", thinking="old"), user("q")]
TRACE_ROWS = {
    "text with marker": (row() | {"chosen": "<think>so</think>yes"}, ("so", "yes")),
    "text without opening": (row() | {"chosen": "so</think>yes"}, ("so", "yes")),
    "whitespace is kept": (row() | {"chosen": "<think>\nso\n</think>\n\nyes "}, ("\nso\n", "\n\nyes ")),
    "reasoning_content": (row() | {"chosen": [said("yes", reasoning_content="so")]}, ("so", "yes")),
    "thinking": (row() | {"chosen": [said("yes", thinking="so", reasoning_content=None)]}, ("so", "yes")),
    "empty trace field": (row() | {"chosen": [said("yes", thinking="")]}, ("", "yes")),
    "never closed": (row() | {"chosen": "<think>so yes"}, (None, "<think>so yes")),
}


@pytest.mark.parametrize("name", TRACE_ROWS)
def test_the_trace_is_found_wherever_it_is(name):
    """Guards: a trace left in the answer, or deleted; an unclosed trace taken for an answer without one."""
    given, (trace, answer) = TRACE_ROWS[name]
    assert parse_preference(given, "trace", FMT, "w").chosen == Response(trace=trace, answer=answer)


EMPTY_ROWS = {
    "plain": ("yes", (None, "yes")),
    "empty block": ("<think></think>yes", (None, "yes")),
    "spaced block": ("<think>\n\n</think>\n\nyes", (None, "\n\nyes")),
    "lone closing marker": ("</think>\n\nyes", (None, "\n\nyes")),
    "blank field": ([said("yes", thinking=" ")], (None, "yes")),
    "a real trace": ("<think>so</think>yes", ("so", "yes")),
    "a real trace field": ([said("yes", thinking="so")], ("so", "yes")),
    "an unclosed trace": ("<think>so", ("<think>so", "<think>so")),
}


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_the_empty_view_loses_its_block_and_shows_a_real_trace(name):
    """Guards: the forced block scored twice, and a real trace hidden from the check that drops it."""
    value, (trace, answer) = EMPTY_ROWS[name]
    parsed = parse_preference(row() | {"chosen": value}, "empty", FMT, "w").chosen
    assert parsed == Response(trace=trace, answer=answer)


CONVERSATIONS = {
    "explicit": {"prompt": TALK, "chosen": [said("a</think>b")], "rejected": [said("c</think>d")]},
    "implicit": {"chosen": [*TALK, said("a</think>b")], "rejected": [*TALK, said("c</think>d")]},
    "implicit, prompt repeated": {
        "prompt": "q",
        "chosen": [*TALK, said("a</think>b")],
        "rejected": [*TALK, said("c</think>d")],
    },
    "text responses": {"prompt": TALK, "chosen": "a</think>b", "rejected": "c</think>d"},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversational_forms_mean_the_same(name):
    """Guards: the shared messages cut one too early or too late."""
    parsed = parse_preference(CONVERSATIONS[name], "trace", FMT, "w")
    assert [(m.role, m.content) for m in parsed.messages] == [("user", "p"), ("assistant", "x"), ("user", "q")]
    assert parsed.chosen == Response(trace="a", answer="b") and parsed.rejected == Response(trace="c", answer="d")


def test_equal_responses_keep_one_message_each():
    """Guards: the whole conversation taken for the prompt when chosen and rejected are equal."""
    parsed = parse_preference({"chosen": [user("p"), said("x")], "rejected": [user("p"), said("x")]}, "empty", FMT, "w")
    assert parsed.chosen == parsed.rejected == Response(answer="x") and len(parsed.messages) == 1


BAD_ROWS = [
    ({"prompt": "p", "chosen": "x"}, r"'rejected': got null.*columns here: prompt, chosen"),
    (row() | {"chosen": 7}, r"'chosen': got 7 \(int\)"),
    ({"chosen": "x", "rejected": "y"}, r"'prompt': got null"),
    (row() | {"prompt": "User: p\nAssistant: <think>\n"}, r"without chat template and '<think>'"),
    (row() | {"prompt": []}, r"'prompt': got \[\]"),
    (row() | {"prompt": [said("x")]}, r"ends with a user turn"),
    (row() | {"prompt": [{"role": "user"}]}, r"'prompt\[0\].content': got null"),
    (row() | {"prompt": ["p"]}, r"'prompt\[0\]'"),
    (row() | {"chosen": [said("x"), said("y")]}, r"2 messages after the prompt"),
    (row() | {"chosen": [user("x")]}, r"'chosen\[0\].role': got 'user'"),
    (row() | {"chosen": [said("x", thinking=1)]}, r"'chosen\[0\].thinking': got 1"),
    (row() | {"chosen": [said("x", thinking="a", reasoning_content="b")]}, r"same text as 'reasoning_content'"),
    (row() | {"chosen": [said("x", tool_calls=[{"id": 1}])]}, r"tool calls are not supported"),
    ({"chosen": [user("p"), said("x")], "rejected": [user("q"), said("x")]}, r"start with the same messages"),
    (
        {"prompt": "other", "chosen": [user("p"), said("x")], "rejected": [user("p"), said("y")]},
        r"'prompt': got 'other'",
    ),
]


@pytest.mark.parametrize(("bad", "words"), BAD_ROWS)
def test_rows_that_cannot_be_understood_are_refused_with_their_line(tmp_path, bad, words):
    """Guards: guessing what a malformed row means, or naming the wrong line (blank lines count)."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        load_quads(DataConfig(trace=str(path)), FMT)
    assert str(error.value).startswith(f"{path}:3: field '")


# ---- where data lies -------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    """Guards: a reader that loses rows, fields or text on the way."""
    rows = [row("p", "1"), row("q", "é\u2028")]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "folder")
    DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "array.json").write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8")
    jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "bom.jsonl").write_bytes(
        b"\xef\xbb\xbf" + Path(jsonl(tmp_path / "t.jsonl", rows)).read_bytes().rstrip()
    )
    names = ("t.parquet", "folder", "splits", "array.json", "lines.json", "bom.jsonl", "t.jsonl")
    read = {name: list(load_quads(DataConfig(trace=str(tmp_path / name)), FMT).train) for name in names}
    assert all(quads == read["t.jsonl"] and len(quads) == 2 for quads in read.values())
    (test,) = load_quads(DataConfig(trace=str(tmp_path / "splits"), trace_split="test"), FMT).train
    assert test == read["t.jsonl"][1]


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("absent.jsonl", "train", "data.trace: no such file: .*absent.jsonl"),
        ("t.txt", "train", "data.trace: got .*t.txt', expected a .json"),
        ("t.jsonl", "test", "data.trace_split: got 'test', expected 'train'"),
        ("splits", "dev", "data.trace_split: got 'dev', expected one of 'train'"),
        ("broken.parquet", "train", "cannot load"),
    ],
)
def test_places_without_data_are_named(tmp_path, name, split, words):
    """Guards: a traceback of another library for a wrong path, and a mistyped path looked up on the Hub."""
    jsonl(tmp_path / "t.jsonl", [row()])
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    DatasetDict({"train": Dataset.from_list([row()])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=words):
        load_quads(DataConfig(trace=str(tmp_path / name), trace_split=split), FMT)


def test_a_name_without_a_file_is_looked_up_on_the_hub(monkeypatch):
    """Guards: the split not passed on, and a failure of the Hub shown as a traceback."""
    asked = []

    def load(name, **options):
        asked.append((name, options))
        if name == "someone/gone":
            raise FileNotFoundError("Dataset 'someone/gone' doesn't exist on the Hub\nlong story")
        return Dataset.from_list([row()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(load_quads(DataConfig(trace="someone/set", trace_split="dev"), FMT).train)) == 1
    assert asked == [("someone/set", {"split": "dev"})]
    with pytest.raises(UserError, match=r"data.empty: cannot load 'someone/gone': .*on the Hub$"):
        load_quads(DataConfig(trace="someone/set", empty="someone/gone"), FMT)


BAD_QUADS = [
    ('{"id": "q"', r":2: not valid JSON"),
    ("[1]", r":2: got \[1\] \(list\), expected an object"),
    ('{"id": "q", "messages": [], "trace": null}', r":2: field 'messages': got an empty list"),
    ('{"id": "", "messages": [{"role": "user", "content": "x"}]}', r":2: field 'id'"),
    ('{"id": "q", "messages": [{"role": "user", "content": "x"}]}', r":2: fields 'trace' and 'empty': got neither"),
    ('{"id": "q", "messages": [{"role": "assistant", "content": "x"}]}', r":2: field 'messages\[0\].role'"),
    ('{"id": "q", "messages": [{"role": "user", "text": "x"}]}', r":2: .*'messages\[0\].text'"),
    (json.dumps(to_dict(quad("q"))).replace('"empty", ', '"trace", '), r":2: field 'empty.view': got 'trace'"),
]


@pytest.mark.parametrize(("line", "words"), BAD_QUADS)
def test_bad_quads_are_refused_with_their_line(tmp_path, line, words):
    """Guards: skipping a line that cannot be read, and the checks that types do not make."""
    path = tmp_path / "quads.jsonl"
    path.write_text(json.dumps(to_dict(quad("a"))) + "\n" + line + "\n", encoding="utf-8")
    source = load_quads(DataConfig(quads=str(path)), FMT).train
    with pytest.raises(UserError, match=words) as error:
        list(source)
    assert str(error.value).startswith(str(path))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """Guards: replacement characters trained on."""
    path = tmp_path / "quads.jsonl"
    path.write_bytes(json.dumps(to_dict(quad("a")), ensure_ascii=False).replace("yes", "\xe9").encode("latin-1"))
    with pytest.raises(UserError, match=r":1: not UTF-8"):
        list(quads_from(str(path), FMT))


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing to train on"),
        ({"quads": "a", "trace": "b"}, "data.quads: set together with data.trace"),
        (
            {"quads": "a", "eval_quads": "b", "eval_fraction": 0.1},
            "data.eval_fraction: set together with data.eval_quads",
        ),
        ({"quads": "a", "eval_fraction": 1.0}, "data.eval_fraction: got 1.0"),
        ({"quads": "a", "limit": 0}, "data.limit: got 0"),
    ],
)
def test_contradicting_settings_are_refused(changes, words):
    """Guards: one of two sources silently ignored."""
    with pytest.raises(UserError, match=words):
        load_quads(DataConfig(**changes), FMT)


def test_the_held_out_prompts_do_not_depend_on_the_rest_of_the_data(tmp_path):
    """Guards: a split by position, quads of one prompt on both sides, a seed that changes nothing."""
    quads = [quad(f"{i}-{k}", f"prompt {i}") for i in range(300) for k in range(2)]

    def held_out(items: list[Quad], seed: int = 0) -> set[str]:
        kept, held = split_quads(quads_from(items, FMT), fraction=0.3, seed=seed)
        assert {q.id for q in kept} | {q.id for q in held} == {q.id for q in items}
        assert not {q.messages for q in kept} & {q.messages for q in held}
        return {q.id for q in held}

    everything = held_out(quads)
    assert 0.2 < len(everything) / len(quads) < 0.4
    assert held_out(quads[::-1][:200]) == everything & {q.id for q in quads[-200:]}
    assert held_out(quads, seed=1) != everything
    path = tmp_path / "q.jsonl"
    write_jsonl(path, quads)
    sets = load_quads(DataConfig(quads=str(path), eval_fraction=0.3, limit=20), FMT, seed=0)
    assert sets.eval is not None
    assert [q.id for q in sets.eval] == [q.id for q in quads if q.id in everything][:20]
    assert [q.id for q in sets.train] == [q.id for q in quads if q.id not in everything][:20]


def test_a_file_of_held_out_quads(tmp_path):
    """Guards: evaluating on the training quads."""
    write_jsonl(tmp_path / "train.jsonl", [quad("a"), quad("b")])
    write_jsonl(tmp_path / "eval.jsonl", [quad("c")])
    sets = load_quads(DataConfig(quads=str(tmp_path / "train.jsonl"), eval_quads=str(tmp_path / "eval.jsonl")), FMT)
    assert [q.id for q in sets.train] == ["a", "b"] and [q.id for q in sets.eval or ()] == ["c"]


# ---- in memory -------------------------------------------------------------------------------------------------------


def test_every_form_in_memory_gives_the_same_quads(tmp_path):
    """Guards: Arrow's nulls taken for values (a missing pair, `finished`), and a stream that can be read only once."""
    quads = list(quads_from(str(EXAMPLES / "quads.jsonl"), FMT))
    dicts = [to_dict(q) for q in quads]
    write_jsonl(tmp_path / "q.jsonl", quads)
    source = quads_from(quads, FMT)
    forms: list[Any] = [tuple(quads), dicts, Dataset.from_list(dicts), tmp_path / "q.jsonl", source]
    for form in forms:
        read = quads_from(form, FMT)
        assert list(read) == list(read) == quads, type(form)
    assert quads_from(source, FMT) is source
    slim = [json.loads(line) for line in (EXAMPLES / "quads.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(quads_from(Dataset.from_list(slim), FMT)) == quads


def test_preference_sets_in_memory():
    """Guards: the keys of the mapping swapped."""
    table = Dataset.from_list([row("p")])
    for value in (table, [row("p")]):
        (only,) = quads_from({"trace": value}, FMT)
        assert only.trace is not None and only.trace.chosen == Response(trace="a", answer="yes") and only.empty is None
    (both,) = quads_from(DatasetDict({"trace": table, "empty": Dataset.from_list([row("p")])}), FMT)
    assert both.trace is not None and both.empty is not None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Dataset.from_list([row()]), "say which view it is"),
        ({"train": [row()]}, "got the keys 'train'"),
        ({}, "expected 'trace', 'empty' or both"),
        (Dataset.from_list([row()]).to_iterable_dataset(), "got IterableDataset"),
        ({"trace": 7}, r"train_dataset\['trace'\]: got int"),
        ([quad("a"), {"id": "b"}], "got list, expected"),
        ([Quad(id="a", messages=())], r"train_dataset\[0\]: field 'messages'"),
    ],
)
def test_other_objects_are_refused(value, words):
    """Guards: a preference set without a view trained as quads, and errors deep inside another library."""
    with pytest.raises(UserError, match=words):
        list(quads_from(value, FMT))


def fingerprints(tmp_path: Path) -> dict[str, str]:
    rows, other = [row("p"), row("q")], [row("p"), row("q", "!")]
    path, changed = jsonl(tmp_path / "t.jsonl", rows), jsonl(tmp_path / "u.jsonl", other)
    quads = [quad("a"), quad("b")]
    fmt = format_of("qwen3")
    return {
        "file": load_quads(DataConfig(trace=path), FMT).train.fingerprint,
        "other file": load_quads(DataConfig(trace=changed), FMT).train.fingerprint,
        "other view": load_quads(DataConfig(empty=path), FMT).train.fingerprint,
        "other format": load_quads(DataConfig(trace=path), fmt).train.fingerprint,
        "limit": load_quads(DataConfig(trace=path, limit=1), FMT).train.fingerprint,
        "other limit": load_quads(DataConfig(trace=path, limit=2), FMT).train.fingerprint,
        "split": load_quads(DataConfig(trace=path, eval_fraction=0.5), FMT).train.fingerprint,
        "seed": load_quads(DataConfig(trace=path, eval_fraction=0.5), FMT, seed=1).train.fingerprint,
        "held out": load_quads(DataConfig(trace=path, eval_fraction=0.5), FMT).eval.fingerprint,  # type: ignore[union-attr]
        "dataset": quads_from({"trace": Dataset.from_list(rows)}, FMT).fingerprint,
        "other dataset": quads_from({"trace": Dataset.from_list(other)}, FMT).fingerprint,
        "selected": quads_from({"trace": Dataset.from_list(rows).select([1])}, FMT).fingerprint,
        "list": quads_from(quads, FMT).fingerprint,
        "other list": quads_from(quads[::-1], FMT).fingerprint,
        "rows": quads_from({"trace": rows}, FMT).fingerprint,
        "other rows": quads_from({"trace": other}, FMT).fingerprint,
    }


def test_fingerprints_follow_content(tmp_path):
    """Guards: stale tokens after the data changed (a constant or a path as fingerprint), and needless rebuilds."""
    first = fingerprints(tmp_path)
    assert len(set(first.values())) == len(first)
    (tmp_path / "again").mkdir()
    assert fingerprints(tmp_path / "again") == first
    # another way to the same rows: only the content counts
    rows = Dataset.from_list([row("x"), row("p"), row("q")]).select([1, 2])
    assert quads_from({"trace": rows}, FMT).fingerprint == first["dataset"]


def grouped(name: str, num: int) -> list[Quad]:
    """A quad with ``num`` traces of its answers."""
    first = quad(name)
    sides = [[Response(trace=f"{side}{i}", answer=side) for i in range(num)] for side in ("yes", "no")]
    pairs = [Pair(view="trace", chosen=c, rejected=r) for c, r in zip(*sides, strict=True)]
    group = name if num > 1 else None
    more = [Quad(id=f"{name}+{i}", messages=first.messages, trace=pairs[i - 1], group=group) for i in range(2, num + 1)]
    return [replace(first, trace=pairs[0], group=group), *more]


def test_a_limit_and_a_split_keep_groups_whole(tmp_path):
    """Guards: a limit on lines, a limit that stops at the first member, and a split by line."""
    quads = [q for i in range(30) for q in grouped(f"g{i}", 1 + i % 3)]
    path = tmp_path / "quads.jsonl"
    write_jsonl(path, quads)
    assert '"group": null' not in path.read_text(), "files without groups are what they were"
    limited = list(load_quads(DataConfig(quads=str(path), limit=3), FMT).train)
    assert [q.id for q in limited] == ["g0", "g1", "g1+2", "g2", "g2+2", "g2+3"]
    sets = load_quads(DataConfig(quads=str(path), eval_fraction=0.4), FMT)
    assert sets.eval is not None
    roots = [{q.id.split("+")[0] for q in source} for source in (sets.train, sets.eval)]
    assert not roots[0] & roots[1] and len(roots[0] | roots[1]) == 30 and min(map(len, roots)) > 3
    empty = list(load_quads(DataConfig(quads=str(path), views=("empty",)), FMT).train)
    assert [q.id for q in empty] == [f"g{i}" for i in range(30)]


def test_members_are_tokenised_for_the_estimator_that_takes_them(tmp_path, caplog):
    """Guards: members trained on as quads of their own, a group that loses its bounds, and nothing said of either."""
    caplog.set_level(logging.INFO, logger="bvpo")
    quads = [*grouped("a", 3), *grouped("b", 1), *grouped("c", 2)]
    settings = {keep: TokenSettings(max_length=400, keep_groups=keep) for keep in (False, True)}
    first = prepare_tokens(quads_from(quads, FMT), TOKENIZER, FMT, settings[False], tmp_path)
    assert [q.id for q in first] == ["a", "b", "c"] and not first.has_groups and first.num_left_out == 3
    assert "3 further traces of quads with several are left out" in caplog.text
    every = prepare_tokens(quads_from(quads, FMT), TOKENIZER, FMT, settings[True], tmp_path)
    assert [q.id for q in every] == [q.id for q in quads] and every.group_starts.tolist() == [0, 3, 4, 6]
    assert every.group_has_view.tolist() == [[True, True]] * 3
    assert every.group_tokens.tolist() == [sum(q.num_tokens for q in every if q.id[0] == name) for name in "abc"]
    assert "traces per answer: 1 quads with 1, 1 quads with 2, 1 quads with 3" in caplog.text
    long = [replace(q, trace=replace(q.trace, chosen=replace(q.trace.chosen, trace="x" * 999))) for q in quads[1:3]]
    short = prepare_tokens(quads_from([quads[0], *long, *quads[3:]], FMT), TOKENIZER, FMT, settings[True], tmp_path)
    assert short.group_starts.tolist() == [0, 1, 2, 4] and short.num_dropped_quads == 0
    ones = prepare_tokens(quads_from(quads[3:4], FMT), TOKENIZER, FMT, settings[True], tmp_path)
    assert not ones.has_groups and "so 'traces' is the same as 'joint'" in caplog.text


def test_broken_groups_are_refused():
    """Guards: a member far from its group, whose traces would be taken for another quad's; a second empty pair."""
    apart = [*grouped("a", 2)[:1], *grouped("b", 1), *grouped("a", 2)[1:]]
    with pytest.raises(
        UserError, match=r"\[2\]: field 'group': got 'a' \(str\), expected null as in the quad before it"
    ):
        quads_from(apart, FMT)
    with pytest.raises(UserError, match=r"\[0\]: field 'group': got 'a' \(str\), expected null"):
        quads_from(grouped("a", 2)[1:], FMT)
    first, second = grouped("a", 2)
    with pytest.raises(
        UserError, match=r"field 'group': got 'a' \(str\), whose members have a trace pair and nothing else"
    ):
        quads_from([first, replace(second, empty=first.empty)], FMT)


def test_members_of_another_quad_are_refused_with_their_line(tmp_path):
    """A member of another prompt would go to the other side of a split; of another answer, into the wrong mean.

    Mutations: `_group_leader` without the comparison of messages, of the chosen or of the rejected answers, or with the
    quad before in place of the group's first; answers compared with their outer whitespace, which pairing does not; a
    check that only one of the two ways of reading makes."""
    first, *more = grouped("a", 3)
    pair = first.trace

    def answers(**sides: str) -> Pair:
        return replace(pair, **{side: replace(getattr(pair, side), answer=text) for side, text in sides.items()})

    path, data = tmp_path / "quads.jsonl", DataConfig(quads=str(tmp_path / "quads.jsonl"), eval_fraction=0.5)
    fits = replace(more[1], trace=answers(chosen="\n\nyes", rejected="no "))
    write_jsonl(path, [first, more[0], fits])
    assert len(list(quads_from(str(path), FMT))) == len(list(quads_from([first, more[0], fits], FMT))) == 3
    other = (Message(role="user", content="b"),)
    cases = [
        (
            first,
            {"messages": other},
            r"field 'messages': got \[\{'role': 'user', 'content': 'b'\}\] \(list\), expected the me",
        ),
        (
            first,
            {"trace": answers(chosen="ja")},
            r"field 'trace.chosen.answer': got 'ja' \(str\), expected 'yes' \(str\)",
        ),
        (first, {"trace": answers(rejected="yes")}, r"field 'trace.rejected.answer': got 'yes' .*quad 'a', the first"),
        (replace(first, trace=None), {}, r"field 'group': got 'a' \(str\), whose first quad has no trace pair"),
    ]
    for leader, change, words in cases:
        quads = [leader, *([more[0]] if change else []), replace(more[1], **change)]
        write_jsonl(path, quads)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:{len(quads)}: {words}"):
            list(load_quads(data, FMT).train)
        with pytest.raises(UserError, match=rf"^train_dataset\[{len(quads) - 1}\]: {words}"):
            quads_from(quads, FMT)


def test_sources_feed_the_token_store(tmp_path):
    """Guards: a source that the tokeniser cannot read twice, and a setting of the trainer that is not passed on."""

    class Arguments:
        output_dir = str(tmp_path / "out")
        reasoning_format = "auto"
        custom_format = None
        max_length = 400
        over_long = "drop"
        score_empty_block = True
        trace_estimator = "joint"

    data = str(EXAMPLES / "quads.jsonl")
    dataset = token_dataset(data, TOKENIZER, len(TOKENIZER), Arguments(), "train")
    settings = TokenSettings(max_length=400, vocab_size=len(TOKENIZER))
    direct = prepare_tokens(quads_from(data, FMT), TOKENIZER, FMT, settings, tmp_path / "direct")
    assert dataset.fingerprint == direct.fingerprint and len(dataset) == 3
    assert dataset.folder.is_relative_to(tmp_path / "out")
    changes = (("max_length", 30), ("score_empty_block", False), ("over_long", "refuse"), ("trace_estimator", "traces"))
    for name, value in changes:
        changed = Arguments()
        setattr(changed, name, value)
        assert token_dataset(data, TOKENIZER, len(TOKENIZER), changed, "train").fingerprint != dataset.fingerprint
    assert isinstance(quads_from(data, FMT), QuadSource)
