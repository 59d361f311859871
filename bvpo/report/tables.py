"""Plain-text tables: values with their intervals, in aligned columns.

In: rows of cells, an :class:`~bvpo.stats.Interval`, or the results of an evaluation. Out: text for a terminal or a log.
It computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bvpo.evaluation.metrics import EMPTY, MODE_TITLES, UNCLOSED
from bvpo.stats import Interval


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = "  ") -> Iterator[str]:
    """The rows, header first, as lines; the first ``left`` columns start at the left, the others end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()


def number(value: float | None, *, sign: bool = False) -> str:
    """Four digits that matter; a dash for what is not known."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"+{text}" if sign and value > 0 else text


def shown(interval: Interval, *, sign: bool = False) -> str:
    """``value [low, high]``."""
    if interval.value is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{number(interval.value, sign=sign)} [too few prompts]"
    ends = f"[{number(interval.low, sign=sign)}, {number(interval.high, sign=sign)}]"
    return f"{number(interval.value, sign=sign)} {ends}"


def of_asked(num: int, asked: int, dropped: int) -> str:
    """``22 of 41 (19 dropped)``: what a number rests on, of what was asked for, and the responses left out without an
    answer; just ``41`` where nothing is missing."""
    text = f"{num:,} of {asked:,}" if num < asked else f"{num:,}"
    return f"{text} ({dropped:,} dropped)" if dropped else text


def _as_what(rule: float | str | None) -> str:
    said = {"scored": "as the function scores the empty text", "lowest": "as the lowest score"}
    return said[rule] if isinstance(rule, str) else f"as {number(rule)}"


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line per benchmark, mode and metric, then what is left out and why."""
    rows = [("benchmark", "mode", "metric", "value", "prompts", "samples", "unclosed", "tokens")]
    notes = []
    for name, modes in results.items():
        for mode, one in modes.items():
            unclosed, tokens = Interval(**one["unclosed"]), Interval(**one["tokens"])
            for metric, found in one["metrics"].items():
                estimate = Interval(**found["estimate"])
                title = MODE_TITLES[mode]  # type: ignore[index]
                share = "-" if unclosed.value is None else f"{100 * unclosed.value:.1f} %"
                lost = sum(found["missing"].get(reason, 0) for reason in (UNCLOSED, EMPTY))
                prompts = of_asked(estimate.num_prompts, one["num_prompts"], lost)
                counts = (prompts, f"{found['num_samples']:,}", share, number(tokens.value))
                rows.append((name, title, metric, shown(estimate), *counts))
                if len(found["pass_at"]) > 1:
                    passes = ", ".join(f"pass@{k} {shown(Interval(**at))}" for k, at in found["pass_at"].items())
                    notes.append(f"{name} {title} {metric}: {passes}")
                if found["silent"]:
                    counted = f"{found['silent']:,} of {found['num_samples']:,} samples have no answer and are counted"
                    notes.append(f"{name} {title} {metric}: {counted} ({_as_what(one['without_answer'][metric])})")
                for reason, num in found["missing"].items():
                    notes.append(f"{name} {title} {metric}: {num:,} samples left out, {reason}")
    yield from aligned(rows, left=3)
    yield from (f"  {note}" for note in notes)
    yield "  [low, high]: 95 % interval over prompts"
