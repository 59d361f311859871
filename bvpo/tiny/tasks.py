"""The two tasks of the tiny model: what a problem reads like, how it is solved step by step, and what a prompt asks for.

In: a random generator and sizes, or the words of a problem. Out: problems with their steps and result; prompts and what
they ask for. Pure, and free of torch, because the reward reads prompts with it. Traces and answers are written elsewhere.

``add``   ``add first 3 second 5 third 2 mod 7``  adds numbers, modulo the last one
``cups``  ``cups b first a c second b d``         a ball is under cup b; a and c swap places, then b and d; where is it?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
UNITS = ("gems", "pens", "keys", "nuts")
STYLES = ("kindly", "briefly")
CUP_NAMES = "abcdefgh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one step of a solution takes in: a number or two cups, and its place in the problem."""

    ordinal: str
    operands: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem in words, and how it is solved: from ``start`` on, each move turns a state into the next.

    ``advance(state, move)`` is the right next state, ``slip(state, move)`` the one that a careless solver gets, ``states``
    are all that are possible.
    """

    words: tuple[str, ...]
    start: str
    moves: tuple[Move, ...]
    states: tuple[str, ...]
    advance: Callable[[str, Move], str]
    slip: Callable[[str, Move], str]

    @property
    def result(self) -> str:
        return reduce(self.advance, self.moves, self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large problems are: the modulus of ``add``, the number of cups."""

    modulus: int
    cups: int


@dataclass(frozen=True, slots=True)
class Task:
    """``draw`` writes a random problem with ``length`` numbers or swaps; ``read`` takes one apart (``ValueError``: cannot);
    ``count`` is the number of different problems of a length."""

    draw: Callable[[random.Random, int, Sizes], tuple[str, ...]]
    read: Callable[[Sequence[str]], Problem]
    count: Callable[[int, Sizes], int]


# ---------------------------------------------------------------------------------------------------------------------
# add


def _draw_add(rng: random.Random, length: int, sizes: Sizes) -> tuple[str, ...]:
    numbers = (word for ordinal in ORDINALS[:length] for word in (ordinal, str(rng.randrange(sizes.modulus))))
    return ("add", *numbers, "mod", str(sizes.modulus))


def _read_add(words: Sequence[str]) -> Problem:
    match words:
        case ["add", *listed, "mod", last] if last.isdecimal() and int(last) > 1:
            modulus, moves = int(last), _moves(listed, 1)
        case _:
            raise ValueError(f"not a problem of the task add: {' '.join(words)!r}")
    states = tuple(str(value) for value in range(modulus))
    if len(moves) < 2 or any(move.operands[0] not in states for move in moves):
        raise ValueError(f"expected two or more numbers below the modulus: {' '.join(words)!r}")
    return Problem(
        words=tuple(words),
        start=moves[0].operands[0],
        moves=moves[1:],
        states=states,
        advance=partial(_sum, modulus, 0),
        slip=partial(_sum, modulus, 1),
    )


def _sum(modulus: int, more: int, state: str, move: Move) -> str:
    return str((int(state) + int(move.operands[0]) + more) % modulus)


# ---------------------------------------------------------------------------------------------------------------------
# cups


def _draw_cups(rng: random.Random, length: int, sizes: Sizes) -> tuple[str, ...]:
    names = CUP_NAMES[: sizes.cups]
    start = rng.choice(names)
    return ("cups", start, *(word for ordinal in ORDINALS[:length] for word in (ordinal, *rng.sample(names, 2))))


def _read_cups(words: Sequence[str]) -> Problem:
    match words:
        case ["cups", start, *listed]:
            moves = _moves(listed, 2)
        case _:
            raise ValueError(f"not a problem of the task cups: {' '.join(words)!r}")
    named = {start, *(name for move in moves for name in move.operands)}
    if not named <= set(CUP_NAMES) or any(one == other for one, other in (move.operands for move in moves)):
        raise ValueError(f"expected two different cups, a to {CUP_NAMES[-1]}, in each swap: {' '.join(words)!r}")
    return Problem(
        words=tuple(words), start=start, moves=moves, states=tuple(sorted(named)), advance=_swap, slip=_missed_swap
    )


def _swap(state: str, move: Move) -> str:
    one, other = move.operands
    return {one: other, other: one}.get(state, state)


def _missed_swap(state: str, move: Move) -> str:
    """The ball stays although its cup moved, or goes along although it did not."""
    return state if state in move.operands else move.operands[1]


def _moves(listed: Sequence[str], width: int) -> tuple[Move, ...]:
    """``first 3 second 5`` taken apart: each ordinal in turn, followed by ``width`` operands."""
    rows = [listed[start : start + width + 1] for start in range(0, len(listed), width + 1)]
    if not rows or [row[0] for row in rows] != list(ORDINALS[: len(rows)]) or len(rows[-1]) != width + 1:
        raise ValueError(f"expected first, second, ... with {width} each: {' '.join(listed)!r}")
    return tuple(Move(ordinal=row[0], operands=tuple(row[1:])) for row in rows)


TASKS: dict[str, Task] = {
    "add": Task(_draw_add, _read_add, lambda length, sizes: sizes.modulus**length),
    "cups": Task(_draw_cups, _read_cups, lambda length, sizes: sizes.cups * (sizes.cups * (sizes.cups - 1)) ** length),
}
"""Name, which is the first word of its prompts -> task."""


# ---------------------------------------------------------------------------------------------------------------------
# prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a prompt asks for: the problem, the unit of the answer, and the style, if it names one."""

    problem: Problem
    unit: str
    style: str | None

    @property
    def text(self) -> str:
        return " ".join((*self.problem.words, self.unit, *([self.style] if self.style else [])))


def read_prompt(text: str) -> Ask:
    """What a prompt asks for; ``ValueError`` for any other text."""
    words = text.split()
    style = words.pop() if words and words[-1] in STYLES else None
    unit = words.pop() if words and words[-1] in UNITS else None
    if not words or unit is None or words[0] not in TASKS:
        raise ValueError(f"not a prompt of the tasks {', '.join(TASKS)}: {text!r}")
    return Ask(problem=TASKS[words[0]].read(words), unit=unit, style=style)


def draw_ask(rng: random.Random, tasks: Sequence[str], lengths: tuple[int, int], sizes: Sizes, *, styled: bool) -> Ask:
    """A random prompt: task, length (both ends included), unit, and a style in two of three prompts where ``styled``."""
    task = TASKS[rng.choice(tasks)]
    problem = task.read(task.draw(rng, rng.randint(*lengths), sizes))
    unit = rng.choice(UNITS)
    return Ask(problem=problem, unit=unit, style=rng.choice((None, *STYLES)) if styled else None)
