"""What a score is about: which text of a sample is scored, when two answers count as one, and which attempt holds.

In: the fields of samples and prompts, and :class:`~bvpo.records.Score` records. Out: the text that a scorer sees,
content hashes that name "this answer to this prompt", and store keys. Pure; scorers, stages and evaluation share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bvpo.keys import content_hash
from bvpo.records import Message, Score

NO_ANSWER = "no answer"
"""Error of a sample that has nothing to score: the trace never closed, the answer is blank, or sampling failed."""

CONTENT_DIGITS = 32  # of a SHA-256: 128 bits
ATTEMPT = "attempt"
CONTENT = "content"


def answer_text(answer: str | None) -> str | None:
    """The text that is scored and compared: the final answer without outer whitespace; ``None`` when nothing is left.

    Families put different whitespace between marker and answer; a scorer must not see which view an answer is from.
    """
    return (answer or "").strip() or None


def content_key(messages: Sequence[Message], answer: str, context: Any = None) -> str:
    """Names one answer to one conversation; equal keys mean that one score serves both.

    ``context`` holds whatever else the scorer looks at (a prompt's metadata, the rival answers), as plain values.
    """
    parts: list[Any] = [[[m.role, m.content] for m in messages], answer]
    return content_hash(parts if context is None else [*parts, context])[:CONTENT_DIGITS]


def scorer_id(name: str, fingerprint: Mapping[str, Any]) -> str:
    """``name-digits``: what :attr:`~bvpo.records.Score.scorer` says; another fingerprint is another scorer."""
    return f"{name}-{content_hash(dict(fingerprint))[:12]}"


def attempt_of(score: Score) -> int:
    """0 for the first score of a sample; later attempts count up."""
    return int(score.extra.get(ATTEMPT, 0))


def score_key(score: Score) -> tuple[str, ...]:
    """Key in the record store, which never replaces a record: a repeated attempt is a record of its own."""
    attempt = attempt_of(score)
    return (score.sample_key, score.scorer, str(attempt)) if attempt else (score.sample_key, score.scorer)
