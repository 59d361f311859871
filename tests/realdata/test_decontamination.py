"""Decontamination on public benchmarks: every copy is found, and unrelated benchmarks do not accuse each other.

The data is not part of the repository: these tests look for ``../shared/bench-data`` beside it and are skipped without.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from bvpo.cli import main
from bvpo.data.cleaning import contamination_drops, near_duplicate_drops
from bvpo.data.sources import benchmark_files, read_benchmark
from bvpo.records import Message

DATA = Path(__file__).parents[3] / "shared" / "bench-data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"public benchmark data is not at ../shared/{DATA.name}")

QUESTIONS = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math500/test.jsonl",
    "mt_bench": "mt_bench/question.jsonl",
    "alpacaeval2": "alpacaeval2/instructions.jsonl",
    "arena_hard_v01": "arena_hard_v01/question.jsonl",
    "aime24": "aime24/test.jsonl",
    "amc23": "amc23/test.jsonl",
    "truthfulqa": "truthfulqa/test.jsonl",
    "mmlu": "mmlu/test.jsonl",
}


def items(name: str) -> list[tuple[str, str]]:
    return list(read_benchmark(DATA / QUESTIONS[name]))


def conversation(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def hits(prompts: list[str], against: list[tuple[str, str]]) -> list[str]:
    drops = contamination_drops(
        [conversation(text) for text in prompts],
        [text for _, text in against],
        [place for place, _ in against],
        ngram=13,
    )
    return [drop.detail for drop in drops]


def test_every_copied_gsm8k_question_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: copies missed because of case, spacing, added text or short questions; the wrong line named."""
    monkeypatch.chdir(tmp_path)
    copies = items("gsm8k")
    fillers = [f"Write sentence number {n} of a story about the {n % 7}th dragon and its friends." for n in range(300)]
    with open("prompts.jsonl", "w") as stream:
        for text in fillers:
            stream.write(json.dumps({"prompt": text}) + "\n")
        for number, (_, text) in enumerate(copies):
            changed = (
                text,
                text.upper(),
                f"Solve this problem.\n\n{text}\n\nThink step by step.",
                text.replace(" ", "\n"),
            )
            stream.write(json.dumps({"prompt": changed[number % 4]}) + "\n")
    benchmark = DATA / QUESTIONS["gsm8k"]
    Path("mine.toml").write_text(
        f'name = "mine"\n[model]\npath = "m"\n[prompts]\nsources = ["prompts.jsonl"]\ndecontaminate = ["{benchmark}"]\n'
        "near_duplicates = 'none'\n"
    )
    assert main(["prompts", "mine.toml"]) == 0
    kept = [json.loads(line) for line in Path("experiments/mine/prompts.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in Path("experiments/mine/prompts.dropped.jsonl").read_text().splitlines()]
    assert [prompt["messages"][0]["content"] for prompt in kept] == fillers
    assert len(copies) == 1319
    assert Counter(drop["reason"] for drop in dropped) == {"contaminated": 1319}
    places = [drop["detail"].rsplit(": ", 1)[0] for drop in dropped]
    # two questions may share a run of words, so a few name another line than their own
    assert sum(place == where for place, (where, _) in zip(places, copies, strict=True)) > 1300


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_every_benchmark_finds_itself(name: str) -> None:
    """Mutation: items of few words, formulas or several turns that no prompt can match."""
    own = items(name)
    found = hits([text for _, text in own], own)
    assert len(found) == len(own)


def test_unrelated_benchmarks_do_not_accuse_each_other() -> None:
    """Mutation: short runs of words that count as contamination."""
    assert hits([text for _, text in items("mt_bench")], items("math500")) == []
    assert hits([text for _, text in items("gsm8k")], items("alpacaeval2")) == []
    assert hits([text for _, text in items("truthfulqa")], items("gsm8k") + items("math500") + items("aime24")) == []


def test_all_question_files_can_be_read() -> None:
    """Mutation: a usual name of a question field that is not known."""
    files = benchmark_files([str(DATA / path) for path in QUESTIONS.values()] + [str(DATA / "bbh" / "*.jsonl")])
    assert sum(1 for path in files for _ in read_benchmark(path)) > 10_000


def test_near_duplicates_of_real_questions_are_few() -> None:
    """Mutation: a similarity that calls different questions equal; GSM8K's test set has next to none."""
    own = [conversation(text) for _, text in items("gsm8k")]
    started = time.process_time()
    drops = near_duplicate_drops(own, [str(n) for n in range(len(own))], threshold=0.8, shingle=3)
    assert len(drops) <= 5
    assert time.process_time() - started < 5
