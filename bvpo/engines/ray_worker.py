"""What runs inside a Ray actor: an engine that takes requests and gives generations call by call.

In: lists of requests. Out: lists of generations, at least one as long as any request is held. Plain Python: ``ray.py``
makes it an actor, tests call it as it is. It knows nothing of other actors, deaths or retries.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from bvpo.engines.base import Engine, Generation, Request, create_engine

# While it has something finished, an answer is not held back for longer: each costs the driver about a millisecond.
_ANSWER_EVERY_S = 0.2


class Worker:
    """See the module's docstring; :meth:`start` comes first."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._waiting: deque[Request] = deque()
        self._generations: Iterator[Generation] | None = None
        self._held = 0

    def start(self, engine: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Builds the engine (not in the constructor: Ray would lose the type of its errors) and says what it is."""
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # one per actor would cover the run's own
        self._engine = create_engine(engine, options)
        return {"fingerprint": self._engine.fingerprint(), "caps": self._engine.caps}

    def exchange(self, requests: list[Request]) -> list[Generation]:
        """Takes these requests in and returns what is finished: at least one generation if it holds any request."""
        assert self._engine is not None
        self._waiting.extend(requests)
        self._held += len(requests)
        done: list[Generation] = []
        until = time.monotonic() + _ANSWER_EVERY_S
        while self._held and not (done and time.monotonic() >= until):
            if self._generations is None:
                self._generations = self._engine.generate(_Drain(self._waiting))
            generation = next(self._generations, None)
            if generation is None:
                self._generations = None  # it saw no more requests; those that came since start it anew
                continue
            self._held -= 1
            done.append(generation)
        return done


class _Drain:
    """The waiting requests as an iterator that goes on when more have come: an engine that looks again keeps its batch
    full. One that does not look again ends, and is started again with what waits."""

    def __init__(self, waiting: deque[Request]) -> None:
        self._waiting = waiting

    def __iter__(self) -> _Drain:
        return self

    def __next__(self) -> Request:
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()
