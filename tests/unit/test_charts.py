"""Plots: names are drawn as they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from markupsafe import Markup

from bvpo.report.charts import Curve, Point, curve_chart, dot_chart

NAME = r"cost $\frac$ of <b>"


def dots() -> Markup:
    return dot_chart([Point(label=NAME, value=1.0)], x_label=NAME, salt="s")


def lines() -> Markup:
    return curve_chart([Curve(label=NAME, x=[1.0, 2.0], y=[1.0, 2.0])], x_label=NAME, y_label=NAME, salt="s")


@pytest.mark.parametrize(("draw", "num"), [(dots, 2), (lines, 3)])
def test_names_are_no_formulas(draw: Callable[[], Markup], num: int) -> None:
    """Mutation: a label read as mathematics, which raises for one that is none, or is drawn without its dollars."""
    assert draw().count(r"cost $\frac$ of &lt;b&gt;</text>") == num
