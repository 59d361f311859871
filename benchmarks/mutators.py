# ruff: noqa: E501
"""Damage of every kind, drawn by a seeded generator: to bytes, to JSON values, to TOML lines, to Jinja templates.

In: a ``random.Random`` and something whole. Out: the same, damaged in one to three places. Nothing here knows bvpo.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Chance = random.Random

CONTROLS = [
    "\x00",
    "\x1b]0;owned\x07",
    "\x1b[31m",
    "\u202e",
    "\u2028",
    "\x85",
    "\x0c",
    "\r",
    "\x7f",
    "\ufeff",
    "\ufffe",
]
TEXTS = [
    "", " ", "none", "nan", "1e999", "true", "a" * 5000, "é" * 300, "\ud800", "../../etc", "/", ".", "x\ny", "{{ 1 }}",
    "%s%n", "</think>", "<think>", "0x10", "-0", "\\", '"', "'", *CONTROLS,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30, 10**400]
# what json.dumps would not write: put in as text
RAW_JSON = [
    "NaN", "Infinity", "-Infinity", "9" * 5000, "-" + "1" * 20000, "1e99999", "[" * 90 + "]" * 90, "[" * 700 + "]" * 700,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 400 + "1" + "}" * 400, '{"a":' * 90_000 + "1" + "}" * 90_000, "[" * 3000,
    '{"a":1,"a":2}', "01", "+1", "1.", "tru", "", "'x'", '"\\ud800"', '"\\u0000"', '"\t"', "1" + "0" * 400 + ".5",
]  # fmt: skip
RAW_TOML = [
    "[" * 100 + "]" * 100, "[" * 5000 + "]" * 5000, "[" * 60_000, "{a=" * 300 + "1" + "}" * 300,
    "{a=" * 5000 + "1" + "}" * 5000, "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 6000, "0b" + "1" * 90_000, "1" + "0" * 400,
    "2" + "0" * 30, "inf", "-inf", "nan", "1e400", "1979-05-27T07:32:00Z", "1979-05-27", "07:32:00", "2021-02-31",
    "0000-00-00", "1979-05-27T07:32:00+99:99", "true", "0", "-1", "1_000", "0.5", "[]", "{}", '""', '"none"', "[1, 'a', [true]]",
    '["none"]', '[{a = 1}, {b = "none"}]', "{ a = 1, a = 2 }", '"""x\ny"""', "'''\n'''", '"\\ud800"', '"\\u0000"', '"\\U0010ffff"',
    '"\\x41"', "''", "1979-05-27 07:32:00.999999999999", '"' + "a" * 70_000 + '"', "{" + ", ".join(f"k{n} = 1" for n in range(500)) + "}",
    '{"a.b" = 1, "" = 2, "\\n" = 3}', "[nan]", "{a = inf}", "{a = 1979-05-27}", "[1979-05-27]", "+1", "--1", "0o777",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# bytes


def damaged_bytes(chance: Chance, data: bytes) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        data = chance.choice(_BYTES)(chance, data)
    return data


def _at(chance: Chance, data: Sequence[Any]) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: Chance, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def _cut(chance: Chance, data: bytes) -> bytes:
    start = _at(chance, data)
    return data[:start] + data[start + chance.choice([1, 2, 7, 40, 4000]) :]


def _twice(chance: Chance, data: bytes) -> bytes:
    start = _at(chance, data)
    piece = data[start : start + chance.choice([1, 5, 60])]
    return data[:start] + piece * chance.choice([2, 3, 500]) + data[start:]


def _put(chance: Chance, data: bytes) -> bytes:
    odd = [
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xf4\x90\x80\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\n\n",
    ]
    odd += [b'"', b"'", b"[", b"]", b"{", b"}", b",", b"=", b"\\", b"#", b'"""', b"99999999999999999999"]
    odd += [text.encode("utf-8", "surrogatepass") for text in CONTROLS]
    at = _at(chance, data)
    return data[:at] + chance.choice(odd) + data[at:]


