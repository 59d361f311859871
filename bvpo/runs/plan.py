"""Jobs of one ``bvpo run``: an experiment config in, ordinary experiment configs and the verbs to run on them out.

Without methods there is one job, the chain itself. With methods there is one data job per seed (the stages up to pairing)
and one job per seed and method (training and evaluation), each an experiment folder of its own below ``ROOT/NAME/seed-S``,
so that every verb works on every one of them by hand. Nothing is run or written here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig, validate
from bvpo.config.layers import Layer, build, checked_table
from bvpo.experiment import Experiment
from bvpo.strict import FieldError, UserError, did_you_mean, show, to_dict
from bvpo.verbs import VERBS

SHARED = ("tiny",)
"""Verbs that make what all seeds share: the model."""
DATA = ("prompts", "sample", "score", "pair", "analyze")
"""Verbs whose work all methods of a seed share."""
METHOD = ("train", "evaluate")
DATA_FOLDER = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Verbs to run in turn on one experiment folder, once the jobs named in ``after`` are done."""

    name: str
    config: ExperimentConfig
    verbs: tuple[str, ...]
    after: tuple[str, ...] = ()
    inherits: Path | None = None
    """A folder whose ``prompts.jsonl`` this experiment starts with."""

    @property
    def folder(self) -> Path:
        return self.config.folder


def plan(config: ExperimentConfig, tuned: Mapping[str, Mapping[str, Any]] | None = None) -> list[Job]:
    """All jobs in an order in which they can be done. ``tuned`` holds settings by method that win over its own."""
    check_run(config)
    if not config.run.methods:
        return [Job(name=config.name, config=config, verbs=stages_of(config))]
    jobs = list(_shared_jobs(config))
    shared = tuple(job.name for job in jobs)
    for seed in seeds_of(config):
        data = data_job(config, seed, shared)
        jobs.append(data)
        jobs += [method_job(config, name, seed, data, (tuned or {}).get(name, {})) for name in config.run.methods]
    return jobs


def seeds_of(config: ExperimentConfig) -> tuple[int, ...]:
    """The seeds of a comparison."""
    return config.run.seeds or tuple(range(config.seed, config.seed + config.run.num_seeds))


def stages_of(config: ExperimentConfig) -> tuple[str, ...]:
    """The verbs of the chain; nothing is evaluated without a benchmark."""
    return tuple(verb for verb in config.run.stages if verb != "evaluate" or config.evaluate.benchmarks)


def check_run(config: ExperimentConfig) -> None:
    """Refuses names that mean nothing, before any work."""
    chain = (*SHARED, *DATA, *METHOD)
    for verb in config.run.stages:
        if verb not in chain or verb not in VERBS:
            raise UserError(f"run.stages: {verb!r} is not a stage of a chain{did_you_mean(verb, chain)}")
    places = [chain.index(verb) for verb in config.run.stages]
    if places != sorted(set(places)):
        raise UserError(
            f"run.stages: got {show(list(config.run.stages))}, expected each once, in the order of the work"
        )
    methods = config.run.methods
    if config.run.baseline and config.run.baseline not in methods:
        raise UserError(f"run.baseline: no method {config.run.baseline!r}{did_you_mean(config.run.baseline, methods)}")
    if DATA_FOLDER in methods:
        raise UserError(f"run.methods.{DATA_FOLDER}: this name is taken by the folder of the pairs")
    tune = config.run.tune
    for name, others, what in (
        ("seeds", seeds_of(config), "the comparison"),
        ("final_seeds", (*seeds_of(config), *tune.seeds), "the comparison or of run.tune.seeds"),
    ):
        seeds = getattr(tune, name)
        if len(set(seeds)) < len(seeds):
            raise UserError(f"run.tune.{name}: got {show(list(seeds))}, expected each seed once")
        if overlap := set(others) & set(seeds):
            raise UserError(f"run.tune.{name}: {min(overlap)} is also a seed of {what}; tuning needs seeds of its own")
    for name, table in methods.items():
        method_config(config, name, table)
    for name, other in tune.same.items():
        for one in (name, other):
            if one not in methods:
                raise UserError(f"run.tune.same: no method {one!r}{did_you_mean(str(one), methods)}")


