"""What a comparison's config declares, and whether it stood there before there was anything to see.

In: the config and the experiment's folder. Out: :class:`~bvpo.evaluation.declared.Declared` records, and
``declared.json`` in the folder: every comparison ever declared, for which seeds and under which settings of its
methods, and whether nothing was evaluated yet when it was entered. Entries are never removed, so that what was taken
back still counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bvpo.config import ExperimentConfig, benchmarks_of
from bvpo.evaluation.declared import Declared, declared_rows
from bvpo.evaluation.metrics import MODES, Mode
from bvpo.evaluation.results import DeclaredRow, Runs
from bvpo.experiment import Experiment, write_atomically
from bvpo.keys import content_hash
from bvpo.runs.plan import method_config, nested, seeds_of
from bvpo.strict import UserError, did_you_mean, show, to_dict

Tuned = Mapping[str, Mapping[str, Any]]


def declared_of(config: ExperimentConfig) -> tuple[Declared, ...]:
    """The comparisons of ``[run.declared]``, checked against methods and benchmarks."""
    if config.run.declared and not config.run.methods:
        raise UserError("run.declared: there is nothing to compare without [run.methods]")
    found: dict[str, Declared] = {}
    for name, table in config.run.declared.items():
        one = _parse(config, name, table)
        if (what := _what(one)) in found:
            raise UserError(f"run.declared.{name}: says the same as run.declared.{found[what].name}")
        found[what] = one
    return tuple(found.values())


def _parse(config: ExperimentConfig, name: str, table: Any) -> Declared:
    where, keys = f"run.declared.{name}", ("better", "than", "on")
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: got {show(table)}, expected a table with 'better', 'than' and 'on'")
    for key, value in table.items():
        if key not in keys:
            raise UserError(f"{where}: unknown field {key!r}{did_you_mean(str(key), keys)}")
        if not isinstance(value, str):
            raise UserError(f"{where}.{key}: got {show(value)}, expected a string")
    for key in keys:
        if key not in table:
            raise UserError(f"{where}.{key}: not set; a declared comparison has 'better', 'than' and 'on'")
    for key in ("better", "than"):
        if table[key] not in config.run.methods:
            raise UserError(f"{where}.{key}: no method {table[key]!r}{did_you_mean(table[key], config.run.methods)}")
    if table["better"] == table["than"]:
        raise UserError(f"{where}: compares {table['better']!r} with itself")
    benchmark, mode, metric = metric_named(config, table["on"], f"{where}.on")
    return Declared(
        name=name, better=table["better"], than=table["than"], benchmark=benchmark, mode=mode, metric=metric
    )


def metric_named(config: ExperimentConfig, text: str, where: str) -> tuple[str, Mode, str]:
    """``benchmark/mode/metric`` of a config, checked against what it evaluates."""
    parts = text.split("/")
    if len(parts) != 3:
        raise UserError(f"{where}: got {show(text)}, expected benchmark/mode/metric")
    benchmark, mode, metric = parts
    benchmarks = benchmarks_of(config.evaluate)
    if benchmark not in benchmarks:
        raise UserError(f"{where}: no benchmark {benchmark!r}{did_you_mean(benchmark, benchmarks)}")
    if mode not in MODES or mode not in config.evaluate.modes:
        raise UserError(f"{where}: {mode!r} is not a mode that is evaluated ({', '.join(config.evaluate.modes)})")
    metrics = (benchmarks[benchmark].metric, *benchmarks[benchmark].more)
    if metric not in metrics:
        raise UserError(f"{where}: {metric!r} is not a metric of {benchmark} ({', '.join(metrics)})")
    return benchmark, cast(Mode, mode), metric


def enter(config: ExperimentConfig, folder: Path, tuned: Tuned) -> None:
    """Writes down what is declared and was not before. An entry may change until something is evaluated, and never after."""
    declared, entered = declared_of(config), _read(folder)
    nothing_seen = not any(True for pattern in Experiment.SEEN for _ in folder.glob(pattern))
    entries = dict(entered)
    for one in declared:
        now, before = _entry(config, one, tuned), entered.get(one.name)
        if before is None or (nothing_seen and not _same(before, now)):
            entries[one.name] = {**now, "beforehand": nothing_seen}
        elif before["what"] != now["what"]:  # the first entry stays, and this one counts beside it
            entries.setdefault(f"{one.name}: {now['what']}", {**now, "beforehand": False})
    if entries != entered:
        write_atomically(Experiment(folder).declared, json.dumps(entries, indent=1) + "\n")


def rows_of(
    config: ExperimentConfig, folder: Path, runs: Mapping[str, Runs], tuned: Tuned, level: float
) -> tuple[DeclaredRow, ...]:
    """What became of each. The level is shared with what was declared once and is no more."""
    declared, entered = declared_of(config), _read(folder)

    def in_time(one: Declared) -> bool:
        before = entered.get(one.name)
        return before is not None and _same(before, _entry(config, one, tuned)) and before["beforehand"]

    return declared_rows(
        declared,
        runs,
        beforehand={one.name: in_time(one) for one in declared},
        num_seeds=len(seeds_of(config)),
        num_withdrawn=len({entry["what"] for entry in entered.values()} - {_what(one) for one in declared}),
        level=level,
    )


def _entry(config: ExperimentConfig, one: Declared, tuned: Tuned) -> dict[str, Any]:
    """What must not change between the declaration and the result: the comparison, its seeds, what is trained and how."""
    settings = {}
    for name in (one.better, one.than):
        own = method_config(config, name, config.run.methods[name], nested(tuned.get(name, {})))
        sections = {key: value for key, value in to_dict(own).items() if key not in ("run", "name", "root", "seed")}
        settings[name] = content_hash(sections)[:16]
    return {"what": _what(one), "seeds": list(seeds_of(config)), "settings": settings}


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return {key: before.get(key) for key in now} == now


def _what(one: Declared) -> str:
    return f"{one.better} > {one.than} on {one.benchmark}/{one.mode}/{one.metric}"


def _read(folder: Path) -> dict[str, Any]:
    path = Experiment(folder).declared
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it holds what was declared before the runs") from None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise UserError(f"{path}: got something else than entries; it holds what was declared before the runs")
    return found
