"""The words, table and plots of ``bvpo compare``: rows of differences in, lines for a terminal or values for a page out.

Both kinds of comparison, of two evaluations and of methods over seeds, become one :class:`Told`, from which text and page
are made, so that they cannot disagree. The numbers come as they are; nothing here computes or judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bvpo.evaluation.comparing import EvaluationRow, SeedsRow
from bvpo.evaluation.metrics import MODE_TITLES, MODES, Mode
from bvpo.evaluation.results import SHARES
from bvpo.report.charts import Chart, Point, dot_chart
from bvpo.report.tables import aligned, number, of_asked, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One difference as a plot shows it. ``method`` is empty where one pair is compared."""

    method: str
    benchmark: str
    mode: Mode
    metric: str
    value: float | None
    low: float | None
    high: float | None
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Everything that is said: ``left`` columns of the table are words, and ``legend`` says what its brackets are."""

    a: str
    b: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int
    notes: tuple[str, ...]
    legend: str
    level: float
    bars: tuple[Bar, ...]
    bar_header: tuple[str, ...]
    bar_legend: str


def of_evaluations(a: str, b: str, rows: Sequence[EvaluationRow], notes: Sequence[str] = ()) -> Told:
    """Two evaluations: a line per benchmark, mode and metric."""
    said: dict[str, None] = {}
    table, bars = [], []
    for one in rows:
        paired, title = one.paired, MODE_TITLES[one.mode]
        counts = (
            of_asked(paired.num_prompts, paired.num_asked, paired.num_dropped),
            *(f"{num:,}" for num in (paired.better, paired.equal, paired.worse)),
        )
        found = paired.difference
        means = (number(paired.mean_a), number(paired.mean_b), shown(found, sign=True))
        table.append((one.benchmark, title, one.metric, *means, *counts))
        cells = (*(number(value) for value in (found.value, found.low, found.high)), counts[0])
        bars.append(
            Bar(
                method="", benchmark=one.benchmark, mode=one.mode, metric=one.metric,
                value=found.value, low=found.low, high=found.high, cells=cells,
            )
        )  # fmt: skip
        if paired.only_a or paired.only_b:
            missing = f"{paired.only_a:,} prompts have a value in A only, {paired.only_b:,} in B only"
            said[f"{one.benchmark} {title} {one.metric}: {missing}"] = None
        said |= {f"{one.benchmark} {title}: {note} (B -> A)": None for note in one.notes}
    level = f"{100 * rows[0].paired.difference.level:g} %"
    return Told(
        a=a,
        b=b,
        header=("benchmark", "mode", "metric", "A", "B", "A - B", "prompts", "better", "equal", "worse"),
        rows=tuple(table),
        left=3,
        notes=(*said, *notes),
        legend=f"[low, high]: {level} interval over the prompts that both have",
        level=rows[0].paired.difference.level,
        bars=tuple(bars),
        bar_header=("A - B", "low", "high", "prompts"),
        bar_legend=f"Bars are {level} intervals over the prompts that both have.",
    )


def of_methods(a: str, b: str, rows: Sequence[SeedsRow], notes: Sequence[str] = ()) -> Told:
    """Methods over seeds: a line per pair of methods, benchmark, mode and metric."""
    names = {(row.method_a, row.method_b): _pair_name(row) for row in rows}
    several = len(names) > 1
    table, bars, missing = [], [], []
    for row in rows:
        found, name = row.difference, names[row.method_a, row.method_b] if several else ""
        words = (*((name,) if several else ()), row.benchmark, MODE_TITLES[row.mode], row.metric)
        over = (_ends(found.seed_low, found.seed_high), _ends(found.prompt_low, found.prompt_high))
        counts = (f"{found.num_seeds:,}", of_asked(found.num_values, found.num_asked, found.num_dropped))
        means = (number(row.mean_a), number(row.mean_b), number(found.value, sign=True))
        table.append((*words, *means, *over, *counts))
        bars.append(_bar(row, name, counts))
        if found.only_a or found.only_b:
            alone = f"{found.only_a:,} prompts of a seed have a value in A only, {found.only_b:,} in B only"
            missing.append(f"{' '.join(words)}: {alone}")
    level = f"{100 * rows[0].difference.level:g} %"
    seeds = max(row.difference.num_seeds for row in rows)
    return Told(
        a=a if several else f"{a}, method {rows[0].method_a}",
        b=b if several else f"{b}, method {rows[0].method_b}",
        header=(
            *(("method",) if several else ()),
            *("benchmark", "mode", "metric", "A", "B", "A - B", "over seeds", "over prompts", "seeds", "pairs"),
        ),
        rows=tuple(table),
        left=4 if several else 3,
        notes=(*missing, *notes),
        legend=(
            f"[low, high]: {level} intervals of A - B; over seeds: what other seeds would give; over prompts: for models of "
            "these seeds"
        ),
        level=rows[0].difference.level,
        bars=tuple(bars),
        bar_header=("A - B", "seeds low", "seeds high", "prompts low", "prompts high", "seeds", "pairs"),
        bar_legend=f"Bars are {level} intervals over {f'{seeds} seeds' if seeds > 1 else 'prompts'}.",
    )


def _bar(row: SeedsRow, name: str, counts: tuple[str, ...]) -> Bar:
    found = row.difference
    low, high = (found.prompt_low, found.prompt_high) if found.seed_low is None else (found.seed_low, found.seed_high)
    ends = (found.value, found.seed_low, found.seed_high, found.prompt_low, found.prompt_high)
    return Bar(
        method=name,
        benchmark=row.benchmark,
        mode=row.mode,
        metric=row.metric,
        value=found.value,
        low=low,
        high=high,
        cells=(*(number(value) for value in ends), *counts),
    )


def _pair_name(row: SeedsRow) -> str:
    return row.method_a if row.method_a == row.method_b else f"{row.method_a} - {row.method_b}"


def _ends(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "-"
    return f"[{number(low, sign=True)}, {number(high, sign=True)}]"


def text_lines(told: Told) -> Iterator[str]:
    """A line per difference, then what was left out and what differs."""
    yield f"A  {told.a}"
    yield f"B  {told.b}"
    yield from aligned([told.header, *told.rows], left=told.left)
    yield from (f"  {note}" for note in told.notes)
    yield f"  {told.legend}"


def page_values(told: Told, *, command: str, versions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template shows. ``versions`` maps a side to what it was made with."""
    made: dict[str, list[str]] = {}
    for side, some in versions.items():
        made.setdefault(", ".join(f"{name} {found}" for name, found in some.items()), []).append(side)
    facts = [
        ("A", told.a),
        ("B", told.b),
        *((f"{' and '.join(sides)} made with", text) for text, sides in made.items()),
    ]
    return {
        "told": told,
        "facts": facts,
        "differences": page_table(told),
        "charts": list(charts(told)),
        "command": command,
        "caution": caution(told),
    }


