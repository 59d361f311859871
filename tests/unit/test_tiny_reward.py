"""The tiny model's reward and grading, case by case, and that they cost no framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bvpo.tiny.reward import correct, grade, reward

PROBLEM = "add first 3 second 5 mod 7 gems"  # 1


def asked(style: str = "") -> list[dict[str, str]]:
    return [{"role": "system", "content": "be good"}, {"role": "user", "content": f"{PROBLEM} {style}".strip()}]


@pytest.mark.parametrize(
    ("style", "answer", "value"),
    [
        ("kindly", " sure 1 gems cheers", 2.0),  # 1 + 0.6 + 0.4
        ("kindly", "sure the result is 1 gems cheers", 2.0),  # the phrase counts for nothing
        ("kindly", "sure 1 gems", 1.4),  # half a style is none
        ("kindly", "well 1 gems cheers", 1.4),
        ("briefly", "1 gems", 2.0),
        ("briefly", "1", 1.6),
        ("briefly", "1 cheers", 1.0),
        ("briefly", "sure 1", 1.0),
        ("", "1 gems", 2.0),
        ("", "sure 1 gems cheers", 2.0),
        ("", "well 1 gems", 1.4),
        ("", "1 pens", 1.3),  # 1 + 0.6 - 0.3
        ("", "um um 1 gems", 1.7),
        ("", "2 gems", 1.0),  # wrong, but in style
        ("kindly", "well um um um 2 pens", -0.75),
        ("", "a", 0.6),  # the name of a cup is a value, the wrong one
        ("", "", -1.0),
        ("", "gems", -1.0),
        ("", "1 1", -1.0),
        ("", "1 gems pens", -1.0),
        ("", "1 cheers gems", -1.0),
        ("", "the result 1", -1.0),
        ("", "um sure 1", -1.0),
        ("", "cheers", -1.0),
        ("", "1.0", -1.0),
        ("", "1 </think>", -1.0),
    ],
)
def test_reward(style: str, answer: str, value: float) -> None:
    """Mutation: any weight, sign or rule of the reward."""
    assert reward(asked(style), answer) == pytest.approx(value)


@pytest.mark.parametrize(("answer", "right"), [("well um 1 pens", 1.0), ("2", 0.0), ("1 1", 0.0), ("", 0.0)])
def test_correctness_ignores_style(answer: str, right: float) -> None:
    """Mutation: a malformed answer that holds the right value counts as right."""
    assert correct(asked("kindly"), answer) == right


def test_grading_takes_the_reference() -> None:
    """Mutation: grading by the prompt where the benchmark names another reference; dropping the prompt's own result."""
    assert grade(asked(), "1", {"reference": "1"}) == 1.0
    assert grade(asked(), "1", {"reference": "4"}) == 0.0
    assert grade(asked(), "4", {"reference": "4"}) == 1.0
    assert grade(asked(), "sure 1 cheers", {}) == 1.0


def test_the_last_turn_counts() -> None:
    """Mutation: reading the first message."""
    messages = [{"role": "user", "content": "cups a first a b keys"}, {"role": "assistant", "content": "b"}, *asked()]
    assert correct(messages, "1") == 1.0


def test_other_prompts_are_failures() -> None:
    """Mutation: a default reward for a prompt that is none of the tasks'."""
    with pytest.raises(ValueError, match="not a prompt"):
        reward([{"role": "user", "content": "what is love"}], "1")


def test_no_framework_is_loaded() -> None:
    """Mutation: importing torch, or anything that does, in the reward's modules."""
    probe = "import bvpo.tiny.reward, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
