"""Sample keys: every argument counts, spelling does not, and seeds follow from keys."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from bvpo.keys import SEED_BITS, in_part, sample_key, seed_from_key

REQUEST: dict[str, Any] = {
    "prompt_ids": (1, 2, 3),
    "view": "trace",
    "reasoning_format": "r1",
    "index": 0,
    "model_revision": "abc",
    "sampling": {"temperature": 0.8, "top_p": 1.0, "max_new_tokens": 100},
    "run_seed": 42,
}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": (1, 2, 4)},
        {"prompt_ids": (12, 3)},
        {"view": "empty"},
        {"reasoning_format": "qwen3"},
        {"index": 1},
        {"model_revision": "abd"},
        {"sampling": {"temperature": 0.6, "top_p": 1.0, "max_new_tokens": 100}},
        {"sampling": {"temperature": 0.8, "top_p": 1.0}},
        {"run_seed": 43},
    ],
)
def test_every_argument_counts(change: dict[str, Any]) -> None:
    """Mutation: leaving one field out of the hashed request."""
    assert sample_key(**REQUEST) != sample_key(**{**REQUEST, **change})


def test_spelling_does_not_count() -> None:
    """Mutation: hashing without sort_keys, or without writing 1.0 as 1 (a TOML file may say either)."""
    other = {"max_new_tokens": 100.0, "top_p": 1, "temperature": 0.8}
    assert sample_key(**REQUEST) == sample_key(**{**REQUEST, "sampling": other, "prompt_ids": [1, 2, 3]})


def test_key_is_pinned() -> None:
    """Mutation: any change of the key's recipe without a new KEY_SCHEMA; it would orphan every stored sample."""
    assert sample_key(**REQUEST) == "6a100f73d2c672cc3ce821fcf3b28c5ec1403ed97350505f3332f739523b19b6"


def test_seeds_are_uniform_and_fit() -> None:
    """Mutation: a seed taken from too few bits of the key (a constant, or one that exceeds 53 bits)."""
    seeds = [seed_from_key(sample_key(**{**REQUEST, "index": index})) for index in range(2000)]
    assert len(set(seeds)) == 2000
    assert max(seeds) < 2**SEED_BITS
    assert abs(statistics.mean(seeds) / 2**SEED_BITS - 0.5) < 4 * 0.2887 / 2000**0.5


def test_parts_cover_everything_once() -> None:
    """Mutation: parts that overlap or leave keys out."""
    keys = [sample_key(**{**REQUEST, "index": index}) for index in range(500)]
    counts = [sum(in_part(key, part, 3) for key in keys) for part in range(3)]
    assert sum(counts) == 500
    assert min(counts) > 120
    with pytest.raises(ValueError, match="part 3 of 3"):
        in_part(keys[0], 3, 3)