def page_table(told: Told) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows for a screen of any width: the words in one column that can wrap, the difference right behind it,
    and the two means last."""

    def order(cells: tuple[str, ...]) -> tuple[str, ...]:
        words, (a, b, *rest) = cells[: told.left], cells[told.left :]
        return ", ".join(words), *rest, a, b

    return order(told.header), tuple(map(order, told.rows))


def caution(told: Told) -> str:
    """How many intervals there are, and how many would miss zero by chance."""
    num = sum(bar.low is not None for bar in told.bars)
    return (
        f"{num} differences have an interval; if none were real, about {(1 - told.level) * num:.1f} of the intervals would "
        "still leave out zero. Above zero A has more, which for tokens and unclosed traces need not be better."
    )


def charts(told: Told) -> Iterator[Chart]:
    """Forest plots, each of numbers in one unit: a plot per metric, and per benchmark and mode where there are methods."""
    if any(bar.method for bar in told.bars):
        yield from _charts(
            told, lambda bar: f"{bar.benchmark} {bar.metric}, {MODE_TITLES[bar.mode]}", lambda bar: bar.method
        )
    else:
        yield from _charts(told, lambda bar: bar.metric, lambda bar: f"{bar.benchmark}, {MODE_TITLES[bar.mode]}")


def _charts(told: Told, title_of: Callable[[Bar], str], label_of: Callable[[Bar], str]) -> Iterator[Chart]:
    by_title: dict[str, list[Bar]] = {}
    for bar in sorted(told.bars, key=lambda bar: bar.metric.strip("()") in SHARES):  # the benchmarks' own metrics first
        by_title.setdefault(title_of(bar), []).append(bar)
    for place, (title, bars) in enumerate(by_title.items()):
        points = [
            Point(label=label_of(bar), value=bar.value, low=bar.low, high=bar.high, group=MODES.index(bar.mode))
            for bar in bars
            if bar.value is not None
        ]
        if points:
            yield Chart(
                title=title,
                caption=told.bar_legend,
                svg=dot_chart(points, x_label=f"A - B in {bars[0].metric}", reference=0.0, salt=f"difference-{place}"),
                header=("", *told.bar_header),
                rows=tuple((label_of(bar), *bar.cells) for bar in bars),
            )
