"""The reliability diagram of an experiment's report: what methods state of held-out pairs against how often they are right.

In: results whose ``calibration`` has rows. Out: one chart per view, with its numbers, and a table of accuracy, calibration
error and the two proper scores. It words nothing and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bvpo.evaluation.calibration import Bin, CalibrationRow
from bvpo.evaluation.metrics import OverSeeds
from bvpo.evaluation.results import Results
from bvpo.records import VIEWS
from bvpo.report.charts import Chart, Curve, curve_chart

_HEADER = ("method", "stated from", "to", "stated", "right", "low", "high", "pairs", "prompts")


def reliability_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Method and view by what its stated probabilities are worth."""
    header = ["method", "view", "pairs", "accuracy", "ECE", "ECE by chance", "adaptive ECE", "Brier score", "log loss"]
    rows = [
        [
            row.method, row.view, f"{row.num_pairs:,}", _value(row.accuracy), f"{row.ece:.3f}", f"{row.ece_by_chance:.3f}",
            f"{row.adaptive_ece:.3f}", _value(row.brier), _value(row.log_loss),
        ]
        for row in results.calibration
    ]  # fmt: skip
    return header, rows


def reliability_charts(results: Results, methods: Sequence[str]) -> Iterator[Chart]:
    """One chart per view with a line for each of ``methods`` that has held-out pairs there."""
    for view in VIEWS:
        found = [row for name in methods for row in results.calibration if (row.method, row.view) == (name, view)]
        if found:
            svg = curve_chart(
                [_curve(row) for row in found],
                x_label="stated probability",
                y_label="share right",
                diagonal=(0.5, 1.0),
                salt=f"reliability-{view}",
            )
            yield Chart(
                title=f"Stated probability against share right, {view} view",
                caption=(
                    f"Bins of equally many pairs of all seeds; bars are {100 * results.level:g} % intervals over prompts. "
                    f"{', '.join(row.method for row in found)}; results.json has every method, and bins of equal width."
                ),
                svg=svg,
                header=_HEADER,
                rows=tuple((row.method, *_cells(one)) for row in found for one in row.adaptive_bins),
            )


def _curve(row: CalibrationRow) -> Curve:
    bins = row.adaptive_bins
    return Curve(
        label=row.method,
        x=[one.confidence for one in bins],
        y=[one.right for one in bins],
        low=[one.right if one.low is None else one.low for one in bins],
        high=[one.right if one.high is None else one.high for one in bins],
    )


def _cells(one: Bin) -> tuple[str, ...]:
    values = (one.start, one.end, one.confidence, one.right, one.low, one.high)
    return (*("-" if value is None else f"{value:.4f}" for value in values), str(one.num_pairs), str(one.num_prompts))


def _value(result: OverSeeds) -> str:
    """With the interval over seeds; over prompts where there is one seed."""
    low, high = (
        (result.prompt_low, result.prompt_high) if result.seed_low is None else (result.seed_low, result.seed_high)
    )
    value = "-" if result.value is None else f"{result.value:.3f}"
    return value if low is None else f"{value} [{low:.3f}, {high:.3f}]"
