"""What a finished run left behind, as :class:`~bvpo.evaluation.results.Results`: reads the folders, computes nothing itself.

In: an experiment's folder and config; out: its results and, for the page, transcripts of the same prompts by several
methods. Folders that are not there yet are left out, so that a half-done run can be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.evaluation.calibration import HeldOutPair, calibration_rows
from bvpo.evaluation.metrics import MODE_VIEWS, MODES, Mode, Verdict
from bvpo.evaluation.results import (
    MethodRow,
    Results,
    Runs,
    curve_rows,
    difference_rows,
    mean_of,
    score_rows,
    with_one_lowest,
    with_sums,
)
from bvpo.evaluation.viewstats import Comparison
from bvpo.experiment import Experiment, read_manifest
from bvpo.experiment.manifest import MANIFEST
from bvpo.keys import hash_int
from bvpo.records import VIEWS, Prompt, Sample
from bvpo.runs.declaring import rows_of
from bvpo.runs.plan import DATA_FOLDER, home, seeds_of
from bvpo.runs.tuning import kept_tuned
from bvpo.strict import UserError, convert, parse_json, read_json, read_jsonl, read_text

LEVEL = 0.95
Folders = dict[str, dict[str, Path]]
"""Method -> seed -> experiment folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One method's response to a prompt in one mode."""

    method: str
    mode: Mode
    trace: str | None
    answer: str | None
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A prompt and what several methods answered."""

    benchmark: str
    prompt: Prompt
    transcripts: tuple[Transcript, ...]


def method_folders(config: ExperimentConfig) -> Folders:
    """Where each method's runs are; a plain chain is one method of its own name."""
    top = home(config)
    if not config.run.methods:
        return {config.name: {str(config.seed): top}}
    return {name: {str(seed): top / f"seed-{seed}" / name for seed in seeds_of(config)} for name in config.run.methods}


def gather(config: ExperimentConfig, command: str) -> Results:
    """The results of all that is there."""
    folders = method_folders(config)
    found = [_of_config(config, read_runs(by_seed)) for by_seed in folders.values()]
    runs = dict(zip(folders, with_one_lowest(found), strict=True))
    if not any(runs.values()):
        raise UserError(f"{home(config)}: nothing was evaluated yet; run the experiment first")
    tuned = kept_tuned(home(config))
    baseline = baseline_of(config, folders)
    data = _data_folders(config)
    return Results(
        experiment=config.name,
        seeds=seeds_of(config),
        baseline=baseline,
        level=LEVEL,
        methods=tuple(_method_row(config, name, by_seed, tuned.get(name, {})) for name, by_seed in folders.items()),
        scores=tuple(row for name in folders for row in score_rows(name, runs[name], level=LEVEL)),
        differences=tuple(
            row
            for name in folders
            if name != baseline and baseline in runs
            for row in difference_rows(name, runs[name], baseline, runs[baseline], level=LEVEL)
        ),
        declared=rows_of(config, home(config), runs, tuned, LEVEL),
        calibration=tuple(
            row for name, by_seed in folders.items() for row in calibration_rows(name, _held_out(by_seed), level=LEVEL)
        ),
        curves=tuple(row for name, by_seed in folders.items() for row in curve_rows(name, _logs(by_seed))),
        drops=_drops(data),
        stochasticity=_stochasticity(data),
        versions=_versions(folders),
        command=command,
    )


def baseline_of(config: ExperimentConfig, folders: Folders) -> str:
    """The named baseline, else the first method that is trained."""
    if config.run.baseline or not config.run.methods:
        return config.run.baseline or config.name
    trained = [name for name, by_seed in folders.items() if any(Experiment(f).train.is_dir() for f in by_seed.values())]
    return next(iter(trained), next(iter(folders)))


def read_runs(by_seed: Mapping[str, Path]) -> Runs:
    """Seed -> benchmark -> verdicts, of what is finished."""
    runs: dict[str, dict[str, list[Verdict]]] = {}
    for seed, folder in by_seed.items():
        files = {name: place.verdicts for name, place in Experiment(folder).benchmarks().items()}
        found = {name: list(read_jsonl(file, Verdict)) for name, file in files.items() if file.is_file()}
        if found:
            runs[seed] = found
    return runs


def _of_config(config: ExperimentConfig, runs: Runs) -> Runs:
    """Without benchmarks that the config no longer has, whose folders may be those of other models."""
    wanted = config.evaluate.benchmarks
    kept = {
        seed: {name: verdicts for name, verdicts in by_name.items() if name in wanted} for seed, by_name in runs.items()
    }
    return {seed: by_name for seed, by_name in kept.items() if by_name}


def _method_row(config: ExperimentConfig, name: str, by_seed: Mapping[str, Path], tuned: dict[str, Any]) -> MethodRow:
    summaries = [_json(Experiment(folder).summary) for folder in by_seed.values()]
    summaries = [summary for summary in summaries if summary]
    return MethodRow(
        name=name,
        settings=dict(config.run.methods.get(name, {})),
        tuned=tuned,
        trained=bool(summaries),
        trace_pairs=mean_of(summaries, "pairs", "trace"),
        empty_pairs=mean_of(summaries, "pairs", "empty"),
        tokens=mean_of(summaries, "tokens"),
        optimizer_steps=mean_of(summaries, "optimizer_steps"),
    )


