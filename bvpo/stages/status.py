"""``bvpo status EXPERIMENT``: how far each stage of an experiment is.

Reads the folder and changes nothing; works on empty and half-made folders and while stages run. What is done is counted in
the data itself, never taken from notes about it. Out: a plain table, or JSON with ``--json``. ``--verify`` reads every
stored byte, and ``--repair`` drops what is damaged; it starts no stage.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bvpo.command import ReaderParser, parse_reader
from bvpo.data.overview import SCORE_COLUMNS, last_scores
from bvpo.data.scores import NO_ANSWER
from bvpo.evaluation.metrics import MODES
from bvpo.experiment import Experiment, Manifest, StageEntry, StoreStats
from bvpo.experiment.checking import StoreCheck, check_store
from bvpo.experiment.live import LiveFile, is_active
from bvpo.report.tables import aligned
from bvpo.runs.progress import MethodProgress, method_progress
from bvpo.strict import UserError

ABOUT = (
    "Show per stage what is done, what failed, what is left and how fast it goes. Changes nothing (but for --repair). "
    "Exit code 1: --verify found damage."
)
NOT_STARTED, UNFINISHED, RUNNING, FINISHED = "not started", "unfinished", "running", "finished"
_STAMP = re.compile(r"(\d{20})-.*\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One line of the table. ``None`` is what cannot be known; ``rate`` is per second, of the processes at work now."""

    stage: str
    state: str = NOT_STARTED
    unit: str = ""
    done: int | None = None
    failed: int | None = None
    left: int | None = None
    rate: float | None = None
    notes: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int | None:
    parser = ReaderParser("status", ABOUT)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--verify", action="store_true", help="check every record and shard against its checksum")
    parser.add_argument("--repair", action="store_true", help="verify, and drop what is damaged, to be made again")
    folder, options = parse_reader(parser, argv)
    checks = verify(folder, repair=options.repair) if options.verify or options.repair else []
    if methods := method_progress(folder):
        return say_methods(folder, methods, as_json=options.json)
    stages = examine(folder)
    if options.json:
        found: dict[str, Any] = {"experiment": str(folder), "stages": [asdict(stage) for stage in stages]}
        if checks:
            found["stores"] = [asdict(check) for check in checks]
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write(table(folder, stages) + check_table(checks))
    return 1 if any(check.problems for check in checks) else None


def say_methods(folder: Path, methods: Sequence[MethodProgress], *, as_json: bool) -> None:
    """A comparison has no stages of its own: how many seeds of each method are done, and where to look further."""
    if as_json:
        found = {"experiment": str(folder), "methods": [asdict(one) for one in methods]}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    rows = [["method", "seeds", "paired", "trained", "evaluated"]]
    rows += [[one.name, *map(str, (one.started, one.paired, one.trained, one.evaluated))] for one in methods]
    sys.stdout.write(f"comparison {folder}\n\n" + "\n".join(aligned(rows, left=1)) + "\n")
    first = Experiment(folder).members()[0].folder
    sys.stdout.write(f"\none of them: bvpo status {first}\n")


def verify(folder: Path, *, repair: bool) -> list[StoreCheck]:
    """Every store of the experiment, checked byte by byte."""
    experiment = Experiment(folder)
    manifest, stores = experiment.manifest(), experiment.stores()
    shards = {name: entry.shards for name, (stage, _) in stores.items() if (entry := manifest.stage(stage)) is not None}
    return [check_store(store, name, shards.get(name, ()), repair=repair) for name, (_, store) in stores.items()]


def examine(folder: Path) -> list[StageStatus]:
    """Every stage, in the order of the work."""
    experiment = Experiment(folder)
    manifest = experiment.manifest()
    return [look(experiment, manifest) for look in LOOKS]


# ---------------------------------------------------------------------------------------------------------------------
# one function per stage


def prompts_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    done, dropped = _lines(experiment.prompts_file), _lines(experiment.dropped_file)
    if done is None:
        return StageStatus(stage="prompts")
    notes = (f"{dropped:,} dropped",) if dropped else ()
    return StageStatus(stage="prompts", state=FINISHED, unit="prompts", done=done, notes=notes)


def sample_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    entry = manifest.stage("sample")
    store = experiment.samples()
    stats = store.stats()
    failures = experiment.failed()
    failed = len({row["key"] for row in failures.columns("key") if row["key"] not in store})
    state = _state(stats, entry, len(store) + failed)
    if state == NOT_STARTED:
        return StageStatus(stage="sample")
    asked = _asked(experiment, entry)
    shared = entry.count("shared") if entry is not None else 0  # of prompts that read alike
    left = None if asked is None else max(0, asked - shared - len(store) - failed)
    if state == FINISHED:
        left = left or 0
        state = UNFINISHED if left else FINISHED  # records were lost since
    return StageStatus(
        stage="sample",
        state=state,
        unit="samples",
        done=len(store),
        failed=failed,
        left=left,
        rate=_rate(experiment.samples_folder),
        notes=_store_notes(stats),
    )


