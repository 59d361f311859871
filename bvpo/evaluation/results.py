"""``results.json``: every headline number of an experiment, with its interval and what it rests on.

In: the verdicts of each method on each seed, and what training wrote down. Out: :class:`Results`, plain frozen records that
are also the schema of the file (docs/results.md); reading it back checks it. Nothing here reads files or draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bvpo.evaluation.calibration import CalibrationRow
from bvpo.evaluation.metrics import (
    MODES,
    Mode,
    OverSeeds,
    Verdict,
    difference_over_seeds,
    dropped,
    mean_over_seeds,
    prompt_values,
    share_lowest,
)

SCHEMA = 1
SHARES = ("tokens", "trace_tokens", "unclosed", "no_answer")
"""What is reported of the samples beside the benchmark's own metrics."""
CURVES = (
    "loss",
    "grad_norm",
    "trace/rewards/margins",
    "empty/rewards/margins",
    "trace/rewards/accuracies",
    "empty/rewards/accuracies",
    "trace/kl",
    "empty/kl",
)
"""Numbers of metrics.jsonl that are kept as training curves."""

Outcome = Literal["confirmed", "not confirmed", "the opposite", "not finished"]

Runs = Mapping[str, Mapping[str, Sequence[Verdict]]]
"""Seed -> benchmark -> verdicts, of one method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method: its settings away from the experiment's own, and what its training consumed (means over seeds)."""

    name: str
    settings: dict[str, Any]
    tuned: dict[str, Any] = field(default_factory=dict)
    trained: bool
    trace_pairs: float | None = None
    empty_pairs: float | None = None
    tokens: float | None = None
    optimizer_steps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One metric of one method on one benchmark in one mode."""

    method: str
    benchmark: str
    mode: Mode
    metric: str
    result: OverSeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceRow:
    """``method`` minus ``baseline``, paired by seed and prompt."""

    method: str
    baseline: str
    benchmark: str
    mode: Mode
    metric: str
    result: OverSeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredRow:
    """What became of a declared comparison (``better`` above ``than``). ``result`` is the difference at the level of this
    row; ``beforehand`` says whether the comparison, with its seeds and the settings of its methods, stood in the config
    when nothing was evaluated yet."""

    name: str
    better: str
    than: str
    benchmark: str
    mode: Mode
    metric: str
    result: OverSeeds
    outcome: Outcome
    beforehand: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRow:
    """A number of metrics.jsonl over the optimizer steps, averaged over the seeds that have it at that step."""

    method: str
    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The whole file. ``stochasticity`` is the analysis of one seed's samples (docs/looking.md), ``drops`` counts what was
    dropped on the way by stage and reason, summed over seeds."""

    schema: int = SCHEMA
    experiment: str
    seeds: tuple[int, ...]
    baseline: str
    level: float
    methods: tuple[MethodRow, ...]
    scores: tuple[ScoreRow, ...]
    differences: tuple[DifferenceRow, ...]
    declared: tuple[DeclaredRow, ...] = ()
    calibration: tuple[CalibrationRow, ...] = ()
    curves: tuple[CurveRow, ...]
    drops: dict[str, Any]
    stochasticity: dict[str, Any]
    versions: dict[str, Any]
    command: str


def score_rows(method: str, runs: Runs, *, level: float = 0.95) -> list[ScoreRow]:
    """Every metric of one method over its seeds, in the order of benchmark, mode and metric."""
    rows = []
    for benchmark in benchmarks_in(runs):
        for mode in MODES:
            for metric in metrics_of(runs, benchmark, mode):
                values = seed_values(runs, benchmark, mode, metric)
                result = mean_over_seeds(values, level=level)
                rows.append(ScoreRow(method=method, benchmark=benchmark, mode=mode, metric=metric, result=result))
    return rows


def difference_rows(
    method: str, runs: Runs, baseline: str, baseline_runs: Runs, *, level: float = 0.95
) -> list[DifferenceRow]:
    """The method against the baseline, on everything that both were evaluated on."""
    rows = []
    for benchmark in benchmarks_in(runs):
        for mode in MODES:
            for metric in metrics_of(runs, benchmark, mode):
                result = difference((runs, baseline_runs), benchmark, mode, metric, level=level)
                if result is not None:
                    row = DifferenceRow(
                        method=method, baseline=baseline, benchmark=benchmark, mode=mode, metric=metric, result=result
                    )
                    rows.append(row)
    return rows


