"""``bvpo compare A B``: paired differences between two evaluations, or between methods of comparisons over seeds.

Reads the verdicts and results of both sides and prints A - B per benchmark, mode and metric, paired by prompt, and by seed
where ``bvpo run`` made several, with what only one side has and what differs in the making. It refuses what cannot be
compared: other prompts under the same names, values of two scorers, nothing to pair. It writes a page if asked to.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bvpo.command import ReaderParser, experiment_folder
from bvpo.config.layers import parse_toml
from bvpo.evaluation.comparing import EvaluationRow, SeedsRow, method_pairs, seeds_rows
from bvpo.evaluation.metrics import (
    MEASURES,
    MODE_TITLES,
    MODES,
    Mode,
    Verdict,
    dropped,
    paired_difference,
    prompt_means,
    prompt_values,
    share_lowest,
)
from bvpo.evaluation.results import Runs, with_one_lowest
from bvpo.experiment import Experiment, differences, write_atomically
from bvpo.report.compare import Told, of_evaluations, of_methods, page_values, text_lines
from bvpo.report.pages import render_page
from bvpo.runs.gather import read_runs
from bvpo.strict import UserError, convert, read_json, read_jsonl, read_text

logger = logging.getLogger(__name__)

ABOUT = (
    "Compare two evaluations prompt by prompt, or methods of comparisons that bvpo run made, by seed and prompt: A - B per "
    "benchmark, mode and metric, with intervals. A and B are experiments, or folders of their evaluations. Changes nothing "
    "in them."
)
PAGE = "compare.html"


def main(argv: Sequence[str]) -> int | None:
    words = _parser().parse_args(argv)
    page = None if words.html is None else Path(words.html)
    if page is not None and page.suffix != ".html":
        raise UserError(f"--html: {page}: expected a file name that ends in .html (experiments come before --html)")
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise UserError(f"--html: {page}: expected a file in a folder that is there")
    a = read_side(experiment_folder(words.experiment))
    b = a if words.other is None else read_side(experiment_folder(words.other))
    if isinstance(a, Comparison) and isinstance(b, Comparison):
        rows, notes = compare_methods(a, b, words.method)
        told = of_methods(str(a.folder), str(b.folder), rows, notes)
    elif isinstance(a, Evaluation) and isinstance(b, Evaluation):
        _require_two(words)
        rows, notes = compare(a, b), _version_notes(a, b)
        told = of_evaluations(str(a.folder), str(b.folder), rows, notes)
    else:
        whole, one = (a, b) if isinstance(a, Comparison) else (b, a)
        assert isinstance(whole, Comparison)
        raise UserError(
            f"{whole.folder} is a comparison of methods and {one.folder} one evaluation; name one of the methods' folders, "
            f"such as {whole.example}"
        )
    if words.json:
        data = {"a": str(a.folder), "b": str(b.folder), "comparisons": [asdict(row) for row in rows], "notes": notes}
        sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
    else:
        sys.stdout.write("\n".join(text_lines(told)) + "\n")
    if page is not None:
        write_page(page, told, a, b, f"bvpo compare {shlex.join(argv)}")
    return None


def _parser() -> ReaderParser:
    parser = ReaderParser("compare", ABOUT)
    parser.add_argument(
        "other", nargs="?", metavar="EXPERIMENT", help="what to compare with (default: the same comparison)"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME[,OTHER]",
        help="of comparisons: this method of both, or A's NAME and B's OTHER (default: every method that both have); "
        "may be given more than once",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--html", nargs="?", const=PAGE, metavar="FILE", help=f"also write a page with plots (default {PAGE})"
    )
    return parser


def _require_two(words: Any) -> None:
    if words.other is None:
        raise UserError(f"{words.experiment} is one evaluation; name another one to compare it with")
    if words.method:
        raise UserError("--method chooses among the methods of a comparison; these are single evaluations")


def write_page(path: Path, told: Told, a: Side, b: Side, command: str) -> None:
    """The comparison as one self-contained page."""
    values = page_values(told, command=command, versions={"A": a.versions, "B": b.versions})
    write_atomically(path, render_page("compare.html", **values))
    logger.info("page         %s", path)


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation folder; ``benchmarks`` maps benchmark -> mode -> result, as ``results.json`` holds them."""

    folder: Path
    benchmarks: Mapping[str, Mapping[Mode, Mapping[str, Any]]]

    @property
    def versions(self) -> Mapping[str, Any]:
        """Those of the first result."""
        return next((one["versions"] for modes in self.benchmarks.values() for one in modes.values()), {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Methods over seeds; ``methods`` maps method -> seed -> experiment folder, of what is evaluated."""

    folder: Path
    methods: Mapping[str, Mapping[str, Path]]
    versions: Mapping[str, Any]

    @property
    def example(self) -> Path:
        return next(iter(next(iter(self.methods.values())).values()))


Side = Evaluation | Comparison


def read_side(folder: Path) -> Side:
    """The evaluation in a folder or in its folder of one, or the comparison in a folder."""
    for place in (folder, Experiment(folder).evaluation):
        data = _read(Experiment(place).results)
        if data.get("kind") == "evaluation":
            return _evaluation_in(place, data)
        if "methods" in data and any(folder.glob("seed-*")):
            return _comparison(folder, data)
    if any(any(folder.glob(pattern)) for pattern in Experiment.SEEN):
        raise UserError(
            f"{folder}: a comparison without {Experiment(folder).results.name}; bvpo report {folder} writes it"
        )
    raise UserError(f"{folder}: no evaluation in it; run bvpo evaluate first, or name the folder of an evaluation")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


_Tables = dict[str, dict[str, Any]]
_FACTS: dict[str, Any] = {
    "metrics": _Tables,
    "scorers": _Tables,
    "sampling": dict[str, Any],
    "format": Any,
    "without_answer": Any,
    "versions": dict[str, Any],
}


def _evaluation_in(folder: Path, data: Mapping[str, Any]) -> Evaluation:
    path = Experiment(folder).results
    _require_fields(path, "", data, "benchmarks")
    for name, modes in convert(dict[str, dict[str, Any]], data["benchmarks"], str(path), "benchmarks").items():
        for mode in MODES:
            if mode in modes:
                where = f"benchmarks.{name}.{mode}"
                _require_fields(path, f"{name} {MODE_TITLES[mode]}: ", modes[mode], *_FACTS)
                for fact, tp in _FACTS.items():
                    convert(tp, modes[mode][fact], str(path), f"{where}.{fact}")
                for metric, result in modes[mode]["metrics"].items():
                    tables = (("metrics", result), ("scorers", modes[mode]["scorers"].get(metric)))
                    for fact, table in tables:
                        convert(dict[str, Any], table, str(path), f"{where}.{fact}.{metric}")
                    convert(bool, result.get("binary"), str(path), f"{where}.metrics.{metric}.binary")
    return Evaluation(folder=folder, benchmarks=data["benchmarks"])


def _require_fields(path: Path, where: str, table: Mapping[str, Any], *names: str) -> None:
    if missing := [name for name in names if name not in table]:
        raise UserError(f"{path}: {where}no field {missing[0]!r}; the verb that made this file writes it anew")


def _comparison(folder: Path, data: Mapping[str, Any]) -> Comparison:
    """By its own folder, wherever that lies now."""
    path = Experiment(folder).results
    _require_fields(path, "", data, "methods", "seeds", "versions")
    convert(dict[str, Any], data["versions"], str(path), "versions")
    convert(tuple[int, ...], data["seeds"], str(path), "seeds")
    rows = convert(tuple[dict[str, Any], ...], data["methods"], str(path), "methods")
    methods: dict[str, dict[str, Path]] = {}
    for name in (convert(str, row.get("name"), str(path), f"methods[{n}].name") for n, row in enumerate(rows)):
        places = {str(seed): folder / f"seed-{seed}" / name for seed in data["seeds"]}
        if there := {seed: place for seed, place in places.items() if _has_results(place)}:
            methods[name] = there
    if not methods:
        raise UserError(f"{folder}: none of its methods has an evaluation")
    return Comparison(folder=folder, methods=methods, versions=data["versions"])


def _has_results(folder: Path) -> bool:
    return Experiment(Experiment(folder).evaluation).results.is_file()


def _version_notes(a: Side, b: Side) -> list[str]:
    return [f"{note} (B -> A)" for note in differences({"versions": b.versions}, {"versions": a.versions})]


# ---------------------------------------------------------------------------------------------------------------------
# two evaluations


def compare(a: Evaluation, b: Evaluation) -> list[EvaluationRow]:
    """Every benchmark, mode and metric that both have."""
    rows = [row for name in _shared_benchmarks(a, b) for row in _compare_benchmark(a, b, name)]
    if not rows:
        raise UserError(f"no mode and metric in common in {', '.join(_shared_benchmarks(a, b))}")
    return rows


def _shared_benchmarks(a: Evaluation, b: Evaluation) -> list[str]:
    shared = [name for name in a.benchmarks if name in b.benchmarks]
    if not shared:
        raise UserError(f"no benchmark in common: {_names(a)}; {_names(b)}")
    return shared


def _names(one: Evaluation) -> str:
    return f"{one.folder} has {', '.join(one.benchmarks) or 'none'}"


def _compare_benchmark(a: Evaluation, b: Evaluation, name: str) -> Iterator[EvaluationRow]:
    if not num_same_prompts(a.folder / name, b.folder / name):
        raise UserError(f"{a.folder / name} and {b.folder / name} have no prompt in common, so nothing can be paired")
    verdicts = share_lowest([list(read_jsonl(Experiment(one.folder / name).verdicts, Verdict)) for one in (a, b)])
    for mode, notes in check_making(a, b, name).items():
        ours, theirs = (one.benchmarks[name][mode]["metrics"] for one in (a, b))
        for metric in (metric for metric in ours if metric in theirs):
            binary = ours[metric]["binary"] and theirs[metric]["binary"]
            values = [prompt_values(found, mode, metric) for found in verdicts]
            mine = [one for found in verdicts for one in found if one.mode == mode]
            paired = replace(
                paired_difference(*values, bound=1.0 if binary else None),
                num_asked=len({one.prompt_id for one in mine}),
                num_dropped=sum(dropped(one, metric) for one in mine),
            )
            yield EvaluationRow(benchmark=name, mode=mode, metric=metric, paired=paired, notes=notes)
        for measure, bound in (("unclosed", 1.0), ("no answer", 1.0), ("tokens", None)):
            values = [prompt_means(found, mode, MEASURES[measure]) for found in verdicts]
            paired = paired_difference(*values, bound=bound)
            yield EvaluationRow(benchmark=name, mode=mode, metric=f"({measure})", paired=paired)


# ---------------------------------------------------------------------------------------------------------------------
# methods over seeds


def compare_methods(a: Comparison, b: Comparison, wanted: Sequence[str]) -> tuple[list[SeedsRow], list[str]]:
    """Every pair of methods on everything that both were evaluated on, and what to know about it."""
    same = a.folder.resolve() == b.folder.resolve()
    pairs = method_pairs(list(a.methods), list(b.methods), wanted, same)
    rows: list[SeedsRow] = []
    notes: dict[str, list[str]] = {}  # -> the pairs that it is about
    for pair in pairs:
        sides = a.methods[pair[0]], b.methods[pair[1]]
        shared = [seed for seed in sides[0] if seed in sides[1]]
        if not shared:
            seeds = [", ".join(side) for side in sides]
            raise UserError(
                f"no seed in common, so nothing can be paired: {a.folder} has {pair[0]} on {seeds[0]}, {b.folder} has "
                f"{pair[1]} on {seeds[1]}"
            )
        by_seed = {seed: (_evaluation(sides[0][seed]), _evaluation(sides[1][seed])) for seed in shared}
        both = list(by_seed.values())
        _require_prompts(both)
        for note in _pair_notes(*sides, both):
            notes.setdefault(note, []).append(pair[0] if pair[0] == pair[1] else " - ".join(pair))
        rows += seeds_rows(pair, *with_one_lowest([_checked_runs(side, by_seed) for side in sides]))
    if not rows:
        raise UserError(f"{a.folder} and {b.folder}: no benchmark, mode and metric in common")
    said = [note if len(about) == len(pairs) else f"{', '.join(about)}: {note}" for note, about in notes.items()]
    return rows, [*_unpaired_methods(a, b, wanted), *said, *_version_notes(a, b)]


Both = tuple[Evaluation, Evaluation]  # A's and B's on one seed


def _checked_runs(side: Mapping[str, Path], both: Mapping[str, Both]) -> Runs:
    """A side's verdicts of the benchmarks and modes that both results have: what else lies in its folders, such as a
    benchmark that the config no longer names, has not been checked and is not compared."""
    runs: dict[str, dict[str, list[Verdict]]] = {}
    for seed, found in read_runs({seed: side[seed] for seed in both}).items():
        a, b = (one.benchmarks for one in both[seed])
        runs[seed] = {
            name: [verdict for verdict in verdicts if verdict.mode in a[name] and verdict.mode in b[name]]
            for name, verdicts in found.items()
            if name in a and name in b
        }
    return runs


def _require_prompts(both: Sequence[Both]) -> None:
    """Refuses a benchmark that has no prompt in common on any seed."""
    common: dict[str, int] = {}
    for a, b in both:
        for name in (name for name in a.benchmarks if name in b.benchmarks):
            common[name] = common.get(name, 0) + num_same_prompts(a.folder / name, b.folder / name)
    if alone := [name for name, num in common.items() if not num]:
        one, other = (evaluation.folder.parent for evaluation in both[0])
        raise UserError(
            f"{one} and {other} have no prompt in common in {', '.join(alone)}, nor on other seeds, so nothing can be paired"
        )


def _evaluation(folder: Path) -> Evaluation:
    found = read_side(folder)
    assert isinstance(found, Evaluation), f"{folder} is no evaluation"
    return found


def _pair_notes(ours: Mapping[str, Path], theirs: Mapping[str, Path], both: Sequence[Both]) -> dict[str, None]:
    """Seeds and benchmarks of one side only, and what differs in the settings and in the sampling."""
    notes: dict[str, None] = {}
    for side, mine, other in (("A", ours, theirs), ("B", theirs, ours)):
        if alone := [seed for seed in mine if seed not in other]:
            notes[f"seeds in {side} only, left out: {', '.join(alone)}"] = None
    for a, b in both:
        for side, one, other in (("A", a, b), ("B", b, a)):
            if alone := [name for name in one.benchmarks if name not in other.benchmarks]:
                notes[f"benchmarks in {side} only, left out: {', '.join(alone)}"] = None
        notes |= {f"{note} (B -> A)": None for note in differences(*_settings(b.folder.parent, a.folder.parent))}
        for name in (name for name in a.benchmarks if name in b.benchmarks):
            for mode, changed in check_making(a, b, name).items():
                notes |= {f"{name} {MODE_TITLES[mode]}: {note} (B -> A)": None for note in changed}
    return notes


def _unpaired_methods(a: Comparison, b: Comparison, wanted: Sequence[str]) -> Iterator[str]:
    for side, mine, other in (("A", a, b), ("B", b, a)):
        alone = [name for name in mine.methods if name not in other.methods]
        if alone and not wanted:
            yield f"methods in {side} only, left out: {', '.join(alone)}"


_TRAINING = ("prompts", "sample", "score", "pair", "data", "train")
_PLACES = ("name", "root", "run")


def _settings(*folders: Path) -> list[dict[str, Any]]:
    """Of each method, what decides its model: where it lies does not, and nothing of training where one is not trained."""
    found = [_config(Experiment(folder).config_file) for folder in folders]
    untrained = any(config.get("evaluate", {}).get("model") for config in found)
    for config in found:
        for name in (*_PLACES, *(_TRAINING if untrained else ())):
            config.pop(name, None)
        for section, name in (("data", "quads"), ("train", "reference_cache"), ("evaluate", "folder")):
            config.get(section, {}).pop(name, None)
    return found


def _config(path: Path) -> dict[str, Any]:
    """As it was written; the version that wrote it may have had other fields."""
    if not path.is_file():
        raise UserError(f"{path}: No such file or directory; it says how this method was made")
    return parse_toml(read_text(path), str(path))


# ---------------------------------------------------------------------------------------------------------------------
# what must agree


def num_same_prompts(ours: Path, theirs: Path) -> int:
    """How many prompts both benchmarks have. The same id must mean the same conversation and metadata, or differences
    would be between prompts."""
    found = [{prompt.id: prompt for prompt in Experiment(path).prompts()} for path in (ours, theirs)]
    common = [id for id in found[0] if id in found[1]]
    for id in common:
        one, other = (prompts[id] for prompts in found)
        if (one.messages, one.meta) != (other.messages, other.meta):
            raise UserError(f"{ours} and {theirs}: prompt {id!r} is not the same in both, so they cannot be compared")
    return len(common)


def check_making(a: Evaluation, b: Evaluation, name: str) -> dict[Mode, tuple[str, ...]]:
    """For each mode that both have, how the two were made differently; refuses metrics that two scorers gave."""
    found: dict[Mode, tuple[str, ...]] = {}
    for mode in MODES:
        ours, theirs = (one.benchmarks[name].get(mode) for one in (a, b))
        if ours is None or theirs is None:
            continue
        found[mode] = tuple(differences(_how(theirs), _how(ours)))
        for metric in (metric for metric in ours["metrics"] if metric in theirs["metrics"]):
            scorers = [_scorer(one["scorers"][metric]) for one in (theirs, ours)]
            if changed := differences(*scorers):
                what, said = f"{name}, {metric}", "; ".join(changed[:3])
                raise UserError(f"{what}: {b.folder} and {a.folder} were scored differently: {said}")
    return found


def _how(result: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ between two evaluations, and should be known."""
    sampling = {key: value for key, value in result["sampling"].items() if key != "views"}
    return {"sampling": sampling, "format": result["format"], "without_answer": result["without_answer"]}


def _scorer(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A function is the same wherever its file lies."""
    path = fingerprint.get("path")
    return {**fingerprint, "path": path.rpartition(":")[2]} if isinstance(path, str) else dict(fingerprint)