def _asked(experiment: Experiment, entry: StageEntry | None) -> int | None:
    """How many samples the experiment asks for, from the settings that sampling was started with."""
    if entry is None or not experiment.prompts_file.is_file():
        return None
    settings = entry.section("sample")
    splits = settings.get("splits", [])
    try:
        prompts = sum(not splits or prompt.split in splits for prompt in experiment.prompts())
        return prompts * len(settings["views"]) * int(settings["num_samples"])
    except (KeyError, TypeError):
        return None


def score_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    entry = manifest.stage("score")
    store = experiment.scores()
    stats = store.stats()
    columns = store.columns(*SCORE_COLUMNS)
    latest = last_scores(columns, experiment.scorer())
    unscorable = sum(score.error == NO_ANSWER for score in latest.values())
    failed = sum(score.value is None for score in latest.values()) - unscorable
    state = _state(stats, entry, len(latest))
    if state == NOT_STARTED:
        return StageStatus(stage="score")
    samples = len(experiment.samples())
    notes = [f"{unscorable:,} without an answer"] if unscorable else []
    return StageStatus(
        stage="score",
        state=state,
        unit="samples",
        done=len(latest) - failed,
        failed=failed,
        left=max(0, samples - len(latest)),
        rate=_rate(experiment.scores_folder),
        notes=(*notes, *_store_notes(stats)),
    )


def pair_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    entry = manifest.stage("pair")
    files = experiment.quads_files()
    if not files:
        return StageStatus(stage="pair", state=NOT_STARTED if entry is None else UNFINISHED)
    done = sum(_lines(path) or 0 for path in files)
    finished = entry is not None and entry.finished is not None
    notes = []
    if finished:
        assert entry is not None
        done = entry.count("total", done)  # a quad with several traces has several lines
        counts = {name: num for name, num in entry.counts.items() if isinstance(num, int) and name != "total" and num}
        notes += [f"{num:,} {name}" for name, num in counts.items()]
        score = manifest.stage("score")
        if score is not None and (score.finished or score.started) > (entry.finished or ""):
            notes.append("older than the scores: pair again")
    return StageStatus(
        stage="pair", state=FINISHED if finished else UNFINISHED, unit="quads", done=done, notes=tuple(notes)
    )


def train_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    entry = manifest.stage("train")
    last = _last_entry(experiment.metrics)
    finished = (entry is not None and entry.finished is not None) and experiment.final.is_dir()
    if not finished and last is None:
        return StageStatus(stage="train", state=NOT_STARTED if entry is None else UNFINISHED)
    steps, planned = last[0].get("step") if last else None, _planned_steps(experiment.train)
    notes = []
    if last is not None and not finished:
        speed = last[0].get("tokens_per_second")
        notes += [f"{speed:,.0f} tokens/s"] if isinstance(speed, (int, float)) else []
        notes.append(f"last entry {_ago(time.time() - last[1])} ago")
    return StageStatus(
        stage="train",
        state=FINISHED if finished else UNFINISHED,
        unit="steps",
        done=steps,
        left=0 if finished else None if planned is None or steps is None else max(0, planned - steps),
        notes=tuple(notes),
    )