def _shared_jobs(config: ExperimentConfig) -> Iterator[Job]:
    verbs = tuple(verb for verb in stages_of(config) if verb in SHARED)
    if verbs:
        yield Job(name="model", config=_alone(config, root=str(home(config)), name="model"), verbs=verbs)


def home(config: ExperimentConfig) -> Path:
    return config.folder


def data_job(config: ExperimentConfig, seed: int, after: tuple[str, ...]) -> Job:
    """The stages up to pairing, for all methods of one seed."""
    own = _alone(config, root=str(home(config) / f"seed-{seed}"), name=DATA_FOLDER, seed=seed)
    verbs = tuple(verb for verb in stages_of(config) if verb in DATA)
    return Job(name=f"seed-{seed}/{DATA_FOLDER}", config=own, verbs=verbs, after=after)


def method_job(
    config: ExperimentConfig, name: str, seed: int, data: Job, tuned: Mapping[str, Any], folder: str | None = None
) -> Job:
    """Training and evaluation of one method on one seed's pairs."""
    source = _grid(config, name) if folder else "run.tune.file"  # a cell of the grid has a folder of its own
    own = method_config(config, name, config.run.methods[name], tuned, source)
    own = _alone(own, root=str(home(config) / f"seed-{seed}"), name=folder or name, seed=seed)
    verbs = tuple(verb for verb in stages_of(config) if verb in METHOD)
    if own.evaluate.model:  # something that is there already
        verbs = tuple(verb for verb in verbs if verb != "train")
    if not own.train.reference_cache:
        train = dataclasses.replace(own.train, reference_cache=str(Experiment(data.folder).reference))
        own = dataclasses.replace(own, train=train)
    if not (own.data.quads or own.data.trace or own.data.empty):
        quads = str(Experiment(data.folder).quads())
        own = dataclasses.replace(own, data=dataclasses.replace(own.data, quads=quads))
    return Job(name=f"seed-{seed}/{folder or name}", config=own, verbs=verbs, after=(data.name,), inherits=data.folder)


def method_config(
    config: ExperimentConfig,
    name: str,
    table: Any,
    tuned: Mapping[str, Any] | None = None,
    source: str = "run.tune.file",
) -> ExperimentConfig:
    """The experiment's config with a method's settings over it, and over these the tuned ones, which were written in
    ``source``; checked like a file."""
    where = f"run.methods.{name}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"run.methods: {name!r} is no name of a method; use letters, digits, '-', '_' and '.'")
    own = with_settings(config, where, table)
    return with_settings(own, f"{source}, for {name}", nested(tuned)) if tuned else own


def with_settings(config: ExperimentConfig, where: str, table: Any) -> ExperimentConfig:
    """A partial config over a config; an error says ``where`` it was written."""
    layers = [Layer(values=to_dict(config), source=where, lines={})]
    try:
        layers.append(Layer(values=checked_table(ExperimentConfig, table), source=where, lines={}))
        merged = build(ExperimentConfig, layers)
        validate(merged)
    except FieldError as error:
        raise UserError(f"{where}: {error.problem}") from None
    return merged


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"train.loss.beta": 0.1}`` as a table of tables."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        node = out
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return out


def grid_cells(config: ExperimentConfig, method: str) -> list[dict[str, Any]]:
    """Every combination of the method's grid, as settings; one empty cell where there is nothing to tune."""
    tune = config.run.tune
    grid: Mapping[str, Any] = tune.grids.get(method, tune.grid)
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"{_grid(config, method)}: {key!r}: got {show(values)}, expected a list of values")
    cells = (zip(grid, values, strict=True) for values in itertools.product(*grid.values()))
    return [{name: value for key, value in cell for name in key.split("+")} for cell in cells]


def _grid(config: ExperimentConfig, method: str) -> str:
    """Where the method's grid is written."""
    return f"run.tune.grids.{method}" if method in config.run.tune.grids else "run.tune.grid"


def _alone(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    """An ordinary experiment: it does not know that it is part of a comparison."""
    return dataclasses.replace(config, run=type(config.run)(), **changes)
