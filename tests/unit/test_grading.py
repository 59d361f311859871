"""Numbers as final answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.evaluation.grading import final_number, last_boxed, number


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
        ("1e99999999999", None),  # not a number to compute
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


@pytest.mark.parametrize(
    ("answer", "reference", "expected", "why"),
    [
        ("\\boxed{7y+3}", "3", 0.0, "a formula is not its last digit"),
        ("\\boxed{99\\sqrt2}", "2", 0.0, "nor is a root"),
        ("\\boxed{x = 3}", "3", 0.0, "an equation is no plain number"),
        ("\\boxed{3\\frac{1}{2}}", "31/2", 0.0, "a mixed number is not the digits put together"),
        ("\\boxed{\\$1,234.50}", "1234.5", 1.0, "money"),
        ("\\boxed{1, 2}", "2", 0.0, "two numbers are not one"),
        ("\\boxed{50\\%}", "50", 0.0, "a percentage is another number"),
        ("\\boxed{-\\frac{1}{2}}", "-0.5", 1.0, "the sign of a fraction"),
        ("\\boxed{\\dfrac{1}{2}}", "1/2", 1.0, "a fraction in either form"),
        ("\\boxed{3.0}", "3", 1.0, "values, not texts"),
        ("\\boxed{12\\text{ cm}}", "12", 1.0, "a unit in words"),
        ("\\boxed{1,000}.", "1000", 1.0, "thousands"),
        ("\\boxed{\u22125}", "-5", 1.0, "the minus sign of typesetting"),
        ("\\boxed{1e3}", "1000", 1.0, "an exponent"),
        ("The answer is 12.", "\\boxed{12}", 1.0, "a full stop ends the sentence"),
        ("\\boxed{\u0663}", "3", 1.0, "a digit of another script"),
        ("It is \uff13\u0664.", "34", 1.0, "such digits in a sentence"),
        ("It is \u22123.", "-3", 1.0, "a minus of typesetting in a sentence"),
        ("It is \uff0d3.", "-3", 1.0, "a wide minus"),
        ("It is 10\u202f000.", "10000", 1.0, "thousands set apart by a thin space"),
        ("It is 3\u00b2.", "3", 0.0, "an exponent is not left out"),
        ("It is 3\u00b2.", "32", 0.0, "nor read as a digit"),
        ("7y+3", "3", 0.0, "a formula without a box"),
        ("The answer is 7y + 3.", "3", 0.0, "a formula with spaces"),
        ("so $x = 3(y+1)$", "3", 0.0, "a factor"),
        ("so 3 + x", "3", 0.0, "a sum that ends in a letter"),
        ("5 - 3", "3", 0.0, "a difference"),
        ("5-3", "-3", 0.0, "a difference is no sign"),
        ("It is 2**3", "3", 0.0, "a power"),
        ("It is 10^2", "2", 0.0, "an exponent"),
        ("It is \\sqrt{3}", "3", 0.0, "a root"),
        ("It is 99\\sqrt3", "3", 0.0, "a root in a sentence"),
        ("It is \\frac{x}{3}", "3", 0.0, "a fraction of a letter"),
        ("It is 2\\pi", "2", 0.0, "a multiple of a constant"),
        ("x > 3", "3", 0.0, "an inequality"),
        ("It is (2, 3)", "3", 0.0, "a pair"),
        ("f(3)", "3", 0.0, "an argument"),
        ("x = 3", "3", 1.0, "what a sentence of algebra ends with"),
        ("It is a **42**", "42", 1.0, "bold, behind an article"),
        ("10^2 = 100", "100", 1.0, "behind the last equals sign"),
        ("Step 1 - 5 apples", "5", 0.0, "an ambiguous dash behind a digit"),
        ("the answer - 5 apples", "5", 1.0, "a dash behind a word"),
        ("It is 12cm.", "12", 1.0, "a unit"),
        ("\\(x = \\mathbf{5}\\)", "5", 1.0, "a font"),
    ],
)
def test_an_answer_is_a_number_or_it_is_wrong(answer: str, reference: str, expected: float, why: str) -> None:
    """Mutation: a formula's last digits, boxed or not, taken for its value; a plain number in another dress refused."""
    assert number([], answer, {"reference": reference}) == expected, why


@pytest.mark.parametrize(
    "reference", ["x^2+3", "3\\sqrt2", "(3, \\frac{\\pi}{2})", "50\\%", "5 or 6", "\\text{east}", "2x"]
)
def test_a_reference_that_is_no_plain_number_is_refused(reference: str) -> None:
    """Mutation: its last digits taken for it, so that `7y+3` is right against `x^2+3`."""
    with pytest.raises(ValueError, match="a function of your own"):
        number([], "\\boxed{7y+3}", {"reference": reference})