def _encode(chance: Chance, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"]), "replace")


def _noise(chance: Chance, data: bytes) -> bytes:
    start = _at(chance, data)
    noise = chance.randbytes(chance.choice([1, 8, 300]))
    return data[:start] + noise + data[start + len(noise) :]


_BYTES: list[Callable[[Chance, bytes], bytes]] = [
    _flip, _flip, _cut, _twice, _put, _put, _put, _noise,
    _encode,
    lambda chance, data: data[: _at(chance, data)],
    lambda chance, data: b"",
    lambda chance, data: data.replace(b"\n", b"\r\n"),
    lambda chance, data: data.replace(b"\n", b""),
    lambda chance, data: b"\xef\xbb\xbf" + data,
    lambda chance, data: data + data,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# JSON

_RAW = "raw text \u2603 "


def odd_value(chance: Chance) -> Any:
    """A value of a random type; some stand for text that no JSON value has (:func:`json_text`)."""
    return chance.choice(
        [
            lambda: chance.choice([None, True, False, [], {}, [[]], [None], {"": None}]),
            lambda: chance.choice(NUMBERS),
            lambda: chance.choice(TEXTS),
            lambda: _RAW + str(chance.randrange(len(RAW_JSON))),
        ]
    )()


def json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for number, raw in enumerate(RAW_JSON):
        text = text.replace(f'"{_RAW}{number}"', raw)
    return text


def damaged_json(chance: Chance, value: Any) -> Any:
    """A copy with values replaced, removed, renamed, repeated or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places or chance.random() < 0.03:
            return odd_value(chance)
        holder, key = chance.choice(places)
        change = chance.randrange(8)
        if change < 4:
            holder[key] = odd_value(chance)
        elif change == 4:
            del holder[key]
        elif change == 5:
            holder[key] = chance.choice([[holder[key]], {"a": holder[key]}, [holder[key]] * 3, str(holder[key])])
        elif isinstance(holder, dict):
            holder[chance.choice([key + "x", "", "schema", "\x1b[2J", key.upper(), "__class__"])] = (
                holder.pop(key) if change == 6 else odd_value(chance)
            )
        else:
            other = chance.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
            holder.insert(key, odd_value(chance))
    return value


def _places(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield value, key
        if isinstance(item, (dict, list)) and len(item) < 2000:
            yield from _places(item)


def damaged_json_file(chance: Chance, data: bytes) -> bytes:
    """Of a file that holds one JSON value, or one a line."""
    if chance.random() < 0.4:
        return damaged_bytes(chance, data)
    try:
        return json_text(damaged_json(chance, json.loads(data))).encode("utf-8", "surrogatepass")
    except ValueError:
        return damaged_json_lines(chance, data)


def damaged_json_lines(chance: Chance, data: bytes) -> bytes:
    lines = data.split(b"\n")
    if chance.random() < 0.3 or not any(lines):
        return damaged_bytes(chance, data)
    at = chance.choice([number for number, line in enumerate(lines) if line])
    try:
        value = damaged_json(chance, json.loads(lines[at]))
        lines[at] = json_text(value).encode("utf-8", "surrogatepass")
    except ValueError:
        lines[at] = damaged_bytes(chance, lines[at])
    if chance.random() < 0.15:
        lines.insert(chance.randrange(len(lines)), chance.choice(lines))
    return b"\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# TOML


def damaged_toml(chance: Chance, text: str) -> bytes:
    if chance.random() < 0.25:
        return damaged_bytes(chance, text.encode())
    lines = text.split("\n")
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        keys = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
        at = chance.choice(keys or [0])
        key = lines[at].partition("=")[0].strip() or "name"
        change = chance.randrange(10)
        if change < 5:
            lines[at] = f"{key} = {chance.choice(RAW_TOML)}"
        elif change == 5:
            odd = [
                f"{key}x",
                f'"{key}"',
                f"{key}.a",
                ".".join([key] + ["a"] * chance.choice([3, 900, 6000])),
                '""',
                f"{key} {key}",
            ]
            lines[at] = f"{chance.choice(odd)} = {chance.choice(RAW_TOML)}"
        elif change == 6:
            sections = [
                "[train]",
                "[model]",
                "[[model]]",
                "[]",
                "[a.b]",
                "[" + ".".join("a" * 3000) + "]",
                "[train.loss.beta]",
            ]
            lines.insert(at, chance.choice(sections))
        elif change == 7:
            lines.insert(at, lines[at])
        elif change == 8:
            del lines[at]
        else:
            other = chance.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# chat templates

_PIECES = [
    "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ messages[99].content }}", "{{ messages[0].content.nothing.at.all }}",
    "{{ raise_exception('no\nno') }}", "{{ nowhere() }}", "{{ messages }}", "{{ '%s' % messages }}", "{{ '%d' % 'x' }}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(1000000000) %}x{% endfor %}", "{{ range(99999) | list | length }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(34) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
    "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ 10 ** 9999999 }}", "{% set x = 7 ** (7 ** 12) %}", "{{ 2 ** -1 }}", "{{ 0 ** -1 }}",
    "{{ 'a' * 99999999999 }}", "{{ 'a' * 200000000 }}", "{{ lipsum(n=100000000) }}", "{{ lipsum(n=1, max=10**9) }}", "{{ cycler() }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for m in messages %}{% if messages.append(m) %}{% endif %}{% endfor %}",
    "{{ messages | tojson }}", "{{ messages | join | upper | wordwrap(0) }}", "{{ 'x' | indent(10 ** 10) }}", "{{ 'x' | center(10 ** 11) }}",
    "{{ 'x'.ljust(99999999999) }}", "{{ '{:>99999999999}'.format(1) }}", "{{ '%099999999999d' % 1 }}", "{{ 1 | batch(0) | list }}",
    "{{ range(10) | batch(0) | list }}", "{{ [1] | slice(0) | list }}", "{{ 'a' | filesizeformat }}", "{{ 1e308 * 10 }}", "{{ 5 | round(400) }}",
    "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}", "{% block b %}{{ super() }}{% endblock %}",
    "{% block b %}{{ self.b() }}{% endblock %}", "{% break %}", "{% for m in messages %}{% break %}{% endfor %}", "{% generation %}x{% endgeneration %}",
    "{% if %}", "{{", "{% endfor %}", "{{ ( }}", "{#", "{% raw %}", "{{ 'x'", "{% set messages = none %}", "{% set x %}", "{% unknown %}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(messages) }}", "{{ strftime_now('\ud800') }}", "{{ strftime_now('%' * 9) }}",
    "{{ messages[0].content | replace('', 'aaaa') | replace('', 'aaaa') }}", "\ud800", "\x00", "{{ '\ud800' }}",
    "{{ (((((1))))) }}", "{{ " + "(" * 400 + "1" + ")" * 400 + " }}", "{{ " + "-" * 3000 + "1 }}", "{{ " + "[" * 5000 + " }}",
    "{{ " + "not " * 3000 + "1 }}", "{{ " + " + ".join("1" * 1 for _ in range(4000)) + " }}", "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{% for a in [1] %}" * 60 + "{% endfor %}" * 60, "{{ 'a' ~ " + "9" * 5000 + " }}", "{{ dict(a=1).b.c }}", "{{ caller() }}", "{{ loop.index }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages[0].content | regex }}", "{{ 'a'.encode('x') }}",
    "{{ messages[0].content.format(**{}) }}", "{{ '{0.__class__}'.format(1) }}", "{{ namespace(**{'a': 1}).b }}", "{{ joiner(1)(2) }}",
    "{{ messages | map('upper') | list }}", "{{ messages | sort | list }}", "{{ messages | groupby('x') | list }}", "{{ none + 1 }}",
]  # fmt: skip


def damaged_template(chance: Chance, whole: str) -> str:
    """Pieces that fail, never end or eat memory, put into a good template, or bytes of it damaged."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, whole.encode()).decode("utf-8", "surrogateescape")
    for _ in range(chance.choice([1, 1, 2])):
        cuts = [0, len(whole), *(at for at in range(len(whole)) if whole.startswith(("{{", "{%"), at))]
        at = chance.choice(cuts)
        whole = whole[:at] + chance.choice(_PIECES) + whole[at:]
    return whole if chance.random() < 0.9 else chance.choice(_PIECES)
