"""The words, tables and plots of an experiment's report: its results in, plain values for the page out.

Everything is derived from the results, so that page and file cannot disagree. Findings are stated by rule: a difference
counts as found when its interval over seeds leaves out zero. Nothing here judges which method ought to win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.evaluation.metrics import MODE_TITLES, MODES, OverSeeds
from bvpo.evaluation.results import SHARES, DifferenceRow, Results, ScoreRow
from bvpo.report.charts import Chart, Curve, Point, curve_chart, dot_chart
from bvpo.report.reliability import reliability_charts, reliability_table
from bvpo.report.tables import of_asked

TITLES = {
    "loss": "training loss",
    "grad_norm": "gradient norm before clipping",
    "trace/rewards/margins": "implicit reward margin, trace view",
    "empty/rewards/margins": "implicit reward margin, empty view",
    "trace/rewards/accuracies": "share of pairs ranked right, trace view",
    "empty/rewards/accuracies": "share of pairs ranked right, empty view",
    "trace/kl": "log-ratio to the reference, trace view",
    "empty/kl": "log-ratio to the reference, empty view",
}
_MOST_CURVES = 4  # that one plot can tell apart


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def interval(result: OverSeeds, sign: bool = False) -> str:
    """Value and interval over seeds; over prompts where there is one seed."""
    show = signed if sign else number
    low, high = bounds(result)
    return show(result.value) if low is None else f"{show(result.value)} [{show(low)}, {show(high)}]"


def bounds(result: OverSeeds) -> tuple[float | None, float | None]:
    """The interval that is shown first: over seeds, or over prompts where there is only one seed."""
    if result.seed_low is not None:
        return result.seed_low, result.seed_high
    return result.prompt_low, result.prompt_high


def main_rows(results: Results) -> list[tuple[str, str, str]]:
    """(benchmark, mode, metric) of the headline, without token counts and shares."""
    found = {(row.benchmark, row.mode, row.metric): None for row in results.scores if row.metric not in SHARES}
    return sorted(found, key=lambda key: (list(dict.fromkeys(r.benchmark for r in results.scores)).index(key[0]),))


def score_of(results: Results, method: str, key: tuple[str, str, str]) -> OverSeeds | None:
    return next((r.result for r in results.scores if (r.method, r.benchmark, r.mode, r.metric) == (method, *key)), None)


def best_method(results: Results) -> str:
    """The trained method that is highest in the first headline number, for transcripts only."""
    keys = main_rows(results)
    trained = [row.name for row in results.methods if row.trained] or [results.methods[0].name]
    if not keys:
        return trained[0]

    def value(name: str) -> float:
        found = score_of(results, name, keys[0])
        return float("-inf") if found is None or found.value is None else found.value

    return max(trained, key=value)


def label(key: tuple[str, str, str]) -> str:
    benchmark, mode, metric = key
    return f"{benchmark} {metric}, {MODE_TITLES[mode]}"  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------------------
# tables


def headline(results: Results) -> tuple[list[str], list[list[str]]]:
    """Method by headline number."""
    keys = main_rows(results)
    header = ["method", *(label(key) for key in keys)]
    rows = []
    for method in results.methods:
        cells = [method.name]
        for key in keys:
            found = score_of(results, method.name, key)
            cells.append("-" if found is None else interval(found))
        rows.append(cells)
    return header, rows


def differences(results: Results) -> tuple[list[str], list[list[str]]]:
    """Method minus baseline by headline number."""
    keys = main_rows(results)
    rows = []
    for method in results.methods:
        found = {(r.benchmark, r.mode, r.metric): r.result for r in results.differences if r.method == method.name}
        if found:
            rows.append([method.name, *(_with_dropped(found[key]) if key in found else "-" for key in keys)])
    return [f"minus {results.baseline}", *(label(key) for key in keys)], rows


def _with_dropped(result: OverSeeds) -> str:
    """The difference, and in the same cell what it rests on where responses without an answer were left out."""
    text = interval(result, sign=True)
    return (
        f"{text}, {of_asked(result.num_values, result.num_asked, result.num_dropped)}" if result.num_dropped else text
    )


def declared(results: Results) -> tuple[list[str], list[list[str]]]:
    """What was declared, and what became of it."""
    rows = []
    for row in results.declared:
        what = f"{row.better} above {row.than}: {label((row.benchmark, row.mode, row.metric))}"
        late = "" if row.beforehand else " (declared late)"
        rows.append([what, _with_dropped(row.result), row.outcome + late, str(row.result.num_seeds)])
    return ["declared", "difference", "outcome", "seeds"], rows


def budgets(results: Results) -> tuple[list[str], list[list[str]]]:
    header = ["method", "trace pairs", "empty pairs", "tokens", "steps", "learning rate and beta (tuned)"]
    rows = []
    for row in results.methods:
        tuned = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in row.tuned.items())
        counts = (row.trace_pairs, row.empty_pairs, row.tokens, row.optimizer_steps)
        shown = ["-" if value is None else f"{value:,.0f}" for value in counts]
        rows.append([row.name, *shown, tuned or "-"])
    return header, rows


def shares(results: Results) -> tuple[list[str], list[list[str]]]:
    """How long the responses are, how often a trace never closes, and how often there is no answer."""
    keys = list(dict.fromkeys((r.benchmark, r.mode, r.metric) for r in results.scores if r.metric in SHARES))
    keys = [key for key in keys if not (key[1] == "nothinking" and key[2] not in ("tokens", "no_answer"))]
    rows = []
    for method in results.methods:
        cells = [method.name]
        for key in keys:
            found = score_of(results, method.name, key)
            cells.append("-" if found is None else number(found.value))
        rows.append(cells)
    return ["method", *(label(key) for key in keys)], rows


def text_table(results: Results) -> str:
    """The headline and the differences for a terminal."""
    parts = []
    for header, rows in (headline(results), differences(results), declared(results)):
        if rows:
            parts.append(_aligned([header, *rows]))
    if results.differences and len(results.seeds) == 1:
        parts.append("One seed: intervals are over prompts and leave out the chance of training.\n")
    return "\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The header is broken into its words, so that narrow columns stay narrow."""
    header = [cell.split(" ") for cell in rows[0]]
    height = max(map(len, header))
    top = [[parts[line] if line < len(parts) else "" for parts in header] for line in range(height)]
    lines = [*top, *rows[1:]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    out = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# findings


def findings(results: Results) -> list[str]:
    """What the differences show, in sentences; also where they show nothing."""
    sentences = []
    by_key: dict[tuple[str, str, str], list[DifferenceRow]] = {}
    for row in results.differences:
        if row.metric not in SHARES and _is_trained(results, row.method):
            by_key.setdefault((row.benchmark, row.mode, row.metric), []).append(row)
    for key, rows in by_key.items():
        above = [r for r in rows if (bounds(r.result)[0] or 0) > 0]
        below = [r for r in rows if (bounds(r.result)[1] or 0) < 0]
        rest = [r.method for r in rows if r not in above and r not in below]
        parts = []
        for which, word in ((above, "above"), (below, "below")):
            if which:
                named = ", ".join(f"{r.method} ({signed(r.result.value)})" for r in which)
                parts.append(f"{named} {word} {results.baseline}")
        if rest:
            parts.append(
                f"{', '.join(rest)} not distinguishable from it"
                if parts
                else f"no method differs from {results.baseline}"
            )
        sentences.append(f"{label(key)}: {'; '.join(parts)}.")
    return sentences


def _is_trained(results: Results, method: str) -> bool:
    return any(row.name == method and row.trained for row in results.methods)


def caution(results: Results) -> str:
    """What to keep in mind: how many comparisons were looked at, and what the intervals leave out."""
    rows = [r for r in results.differences if r.metric not in SHARES and _is_trained(results, r.method)]
    share = 1 - results.level
    said = [
        f"{len(rows)} differences are shown; if none were real, about {len(rows) * share:.1f} of them would still leave out "
        f"zero at {100 * results.level:g} %."
    ]
    if len(results.seeds) == 1:
        said.append(
            "There is one seed: the intervals are over its prompts and leave out the chance of training, so another seed "
            "may reverse what is found here."
        )
    if alone := max((r.result.only_a + r.result.only_b for r in rows), default=0):
        said.append(
            f"Up to {alone} values have no partner (what failed, or was left out without an answer) and are in a method's "
            "value, but in no difference; so a difference need not be that of the two values."
        )
    return " ".join(said)


# ---------------------------------------------------------------------------------------------------------------------
# plots


def score_charts(results: Results) -> Iterator[Chart]:
    for place, key in enumerate(main_rows(results)):
        points, rows = [], []
        for row in (r for r in results.scores if (r.benchmark, r.mode, r.metric) == key):
            if row.result.value is not None:
                low, high = bounds(row.result)
                group = _group(results, row)
                points.append(Point(label=row.method, value=row.result.value, low=low, high=high, group=group))
                rows.append((row.method, *_cells(row.result)))
        yield Chart(
            title=label(key),
            caption=_caption(results),
            svg=dot_chart(points, x_label=f"{key[2]} ({MODE_TITLES[key[1]]})", salt=f"score-{place}"),  # type: ignore[index]
            header=("method", *_HEADER),
            rows=tuple(rows),
        )


def difference_charts(results: Results) -> Iterator[Chart]:
    for place, key in enumerate(main_rows(results)):
        found = [
            r for r in results.differences if (r.benchmark, r.mode, r.metric) == key and r.result.value is not None
        ]
        found = [r for r in found if _is_trained(results, r.method)]
        if not found:
            continue
        points = []
        for row in found:
            low, high = bounds(row.result)
            assert row.result.value is not None
            points.append(Point(label=row.method, value=row.result.value, low=low, high=high))
        yield Chart(
            title=f"Difference from {results.baseline}: {label(key)}",
            caption=f"Paired by seed and prompt. {_caption(results)}",
            svg=dot_chart(points, x_label=f"difference in {key[2]}", reference=0.0, salt=f"difference-{place}"),
            header=("method", *_HEADER),
            rows=tuple((row.method, *_cells(row.result)) for row in found),
        )


_HEADER = ("value", "seeds low", "seeds high", "prompts low", "prompts high", "seeds", "prompts")


def _cells(result: OverSeeds) -> tuple[str, ...]:
    values = (result.value, result.seed_low, result.seed_high, result.prompt_low, result.prompt_high)
    return (*(number(value, 4) for value in values), str(result.num_seeds), str(result.num_prompts))


def _caption(results: Results) -> str:
    over = f"{len(results.seeds)} seeds" if len(results.seeds) > 1 else "prompts"
    return f"Bars are {100 * results.level:g} % intervals over {over}."


def _group(results: Results, row: ScoreRow) -> int:
    if not _is_trained(results, row.method):
        return 1
    return 2 if row.method == results.baseline else 0


def sweep_charts(config: ExperimentConfig, results: Results) -> Iterator[Chart]:
    """Headline numbers against alpha, over the methods that differ from one another in alpha (and tuned values) alone."""
    sweep = alpha_sweep(config, results)
    if len(sweep) < 3:
        return
    for metric in dict.fromkeys((key[0], key[2]) for key in main_rows(results)):
        curves, rows = [], []
        for mode in MODES:
            found = [(alpha, name, score_of(results, name, (metric[0], mode, metric[1]))) for alpha, name in sweep]
            kept = [(alpha, name, r, r.value) for alpha, name, r in found if r is not None and r.value is not None]
            if kept:
                curves.append(_sweep_curve(MODE_TITLES[mode], [(alpha, r, value) for alpha, _, r, value in kept]))
                rows += [(MODE_TITLES[mode], f"{alpha:g}", name, *_cells(r)) for alpha, name, r, _ in kept]
        yield Chart(
            title=f"{metric[0]} {metric[1]} against alpha",
            caption=f"alpha 1 is the trace view alone, 0 the empty view alone. {_caption(results)}",
            svg=curve_chart(curves, x_label="alpha", y_label=metric[1], salt=f"sweep-{metric[0]}-{metric[1]}"),
            header=("mode", "alpha", "method", *_HEADER),
            rows=tuple(rows),
        )


def _sweep_curve(title: str, points: Sequence[tuple[float, OverSeeds, float]]) -> Curve:
    ends = [bounds(result) for _, result, _ in points]
    values = [value for _, _, value in points]
    return Curve(
        label=title,
        x=[alpha for alpha, _, _ in points],
        y=values,
        low=[value if low is None else low for (low, _), value in zip(ends, values, strict=True)],
        high=[value if high is None else high for (_, high), value in zip(ends, values, strict=True)],
    )


def alpha_sweep(config: ExperimentConfig, results: Results) -> list[tuple[float, str]]:
    """(alpha, method) of the plain mixtures: the base loss, no anchor, joint estimator, constant alpha, all the data."""
    found: dict[float, str] = {}
    for row in results.methods:
        train = row.settings.get("train", {})
        plain = set(train) <= {"alpha"} and set(row.settings) <= {"train", "data"}
        plain = plain and set(row.settings.get("data", {})) <= {"views"}
        alpha = train.get("alpha", {})
        if row.trained and plain and set(alpha) <= {"value"}:
            found.setdefault(float(alpha.get("value", config.train.alpha.value)), row.name)
    return sorted(found.items())


def _first_trained(results: Results) -> list[str]:
    """As many methods as a reader can tell apart, the baseline first."""
    trained = [row.name for row in results.methods if row.trained]
    return list(dict.fromkeys([results.baseline, *trained]))[:_MOST_CURVES]


def training_charts(results: Results) -> Iterator[Chart]:
    """Curves of the first few methods."""
    chosen = _first_trained(results)
    for name in dict.fromkeys(row.name for row in results.curves):
        found = [row for row in results.curves if row.name == name and row.method in chosen]
        if found:
            yield Chart(
                title=TITLES.get(name, name),
                caption=f"Mean over seeds. {', '.join(row.method for row in found)}; results.json has every method.",
                svg=curve_chart(
                    [Curve(label=row.method, x=row.steps, y=row.values) for row in found],
                    x_label="optimizer step",
                    y_label=name,
                    salt=f"curve-{name}",
                ),
                header=("method", "step", "value"),
                rows=tuple(
                    (row.method, str(step), number(value, 4))
                    for row in found
                    for step, value in zip(row.steps, row.values, strict=True)
                ),
            )


def stochasticity(results: Results) -> tuple[list[str], list[list[str]]]:
    """The paper's Tables 3 to 5 of the base model's samples."""
    paper = results.stochasticity.get("paper", {})

    def cell(value: Any) -> str:
        if not value or value.get("value") is None:
            return "-"
        if value.get("low") is None:
            return f"{value['value']:.4g}"
        return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"

    rows = [
        [
            f"Table {one['table']}", f"{one['label']} ({one['unit']})" if one["unit"] else one["label"],
            cell(one["first"]), cell(one["second"]), cell(one["ratio"]), paper.get(one["name"], "-"),
            str(one["num_prompts"]),
        ]
        for one in results.stochasticity.get("comparisons", [])
    ]  # fmt: skip
    return [
        "paper",
        "quantity",
        "trace view (or trace)",
        "empty view (or answer)",
        "ratio",
        "the paper's",
        "prompts",
    ], rows


def page_values(config: ExperimentConfig, results: Results) -> dict[str, Any]:
    """Everything that the template shows."""
    drops = [
        (stage, reason, count) for stage, counts in results.drops.items() for reason, count in sorted(counts.items())
    ]
    return {
        "results": results,
        "about": _about(config, results),
        "findings": findings(results),
        "caution": caution(results),
        "headline": headline(results),
        "differences": differences(results),
        "declared": declared(results),
        "budgets": budgets(results),
        "shares": shares(results),
        "score_charts": list(score_charts(results)),
        "difference_charts": list(difference_charts(results)),
        "sweep_charts": list(sweep_charts(config, results)),
        "training_charts": list(training_charts(results)),
        "reliability": reliability_table(results),
        "reliability_charts": list(reliability_charts(results, _first_trained(results))),
        "stochasticity": stochasticity(results),
        "drops": drops,
        "drops_text": [(stage, reason.replace("_", " "), f"{count:,}") for stage, reason, count in drops],
        "modes": MODE_TITLES,
    }


def _about(config: ExperimentConfig, results: Results) -> list[tuple[str, str]]:
    samples = f"{config.sample.num_samples} per prompt and view at temperature {config.sample.temperature:g}"
    score = config.score
    scorers = {"function": score.function.path, "judge": score.judge.model}
    return [
        ("model", config.model.path),
        ("prompts", ", ".join(config.prompts.sources) or "-"),
        ("samples", samples),
        ("scorer", scorers.get(score.scorer, score.reward_model.model)),
        ("seeds", ", ".join(map(str, results.seeds))),
        ("methods", ", ".join(row.name for row in results.methods)),
        ("evaluated at", f"temperature {config.evaluate.temperature:g}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
    ]
