"""Prompt cleaning: each reason for a drop, exact near-duplicate search, decontamination, and splits that stay."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.data.cleaning import (
    REASONS,
    Drop,
    assign_split,
    contamination_drops,
    exact_duplicate_drops,
    near_duplicate_drops,
    normal_text,
    parse_messages,
    prompt_id,
    structural_problem,
)
from bvpo.data.overlap import OverlapIndex, near_duplicates, words, words_and_operators
from bvpo.records import Message


def chat(*turns: str) -> tuple[Message, ...]:
    """Turns written ``role: text``; text alone is the user's."""
    pairs = [turn.split(": ", 1) if ": " in turn else ["user", turn] for turn in turns]
    return tuple(Message(role=role, content=content) for role, content in pairs)


# ------------------------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ((), "empty", "no turns"),
        (chat(""), "empty", "turn 1 (user) has no text"),
        (chat("system: s", "user: \n\t "), "empty", "turn 2 (user) has no text"),
        (chat("tool: x"), "wrong_roles", "turn 1: role 'tool', expected system, user, assistant"),
        (chat("user: a", "system: b"), "wrong_roles", "turn 2 is system, expected assistant"),
        (chat("user: a", "user: b"), "wrong_roles", "turn 2 is user, expected assistant"),
        (chat("assistant: a", "user: b"), "wrong_roles", "turn 1 is assistant, expected user"),
        (chat("user: a", "assistant: b"), "last_turn_not_user", "it ends with assistant"),
        (chat("system: a"), "last_turn_not_user", "it ends with system"),
        (chat("system: ab", "user: abc"), "too_long_chars", "5 characters"),
    ],
)
def test_each_structural_problem(messages: tuple[Message, ...], reason: str, detail: str) -> None:
    """Mutation: any check left out, or reported under another reason."""
    assert structural_problem(messages, max_chars=4) == (reason, detail)
    assert reason in REASONS


@pytest.mark.parametrize(
    "messages",
    [chat("a"), chat("system: s", "user: a"), chat("user: a", "assistant: b", "user: c"), chat("user: abcd")],
)
def test_good_conversations_pass(messages: tuple[Message, ...]) -> None:
    """Mutation: a check that refuses ordinary conversations, or counts the limit itself as too long."""
    assert structural_problem(messages, max_chars=4) is None


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ("hi", chat("hi")),
        ([{"role": "user", "content": "hi", "name": None}], chat("hi")),
        ([], ()),
        (5, None),
        ({"role": "user", "content": "hi"}, None),
        (["hi"], None),
        ([{"role": "user"}], None),
        ([{"role": "user", "content": [{"type": "image"}]}], None),
    ],
)
def test_parse_messages(value: Any, messages: Any) -> None:
    """Mutation: guessing at what is no conversation."""
    assert parse_messages(value) == messages


def test_prompt_ids_follow_the_content() -> None:
    """Mutation: an id that ignores roles or normalises, so that different prompts share it; or any change of recipe."""
    ids = {prompt_id(m) for m in (chat("a"), chat("A"), chat("a "), chat("system: a"), chat("user: a", "assistant: a"))}
    assert len(ids) == 5
    assert prompt_id(chat("a")) == "593757134f0028f9"


# ------------------------------------------------------------------------------------------------ duplicates


def test_exact_duplicates_keep_the_first() -> None:
    """Mutation: keeping the last, or comparing without the roles or the system message."""
    conversations = [
        chat("What is  2+2?"),
        chat("what is 2+2?\n"),
        chat("What is 2+3?"),
        chat("system: Be brief.", "user: What is 2+2?"),
        chat("ｗhat is 2+2?"),
    ]
    ids = [f"id{n}" for n in range(5)]
    assert exact_duplicate_drops(conversations, ids) == [
        Drop(index=1, reason="exact_duplicate", detail="of id0"),
        Drop(index=4, reason="exact_duplicate", detail="of id0"),
    ]


def test_normal_text() -> None:
    """Mutation: case, spacing or Unicode form that counts."""
    assert normal_text("  Ａ\u00a0b\r\n\tSTRASSE ") == normal_text("a b straße")


