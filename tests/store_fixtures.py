"""Samples for store tests: small, with every field filled, equal whenever the number is equal."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bvpo.experiment import RecordStore
from bvpo.records import Sample


def make_sample(number: int, *, num_tokens: int = 12, text: str | None = None) -> Sample:
    """Sample ``number``; the same number is the same record, content included."""
    key = hashlib.sha256(f"sample-{number}".encode()).hexdigest()
    ids = tuple((number * 7919 + place * 31) % 32000 for place in range(num_tokens))
    text = f"step {number}\nanswer é∑ {number}" if text is None else text
    return Sample(
        key=key,
        prompt_id=f"p{number // 10}",
        view="trace" if number % 2 else "empty",
        index=number % 5,
        prompt_ids=(1, 2, number % 1000),
        completion_start=3,
        token_ids=ids,
        text=text,
        trace=None if number % 3 else text,
        answer=None if number % 7 == 0 else str(number),
        finish="stop",
        logprobs=tuple(-0.25 * place - number / 3 for place in range(num_tokens)) if number % 2 else None,
    )


def fill(folder: Path, numbers: range, *, seal: bool = False) -> RecordStore[Sample]:
    """A store that holds the samples of these numbers."""
    store = RecordStore(folder, Sample)
    with store.open_writer() as writer:
        for number in numbers:
            writer.append(make_sample(number))
    if seal:
        store.seal()
    store.refresh()
    return store


def live_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))
