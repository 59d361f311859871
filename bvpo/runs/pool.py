"""Processes that work jobs off: in, jobs with what they wait for; out, events as verbs start and end.

A worker runs ``bvpo`` verbs by name, one after the other, each job's messages going to ``log.txt`` of its folder. Workers
use one thread each and end with the process that started them, even if that is killed. A job that fails stops the run after
the jobs at work; nothing is retried, because every stage resumes when the run is started again.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from bvpo.command import StageOptions
from bvpo.experiment import Experiment
from bvpo.files import make_folder
from bvpo.runs.plan import Job
from bvpo.runs.stamps import Stamps
from bvpo.strict import OtherSettings, UserError
from bvpo.verbs import run_stage

_PR_SET_PDEATHSIG = 1
_PATIENCE = 30.0  # seconds for a checkpoint; clusters wait about as long between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a job: ``kind`` is start, done, skip (of a verb), end (of the job) or fail. ``refused``: it
    failed because the folder holds work under other settings, and would fail again."""

    job: str
    kind: str
    verb: str = ""
    text: str = ""
    seconds: float = 0.0
    refused: bool = False


def run_job(job: Job, options: StageOptions, tell: Callable[[Event], None]) -> None:
    """The verbs of one job in this process; those that are done already are skipped until one has work."""
    if job.inherits is not None:
        _inherit_prompts(job)
    stamps = Stamps(job.config, options.limit)
    worked = False
    for verb in job.verbs:
        if not worked and stamps.is_done(verb):
            tell(Event(job=job.name, kind="skip", verb=verb))
            continue
        worked = verb != "tiny"  # whose result is part of every later stamp
        tell(Event(job=job.name, kind="start", verb=verb))
        started = time.perf_counter()
        run_stage(verb, job.config, options)
        if not options.dry_run:
            stamps.mark(verb)
        tell(Event(job=job.name, kind="done", verb=verb, seconds=time.perf_counter() - started))


def _inherit_prompts(job: Job) -> None:
    """The prompts that the job's evaluation may ask for; copied once, because a run may be interrupted anywhere."""
    assert job.inherits is not None
    source, target = Experiment(job.inherits).prompts_file, Experiment(job.folder).prompts_file
    if source.is_file() and not target.is_file():
        make_folder(job.folder)
        partial = target.with_suffix(".partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)


def run_jobs(jobs: Sequence[Job], options: StageOptions, num_workers: int, *, fresh: bool) -> Iterator[Event]:
    """Works the jobs off in the given order as far as what they wait for allows. ``fresh`` gives every job a process of its
    own, which returns all memory of an accelerator."""
    pool = _Pool(options, num_workers, fresh)
    waiting, done, failed = [], set[str](), False
    for job in jobs:
        if _is_done(job, options):
            yield from (Event(job=job.name, kind="skip", verb=verb) for verb in job.verbs)
            done.add(job.name)
        else:
            waiting.append(job)
    try:
        while waiting or pool.busy:
            while not failed and (job := _next_ready(waiting, done)) and pool.has_room:
                waiting.remove(job)
                pool.submit(job)
            if not pool.busy:
                break
            for event in pool.events():
                failed = failed or event.kind == "fail"
                if event.kind == "end":
                    done.add(event.job)
                yield event
    finally:
        pool.close()


def _is_done(job: Job, options: StageOptions) -> bool:
    """Whether nothing is left to do, found out without a worker."""
    stamps = Stamps(job.config, options.limit)
    return all(stamps.is_done(verb) for verb in job.verbs)


def _next_ready(waiting: Sequence[Job], done: set[str]) -> Job | None:
    return next((job for job in waiting if set(job.after) <= done), None)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, options: StageOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(other, options), daemon=True)
        self.process.start()
        other.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def ask_to_end(self) -> None:
        """An idle worker leaves when its pipe closes; one at work gets SIGTERM, at which training saves a checkpoint."""
        self.pipe.close()
        if self.job is not None and self.process.is_alive():
            self.process.terminate()

    def wait_for_end(self) -> None:
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Pool:
    def __init__(self, options: StageOptions, size: int, fresh: bool) -> None:
        self._options, self._size, self._fresh = options, size, fresh
        self._workers: list[_Worker] = []

    @property
    def busy(self) -> bool:
        return any(worker.job for worker in self._workers)

    @property
    def has_room(self) -> bool:
        return sum(worker.job is not None for worker in self._workers) < self._size

    def submit(self, job: Job) -> None:
        worker = next((w for w in self._workers if w.job is None), None)
        if worker is None:
            worker = _Worker(self._options)
            self._workers.append(worker)
        worker.give(job)

    def events(self) -> Iterator[Event]:
        """Waits for news of any worker."""
        at_work = [worker for worker in self._workers if worker.job]
        ready = wait([worker.pipe for worker in at_work])
        for worker in [w for w in at_work if w.pipe in ready]:
            job = worker.job
            assert job is not None
            try:
                event: Event = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join(5)
                worker.job = None
                text = f"its process ended unexpectedly (exit code {worker.process.exitcode}); killed for memory?"
                event = Event(job=job.name, kind="fail", text=text)
                self._drop(worker)
            else:
                if event.kind in ("end", "fail"):
                    worker.job = None
                    if self._fresh or event.kind == "fail":
                        self._drop(worker)
            yield event

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.ask_to_end()
        worker.wait_for_end()

    def close(self) -> None:
        """All are asked before the first is waited for."""
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.wait_for_end()
        self._workers.clear()


# ---------------------------------------------------------------------------------------------------------------------
# in the worker


def _work(pipe: Connection, options: StageOptions) -> None:
    """Jobs until the pipe closes."""
    _end_with_parent()
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # after the environment, which it reads once
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own has a semaphore, and a killed process leaves that to be complained about
    torch.set_num_threads(int(threads) if threads.isdecimal() else 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            job: Job = pipe.recv()
            pipe.send(_guarded(job, options, pipe.send))


def _guarded(job: Job, options: StageOptions, tell: Callable[[Any], None]) -> Event:
    try:
        with _messages_to(Experiment(job.folder).log):
            run_job(job, options, tell)
    except UserError as error:
        return Event(job=job.name, kind="fail", text=str(error), refused=isinstance(error, OtherSettings))
    except SystemExit as error:
        return Event(job=job.name, kind="fail", text=f"exit {error.code}")
    except Exception as error:
        return Event(
            job=job.name, kind="fail", text=f"{type(error).__name__}: {error}; see {Experiment(job.folder).log}"
        )
    return Event(job=job.name, kind="end")


@contextmanager
def _messages_to(path: Path) -> Iterator[None]:
    """Everything that the job says, file descriptors included, appended to its log."""
    make_folder(path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("bvpo")
    with open(path, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        except BaseException as error:
            if isinstance(error, UserError):
                logger.info("bvpo: error: %s", error)
            elif isinstance(error, KeyboardInterrupt):
                logger.info("bvpo: interrupted")
            elif not isinstance(error, SystemExit):
                traceback.print_exc()
            raise
        finally:
            logger.removeHandler(handler)
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def _end_with_parent() -> None:
    """At once where the system can do it, else as soon as a thread of ours gets to run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def has_gpu() -> bool:
    """Whether torch sees an accelerator, which the jobs of one run would have to share."""
    import torch

    return torch.cuda.is_available()
