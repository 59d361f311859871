"""Numbers as final answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.core.grading import final_number, last_boxed, number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", 42),
        ("17 + 25 = 42", 42),
        ("so \\boxed{1{,}000} apples, not 7", 1000),
        ("\\boxed{12} or rather \\boxed{13}", 13),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("it costs $1,234.50", Fraction(2469, 2)),
        ("-3", -3),
        ("1e-5", Fraction(1, 100000)),
        ("3/4", Fraction(3, 4)),
        ("2024-10 = 2014", 2014),
        ("no number", None),
        ("\\boxed{12", 12),
        ("1e99999999999", 99999999999),  # not a number to compute
        ("", None),
    ],
)
def test_final_number(text: str, expected: int | Fraction | None) -> None:
    """Mutation: the first number, a box that is not closed, thousands read as decimals."""
    assert final_number(text) == expected


def test_grade() -> None:
    """Mutation: texts compared instead of values, the reasoning of GSM8K's references read as the answer."""
    gsm8k = {"question": "?", "answer": "2 + 2 = <<2+2=4>>4\\n#### 1,004"}
    assert number([], "**1004**", gsm8k) == 1.0
    assert number([], "4", gsm8k) == 0.0
    assert number([], "27", {"answer": 27.0}) == 1.0
    assert number([], "", {"answer": 27.0}) == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        number([], "1", {"reference": "blue"})
    with pytest.raises(ValueError, match="no reference"):
        number([], "1", {})


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.0", "\\boxed{{{}}}", "is {}.", "${:,}$"]))
def test_every_way_to_write_an_integer(value: int, form: str) -> None:
    """Mutation: a sign or a group of thousands that is lost."""
    assert final_number(form.format(value)) == value


@given(st.text(alphabet="\\boxed{}0123456789., -/e+$", max_size=60))
def test_never_raises(text: str) -> None:
    """Mutation: a fraction over zero, or braces that never close."""
    final_number(text)
    last_boxed(text)
