"""What is known of a prompt without its texts: last scores, and which prompts a page shows when not all fit."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bvpo.data.overview import SORTS, LastScore, PromptNote, SampleNote, choose_within, last_scores


def sample(view: Any = "trace", index: int = 0, *, tokens: int = 10, answer: bool = True, **rest: Any) -> SampleNote:
    return SampleNote(
        key=f"{view}{index}", view=view, index=index, num_tokens=tokens, size=100, cut=False, has_answer=answer, **rest
    )


def note(name: str, *, margin: float | None = 5.0, tokens: int = 10, unscorable: int = 0) -> PromptNote:
    samples = [sample("trace", tokens=tokens), sample("empty")]
    samples += [sample("empty", index + 1, answer=False) for index in range(unscorable)]
    margins: Any = {} if margin is None else {"trace": margin, "empty": margin + 1}
    return PromptNote(prompt_id=name, text=name, samples=samples, margins=margins)


def test_the_last_attempt_of_one_scorer_counts() -> None:
    """Mutation: the first attempt, the order of the rows, or another scorer's value."""
    rows = [
        {"sample_key": "a", "scorer": "s", "value": 2.0, "error": None, "extra": {"attempt": 1}},
        {"sample_key": "a", "scorer": "s", "value": None, "error": "e", "extra": {}},
        {"sample_key": "b", "scorer": "other", "value": 9.0, "error": None, "extra": {}},
        {"sample_key": "c", "scorer": "s", "value": None, "error": "no answer", "extra": {}},
    ]
    expected = {
        "a": LastScore(value=2.0, error=None, attempt=1),
        "c": LastScore(value=None, error="no answer", attempt=0),
    }
    assert last_scores(rows, "s") == last_scores(reversed(rows[:2] + rows[3:]), "s") == expected
    assert last_scores(rows, None) == expected
    assert last_scores(rows[2:3], "s") == {}


def test_a_prompt_in_numbers() -> None:
    """Mutation: the empty view's length, the larger margin, or a failed score taken for a score."""
    failed = LastScore(value=None, error="e")
    one = PromptNote(
        prompt_id="p",
        text="",
        samples=[
            sample("empty", 1, tokens=99),
            sample("trace", 1, tokens=7, score=failed),
            sample("trace", 0, tokens=5, answer=False),
            sample("empty", 0, score=LastScore(value=1.0, error=None)),
        ],
        margins={"empty": 2.0},
    )
    assert [s.index for s in one.of("empty")] == [0, 1]
    assert (one.longest, one.num_unscorable, one.margin, one.size) == (7, 2, 2.0, 400)
    assert one.lacking(paired=True) == ["trace"] and one.lacking(paired=False) == []
    assert PromptNote(prompt_id="q", text="").lacking(paired=False) == ["trace", "empty"]


def test_what_deserves_a_look_comes_first() -> None:
    """The odd prompts stand last and there is room for a quarter. Mutation: prompts taken in their order."""
    notes = [note(f"plain{n}") for n in range(16)]
    odd = [
        note("tight", margin=0.1),
        note("long", tokens=900),
        note("unscored", unscorable=3),
        note("bare", margin=None),
    ]
    chosen = choose_within([*notes, *odd], 5, lambda _: 1, paired=True)
    assert {one.prompt_id for one in odd} < {one.prompt_id for one in chosen}
    assert len(chosen) == 5
    for name, first in (("margin", "tight"), ("length", "long"), ("unscorable", "unscored")):
        assert min([*notes, *odd], key=SORTS[name]).prompt_id == first


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(0, 60))
def test_the_budget_holds(costs: list[int], budget: int) -> None:
    """Mutation: spending past the budget, a prompt twice, room left for a prompt that fits, or another order."""
    notes = [note(str(number)) for number in range(len(costs))]
    chosen = choose_within(notes, budget, lambda one: costs[int(one.prompt_id)], paired=True)
    spent = sum(costs[int(one.prompt_id)] for one in chosen)
    left_out = [cost for one, cost in zip(notes, costs, strict=True) if one not in chosen]
    assert spent <= budget
    assert all(spent + cost > budget for cost in left_out)
    assert [int(one.prompt_id) for one in chosen] == sorted(int(one.prompt_id) for one in chosen)
