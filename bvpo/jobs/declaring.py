"""What a comparison's config declares, and whether it stood there before there was anything to see.

In: the config and the experiment's folder. Out: :class:`~bvpo.core.declared.Declared` records, and ``declared.json`` in the
folder, in which every declared comparison is entered once, with whether a result of any method was there at that time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bvpo.config import ExperimentConfig, benchmarks_of
from bvpo.core.declared import Declared, DeclaredRow, declared_rows
from bvpo.core.evaluation import MODES, Mode
from bvpo.core.results import SHARES, Runs
from bvpo.store import write_atomically
from bvpo.strict import FieldError, UserError, convert, did_you_mean, show

FILE = "declared.json"


def declared_of(config: ExperimentConfig) -> tuple[Declared, ...]:
    """The comparisons of ``[run.declared]``, checked against methods and benchmarks."""
    return tuple(_parse(config, name, table) for name, table in config.run.declared.items())


def _parse(config: ExperimentConfig, name: str, table: Any) -> Declared:
    where = f"run.declared.{name}"
    words = {"better": "", "than": "", "on": ""}
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: got {show(table)}, expected a table with 'better', 'than' and 'on'")
    for key, value in table.items():
        if key not in words:
            raise UserError(f"{where}: unknown field {key!r}{did_you_mean(str(key), words)}")
        try:
            words[key] = convert(str, value)
        except FieldError as error:
            raise UserError(f"{where}.{key}: {error.problem}") from None
    for key in ("better", "than"):
        if words[key] not in config.run.methods:
            hint = did_you_mean(words[key], config.run.methods)
            raise UserError(f"{where}.{key}: no method {words[key]!r}{hint}")
    parts = words["on"].split("/")
    if len(parts) != 3:
        raise UserError(f"{where}.on: got {show(words['on'])}, expected benchmark/mode/metric")
    benchmark, mode, metric = parts
    benchmarks = benchmarks_of(config.evaluate)
    if benchmark not in benchmarks:
        raise UserError(f"{where}.on: no benchmark {benchmark!r}{did_you_mean(benchmark, benchmarks)}")
    metrics = (benchmarks[benchmark].metric, *benchmarks[benchmark].more, *SHARES)
    for value, known, what in ((mode, MODES, "mode"), (metric, metrics, f"metric of {benchmark}")):
        if value not in known:
            raise UserError(f"{where}.on: {value!r} is not a {what} ({', '.join(known)})")
    return Declared(
        name=name,
        better=words["better"],
        than=words["than"],
        benchmark=benchmark,
        mode=cast(Mode, mode),
        metric=metric,
    )


def enter(config: ExperimentConfig, folder: Path) -> None:
    """Writes down what is declared and was not before; what was entered once keeps its entry while it stays the same."""
    declared = declared_of(config)
    entered = _read(folder)
    if not declared and not entered:
        return
    nothing_seen = not any(folder.glob("seed-*/*/eval/results.json"))
    entries = {}
    for one in declared:
        before = entered.get(one.name)
        same = before is not None and before["what"] == _what(one)
        entries[one.name] = before if same else {"what": _what(one), "beforehand": nothing_seen}
    if entries != entered:
        write_atomically(folder / FILE, json.dumps(entries, indent=1) + "\n")


def rows_of(config: ExperimentConfig, folder: Path, runs: Mapping[str, Runs], level: float) -> tuple[DeclaredRow, ...]:
    """What became of each; one that was never entered is not counted as declared beforehand."""
    entered = _read(folder)

    def in_time(one: Declared) -> bool:
        entry = entered.get(one.name)
        return entry is not None and entry["what"] == _what(one) and entry["beforehand"]

    declared = declared_of(config)
    return declared_rows(declared, runs, beforehand={one.name: in_time(one) for one in declared}, level=level)


def _what(one: Declared) -> str:
    return f"{one.better} > {one.than} on {one.benchmark}/{one.mode}/{one.metric}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it holds what was declared before the runs") from None
