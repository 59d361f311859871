"""Whether a final answer names the right number: the rule for benchmarks whose references are numbers (GSM8K, AIME, AMC).

In: a conversation, the model's final answer and the prompt's metadata, as function scorers get them. Out: 1.0 or 0.0; it
raises where the reference is no plain number. It compares values, not texts, and reads the last ``\\boxed{}``, which must
hold a plain number and nothing else, else the last number of the answer, unless that is a part of a formula. It knows no
algebra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?(?:[eE][-+]?\d{1,3})?(?![\d.]*\d)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}$")
_BOX = re.compile(r"\\f?boxed\s*\{")
_WRAPPED = re.compile(r"\\(?:text|math)(?:bf|rm|it)?\s*\{([^{}]*)\}")
_BOLD = re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])")  # 2**3 is a power
_GROUPED = re.compile(r"(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")

# What makes a number in a sentence a part of a formula. A variable is one letter; "a" and "I" are words.
_OPERAND = r"(?:\d|(?<![^\W\d_])[b-zB-HJ-Z]|[)\]}²³π])"
_OPERATOR = r"(?:\*\*|[-+*/^×·÷±<>≤≥≠]|\\(?:cdot|times|div|pm|mp|leq?|geq?|neq?|lt|gt)(?![a-z]))"
_BEFORE = re.compile(rf"[^\W\d]$|[_^√{{]$|\d:$|\w\($|[(\[][-+\d.,/\s]*,\s*$|{_OPERAND}\s*{_OPERATOR}\s*$")
_BEFORE_SIGN = re.compile(rf"[^\W_]$|{_OPERAND}\s*$")
_AFTER = re.compile(
    rf"[^\W\d_](?![^\W_])|(?:pi|sqrt|sin|cos|tan|log|ln)\b|[_(²³¼½¾√π]|\s*\^"
    rf"|\s*\\(?!(?:text|mathrm|mbox|quad)\b|[^a-z])|\s*{_OPERATOR}\s*(?:[({{\\]|[b-zB-HJ-Z](?![^\W_]))"
)
_REFERENCE_FIELDS = ("reference", "answer", "target", "solution")


def number(messages: Sequence[Mapping[str, str]], answer: str, meta: Mapping[str, Any]) -> float:
    """1.0 if the answer's number is the reference's: ``meta``'s first of reference, answer, target, solution."""
    right = reference_number(meta)
    found = final_number(answer)
    return float(found is not None and found == right)


def reference_number(meta: Mapping[str, Any]) -> Fraction:
    """The reference of a problem; GSM8K writes it behind ``####``."""
    for name in _REFERENCE_FIELDS:
        if meta.get(name) is not None:
            text = str(meta[name]).rpartition("####")[2]
            boxed = last_boxed(text)
            found = plain_number(text if boxed is None else boxed)
            if found is None:
                raise ValueError(
                    f"field {name!r} holds no number, or more than a number: {str(meta[name])[:60]!r}; grade formulas and "
                    "words with a function of your own, FILE.py:NAME(messages, answer, meta)"
                )
            return found
    raise ValueError(f"the prompt has no reference in any of {', '.join(_REFERENCE_FIELDS)}")


def final_number(text: str) -> Fraction | None:
    """The number that a text ends up with: in its last ``\\boxed{}``, else the last one written. A formula, in a box or at
    the end of a sentence, is no number: its digits say nothing."""
    boxed = last_boxed(text)
    return _last_number(text) if boxed is None else plain_number(boxed)


def plain_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, up to dollar signs, a unit in ``\\text{}`` and a full stop.
    A percentage is another number than its digits, and is none here."""
    plain = _UNIT.sub("", _clean(text).replace("\\$", "").replace("$", "").strip()).strip().removesuffix(".")
    plain = re.sub(r"^([-+])\s+", r"\1", plain)
    found = _NUMBER.fullmatch(plain)
    return _value(found[0]) if found and any(char.isdigit() for char in found[0]) else None


def last_boxed(text: str) -> str | None:
    """The content of the last closed ``\\boxed{...}``, braces matched."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def _last_number(text: str) -> Fraction | None:
    """``x = 3`` ends in a number, ``7y + 3`` and ``x > 3`` do not."""
    plain = _BOLD.sub(" ", _WRAPPED.sub(r" \1 ", _BOX.sub(" ", _clean(text))).replace("\\$", "").replace("$", ""))
    matches = [match for match in _NUMBER.finditer(plain) if _value(match[0]) is not None]
    if not matches:
        return None
    before, last, after = plain[: matches[-1].start()], matches[-1][0], plain[matches[-1].end() :]
    signed = last[0] in "-+" and _BEFORE_SIGN.search(before)
    return None if signed or _BEFORE.search(before) or _AFTER.match(after) else _value(last)


def _clean(text: str) -> str:
    """Signs, digits and thousands of typesetting as ASCII has them. Exponents (``²``) are no digits."""
    text = re.sub(r"[−－﹣]", "-", text.replace("\\!", "").replace("{,}", ","))
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    return _FRACTION.sub(_written, _GROUPED.sub("", text))


def _written(match: re.Match[str]) -> str:
    """``-\\frac{1}{2}`` is -1/2: a sign in front stays with the number. ``3\\frac{1}{2}`` is not 31/2."""
    before = match.string[: match.start()]
    return f"{' ' if before[-1:].isdigit() else ''}{match[1]}/{match[2]} "


def _value(text: str) -> Fraction | None:
    above, _, below = text.replace(",", "").replace(" ", "").partition("/")
    try:
        mantissa = Fraction(above)  # reads decimals and exponents
        return mantissa / int(below) if below else mantissa
    except (ValueError, ZeroDivisionError):
        return None
