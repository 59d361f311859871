"""Which prompts of a list are fit for sampling, and which split each belongs to.

In: conversations in the order of their sources. Out: for each, nothing or the reason it is dropped with a detail; and a
split that follows from its content and the seed alone, so adding prompts moves none. Reading, writing, tokenizers and
benchmark files belong to the stage.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bvpo.data.overlap import OverlapIndex, near_duplicates, words, words_and_operators
from bvpo.keys import content_hash, hash_int
from bvpo.records import Message

ROLES = ("system", "user", "assistant")

REASONS: dict[str, str] = {
    "malformed": "not a list of messages with a role and text",
    "empty": "a turn without text, or no turn at all",
    "wrong_roles": "an unknown role, a system message that is not first, or turns that do not alternate",
    "last_turn_not_user": "the conversation does not end with a user turn",
    "too_long_chars": "more characters than prompts.max_chars",
    "too_long_tokens": "more tokens than prompts.max_tokens",
    "exact_duplicate": "equal to an earlier prompt up to case, spacing and Unicode form",
    "near_duplicate": "shares most word shingles with an earlier prompt",
    "contaminated": "shares a run of words with a benchmark item",
}
"""Every reason for a drop, in the order of the checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Why prompt number ``index`` is dropped."""

    index: int
    reason: str
    detail: str = ""


def normal_text(text: str) -> str:
    """The text as duplicates are recognised: Unicode form, case and spacing do not count."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def normal_conversation(messages: Sequence[Message]) -> str:
    """One string per conversation; equal for exact duplicates only."""
    return content_hash([[m.role, normal_text(m.content)] for m in messages])


def prompt_id(messages: Sequence[Message]) -> str:
    """The content hash that names a prompt: 16 hex digits."""
    return content_hash([[m.role, m.content] for m in messages])[:16]


def parse_messages(value: Any) -> tuple[Message, ...] | None:
    """A string (one user turn) or a list of ``role``/``content`` tables as messages; other keys are ignored.

    ``None`` where it is neither, or where a content is no text (images, tool calls).
    """
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, Sequence):
        return None
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append(Message(role=role, content=content))
    return tuple(messages)


def structural_problem(messages: Sequence[Message], max_chars: int | None = None) -> tuple[str, str] | None:
    """(reason, detail) of the first thing wrong with one conversation by itself."""
    if not messages:
        return "empty", "no turns"
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            return "wrong_roles", f"turn {number}: role {message.role[:40]!r}, expected {', '.join(ROLES)}"
        if not message.content.strip():
            return "empty", f"turn {number} ({message.role}) has no text"
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ROLES[1 + number % 2]
        if message.role != expected:
            return "wrong_roles", f"turn {number + 1} is {message.role}, expected {expected}"
    if not turns or turns[-1].role != "user":
        return "last_turn_not_user", f"it ends with {messages[-1].role}"
    num_chars = sum(len(message.content) for message in messages)
    if max_chars is not None and num_chars > max_chars:
        return "too_long_chars", f"{num_chars} characters"
    return None


def exact_duplicate_drops(conversations: Sequence[Sequence[Message]], ids: Sequence[str]) -> list[Drop]:
    """All but the first of equal conversations."""
    first: dict[str, int] = {}
    drops = []
    for index, messages in enumerate(conversations):
        of = first.setdefault(normal_conversation(messages), index)
        if of != index:
            drops.append(Drop(index=index, reason="exact_duplicate", detail=f"of {ids[of]}"))
    return drops


def near_duplicate_drops(
    conversations: Sequence[Sequence[Message]], ids: Sequence[str], *, threshold: float, shingle: int
) -> list[Drop]:
    """Conversations that nearly repeat an earlier one under the same system message."""
    found = near_duplicates(
        [words_and_operators(spoken_text(messages)) for messages in conversations],
        threshold=threshold,
        shingle=shingle,
        groups=[normal_text(m[0].content) if m[0].role == "system" else "" for m in conversations],
    )
    return [
        Drop(index=near.index, reason="near_duplicate", detail=f"of {ids[near.of]}, similarity {near.similarity:.2f}")
        for near in found
    ]


def contamination_drops(
    conversations: Sequence[Sequence[Message]], items: Sequence[str], places: Sequence[str], *, ngram: int
) -> list[Drop]:
    """Conversations that share ``ngram`` words in a row with one of the benchmark ``items`` (found at ``places``)."""
    index = OverlapIndex([words(item) for item in items], ngram)
    texts = [words(spoken_text(messages)) for messages in conversations]
    return [
        Drop(
            index=hit.index,
            reason="contaminated",
            detail=f"{places[hit.item]}: {' '.join(texts[hit.index][hit.start : hit.stop])}",
        )
        for hit in index.find(texts)
    ]


def spoken_text(messages: Sequence[Message]) -> str:
    """All but the system message, which many prompts share."""
    return "\n".join(message.content for message in messages if message.role != "system")


def assign_split(messages: Sequence[Message], *, seed: int, validation: float, test: float) -> str:
    """``test``, ``validation`` or ``train`` by the hash of content and seed; a larger fraction keeps its members."""
    place = hash_int(normal_conversation(messages), f"bvpo-split-{seed}") / 2**64
    if place < test:
        return "test"
    # from the other end, so that changing one fraction never moves prompts of the other
    return "validation" if place >= 1 - validation else "train"
