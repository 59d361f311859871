"""Names for requests: the key of a sample, the random seed that follows from it, and its part of the work.

In: everything that decides what a sample is. Out: a SHA-256 in hex and integers derived from it. The same request has
the same key, hence the same seed, on every machine and in every batch; nothing here reads a clock or a random source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bvpo.records import View

KEY_SCHEMA = 1
SEED_BITS = 53  # survives every JSON reader (some hold numbers as doubles) and fits a signed 64-bit integer


def sample_key(
    *,
    prompt_ids: Sequence[int],
    view: View,
    reasoning_format: str,
    index: int,
    model_revision: str,
    sampling: Mapping[str, Any],
    run_seed: int,
) -> str:
    """SHA-256 (64 hex digits) over all that decides a sample: change any argument and it is another sample.

    ``model_revision`` names the weights (a commit or a content hash), ``sampling`` holds the sampling parameters by
    name (order does not matter, ``1`` and ``1.0`` are equal), ``index`` counts the samples of one prompt and view.
    """
    request = {
        "schema": KEY_SCHEMA,
        "prompt_ids": [int(i) for i in prompt_ids],
        "view": view,
        "format": reasoning_format,
        "index": index,
        "model": model_revision,
        "sampling": dict(sampling),
        "run_seed": run_seed,
    }
    return content_hash(request)


def seed_from_key(key: str) -> int:
    """The seed of the sample with this key: uniform in ``[0, 2**53)``, not a prefix of the key."""
    digest = hashlib.sha256(b"bvpo-seed\0" + key.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def in_part(key: str, part: int, num_parts: int) -> bool:
    """Whether this key belongs to part ``part`` (from 0) of ``num_parts``: splits work without talk."""
    if not 0 <= part < num_parts:
        raise ValueError(f"part {part} of {num_parts}: expected 0 <= part < number of parts")
    return hash_int(key, "part") % num_parts == part


def hash_int(text: str, purpose: str) -> int:
    """A 64-bit integer from ``text``; different ``purpose`` strings give independent integers."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{text}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def content_hash(value: Any) -> str:
    """SHA-256 of a plain value's canonical JSON: sorted keys, and whole floats written as the integers they equal."""
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) <= {int, str}:
            return value  # thousands of token ids need no visit each
        return [_canonical(v) for v in value]
    return value
