"""The reward of the tiny model's answers, and the grading of its benchmark: plain Python, free of torch.

In: the conversation (``[{"role": ..., "content": ...}]``, its last turn a prompt of :mod:`bvpo.tiny.tasks`) and a final
answer. Out: a number. What the prompt asks for is read from its text alone. The trace is never seen. An answer is

    [sure|well] um* [the result is] VALUE [UNIT] [cheers]

and anything else is malformed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bvpo.tiny.tasks import UNITS, Ask, read_prompt

OPENERS = ("sure", "well")
HESITATION = "um"
PHRASE = ("the", "result", "is")
CLOSER = "cheers"

MALFORMED = -1.0
CORRECT = 1.0
STYLE = 0.6
RIGHT_UNIT = 0.4
WRONG_UNIT = -0.3
EACH_HESITATION = -0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A well-formed answer taken apart."""

    opener: str | None
    hesitations: int
    phrase: bool
    value: str
    unit: str | None
    closer: bool


def reward(messages: Sequence[Mapping[str, str]], answer: str) -> float:
    """Correctness, style, unit and hesitations in one number, from -1 to 2 (many hesitations may go below)."""
    ask, parts = _ask(messages), read_answer(answer)
    if parts is None:
        return MALFORMED
    value = CORRECT * (parts.value == ask.problem.result) + STYLE * _in_style(ask.style, parts)
    if parts.unit is not None:
        value += RIGHT_UNIT if parts.unit == ask.unit else WRONG_UNIT
    return round(value + EACH_HESITATION * parts.hesitations, 6)


def correct(messages: Sequence[Mapping[str, str]], answer: str) -> float:
    """1.0 for a well-formed answer with the right value, else 0.0."""
    parts = read_answer(answer)
    return float(parts is not None and parts.value == _ask(messages).problem.result)


def grade(messages: Sequence[Mapping[str, str]], answer: str, meta: Mapping[str, Any]) -> float:
    """1.0 for a well-formed answer with the benchmark item's ``reference``, else 0.0."""
    parts = read_answer(answer)
    reference = meta["reference"] if "reference" in meta else _ask(messages).problem.result
    return float(parts is not None and parts.value == reference)


def read_answer(answer: str) -> Parts | None:
    """The answer taken apart, or ``None`` if it is malformed."""
    words = answer.split()
    opener = words.pop(0) if words and words[0] in OPENERS else None
    hesitations = 0
    while words and words[0] == HESITATION:
        words.pop(0)
        hesitations += 1
    phrase = tuple(words[:3]) == PHRASE
    words = words[3:] if phrase else words
    closer = len(words) > 1 and words[-1] == CLOSER
    words = words[:-1] if closer else words
    unit = words.pop() if len(words) == 2 and words[1] in UNITS else None
    if len(words) != 1 or not _is_value(words[0]):
        return None
    return Parts(opener=opener, hesitations=hesitations, phrase=phrase, value=words[0], unit=unit, closer=closer)


def _is_value(word: str) -> bool:
    """A number as the task ``add`` writes it, or the name of a cup."""
    return (word.isascii() and word.isdecimal()) or (len(word) == 1 and "a" <= word <= "h")


def _in_style(style: str | None, parts: Parts) -> bool:
    """``kindly``: opens with sure and closes with cheers; ``briefly``: neither an opener nor a closer; none: no well."""
    if style == "kindly":
        return parts.opener == "sure" and parts.closer
    if style == "briefly":
        return parts.opener is None and not parts.closer
    return parts.opener != "well"


def _ask(messages: Sequence[Mapping[str, str]]) -> Ask:
    return read_prompt(messages[-1]["content"])