def _logs(by_seed: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    logs = {}
    for seed, folder in by_seed.items():
        path = Experiment(folder).metrics
        if path.is_file():
            whole, _, _ = read_text(path).rpartition("\n")  # a killed run leaves half a line
            lines = [(f"{path}:{number}", line) for number, line in enumerate(whole.split("\n"), start=1) if line]
            logs[seed] = [convert(dict[str, Any], parse_json(line, where), where) for where, line in lines]
    return logs


def _held_out(by_seed: Mapping[str, Path]) -> dict[str, list[HeldOutPair]]:
    files = {seed: Experiment(folder).held_out for seed, folder in by_seed.items()}
    return {seed: list(read_jsonl(path, HeldOutPair)) for seed, path in files.items() if path.is_file()}


def _data_folders(config: ExperimentConfig) -> list[Path]:
    top = home(config)
    if not config.run.methods:
        return [top]
    return [top / f"seed-{seed}" / DATA_FOLDER for seed in seeds_of(config)]


def _drops(folders: Sequence[Path]) -> dict[str, Any]:
    """Stage -> reason -> count, summed over seeds."""
    totals: dict[str, dict[str, Any]] = {"prompts": {}, "score": {}, "pair, trace view": {}, "pair, empty view": {}}
    for folder in folders:
        stages = read_manifest(folder).stages
        with_sums(totals["prompts"], _table(folder / MANIFEST, stages, "prompts", "counts", "dropped"))
        counts = _table(folder / MANIFEST, stages, "score", "counts")
        with_sums(totals["score"], {name: counts[name] for name in ("failed", "no_answer") if counts.get(name)})
        path = Experiment(folder).pairing
        report = _json(path)
        for view in VIEWS:
            with_sums(totals[f"pair, {view} view"], _table(path, report, "views", view, "prompts_dropped"))
    return totals


def _table(path: Path, tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object below these keys of what a file holds; an empty one where there is none."""
    for number, key in enumerate(keys, start=1):
        tree = convert(dict[str, Any], tree.get(key, {}), str(path), ".".join(keys[:number]))
    return tree


_ANALYSIS: dict[str, Any] = {
    "settings": dict[str, Any],
    "counts": dict[str, Any],
    "paper": dict[str, str],
    "comparisons": tuple[Comparison, ...],
    "notes": tuple[str, ...],
}


def _stochasticity(folders: Sequence[Path]) -> dict[str, Any]:
    """The analysis of the first seed that has one."""
    for folder in folders:
        path = Experiment(folder).analysis
        if found := _json(path):
            kept = {name: found.get(name) for name in ("settings", "counts", "paper", "comparisons", "notes")}
            for name, tp in _ANALYSIS.items():
                convert(tp, kept[name], str(path), name)
            return kept
    return {}


def _versions(folders: Folders) -> dict[str, Any]:
    for by_seed in folders.values():
        for folder in by_seed.values():
            for entry in read_manifest(folder).stages.values():
                if entry.get("versions"):
                    return dict(entry["versions"])
    return {}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# ---------------------------------------------------------------------------------------------------------------------
# transcripts


def conversations(config: ExperimentConfig, methods: Sequence[str], num_prompts: int) -> Iterator[Conversation]:
    """What the methods answered to the same few prompts of each benchmark, chosen by hash, on the first seed."""
    folders = method_folders(config)
    first = {name: next(iter(folders[name].values())) for name in methods}
    for benchmark in sorted({name for folder in first.values() for name in Experiment(folder).benchmarks()}):
        places = {name: Experiment(folder).benchmark(benchmark) for name, folder in first.items()}
        places = {name: place for name, place in places.items() if place.verdicts.is_file()}
        if not places:
            continue
        prompts = next(iter(places.values())).prompts()
        chosen = sorted(prompts, key=lambda prompt: hash_int(prompt.id, "transcripts"))[:num_prompts]
        said = {name: _responses(place, {prompt.id for prompt in chosen}) for name, place in places.items()}
        for prompt in chosen:
            found = [t for name in places for t in _of_prompt(name, prompt.id, said[name])]
            yield Conversation(benchmark=benchmark, prompt=prompt, transcripts=tuple(found))


_Said = dict[tuple[str, str], tuple[Sample, dict[str, Any]]]  # (prompt, mode) -> first sample and its values


def _responses(place: Experiment, wanted: set[str]) -> _Said:
    values = {
        (verdict.prompt_id, verdict.mode): verdict.values
        for verdict in read_jsonl(place.verdicts, Verdict)
        if verdict.index == 0 and verdict.prompt_id in wanted
    }
    modes = {view: mode for mode, view in MODE_VIEWS.items()}
    found: _Said = {}
    for sample in place.samples():
        key = (sample.prompt_id, modes[sample.view])
        if sample.index == 0 and sample.prompt_id in wanted:
            found[key] = (sample, values.get(key, {}))
    return found


def _of_prompt(method: str, prompt: str, said: _Said) -> Iterator[Transcript]:
    for mode in MODES:
        if (prompt, mode) in said:
            sample, values = said[prompt, mode]
            trace = sample.trace if sample.answer is not None or sample.view == "empty" else sample.text
            yield Transcript(method=method, mode=mode, trace=trace, answer=sample.answer, values=values)
