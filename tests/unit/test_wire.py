"""Reading one answer of a completions server: what is accepted, what is refused, and why (no sockets)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from models_fixtures import tiny_tokenizer

from bvpo.engines.base import Request, Sampling
from bvpo.engines.http.wire import Vocabulary, Wire, sent_seed
from bvpo.web import BadAnswer

VOCABULARY = Vocabulary(tiny_tokenizer())
WIRE = Wire(model="m", dialect="vllm", prompts="ids", vocabulary=VOCABULARY)
EOS = tiny_tokenizer().eos_token_id
REQUEST = Request(key="k", prompt_ids=(30, 31), seed=5, params=Sampling(max_new_tokens=4, stop_token_ids=(70,)))


def answer(ids: list[int], finish: str, stop_reason: Any = None, **choice: Any) -> bytes:
    full = {
        "text": "whatever",
        "finish_reason": finish,
        "stop_reason": stop_reason,
        "token_ids": ids,
        "prompt_token_ids": [30, 31],
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
    }
    usage = {"prompt_tokens": 2, "completion_tokens": len(ids)}
    return json.dumps({"choices": [full | choice], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("ids", "finish", "stop_reason"),
    [
        ([50, 51, 52, 53], "length", None),
        ([50, 70], "stop", 70),
        ([50, EOS], "stop", None),
        ([50, 90], "stop", 90),  # another end-of-sequence token, of the model's generation config
    ],
)
def test_right_endings(ids: list[int], finish: str, stop_reason: int | None):
    """Mutations: refuse the model's second end token; leave the stop token in the text."""
    generation = WIRE.read(REQUEST, answer(ids, finish, stop_reason)).generation
    assert (list(generation.token_ids), generation.finish) == (ids, finish)
    assert generation.text == VOCABULARY.decode(ids[:-1] if finish == "stop" else ids)
    assert generation.logprobs == (-0.5,) * len(ids)


@pytest.mark.parametrize(
    ("ids", "finish", "stop_reason", "message"),
    [
        ([50, 51], "stop", None, "the last token 51 is no stop token"),
        ([50, 70, 51, 52], "length", None, "went on after the stop token 70"),
        ([EOS, 51, 52, 53], "length", None, f"went on after the stop token {EOS}"),
        ([50, 51, 52, 70], "length", None, "ends with the stop token 70, and finish_reason is length"),
        ([50, 51], "length", None, "finish_reason is length after 2 of 4"),
        ([50, 51, 52, 53, 54], "length", None, "5 tokens, expected 1 to 4"),
        ([], "length", None, "0 tokens"),
        ([50, -1, 52, 53], "length", None, "token id -1 is outside"),
        ([50, VOCABULARY.size, 52, 53], "length", None, f"token id {VOCABULARY.size} is outside"),
        ([50, True, 52, 53], "length", None, "expected a list of integers"),
    ],
)
def test_wrong_endings_and_ids(ids: list[int], finish: str, stop_reason: int | None, message: str):
    """Mutations: drop any check of ``_check_stop``, ``_check_length`` or ``_sampled_ids``."""
    with pytest.raises(BadAnswer, match=message):
        WIRE.read(REQUEST, answer(ids, finish, stop_reason))


def test_a_response_may_be_short_where_the_context_ends():
    """Mutations: ignore the served context length; accept any short response once it is known."""
    raw = answer([50, 51], "length")
    assert replace(WIRE, context=5).read(REQUEST, raw).generation.finish == "length"
    with pytest.raises(BadAnswer, match="after 2 of 4"):
        replace(WIRE, context=50).read(REQUEST, raw)
    # a server that names no context
    with pytest.raises(BadAnswer, match="after 2 of 4"):
        WIRE.read(REQUEST, raw)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"logprobs": {"token_logprobs": [-0.5, 0.2]}}, "log-probability 0.2"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "log-probability None"),
        ({"logprobs": None}, "none log-probabilities for 2 tokens"),
        ({"logprobs": {"token_logprobs": [-0.5]}}, "1 log-probabilities for 2 tokens"),
        ({"logprobs": {"tokens": ["token_id:50", "token_id:71"]}}, "name different tokens"),
        ({"token_ids": None}, "no token ids"),
        ({"text": None}, "text is None"),
        ({"prompt_token_ids": [2, 30]}, "other prompt tokens"),
    ],
)
def test_damaged_fields(broken: dict[str, Any], message: str):
    """Mutations: drop the check of the field."""
    with pytest.raises(BadAnswer, match=message):
        WIRE.read(REQUEST, answer([50, 70], "stop", 70, **broken))


@pytest.mark.parametrize(
    "raw", [b"", b"[1]", b'"text"', b"{", b'{"choices": {}}', b'{"choices": [1]}', b"\xff\xfe", b"[" * 9999]
)
def test_anything_else_is_refused_without_a_crash(raw: bytes):
    """Mutations: let a JSON error, a recursion error or a type error escape."""
    with pytest.raises(BadAnswer):
        WIRE.read(REQUEST, raw)


def test_made_ids_end_as_the_response_ended():
    """Without returned ids. Mutations: append the first stop token whatever was met; append one to a cut response."""
    wire = replace(WIRE, dialect="plain", retokenise=True, logprobs=False)
    stop_text = VOCABULARY.decode([70])

    def made(finish: str, stop_reason: str | None) -> list[int]:
        raw = answer([1], finish, stop_reason, token_ids=None, logprobs=None, text="think", prompt_token_ids=None)
        return list(wire.read(REQUEST, raw).generation.token_ids)

    body = VOCABULARY.encode("think")
    assert made("length", None) == body
    assert made("stop", None) == [*body, EOS]
    assert made("stop", stop_text) == [*body, 70]


def test_seeds_are_sent_as_they_are_or_reduced_within_bounds():
    """Mutations: reduce a seed that fits; a reduced seed that does not fit; a negative seed."""
    assert sent_seed(2**53 - 1, 63) == 2**53 - 1
    assert sent_seed(7, 31) == 7
    reduced = [sent_seed(seed, 31) for seed in (2**31, 2**53 - 1, -5, 2**70)]
    assert all(0 <= seed < 2**31 for seed in reduced) and len(set(reduced)) == 4
