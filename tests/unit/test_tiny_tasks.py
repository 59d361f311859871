"""The tiny model's tasks and corpus: ground truth against a second computation, prompts read back, traces that add up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.tiny.corpus import CHECK, CONCLUSION, EQUALS, FILLERS, RETRACTION, Noise, write_answer, write_trace
from bvpo.tiny.reward import read_answer
from bvpo.tiny.tasks import ORDINALS, STYLES, TASKS, UNITS, Sizes, draw_ask, read_prompt

SIZES = Sizes(modulus=7, cups=4)
QUIET = Noise(filler=0.0, false_start=0.0, slip=0.0, recheck=0.0)
NOISY = Noise(filler=0.5, false_start=0.3, slip=0.0, recheck=0.5)


def by_position(ball: str, swaps: list[tuple[str, str]]) -> str:
    """Cups by what they hold, not by where one ball is: another way to compute the same."""
    holds = {name: name == ball for name in "abcdefgh"}
    for one, other in swaps:
        holds[one], holds[other] = holds[other], holds[one]
    return next(name for name in holds if holds[name])


@given(
    st.integers(2, 30).flatmap(
        lambda m: st.tuples(st.just(m), st.lists(st.integers(0, m - 1), min_size=2, max_size=10))
    )
)
def test_sums(case: tuple[int, list[int]]) -> None:
    """Mutation: a step that forgets the modulus, or starts from 0 and drops the first number."""
    modulus, numbers = case
    listed = " ".join(f"{ordinal} {number}" for ordinal, number in zip(ORDINALS, numbers, strict=False))
    assert TASKS["add"].read(f"add {listed} mod {modulus}".split()).result == str(sum(numbers) % modulus)


@given(
    st.sampled_from("abcd"),
    st.lists(st.permutations("abcd").map(lambda names: (names[0], names[1])), min_size=1, max_size=10),
)
def test_cups(ball: str, swaps: list[tuple[str, str]]) -> None:
    """Mutation: a swap that moves the ball in one direction only."""
    listed = " ".join(f"{ordinal} {one} {other}" for ordinal, (one, other) in zip(ORDINALS, swaps, strict=False))
    assert TASKS["cups"].read(f"cups {ball} {listed}".split()).result == by_position(ball, swaps)


@pytest.mark.parametrize("styled", [True, False])
def test_prompts_read_back(styled: bool) -> None:
    """Mutation: a unit or style lost between prompt and reward; a style in the benchmark."""
    rng = random.Random(1)
    asks = [draw_ask(rng, ("add", "cups"), (2, 4), SIZES, styled=styled) for _ in range(300)]
    for ask in asks:
        again = read_prompt(ask.text)
        assert (again.problem.words, again.unit, again.style) == (ask.problem.words, ask.unit, ask.style)
        assert again.problem.result == ask.problem.result
        assert 2 <= ask.problem.words.count("first") + sum(word in ORDINALS[1:] for word in ask.problem.words) <= 4
    assert {ask.style for ask in asks} == ({None, *STYLES} if styled else {None})
    assert {ask.unit for ask in asks} == set(UNITS) and {ask.problem.words[0] for ask in asks} == {"add", "cups"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gems",
        "add first 3 second 5 mod 7",  # no unit
        "add first 3 mod 7 gems",  # one number
        "add first 3 second 7 mod 7 gems",  # 7 is not below 7
        "add first 3 third 5 mod 7 gems",
        "add first 3 second 5 mod 1 gems",
        "cups a first b b gems",
        "cups a first b gems",
        "cups z first a b gems",
        "cups a gems",
        "sing first 3 second 5 mod 7 gems",
        "kindly add first 3 second 5 mod 7 gems",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    """Mutation: guessing at a text that is no prompt; its reward would be a number instead of a failure."""
    with pytest.raises(ValueError):
        read_prompt(text)


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("add first 3 second 5 third 2 mod 7 gems", "3 second 5 = 1 1 third 2 = 3 thus 3"),
        ("cups b first a c second b d keys", "b first a c = b b second b d = d thus d"),
    ],
)
def test_quiet_traces(text: str, trace: str) -> None:
    """Mutation: a step that shows the state after it instead of before, or a result out of turn."""
    words, value = write_trace(read_prompt(text).problem, random.Random(0), QUIET)
    assert " ".join(words) == trace and value == trace.split()[-1]


@given(st.integers(0, 10_000))
def test_noisy_traces_reach_the_result(seed: int) -> None:
    """Mutation: a false start that is not taken back, or a second look that goes on from the first one's result."""
    rng = random.Random(seed)
    ask = draw_ask(rng, ("add", "cups"), (2, 5), SIZES, styled=True)
    words, value = write_trace(ask.problem, rng, NOISY)
    assert value == ask.problem.result and words[-2:] == [CONCLUSION, value]
    steps = [word for word in words if word not in FILLERS]
    assert steps.count(EQUALS) == len(ask.problem.moves) * (1 + steps.count(CHECK)) + steps.count(RETRACTION)
    for at in (i for i, word in enumerate(steps) if word == EQUALS and steps[i + 2] != RETRACTION):
        ordinal = max(i for i in range(at) if steps[i] in ORDINALS)
        move = next(m for m in ask.problem.moves if m.ordinal == steps[ordinal])
        assert steps[at + 1] == ask.problem.advance(steps[ordinal - 1], move)


def test_slips_are_wrong_and_followed() -> None:
    """Mutation: a slip equal to the right result, or an answer that knows better than its trace."""
    rng, always = random.Random(3), Noise(filler=0.0, false_start=0.0, slip=1.0, recheck=0.0)
    for _ in range(200):
        problem = draw_ask(rng, ("add", "cups"), (2, 2), SIZES, styled=False).problem
        words, value = write_trace(problem, rng, always)
        assert value == words[-1]
        state = problem.start
        for move in problem.moves:
            assert problem.slip(state, move) != problem.advance(state, move)
            state = problem.slip(state, move)
        assert value == state


def test_answers_are_well_formed_and_ignore_the_style() -> None:
    """Mutation: SFT answers that follow the tag, so that nothing is left to align."""
    rng = random.Random(4)
    ask = {
        style: read_prompt(f"add first 3 second 5 mod 7 gems {style}".replace(" None", "")) for style in (None, *STYLES)
    }
    share = {}
    for style, asked in ask.items():
        parts = [read_answer(" ".join(write_answer(asked, "1", rng))) for _ in range(1500)]
        assert all(p is not None and p.value == "1" for p in parts)
        share[style] = sum(p is not None and p.opener == "sure" and p.closer for p in parts) / len(parts)
    assert all(0.08 < value < 0.16 for value in share.values())  # 0.6 / 2 * 0.4 = 0.12


def test_counts() -> None:
    """Mutation: counting swaps of a cup with itself."""
    assert TASKS["add"].count(3, SIZES) == 343
    assert TASKS["cups"].count(2, SIZES) == 4 * 12 * 12
