"""Tuning of a comparison: the same grid for every method, on seeds and prompts of its own; the best cell by one objective.

In: the experiment config; out: the jobs of all cells, those of the best cells of each method on further seeds, and from
their evaluations the tuned values as TOML text and a log of every cell. Ties go to the earlier cell. Nothing here runs a
job or writes a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.config.layers import read_tables
from bvpo.config.toml import toml_value
from bvpo.experiment import Experiment
from bvpo.runs.declaring import metric_named
from bvpo.runs.plan import Job, check_run, data_job, grid_cells, home, method_job, plan, with_settings
from bvpo.strict import UserError, convert, read_json

TUNING = "tuning"
"""Folder of the tuning runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method with one combination of the grid's values (the ``number``-th), and the folders of its runs by seed."""

    method: str
    number: int
    settings: dict[str, Any]
    folders: tuple[Path, ...]


def plan_tuning(config: ExperimentConfig, kept: Sequence[Cell] | None = None) -> tuple[list[Job], list[Cell]]:
    """The jobs of every cell on every tuning seed, below ``ROOT/NAME/tuning``; those of the ``kept`` cells on the final
    seeds, if cells are given, whose folders then are all that they have."""
    check_run(config)
    _require(config)
    apart = with_settings(config, "run.tune.settings", config.run.tune.settings)
    own = dataclasses.replace(apart, root=str(home(config)), name=TUNING)
    jobs = [job for job in plan(config) if job.name == "model"]
    shared = tuple(job.name for job in jobs)
    cells: list[Cell] = []
    seeds = config.run.tune.seeds if kept is None else config.run.tune.final_seeds
    before = {(cell.method, cell.number): cell for cell in kept or ()}
    data = {seed: data_job(own, seed, shared) for seed in seeds}
    jobs += data.values()
    for name in config.run.methods:
        trained = not method_job(own, name, 0, next(iter(data.values())), {}).config.evaluate.model
        if not trained or name in config.run.tune.same:
            continue
        for number, settings in enumerate(grid_cells(config, name)):
            if kept is not None and (name, number) not in before:
                continue
            found = [method_job(own, name, seed, data[seed], settings, f"{name}.{number}") for seed in data]
            jobs += found
            folders = before[name, number].folders if kept is not None else ()
            folders += tuple(job.folder for job in found)
            cells.append(Cell(method=name, number=number, settings=settings, folders=folders))
    return jobs, cells


def _require(config: ExperimentConfig) -> None:
    tune = config.run.tune
    for name in ("seeds", "grid", "objective", "file"):
        if not getattr(tune, name):
            raise UserError(f"run.tune.{name}: not set, but --tune needs it")
    if not config.run.methods:
        raise UserError("run.methods: not set, but --tune tunes methods")
    for text in tune.objective:
        metric_named(config, text, "run.tune.objective")


def objective(folder: Path, names: Sequence[str]) -> float:
    """The mean of the named results of one evaluated experiment."""
    values = []
    for name in names:
        benchmark, mode, metric = name.split("/")
        path = Experiment(folder).benchmark(benchmark).mode_result(mode)
        try:
            values.append(float(json.loads(path.read_text(encoding="utf-8"))["metrics"][metric]["estimate"]["value"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"run.tune.objective: {name!r} is not in {path} ({type(error).__name__}: {error})"
            ) from None
    return sum(values) / len(values)


def finalists(cells: Sequence[Cell], names: Sequence[str], num: int) -> list[Cell]:
    """The ``num`` best cells of each method, in the order of the grid."""
    chosen = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        ranked = sorted(own, key=lambda cell: -sum(objective(folder, names) for folder in cell.folders))
        chosen += sorted(ranked[:num], key=lambda cell: cell.number)
    return chosen


def choose(
    cells: Sequence[Cell], names: Sequence[str], finals: Sequence[Cell] = ()
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Method -> its best settings, and every cell with its scores by seed, in the order of the grid. Where there are
    ``finals``, which hold more seeds of some cells, the best is one of them."""
    further = {(cell.method, cell.number): cell for cell in finals}
    log: list[dict[str, Any]] = []
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for cell in cells:
        last = further.get((cell.method, cell.number), cell)
        scores = [objective(folder, names) for folder in last.folders]
        mean = sum(scores) / len(scores)
        log.append(
            {"method": cell.method, "settings": cell.settings, "scores": scores, "mean": mean, "final": last in finals}
        )
        runs_for_it = not finals or last in finals
        if runs_for_it and (cell.method not in best or mean > best[cell.method][0]):
            best[cell.method] = (mean, cell.settings)
    return {method: settings for method, (_, settings) in best.items()}, log


def at_edges(config: ExperimentConfig, best: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was chosen at an end of its values, so that a better one may lie beyond: 'dpo: train.learning_rate = 0.002'."""
    found = []
    for method, settings in best.items():
        cells = grid_cells(config, method)
        for key, value in settings.items():
            tried = sorted({cell[key] for cell in cells if isinstance(cell[key], int | float)})
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                found.append(f"{method}: {key} = {value:g}")
    return found


def tuned_toml(config: ExperimentConfig, best: Mapping[str, Mapping[str, Any]]) -> str:
    """The tuned values as a file that :func:`read_tuned` reads."""
    tune = config.run.tune
    lines = [
        f"# Tuned values of the experiment {config.name!r}, written by `bvpo run ... --tune`; the log of every cell is",
        f"# beside this file. Seeds {_seeds(config)};",
        f"# chosen by the mean of {', '.join(tune.objective)}.",
    ]
    for method, settings in best.items():
        lines += [
            "",
            f"[{_key(method)}]",
            *(f"{_key(key)} = {toml_value(value, key)}" for key, value in settings.items()),
        ]
    return "\n".join(lines) + "\n"


def _seeds(config: ExperimentConfig) -> str:
    tune = config.run.tune
    first = ", ".join(map(str, tune.seeds))
    final = ", ".join(map(str, tune.final_seeds))
    return f"{first}, and {final} for the best {tune.finalists} cells of each method" if final else first


def _key(name: str) -> str:
    return json.dumps(name) if not name.replace("-", "").replace("_", "").isalnum() else name


def kept_tuned(folder: Path) -> dict[str, dict[str, Any]]:
    """The values that the experiment in ``folder`` ran with, whatever became of run.tune.file since."""
    path = Experiment(folder).tuned
    if not path.is_file():
        return {}
    return convert(dict[str, dict[str, Any]], read_json(path), str(path))


def read_tuned(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Method -> tuned settings; empty without a file, which may be that of an experiment with more methods."""
    path = config.run.tune.file
    if not path:
        return {}
    if not Path(path).is_file():
        raise UserError(f"run.tune.file: {path} is not there; `bvpo run CONFIG --tune` writes it")
    tables = read_tables(path)
    if tables and not set(tables) & set(config.run.methods):
        raise UserError(f"{path}: none of its methods ({', '.join(tables)}) is in run.methods")
    tables = {name: table for name, table in tables.items() if name in config.run.methods}
    return tables | {name: tables[other] for name, other in config.run.tune.same.items() if other in tables}