def difference(
    sides: tuple[Runs, Runs], benchmark: str, mode: Mode, metric: str, *, level: float = 0.95
) -> OverSeeds | None:
    """The first side minus the second, with what was asked and what was dropped; ``None`` without a seed in common."""
    mine, theirs = (seed_values(runs, benchmark, mode, metric) for runs in sides)
    if not mine.keys() & theirs.keys():
        return None
    asked: set[tuple[str, str]] = set()
    num_dropped = 0
    for runs, seeds in ((runs, sides[0].keys() & sides[1].keys()) for runs in sides):
        for seed in seeds:
            for verdict in (one for one in runs[seed].get(benchmark, ()) if one.mode == mode):
                asked.add((seed, verdict.prompt_id))
                num_dropped += dropped(verdict, metric)
    return replace(difference_over_seeds(mine, theirs, level=level), num_asked=len(asked), num_dropped=num_dropped)


def with_one_lowest(sides: Sequence[Runs]) -> list[Runs]:
    """The runs with one lowest score per benchmark over all of them and all their seeds (:func:`share_lowest`)."""
    found: list[dict[str, dict[str, Sequence[Verdict]]]] = [
        {seed: dict(of) for seed, of in runs.items()} for runs in sides
    ]
    for benchmark in dict.fromkeys(name for runs in sides for name in benchmarks_in(runs)):
        places = [(runs, seed) for runs in found for seed in runs if benchmark in runs[seed]]
        shared = share_lowest([runs[seed][benchmark] for runs, seed in places])
        for (runs, seed), verdicts in zip(places, shared, strict=True):
            runs[seed][benchmark] = verdicts
    return list(found)


def benchmarks_in(runs: Runs) -> list[str]:
    """In the order in which they are met."""
    return list(dict.fromkeys(benchmark for by_benchmark in runs.values() for benchmark in by_benchmark))


def metrics_of(runs: Runs, benchmark: str, mode: Mode) -> list[str]:
    """The benchmark's metrics, its own first, then the shares; those without any value are left out."""
    found: dict[str, None] = {}
    for by_benchmark in runs.values():
        for verdict in by_benchmark.get(benchmark, ()):
            if verdict.mode == mode:
                found.update(dict.fromkeys((*verdict.values, *verdict.missing)))
    return [*found, *(SHARES if found else ())]


def seed_values(runs: Runs, benchmark: str, mode: Mode, metric: str) -> dict[str, dict[str, float]]:
    """Seed -> prompt -> value."""
    out = {}
    for seed, by_benchmark in runs.items():
        verdicts = by_benchmark.get(benchmark, ())
        values = shares(verdicts, mode, metric) if metric in SHARES else prompt_values(verdicts, mode, metric)
        if values:
            out[seed] = values
    return out


def shares(verdicts: Iterable[Verdict], mode: Mode, name: str) -> dict[str, float]:
    """Prompt -> mean over its samples of a number that every drawn sample has."""
    sums: dict[str, tuple[float, int]] = {}
    for verdict in verdicts:
        value = {
            "tokens": verdict.tokens,
            "trace_tokens": verdict.trace_tokens,
            "unclosed": not verdict.closed,
            "no_answer": not (verdict.closed and verdict.answered),
        }[name]
        if verdict.mode == mode and verdict.tokens is not None and value is not None:
            total, count = sums.get(verdict.prompt_id, (0.0, 0))
            sums[verdict.prompt_id] = total + float(value), count + 1
    return {prompt: total / count for prompt, (total, count) in sums.items()}


def curve_rows(method: str, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[CurveRow]:
    """``logs`` maps seeds to the entries of their metrics.jsonl."""
    rows = []
    for name in CURVES:
        by_step: dict[int, list[float]] = {}
        for entries in logs.values():
            for entry in entries:
                if isinstance(entry.get(name), int | float) and isinstance(entry.get("step"), int):
                    by_step.setdefault(entry["step"], []).append(float(entry[name]))
        if by_step:
            steps = tuple(sorted(by_step))
            means = tuple(sum(by_step[step]) / len(by_step[step]) for step in steps)
            seeds = max(len(values) for values in by_step.values())
            rows.append(CurveRow(method=method, name=name, steps=steps, values=means, num_seeds=seeds))
    return rows


def mean_of(summaries: Sequence[Mapping[str, Any]], *path: str) -> float | None:
    """The mean of a number at a path of each summary, ``None`` where it is nowhere."""
    values = []
    for summary in summaries:
        node: Any = summary
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, int | float):
            values.append(float(node))
    return sum(values) / len(values) if values else None


def with_sums(into: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Adds counts by name into ``into``."""
    for name, count in counts.items():
        if isinstance(count, int | float) and not isinstance(count, bool):
            into[name] = into.get(name, 0) + count