def _last_entry(path: Path) -> tuple[dict[str, Any], float] | None:
    """The last whole line of a metrics file, and when the file was last written."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        written = path.stat().st_mtime
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a killed run leaves half a line
        if isinstance(entry, dict) and "step" in entry:
            return entry, written
    return None


def _planned_steps(output: Path) -> int | None:
    """From the newest checkpoint; none is written before the first save."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(states):
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["max_steps"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def evaluate_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    """Counts results, one per benchmark and mode; each benchmark is an experiment folder with a status of its own."""
    entry = manifest.stage(experiment.evaluate_stage)
    benchmarks = experiment.benchmarks().values()
    if entry is None and not benchmarks:
        return StageStatus(stage="evaluate")
    finished = entry is not None and entry.finished is not None
    done = sum(place.mode_result(mode).is_file() for place in benchmarks for mode in MODES)
    planned = None if entry is None else entry.section("evaluate")
    asked = len(planned.get("benchmarks", ())) * len(planned.get("modes", ())) if planned else None
    notes = []
    train = manifest.stage("train")
    if (
        finished
        and entry is not None
        and train is not None
        and (train.finished or train.started) > (entry.finished or "")
    ):
        notes.append("older than the model: evaluate again")
    if not finished and benchmarks:
        notes.append("bvpo status of " + ", ".join(str(place.folder) for place in benchmarks) + " tells more")
    return StageStatus(
        stage="evaluate",
        state=FINISHED if finished else UNFINISHED,
        unit="results",
        done=done,
        left=0 if finished else None if asked is None else max(0, asked - done),
        notes=tuple(notes),
    )


def analyze_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    return _page("analyze", experiment.analysis, experiment.analysis_page)


def report_status(experiment: Experiment, manifest: Manifest) -> StageStatus:
    return _page("report", experiment.results, experiment.page)


def _page(stage: str, *paths: Path) -> StageStatus:
    there = [path.name for path in paths if path.is_file()]
    state = FINISHED if len(there) == len(paths) else UNFINISHED if there else NOT_STARTED
    return StageStatus(stage=stage, state=state, notes=tuple(there))


LOOKS: tuple[Callable[[Experiment, Manifest], StageStatus], ...] = (
    prompts_status,
    sample_status,
    score_status,
    pair_status,
    train_status,
    evaluate_status,
    analyze_status,
    report_status,
)
"""In the order of the work."""


# ---------------------------------------------------------------------------------------------------------------------
# stores


def _state(stats: StoreStats, entry: StageEntry | None, num_records: int) -> str:
    if stats.num_active:
        return RUNNING
    if entry is not None and entry.finished is not None:
        return FINISHED
    return UNFINISHED if entry is not None or num_records else NOT_STARTED


def _rate(folder: Path) -> float | None:
    """Records a second of all writers at work: each has a file of its own, which is named by when it was opened."""
    rates = []
    for path in folder.glob("*.jsonl") if folder.is_dir() else ():
        stamp = _STAMP.fullmatch(path.name)
        if stamp is None or not is_active(path):
            continue
        try:
            num, written = len(LiveFile(path).keys()[1]), path.stat().st_mtime
        except FileNotFoundError:
            continue  # sealed meanwhile
        seconds = written - int(stamp[1]) / 1e9
        if num and seconds > 0:
            rates.append(num / seconds)
    return sum(rates) if rates else None


def _store_notes(stats: StoreStats) -> tuple[str, ...]:
    found = []
    if stats.num_active:
        found.append(f"{stats.num_active} at work" if stats.num_active > 1 else "at work now")
    if stats.torn_bytes:
        found.append("a writer was killed; the next run tidies up")
    if stats.damaged:
        sealed = any(".parquet" in damage.where for damage in stats.damaged)
        advice = "bvpo status --repair drops them" if sealed else "the next run makes these records again"
        found.append(f"{len(stats.damaged)} damaged places, {advice}")
    return tuple(found)


def _lines(path: Path) -> int | None:
    """Lines with something in them; ``None`` where there is no such file."""
    try:
        with open(path, "rb") as stream:
            return sum(bool(line.strip()) for line in stream)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# the table


def table(folder: Path, stages: Iterable[StageStatus]) -> str:
    """Plain text; a dash is what cannot be known, or what a stage has none of."""
    rows = [("stage", "state", "done", "failed", "left", "rate", "")]
    for one in stages:
        note = "; ".join(([_remaining(one)] if _remaining(one) else []) + list(one.notes))
        counts = [_count(value) for value in (one.done, one.failed, one.left)]
        done = f"{counts[0]} {one.unit}" if one.done is not None and one.unit else counts[0]
        rows.append((one.stage, one.state, done, counts[1], counts[2], _rate_text(one.rate), note))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [f"experiment {folder}", ""]
    for row in rows:
        left = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        right = [row[column].rjust(widths[column]) for column in range(2, 6)]
        lines.append("  ".join([*left, *right, row[6]]).rstrip())
    return "\n".join(lines) + "\n"


def check_table(checks: Sequence[StoreCheck]) -> str:
    """What reading every byte has found; nothing where nothing was checked."""
    if not checks:
        return ""
    lines = [""]
    for check in checks:
        files = f"shards {check.num_shards:,}, live files {check.num_live:,}, bytes {check.num_bytes:,}"
        lines.append(f"{check.store}: records {check.num_records:,}, {files}")
        lines += [f"  dropped: {dropped}" for dropped in check.dropped]
        lines += [f"  DAMAGED: {problem}" for problem in check.problems]
    if any(check.problems for check in checks):
        lines.append("--repair drops what shards have lost; then the stage's own command makes it again")
    else:
        lines.append("every checksum holds")
    return "\n".join(lines) + "\n"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _rate_text(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}/s"


def _remaining(one: StageStatus) -> str:
    if not one.rate or not one.left:
        return ""
    return f"about {_ago(one.left / one.rate)} to go"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
