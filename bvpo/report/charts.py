"""Plots as SVG text for a page that may be light or dark: numbers in, one ``<svg>`` out, drawn by matplotlib.

In: labelled values with their intervals, or curves. Out: a :class:`Chart`, which also carries its numbers as a table, so
that no number is in a picture only. Colours are Okabe and Ito's, which people with colour-blindness tell apart, and shapes
or line styles differ as well. The same input gives the same text. It computes nothing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# Placeholders that matplotlib draws with; the page's style decides what they are.
_INK, _FAINT = "#010203", "#040506"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "D", "^")
_LINES = ("solid", (0, (5, 2)), (0, (1, 1)), (0, (5, 2, 1, 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plot with its numbers: ``header`` and ``rows`` are the table."""

    title: str
    caption: str
    svg: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of a :func:`dot_chart`; ``group`` chooses colour and marker."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a :func:`curve_chart`; ``low`` and ``high`` are drawn as bars at every point, ``mark`` is a point of it
    that stands out, such as its minimum."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    mark: tuple[float, float] | None = None


def dot_chart(
    points: Sequence[Point], *, x_label: str, log: bool = False, reference: float | None = None, salt: str
) -> Markup:
    """Values with intervals, one per line, the first on top. ``reference`` is a vertical line, such as a ratio of 1."""
    with _figure(height=0.9 + 0.42 * len(points), salt=salt) as (figure, axes, done):
        if reference is not None:
            axes.axvline(reference, color=_FAINT, linewidth=1.2, zorder=0)
        for place, point in enumerate(points):
            color, marker = COLORS[point.group % len(COLORS)], _MARKERS[point.group % len(_MARKERS)]
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
            axes.plot([point.value], [place], marker, color=color, markersize=7)
        if log:
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis, [v for p in points for v in (p.value, p.low, p.high) if v is not None])
        axes.set_yticks(range(len(points)), [point.label for point in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=_FAINT, linewidth=0.6, alpha=0.5)
        axes.set_xlabel(x_label)
        done(figure)
    return done.svg


def curve_chart(
    curves: Sequence[Curve], *, x_label: str, y_label: str, log: bool = False, log_y: bool = False,
    diagonal: tuple[float, float] | None = None, salt: str,
) -> Markup:  # fmt: skip
    """Lines over a common axis, told apart by colour and dashes; ``log`` is the x axis. ``diagonal`` are the ends of a thin
    line where y = x."""
    with _figure(height=3.3, salt=salt) as (figure, axes, done):
        if diagonal is not None:
            axes.plot(diagonal, diagonal, color=_INK, linewidth=0.8, zorder=0)
        for number, curve in enumerate(curves):
            axes.plot(
                curve.x, curve.y, color=COLORS[number % len(COLORS)], linestyle=_LINES[number % len(_LINES)],
                linewidth=2, label=curve.label, marker=_MARKERS[number % len(_MARKERS)] if curve.low else None,
            )  # fmt: skip
            if curve.low is not None and curve.high is not None:
                axes.vlines(curve.x, curve.low, curve.high, color=COLORS[number % len(COLORS)], linewidth=1.5)
            if curve.mark is not None:
                axes.plot(
                    *curve.mark, _MARKERS[number % len(_MARKERS)], color=COLORS[number % len(COLORS)], markersize=8
                )
        if log:
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis, [x for curve in curves for x in curve.x])
        if log_y:
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis, [y for curve in curves for y in curve.y])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_FAINT, linewidth=0.6, alpha=0.5)
        axes.legend(frameon=False, labelcolor=_INK, loc="best")
        done(figure)
    return done.svg


class _Done:
    """Turns the finished figure into text while matplotlib's settings are still ours."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.svg = Markup()

    def __call__(self, figure: Any) -> None:
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        self.svg = Markup(_embeddable(out.getvalue(), self.salt))


@contextmanager
def _figure(height: float, salt: str) -> Iterator[tuple[Any, Any, _Done]]:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global figures, no display

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: readable by people who search or listen
        "svg.hashsalt": salt,
        "text.parse_math": False,  # names are text, also with a $ in them
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        yield figure, figure.add_subplot(), _Done(salt)


def _plain_log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks such as 0.5, 1, 2, 5, 10 instead of powers, as many as are readable."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    positive = [value for value in values if value > 0] or [1.0]
    spread = max(positive) / min(positive)
    if spread < 8:
        locator: Any = MaxNLocator(6)
    else:
        locator = LogLocator(base=10, subs=(1.0,) if spread > 300 else (1.0, 2.0, 5.0))
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _embeddable(svg: str, salt: str) -> str:
    """The drawing without XML header, in the page's colours, with ids of its own and scalable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--line)")
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--series-{number})")
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{salt}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
