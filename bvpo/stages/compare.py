"""``bvpo compare A B``: paired differences between the evaluations of two models, per benchmark, mode and metric.

Reads ``verdicts.jsonl`` and the results of both evaluations, prompt by prompt, and prints A - B with an interval over the
prompts that both have, and what only one of them has. It refuses what cannot be compared: other prompts under the same
names, or values of two scorers. It changes nothing and draws no conclusion.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bvpo.core.evaluation import (
    MEASURES,
    MODE_TITLES,
    MODES,
    Mode,
    PairedDifference,
    Verdict,
    paired_difference,
    prompt_means,
    prompt_values,
)
from bvpo.look import LookParser, experiment_folder
from bvpo.records import Prompt
from bvpo.report.tables import aligned, number, shown
from bvpo.store import differences
from bvpo.strict import UserError, parse_json, read_jsonl

ABOUT = (
    "Compare two evaluations prompt by prompt: A - B per benchmark, mode and metric, with intervals over prompts. A and B "
    "are experiments, or folders of their evaluations. Changes nothing."
)
RESULTS, VERDICTS = "results.json", "verdicts.jsonl"


def main(argv: Sequence[str]) -> int | None:
    parser = LookParser("compare", ABOUT)
    parser.add_argument("other", metavar="EXPERIMENT", help="the evaluation to compare with")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    words = parser.parse_args(argv)
    a, b = (read_evaluation(experiment_folder(text)) for text in (words.experiment, words.other))
    comparisons = compare(a, b)
    if words.json:
        data = {"a": str(a.folder), "b": str(b.folder), "comparisons": [asdict(one) for one in comparisons]}
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        sys.stdout.write("\n".join(text_table(a, b, comparisons)) + "\n")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation folder; ``benchmarks`` maps benchmark -> mode -> result, as ``results.json`` holds them."""

    folder: Path
    benchmarks: Mapping[str, Mapping[Mode, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the comparison. ``notes`` say how the two were made differently."""

    benchmark: str
    mode: Mode
    metric: str
    paired: PairedDifference
    notes: tuple[str, ...] = field(default=())


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in a folder, or in its folder eval."""
    for place in (folder, folder / "eval"):
        path = place / RESULTS
        if path.is_file():
            data = parse_json(path.read_text(encoding="utf-8"), str(path))
            if isinstance(data, dict) and data.get("kind") == "evaluation":
                return Evaluation(folder=place, benchmarks=data["benchmarks"])
    raise UserError(f"{folder}: no evaluation in it; run bvpo evaluate first, or name the folder of an evaluation")


def compare(a: Evaluation, b: Evaluation) -> list[Row]:
    """Every benchmark, mode and metric that both have."""
    shared = [name for name in a.benchmarks if name in b.benchmarks]
    if not shared:
        raise UserError(f"no benchmark in common: {_names(a)}; {_names(b)}")
    rows = [row for name in shared for row in _compare_benchmark(a, b, name)]
    if not rows:
        raise UserError(f"no mode and metric in common in {', '.join(shared)}")
    return rows


def _names(one: Evaluation) -> str:
    return f"{one.folder} has {', '.join(one.benchmarks) or 'none'}"


def _compare_benchmark(a: Evaluation, b: Evaluation, name: str) -> Iterator[Row]:
    _require_same_prompts(a.folder / name, b.folder / name)
    verdicts = [list(read_jsonl(one.folder / name / VERDICTS, Verdict)) for one in (a, b)]
    for mode in MODES:
        ours, theirs = (one.benchmarks[name].get(mode) for one in (a, b))
        if ours is None or theirs is None:
            continue
        notes = tuple(differences(_how(theirs), _how(ours)))
        for metric in ours["metrics"]:
            if metric not in theirs["metrics"]:
                continue
            _require_same_scorer(a, b, f"{name}, {metric}", ours["scorers"][metric], theirs["scorers"][metric])
            binary = all(one["metrics"][metric]["binary"] for one in (ours, theirs))
            values = [prompt_values(found, mode, metric) for found in verdicts]
            paired = paired_difference(*values, bound=1.0 if binary else None)
            yield Row(benchmark=name, mode=mode, metric=metric, paired=paired, notes=notes)
        for measure, bound in (("unclosed", 1.0), ("tokens", None)):
            values = [prompt_means(found, mode, MEASURES[measure]) for found in verdicts]
            yield Row(benchmark=name, mode=mode, metric=f"({measure})", paired=paired_difference(*values, bound=bound))


def _how(result: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ between two evaluations, and should be known."""
    sampling = {key: value for key, value in result["sampling"].items() if key != "views"}
    return {"sampling": sampling, "format": result["format"], "without_answer": result["without_answer"]}


def _require_same_prompts(ours: Path, theirs: Path) -> None:
    """The same id must mean the same conversation and metadata, or differences would be between prompts."""
    found = [{prompt.id: prompt for prompt in read_jsonl(path / "prompts.jsonl", Prompt)} for path in (ours, theirs)]
    common = [id for id in found[0] if id in found[1]]
    if not common:
        raise UserError(f"{ours} and {theirs} have no prompt in common, so nothing can be paired")
    for id in common:
        one, other = (prompts[id] for prompts in found)
        if (one.messages, one.meta) != (other.messages, other.meta):
            raise UserError(f"{ours} and {theirs}: prompt {id!r} is not the same in both, so they cannot be compared")


def _require_same_scorer(
    a: Evaluation, b: Evaluation, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    if changed := differences(_scorer(theirs), _scorer(ours)):
        raise UserError(f"{what}: {b.folder} and {a.folder} were scored differently: {'; '.join(changed[:3])}")


def _scorer(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A function is the same wherever its file lies."""
    path = fingerprint.get("path")
    return {**fingerprint, "path": path.rpartition(":")[2]} if isinstance(path, str) else dict(fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def text_table(a: Evaluation, b: Evaluation, comparisons: Sequence[Row]) -> Iterator[str]:
    """Plain text: a line per comparison, then what was left out and what differs."""
    yield f"A  {a.folder}"
    yield f"B  {b.folder}"
    rows = [["benchmark", "mode", "metric", "A", "B", "A - B", "prompts", "better", "equal", "worse"]]
    notes: dict[str, None] = {}
    for one in comparisons:
        paired, title = one.paired, MODE_TITLES[one.mode]
        counts = [f"{num:,}" for num in (paired.num_prompts, paired.better, paired.equal, paired.worse)]
        means = [number(paired.mean_a), number(paired.mean_b), shown(paired.difference, sign=True)]
        rows.append([one.benchmark, title, one.metric, *means, *counts])
        if paired.only_a or paired.only_b:
            missing = f"{paired.only_a:,} prompts have a value in A only, {paired.only_b:,} in B only"
            notes[f"{one.benchmark} {title} {one.metric}: {missing}"] = None
        notes |= {f"{one.benchmark} {title}: {note} (B -> A)": None for note in one.notes}
    yield from aligned(rows, left=3)
    yield from (f"  {note}" for note in notes)
    yield f"  [low, high]: {100 * comparisons[0].paired.difference.level:g} % interval over the prompts that both have"