def shingles(text: list[str], size: int) -> set[tuple[str, ...]]:
    size = min(size, len(text))
    return {tuple(text[i : i + size]) for i in range(len(text) - size + 1)} if text else set()


def by_definition(texts: list[list[str]], threshold: float, size: int) -> list[tuple[int, int]]:
    """Near duplicates by comparing every text with every kept one before it."""
    kept: list[int] = []
    found = []
    for index, text in enumerate(texts):
        mine = shingles(text, size)
        near = None
        for other in kept:
            theirs = shingles(texts[other], size)
            if mine and len(mine & theirs) / len(mine | theirs) >= threshold - 1e-12:
                near = other
                break
        if near is None:
            kept.append(index)
        else:
            found.append((index, near))
    return found


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=9), max_size=25),
    st.sampled_from([0.3, 0.5, 0.6, 0.8, 0.9, 1.0]),
    st.integers(1, 4),
)
def test_near_duplicates_are_exactly_those_of_the_definition(
    texts: list[list[str]], threshold: float, size: int
) -> None:
    """Mutation: a prefix one shingle too short, a size bound on the wrong side, or dropped texts that attract others."""
    found = near_duplicates(texts, threshold=threshold, shingle=size)
    assert [(near.index, near.of) for near in found] == by_definition(texts, threshold, size)


def test_near_duplicates_of_long_texts() -> None:
    """Mutation: the same, on texts of realistic length with few changed words."""
    dice = random.Random(3)
    vocabulary = [f"w{n}" for n in range(300)]
    texts: list[list[str]] = [dice.choices(vocabulary, k=dice.randrange(20, 80)) for _ in range(40)]
    for _ in range(200):
        copy = list(dice.choice(texts[:40]))
        for _ in range(dice.randrange(0, 6)):
            copy[dice.randrange(len(copy))] = dice.choice(vocabulary)
        texts.append(copy)
    expected = by_definition(texts, 0.8, 3)
    found = near_duplicates(texts, threshold=0.8, shingle=3)
    assert [(near.index, near.of) for near in found] == expected
    assert 40 < len(expected) < 195


def test_near_duplicate_details_and_groups() -> None:
    """Mutation: comparing prompts under different system messages, or a shared system message that makes all alike."""
    system = "system: " + "You are a careful assistant that answers briefly and in good style. " * 5
    question = "How many apples are left when I eat three of the ten that I bought yesterday at the market"
    conversations = [
        chat(question),
        chat(f"{question}?!"),
        chat(system, f"user: {question}"),
        chat(system, "user: Name the capital of France and two of its rivers please"),
        chat(f"{question} today"),
    ]
    ids = [f"id{n}" for n in range(5)]
    assert near_duplicate_drops(conversations, ids, threshold=0.8, shingle=3) == [
        Drop(index=1, reason="near_duplicate", detail="of id0, similarity 0.94"),
        Drop(index=4, reason="near_duplicate", detail="of id0, similarity 0.94"),
    ]


def test_operators_make_different_questions() -> None:
    """Mutation: near duplicates by words alone."""
    drops = near_duplicate_drops([chat("Compute 3+5"), chat("Compute 3-5")], ["a", "b"], threshold=0.8, shingle=3)
    assert drops == []


def test_no_texts_at_all() -> None:
    """Mutation: array code that needs at least one entry."""
    assert near_duplicates([], threshold=0.8, shingle=3) == []
    assert near_duplicates([[], []], threshold=0.8, shingle=3) == []
    assert OverlapIndex([], 13).find([["a"], []]) == []
    assert OverlapIndex([["x"] * 20], 13).find([]) == []


def test_words_of_many_scripts() -> None:
    """Mutation: a run of Chinese taken for one word, or mark-up that keeps copies apart."""
    assert words("Don't PANIC: $x_1 = 2$") == ["don", "t", "panic", "x", "1", "2"]
    assert words("我有三个苹果") == list("我有三个苹果")
    assert words_and_operators("a+b ≤ −c") == ["a", "+", "b", "≤", "−", "c"]


# ------------------------------------------------------------------------------------------------ decontamination


ITEM = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May"


