"""Tuning of a comparison: the same grid for every method, on seeds and prompts of its own; the best cell by one objective.

In: the experiment config; out: the jobs of all cells, and from their evaluations the tuned values as TOML text and a log of
every cell. Ties go to the earlier cell. Nothing here runs a job or writes a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.jobs.plan import Job, check_run, data_job, grid_cells, home, method_job, plan, with_settings
from bvpo.overlay import read_tables
from bvpo.strict import UserError, show
from bvpo.tomltext import toml_value

TUNING = "tuning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method with one combination of the grid's values, and the folders of its runs."""

    method: str
    settings: dict[str, Any]
    folders: tuple[Path, ...]


def plan_tuning(config: ExperimentConfig) -> tuple[list[Job], list[Cell]]:
    """The jobs of every cell on every tuning seed, below ``ROOT/NAME/tuning``."""
    check_run(config)
    _require(config)
    apart = with_settings(config, "run.tune.settings", config.run.tune.settings)
    own = dataclasses.replace(apart, root=str(home(config)), name=TUNING)
    jobs = [job for job in plan(config) if job.name == "model"]
    shared = tuple(job.name for job in jobs)
    cells: list[Cell] = []
    data = {seed: data_job(own, seed, shared) for seed in config.run.tune.seeds}
    jobs += data.values()
    for name in config.run.methods:
        trained = not method_job(own, name, 0, next(iter(data.values())), {}).config.evaluate.model
        if not trained or name in config.run.tune.same:
            continue
        for number, settings in enumerate(grid_cells(config, name)):
            found = [method_job(own, name, seed, data[seed], settings, f"{name}.{number}") for seed in data]
            jobs += found
            cells.append(Cell(method=name, settings=settings, folders=tuple(job.folder for job in found)))
    return jobs, cells


def _require(config: ExperimentConfig) -> None:
    tune = config.run.tune
    for name in ("seeds", "grid", "objective", "file"):
        if not getattr(tune, name):
            raise UserError(f"run.tune.{name}: not set, but --tune needs it")
    if not config.run.methods:
        raise UserError("run.methods: not set, but --tune tunes methods")
    for text in tune.objective:
        if text.count("/") != 2:
            raise UserError(f"run.tune.objective: got {show(text)}, expected benchmark/mode/metric")


def objective(folder: Path, names: Sequence[str]) -> float:
    """The mean of the named results of one evaluated experiment."""
    values = []
    for name in names:
        benchmark, mode, metric = name.split("/")
        path = folder / "eval" / benchmark / f"{mode}.json"
        try:
            values.append(float(json.loads(path.read_text(encoding="utf-8"))["metrics"][metric]["estimate"]["value"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"run.tune.objective: {name!r} is not in {path} ({type(error).__name__}: {error})"
            ) from None
    return sum(values) / len(values)


def choose(cells: Sequence[Cell], names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Method -> its best settings, and every cell with its scores, in the order of the grid."""
    log: list[dict[str, Any]] = []
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for cell in cells:
        scores = [objective(folder, names) for folder in cell.folders]
        mean = sum(scores) / len(scores)
        log.append({"method": cell.method, "settings": cell.settings, "scores": scores, "mean": mean})
        if cell.method not in best or mean > best[cell.method][0]:
            best[cell.method] = (mean, cell.settings)
    return {method: settings for method, (_, settings) in best.items()}, log


def tuned_toml(config: ExperimentConfig, best: Mapping[str, Mapping[str, Any]]) -> str:
    """The tuned values as a file that :func:`read_tuned` reads."""
    tune = config.run.tune
    lines = [
        f"# Tuned values of the experiment {config.name!r}, written by `bvpo run ... --tune`; the log of every cell is",
        f"# beside this file. Seeds {', '.join(map(str, tune.seeds))}; chosen by the mean of {', '.join(tune.objective)}.",
    ]
    for method, settings in best.items():
        lines += [
            "",
            f"[{_key(method)}]",
            *(f"{_key(key)} = {toml_value(value, key)}" for key, value in settings.items()),
        ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return json.dumps(name) if not name.replace("-", "").replace("_", "").isalnum() else name


def read_tuned(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Method -> tuned settings; empty where the config names no file."""
    path = config.run.tune.file
    if not path:
        return {}
    tables = read_tables(path)
    unknown = [name for name in tables if name not in config.run.methods]
    if unknown:
        raise UserError(f"{path}: no method {unknown[0]!r} in run.methods")
    return tables | {name: tables[other] for name, other in config.run.tune.same.items() if other in tables}
