"""One line of progress for a whole run: events in, a bar on a terminal or a line per finished job elsewhere out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from bvpo.runs.plan import Job
from bvpo.runs.pool import Event

logger = logging.getLogger(__name__)


class RunView:
    """Counts verbs, not jobs, so that the time left means something from the start."""

    def __init__(self, jobs: Sequence[Job], title: str = "run") -> None:
        self._total = sum(len(job.verbs) for job in jobs)
        self._left = {job.name: list(job.verbs) for job in jobs}
        self._now: dict[str, str] = {}
        self._title, self._bar = title, None
        self._done = self._skipped = 0
        self._began = time.perf_counter()
        self._job_began: dict[str, float] = {}

    def __enter__(self) -> RunView:
        if sys.stderr.isatty():
            from tqdm import tqdm

            form = "{l_bar}{bar:20}{r_bar}"
            self._bar: Any = tqdm(total=self._total, desc=self._title, unit=" stages", bar_format=form, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: Event) -> None:
        """One event; a job's end is also written down for good."""
        if event.kind == "start":
            self._now[event.job] = event.verb
            self._job_began.setdefault(event.job, time.perf_counter())
        elif event.kind in ("skip", "done"):
            self._advance(event)
        elif event.kind == "end":
            self._now.pop(event.job, None)
            if event.job in self._job_began:
                self._line(f"{self._counter()} {event.job}: {time.perf_counter() - self._job_began[event.job]:.1f} s")
        elif event.kind == "fail":
            self._now.pop(event.job, None)
            self._line(f"{self._counter()} {event.job}: FAILED: {event.text}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{job}: {verb}" for job, verb in sorted(self._now.items())))

    def summary(self) -> str:
        new = self._done - self._skipped
        skipped = f", {self._skipped} done before" if self._skipped else ""
        return f"{new} stages in {time.perf_counter() - self._began:.0f} s{skipped}"

    def _advance(self, event: Event) -> None:
        self._done += 1
        self._skipped += event.kind == "skip"
        if self._bar is not None:
            self._bar.update()

    def _counter(self) -> str:
        return f"[{self._done}/{self._total}]"

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logger.info("%s", text)