def contaminated(prompt: str, item: str, ngram: int = 13) -> bool:
    return bool(contamination_drops([chat(prompt)], [item], ["bench:1"], ngram=ngram))


@pytest.mark.parametrize(
    ("prompt", "item", "hit"),
    [
        (ITEM, ITEM, True),
        (f"Solve: {ITEM.upper()}!! Think well.", ITEM, True),
        (" ".join(ITEM.split()[3:16]), ITEM, True),  # 13 words in a row
        (" ".join(ITEM.split()[3:15]), ITEM, False),  # 12 words
        (" ".join(reversed(ITEM.split())), ITEM, False),
        (
            "Please compute the sum of the first ten odd numbers now",
            "Compute the sum of the first ten odd numbers",
            True,
        ),
        ("Compute the sum of the first ten odd", "Compute the sum of the first ten odd numbers", False),
        ("Compute $1+1$.", "compute 1 + 1", True),  # a short item is found as the whole prompt
        ("Compute 1+1 and 2+2", "compute 1 + 1", False),
        ("anything", "", False),
    ],
)
def test_contamination(prompt: str, item: str, hit: bool) -> None:
    """Mutation: a run one word too long or short, word order ignored, or short items found everywhere or nowhere."""
    assert contaminated(prompt, item) == hit


def test_contamination_names_item_and_words() -> None:
    """Mutation: naming the wrong item or run; the longest run is named."""
    items = ["other text " * 10, "eight small words that are in the prompt", ITEM]
    prompt = chat(f"eight small words that are in the prompt. {ITEM}")
    (drop,) = contamination_drops([prompt], items, ["a:1", "a:2", "b:7"], ngram=13)
    assert drop == Drop(index=0, reason="contaminated", detail="b:7: " + " ".join(words(ITEM)[:13]))


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=6),
    st.lists(st.lists(st.sampled_from("abc"), max_size=14), max_size=6),
    st.integers(2, 10),
)
def test_overlap_is_exactly_that_of_the_definition(items: list[list[str]], texts: list[list[str]], ngram: int) -> None:
    """Mutation: runs that cross from one text into the next, or a search that reads past the end of its table."""

    def hit(text: list[str], item: list[str]) -> bool:
        length = min(len(item), ngram)
        if length < min(8, ngram):
            return bool(item) and text == item
        runs = {tuple(item[i : i + length]) for i in range(len(item) - length + 1)}
        return any(tuple(text[i : i + length]) in runs for i in range(len(text) - length + 1))

    found = {overlap.index: overlap for overlap in OverlapIndex(items, ngram).find(texts)}
    assert set(found) == {n for n, text in enumerate(texts) if any(hit(text, item) for item in items)}
    for index, overlap in found.items():
        run = texts[index][overlap.start : overlap.stop]
        assert " ".join(run) in " ".join(items[overlap.item])
        assert overlap.stop > overlap.start


# ------------------------------------------------------------------------------------------------ splits


def splits(num: int, **settings: Any) -> list[str]:
    return [
        assign_split(chat(f"prompt {n}"), **{"seed": 1, "validation": 0.1, "test": 0.2, **settings}) for n in range(num)
    ]


def test_split_fractions_and_stability() -> None:
    """Mutation: a split by position, a fraction that moves the other split's prompts, or a seed that does nothing."""
    before = splits(4000)
    shares = np.array([before.count(name) for name in ("train", "validation", "test")]) / 4000
    assert np.abs(shares - [0.7, 0.1, 0.2]).max() < 4 * 0.5 / 4000**0.5
    assert splits(5000)[:4000] == before
    for wider in (splits(4000, validation=0.3), splits(4000, test=0.5)):
        assert all(new == old for old, new in zip(before, wider, strict=True) if old != "train")
    assert splits(4000, seed=2) != before
    assert set(splits(100, validation=0.0, test=0.0)) == {"train"}


def test_split_follows_the_normal_form() -> None:
    """Mutation: spelling that decides, so that copies land in train and test."""
    for n in range(50):
        pair = [
            assign_split(chat(text.format(n)), seed=1, validation=0.3, test=0.3) for text in ("Word {}", " word  {}")
        ]
        assert pair[0] == pair[1]
