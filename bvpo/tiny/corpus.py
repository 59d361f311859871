"""What the tiny model learns from: noisy traces that solve problems step by step, and answers in every style.

In: a prompt's :class:`~bvpo.tiny.tasks.Ask`, a random generator and how noisy traces are. Out: the words of a trace with its
conclusion, and of an answer. The styles, units and hesitations of answers ignore what the prompt asks for, and some traces
go wrong: both are left to alignment.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from bvpo.tiny.reward import CLOSER, HESITATION, OPENERS, PHRASE
from bvpo.tiny.tasks import UNITS, Ask, Problem

FILLERS = ("hmm", "ok", "now", "then", "so", "let", "me")
EQUALS, CONCLUSION, CHECK, RETRACTION = "=", "thus", "check", "wait"

# Shares of the answers in the corpus: far from what the reward asks for, so that there is something to align.
_OPENER = 0.6
_HESITATE = 0.3
_PHRASE = 0.4
_UNIT = 0.6
_OTHER_UNIT = 0.15
_CLOSER = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Probabilities: of another filler word before a step, of a false start of a step, of a step's wrong result that
    nobody notices, and of a second look at the whole."""

    filler: float
    false_start: float
    slip: float
    recheck: float


def write_trace(problem: Problem, rng: random.Random, noise: Noise) -> tuple[list[str], str]:
    """Words of a trace, and the value that it concludes with. A second look starts afresh, and its result counts."""
    words, result = _solve(problem, rng, noise)
    if rng.random() < noise.recheck:
        again, result = _solve(problem, rng, noise)
        words += [CHECK, *again]
    return [*words, CONCLUSION, result], result


def _solve(problem: Problem, rng: random.Random, noise: Noise) -> tuple[list[str], str]:
    words: list[str] = []
    state = problem.start
    for move in problem.moves:
        while rng.random() < noise.filler:
            words.append(rng.choice(FILLERS))
        result = (problem.slip if rng.random() < noise.slip else problem.advance)(state, move)
        step = (state, move.ordinal, *move.operands, EQUALS)
        if rng.random() < noise.false_start:
            others = [other for other in problem.states if other != result]
            words += [*step, rng.choice(others), RETRACTION]
        words += [*step, result]
        state = result
    return words, state


def write_answer(ask: Ask, value: str, rng: random.Random) -> list[str]:
    """Words of an answer with this value, in a style that ignores what was asked for."""
    words = [rng.choice(OPENERS)] if rng.random() < _OPENER else []
    while rng.random() < _HESITATE:
        words.append(HESITATION)
    if rng.random() < _PHRASE:
        words += PHRASE
    words.append(value)
    if rng.random() < _UNIT:
        others = [unit for unit in UNITS if unit != ask.unit]
        words.append(rng.choice(others) if rng.random() < _OTHER_UNIT else ask.unit)
    if rng.random() < _CLOSER:
        words.append(CLOSER)
    return words


def write(words: Iterable[str]) -> str:
    """Words as the tokenizer reads them: each with the space before it."""
    return "".join(f" {word}" for word in words)
