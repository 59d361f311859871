"""``bvpo run CONFIG.toml``: any chain of stages by one command, and comparisons of several methods over several seeds.

Reads ``[run]``. A chain works on the experiment's own folder; a comparison makes an ordinary experiment folder for every
seed's data and every method, below ``ROOT/NAME/seed-S``. What is finished is skipped, so the same command resumes.
``--tune`` looks for each method's best settings first. It does no work of a stage itself: it calls the verbs by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, dump_toml
from bvpo.experiment import Experiment, begin_stage, finish_stage, forget_stage, write_atomically
from bvpo.files import folder_lock, make_folder
from bvpo.runs.cost import bounds
from bvpo.runs.declaring import Tuned, declared_of, enter
from bvpo.runs.plan import Job, home, plan, stages_of
from bvpo.runs.pool import Event, has_gpu, run_job, run_jobs
from bvpo.runs.tuning import at_edges, choose, finalists, plan_tuning, read_tuned, tuned_toml
from bvpo.runs.view import RunView
from bvpo.strict import OtherSettings, UserError, to_dict
from bvpo.verbs import run_words

logger = logging.getLogger(__name__)

TUNE = "--tune"
ABOUT = (
    "Run the stages of [run] and write the report. Finished stages are skipped; run again, it goes on where it stopped. "
    f"{TUNE} first tries the grid of [run.tune] and writes the best settings of each method to run.tune.file."
)


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("run", argv, ABOUT)
    with _ending_on_sigterm():
        run(config, options)
    return None


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """As on ctrl-C, with the exit code that shells give: workers are ended, and one line says so."""
    asked: list[int] = []

    def end(number: int, frame: Any) -> None:
        asked.append(number)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit:
        if asked:
            logger.info("bvpo: terminated; running the same command again resumes")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """The whole run; a failed job raises after the jobs at work have ended."""
    declared_of(config)  # mistakes in it come before any work
    if options.tune:
        tune_methods(config, options)
        if options.dry_run:
            return
    tuned = read_tuned(config)
    jobs = plan(config, tuned)
    if options.dry_run:
        _say_plan(config, jobs, options)
        if not config.run.methods:
            _rehearse(jobs[0], options)
        return
    folder = home(config)
    make_folder(folder)
    with folder_lock(folder, "run", refusal="another bvpo run is at work in this folder; wait for it"):
        _run(config, options, folder, jobs, tuned)


def _run(config: ExperimentConfig, options: StageOptions, folder: Path, jobs: Sequence[Job], tuned: Tuned) -> None:
    before = _begin(config, folder, tuned)
    try:
        _work(config, jobs, options, "run")
    except OtherSettings:  # what is there stays described by what it was made with
        for path, text in before.items():
            path.unlink(missing_ok=True) if text is None else write_atomically(path, text)
        raise
    finish_stage(folder, "run", counts={"jobs": len(jobs)})
    if "evaluate" in stages_of(config):
        run_words("report", [str(folder)])
    else:
        logger.info("report       none: no benchmark is set in [evaluate.benchmarks]")


def tune_methods(config: ExperimentConfig, options: StageOptions) -> None:
    """Runs every cell of the grid, then writes the tuned values and the log of all cells."""
    jobs, cells = plan_tuning(config)
    if options.dry_run:
        logger.info("bvpo tune    %d experiments in %s", len(jobs), home(config))
        _say_jobs(jobs)
        if seeds := config.run.tune.final_seeds:
            logger.info("  then the best %d of each method on %d more seeds", config.run.tune.finalists, len(seeds))
        return
    _work(config, jobs, options, "tune")
    tune, finals = config.run.tune, []
    if tune.final_seeds:
        jobs, finals = plan_tuning(config, finalists(cells, tune.objective, tune.finalists))
        _work(config, jobs, options, "finals")
    best, log = choose(cells, tune.objective, finals)
    file = Path(tune.file)
    write_atomically(file, tuned_toml(config, best))
    seeds = {"seeds": list(tune.seeds), "final_seeds": list(tune.final_seeds)}
    header = {"objective": list(tune.objective), **seeds, "settings": tune.settings}
    write_atomically(file.with_suffix(".log.json"), json.dumps({**header, "cells": log}, indent=1) + "\n")
    for method, settings in best.items():
        logger.info("%-16s %s", method, ", ".join(f"{key} = {value}" for key, value in settings.items()))
    if edges := at_edges(config, best):
        logger.info("note         at an end of the grid, so a better value may lie beyond it: %s", "; ".join(edges))
    logger.info("tuned        %s", file)


def _begin(config: ExperimentConfig, folder: Path, tuned: Tuned) -> dict[Path, str | None]:
    """The run's own entry, and the texts of the files that it replaced; whether settings may change under finished work is
    for each stage to say."""
    forget_stage(folder, "run") if folder.is_dir() else None
    begin_stage(folder, "run", config={"run": to_dict(config.run), "seed": config.seed})
    if not config.run.methods:
        return {}
    experiment = Experiment(folder)
    texts = {experiment.config_file: dump_toml(config), experiment.tuned: json.dumps(tuned, indent=1) + "\n"}
    before = {path: path.read_text(encoding="utf-8") if path.is_file() else None for path in texts}
    for path, text in texts.items():
        write_atomically(path, text)
    enter(config, folder, tuned)
    return before


def _work(config: ExperimentConfig, jobs: Sequence[Job], options: StageOptions, title: str) -> None:
    if not config.run.methods:
        _chain(jobs[0], options)
        return
    gpu = has_gpu()
    num_workers = config.run.workers or (1 if gpu else len(os.sched_getaffinity(0)))
    logger.info("bvpo %-8s %d experiments, %d at a time, in %s", title, len(jobs), num_workers, home(config))
    failures: list[Event] = []
    with RunView(jobs, title) as view:
        for event in run_jobs(jobs, options, num_workers, fresh=gpu):
            view.show(event)
            failures += [event] if event.kind == "fail" else []
    if failures:
        text = f"{failures[0].job}: {failures[0].text}"
        raise (
            OtherSettings(text)
            if failures[0].refused
            else UserError(f"{text} (running the same command again resumes)")
        )
    logger.info("%-12s %s", title, view.summary())


def _chain(job: Job, options: StageOptions) -> None:
    """One experiment, in this process, so that each stage shows its own progress."""

    def tell(event: Event) -> None:
        number = job.verbs.index(event.verb) + 1
        if event.kind == "start":
            logger.info("== %d/%d %s", number, len(job.verbs), event.verb)
        elif event.kind == "skip":
            logger.info("== %d/%d %s: done before", number, len(job.verbs), event.verb)

    run_job(job, options, tell)


def _say_plan(config: ExperimentConfig, jobs: Sequence[Job], options: StageOptions) -> None:
    logger.info("bvpo run     %d experiments in %s", len(jobs), home(config))
    for line in bounds(config, options.limit).lines():
        logger.info("%s", line)
    _say_jobs(jobs)


def _say_jobs(jobs: Sequence[Job]) -> None:
    """What runs how often."""
    for (name, verbs), count in _alike(jobs).items():
        times = f"{count} x " if len(jobs) > 1 else ""
        logger.info("  %-24s %s%s", name, times, ", ".join(verbs))


def _alike(jobs: Sequence[Job]) -> Counter[tuple[str, tuple[str, ...]]]:
    """How many jobs do the same for other seeds, or with other values of a grid."""
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for job in jobs:
        name = job.name.rpartition("/")[2]
        stem, _, cell = name.rpartition(".")
        found[stem if cell.isdigit() and stem else name, job.verbs] += 1
    return found


def _rehearse(job: Job, options: StageOptions) -> None:
    """The dry run of every stage whose input is there; the first that lacks it ends the rehearsal."""
    for verb in job.verbs:
        logger.info("== %s", verb)
        try:
            run_job(dataclasses.replace(job, verbs=(verb,)), options, _silent)
        except UserError as error:
            logger.info("%s", error)
            logger.info("dry run: the stages from here on need what earlier ones write")
            return


def _silent(event: Any) -> None:
    """Nobody to tell."""
