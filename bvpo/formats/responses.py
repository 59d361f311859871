"""Responses as token ids: written from text, read back as text, and cut where the answer begins.

Sampled ids are never re-tokenised: :func:`answer_offset` looks for the closing marker in what the ids decode to and
returns an index into the same ids. :func:`completion_ids` writes a response that exists only as text, piece by piece
(trace, marker, answer), so that each boundary is a token boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bvpo.formats.prompts import encode
from bvpo.formats.spec import ReasoningFormat
from bvpo.records import View
from bvpo.strict import UserError


def end_ids(tokenizer: Any, fmt: ReasoningFormat) -> tuple[int, ...]:
    """Tokens that end a finished response; the first is the one :func:`completion_ids` writes.

    Engines must stop at each of them: some families (GLM-4.5) end a turn with a token that is not the tokenizer's
    end-of-sequence token.
    """
    found: list[int] = []
    if fmt.turn_end:
        ids = encode(tokenizer, fmt.turn_end)
        if len(ids) != 1:
            raise UserError(f"format {fmt.name!r} ends a turn with {fmt.turn_end!r}, which this tokenizer lacks")
        found += ids
    eos = tokenizer.eos_token_id
    if eos is not None and eos not in found:
        found.append(eos)
    if not found:
        raise UserError("the tokenizer names no end-of-sequence token, so a finished response cannot be told")
    return tuple(found)


def decode_completion(tokenizer: Any, fmt: ReasoningFormat, token_ids: Sequence[int]) -> str:
    """The text of sampled ids for :meth:`ReasoningFormat.split`: markers kept, the final end token left out."""
    ids = list(token_ids)
    if ids and ids[-1] in end_ids(tokenizer, fmt):
        ids.pop()
    return _decode(tokenizer, ids)


def completion_ids(
    tokenizer: Any, fmt: ReasoningFormat, view: View, trace: str | None, answer: str, finished: bool
) -> tuple[int, ...]:
    """What a model would have sampled after the view's prompt to write this response; an end token iff ``finished``.

    Refuses (:class:`UserError`) a response that cannot be written so that it reads back: a trace that holds the
    closing marker, text that holds an end token, a tokenizer that does not encode piece by piece.
    """
    if not _encodes_piecewise(tokenizer):
        raise UserError(
            "this tokenizer puts characters of its own between pieces of text (a leading-space tokenizer); "
            "responses must come with the token ids that were sampled"
        )
    pieces = [encode(tokenizer, piece) for piece in fmt.pieces(view, trace, answer, finished)]
    ids = [token for piece in pieces for token in piece]
    ends = end_ids(tokenizer, fmt)
    if not set(ends).isdisjoint(ids):
        written = _decode(tokenizer, [next(token for token in ids if token in ends)])
        raise UserError(f"the response contains the end-of-turn token {written!r} before its end")
    start = 0 if view == "empty" else len(pieces[0]) + len(pieces[1])
    if answer_offset(tokenizer, fmt, view, ids) != start:
        raise UserError(f"as tokens, the trace contains the closing marker of format {fmt.name!r}")
    return (*ids, ends[0]) if finished else tuple(ids)


def answer_offset(tokenizer: Any, fmt: ReasoningFormat, view: View, token_ids: Sequence[int]) -> int | None:
    """Index into ``token_ids`` of the first answer token; ``None``: the trace never closed, there is no answer.

    The closing marker is the first one in the decoded text, whatever tokens spell it. A token that holds the marker's
    end and the answer's beginning counts as marker. May equal ``len(token_ids)`` (an empty, unfinished answer).
    """
    if view == "empty":
        return 0
    ids = list(token_ids)
    at = _single_token_close(tokenizer, fmt, ids)
    if at is not None:
        return at
    text = _decode(tokenizer, ids)
    span = fmt.find_close(text)
    return None if span is None else _tokens_covering(tokenizer, ids, text[: span[1]])


def _single_token_close(tokenizer: Any, fmt: ReasoningFormat, ids: list[int]) -> int | None:
    """The common case in one decode: the marker is one token, and nothing before it spells the marker."""
    if len(fmt.close) != 1:
        return None
    marker = encode(tokenizer, fmt.close[0])
    if len(marker) != 1 or marker[0] not in ids:
        return None
    at = ids.index(marker[0])
    before = _decode(tokenizer, ids[:at])
    span = fmt.find_close(before + fmt.close[0])
    return at + 1 if span is not None and span[0] == len(before) else None


def _tokens_covering(tokenizer: Any, ids: list[int], text: str) -> int:
    """The smallest number of tokens that decode to ``text`` or more (``text`` is a prefix of all of them decoded)."""
    low, high = 0, len(ids)
    while low < high:  # covering is monotone: one more token changes at most an incomplete last character
        middle = (low + high) // 2
        if _decode(tokenizer, ids[:middle]).startswith(text):
            high = middle
        else:
            low = middle + 1
    return low


def _encodes_piecewise(tokenizer: Any) -> bool:
    return _decode(tokenizer, encode(tokenizer, "a") + encode(tokenizer, "b")) == "ab"


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
