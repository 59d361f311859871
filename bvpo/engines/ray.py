"""The Ray engine: any other engine as actors over the machines of a Ray cluster, with the same samples.

In: requests of token ids. Out: generations as they finish, whichever actor drew them. An actor that dies is replaced and
what it held is drawn again; nothing is lost and nothing comes twice. The fingerprint is the inner engine's, because a
sample does not depend on where it is drawn. Ray is imported on use. It distributes no model over machines and sets up no
cluster.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bvpo.engines.base import ENGINES, Caps, Generation, Request
from bvpo.engines.ray_worker import Worker
from bvpo.strict import UserError, did_you_mean

logger = logging.getLogger(__name__)

# Requests of one prompt share its computation: so many of them go to one actor.
_TOGETHER = 32
# After each death the requests that were in flight go out in so much smaller company, so that one that kills its actor is
# soon alone and known; it fails after at least so many deaths.
_SHRINK = 16
_DEATHS = 5
# Deaths in a row, beyond one per actor, without a sample in between: it is not the requests.
_HOPELESS = 10
# What a cluster of our own holds are requests and samples, which are small.
_OBJECT_STORE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How many actors, what each takes, and where; ``None`` is decided when the cluster is known."""

    engine: str
    options: Mapping[str, Any]
    actors: int | None
    num_gpus: float | None
    num_cpus: float
    address: str
    in_flight: int
    start_timeout_s: float

    def __post_init__(self) -> None:
        inner = sorted(set(ENGINES) - {"ray"})
        if self.engine not in inner:
            raise UserError(f"ray engine: engine: got {self.engine!r}{did_you_mean(self.engine, inner)}")
        for name, least in (("actors", 1), ("in_flight", 1), ("num_gpus", 0), ("num_cpus", 0), ("start_timeout_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"ray engine: {name}: got {value!r}, expected a number of at least {least}")
        if self.options.get("api") == "chat":
            raise UserError("ray engine: inner.api: chat endpoints are asked without Ray; use engine 'openai'")


def create(
    *,
    model: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    engine: str = "embedded",
    inner: Mapping[str, Any] | None = None,
    actors: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    address: str = "",
    in_flight: int = 512,
    start_timeout_s: float = 600.0,
) -> RayEngine:
    """Actors that each hold an ``engine`` with the options ``inner``, on the cluster at ``address``.

    ``address`` is Ray's ("auto", "ray://host:10001"); empty takes $RAY_ADDRESS, or starts Ray on this machine for the
    length of the run. ``actors`` is one per GPU if the cluster has any, else one per CPU, unless said otherwise; each takes
    ``num_gpus`` and ``num_cpus`` of it and holds at most ``in_flight`` requests. Model and tokenizer must be readable on
    every machine by the same name.
    """
    own: dict[str, Any] = {"model": model, "revision": revision, "tokenizer": tokenizer}
    if engine == "openai":
        own = {"tokenizer": tokenizer or model, "revision": None if tokenizer else revision}
    own["trust_remote_code"] = trust_remote_code
    if twice := sorted(own.keys() & (inner or {}).keys()):
        raise UserError(f"ray engine: inner.{twice[0]}: is an option of its own; set {twice[0]}")
    settings = Settings(
        engine=engine,
        options=own | dict(inner or {}),
        actors=actors,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        address=address,
        in_flight=in_flight,
        start_timeout_s=start_timeout_s,
    )
    return RayEngine(settings)


@dataclass(slots=True, eq=False)
class _Job:
    """A request, and at how many deaths it was in flight."""

    request: Request
    deaths: int = 0

    def company(self, in_flight: int) -> int:
        """How many requests may be in flight on its actor, itself included."""
        return max(1, in_flight // _SHRINK**self.deaths)


@dataclass(slots=True, eq=False)
class _Actor:
    """An actor, what it holds, and the one answer that is waited for; ``ready`` once it has said what it is."""

    handle: Any
    answer: Any
    ready: bool = False
    failed_starts: int = 0  # of those before it in its place
    jobs: dict[str, _Job] = field(default_factory=dict)

    def has_room(self, in_flight: int, job: _Job) -> bool:
        return len(self.jobs) < min(one.company(in_flight) for one in (job, *self.jobs.values()))


class _Supply:
    """The jobs still to be handed out: those of dead actors first, then what the caller's iterable gives."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self._jobs: deque[_Job] = deque()

    def head(self) -> _Job | None:
        if not self._jobs:
            self._jobs.extend(_Job(request) for request in [next(self._requests, None)] if request is not None)
        return self._jobs[0] if self._jobs else None

    def take(self) -> _Job:
        return self._jobs.popleft()

    def put_back(self, job: _Job) -> None:
        self._jobs.appendleft(job)


class RayEngine:
    """See the module's docstring; build one with :func:`create`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ray = import_ray()
        self._owns_cluster = False
        self._actors: list[_Actor] = []
        self._gpus = 0.0  # of each actor
        self._described: dict[str, Any] | None = None
        self._deaths_in_a_row = 0

    @property
    def caps(self) -> Caps:
        return self._start()["caps"]

    def fingerprint(self) -> dict[str, Any]:
        """The inner engine's, equal on all actors."""
        return self._start()["fingerprint"]

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        self._start()
        supply = _Supply(requests)
        try:
            while True:
                self._hand_out(supply)
                if supply.head() is None and not any(actor.jobs for actor in self._actors):
                    return
                waiting = {actor.answer: actor for actor in self._actors if actor.answer is not None}
                yield from self._collect(waiting[self._next_answer(waiting)], supply)
        finally:
            if any(actor.jobs for actor in self._actors):
                self._dismiss()  # ended early: nobody must go on working for it

    def close(self) -> None:
        self._dismiss()
        if self._owns_cluster:
            self._ray.shutdown()
            self._owns_cluster = False

    # ------------------------------------------------------------------------------------------------ actors

    def _start(self) -> dict[str, Any]:
        """Connects, brings all actors up and returns what they say of themselves; once, until they are dismissed."""
        if self._actors and self._described is not None:
            return self._described
        self._connect()
        count, self._gpus = self._count()
        logger.info("starting %d Ray actors with engine %s", count, self._settings.engine)
        self._actors = [self._new_actor() for _ in range(count)]
        deadline = time.monotonic() + self._settings.start_timeout_s
        while starting := {actor.answer: actor for actor in self._actors if not actor.ready}:
            done, _ = self._ray.wait(list(starting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                ready = len(self._actors) - len(starting)
                self._dismiss()
                raise UserError(
                    f"ray engine: {ready} of {count} actors were ready after {self._settings.start_timeout_s:g} s; each "
                    f"takes {self._settings.num_cpus:g} CPUs and {self._gpus:g} GPUs, the cluster has {self._has()}"
                )
            self._meet(starting[done[0]])
        assert self._described is not None
        return self._described

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return  # the caller's connection, which stays the caller's
        settings = self._settings
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers otherwise
        address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {}
        if address == "local":
            # CPUs are places to Ray: more actors than cores may be asked for
            cpus = max(os.cpu_count() or 1, round(settings.num_cpus * (settings.actors or 1)))
            options = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            self._ray.init(address=address, logging_level="ERROR", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"ray engine: address: cannot connect to {address!r} ({_one_line(error)})") from error
        self._owns_cluster = True

    def _count(self) -> tuple[int, float]:
        """How many actors, and how many GPUs each takes."""
        settings, there = self._settings, self._ray.cluster_resources()
        gpus = settings.num_gpus
        if gpus is None:
            share = float(settings.options.get("tensor_parallel_size", 1))
            gpus = share if there.get("GPU") and settings.engine != "openai" else 0.0
        if settings.actors is not None:
            return settings.actors, gpus
        if settings.engine == "openai":
            return 1, gpus  # it does not compute; one serves many servers
        places = there.get("GPU", 0) / gpus if gpus else there.get("CPU", 0) / (settings.num_cpus or 1)
        if places < 1:
            raise UserError(f"ray engine: no room for an actor: the cluster has {self._has()}")
        return int(places), gpus

    def _has(self) -> str:
        there = self._ray.cluster_resources()
        return f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"

    def _new_actor(self, failed_starts: int = 0) -> _Actor:
        settings = self._settings
        remote = self._ray.remote(Worker).options(
            num_cpus=settings.num_cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        handle = remote.remote()
        answer = handle.start.remote(settings.engine, dict(settings.options))
        return _Actor(handle=handle, answer=answer, failed_starts=failed_starts)

    def _meet(self, actor: _Actor) -> None:
        """A new actor says what it is: it must be like the others. Or it died before it could."""
        try:
            found = self._ray.get(actor.answer)
        except self._ray.exceptions.RayError as error:
            if (cause := _cause(error)) is not None:
                raise cause from error  # what the engine itself refuses, it refuses everywhere
            self._replace(actor, error)
            return
        if self._described is not None and found != self._described:
            differences = _difference(self._described, found)
            raise UserError(f"ray engine: the machines would not draw the same samples: {differences}")
        self._described = found
        actor.answer, actor.ready = None, True

    def _replace(self, actor: _Actor, error: BaseException) -> None:
        """Another actor in the place of a dead one, unless they die again and again."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)  # one that failed without dying may still hold its GPU
        self._deaths_in_a_row += 1
        hopeless = self._deaths_in_a_row > _HOPELESS + len(self._actors)
        failed_starts = 0 if actor.ready else actor.failed_starts + 1
        if not hopeless and failed_starts < _DEATHS:
            self._actors.append(self._new_actor(failed_starts))
        elif not hopeless and self._actors:
            logger.warning("an actor does not start (%s); going on with %d", _why(error), len(self._actors))
        else:
            why = f"the last: {_why(error)}; what was drawn is kept, run again to go on"
            raise UserError(f"ray engine: actors keep dying, {why}") from error

    def _dismiss(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []

    # ------------------------------------------------------------------------------------------------ requests

    def _hand_out(self, supply: _Supply) -> None:
        """Fills every actor that is not busy answering, in turns, so that a short list is shared evenly."""
        free = [actor for actor in self._actors if actor.ready and actor.answer is None]
        given: dict[int, list[Request]] = {id(actor): [] for actor in free}
        taking = list(free)
        while taking and (job := supply.head()) is not None:
            actor = min(taking, key=lambda one: len(one.jobs))
            if not actor.has_room(self._settings.in_flight, job):
                taking.remove(actor)
                continue
            prompt = job.request.prompt_ids
            for _ in range(_TOGETHER):
                actor.jobs[job.request.key] = supply.take()
                given[id(actor)].append(job.request)
                job = supply.head()
                if job is None or job.request.prompt_ids != prompt:
                    break
                if not actor.has_room(self._settings.in_flight, job):
                    break
        for actor in free:
            if actor.jobs:
                actor.answer = actor.handle.exchange.remote(given[id(actor)])

    def _next_answer(self, waiting: Mapping[Any, _Actor]) -> Any:
        # while all actors are being replaced, the machines may be gone for good
        patience = None if any(actor.ready for actor in self._actors) else self._settings.start_timeout_s
        done, _ = self._ray.wait(list(waiting), timeout=patience)
        if not done:
            raise UserError(f"ray engine: all actors died, and none could be started; the cluster has {self._has()}")
        return done[0]

    def _collect(self, actor: _Actor, supply: _Supply) -> Iterator[Generation]:
        """What an actor has finished; if it died, its requests go back, or fail when it died of them."""
        if not actor.ready:
            self._meet(actor)
            return
        try:
            done = self._ray.get(actor.answer)
        except self._ray.exceptions.RayError as error:
            if isinstance(cause := _cause(error), UserError):
                raise cause from error
            yield from self._bury(actor, supply, error)
            return
        actor.answer, self._deaths_in_a_row = None, 0
        for generation in done:
            del actor.jobs[generation.key]
            yield generation

    def _bury(self, actor: _Actor, supply: _Supply, error: BaseException) -> Iterator[Generation]:
        jobs, actor.jobs = list(actor.jobs.values()), {}
        logger.warning("a Ray actor died with %d requests in flight (%s); they go to others", len(jobs), _why(error))
        self._replace(actor, error)
        for job in reversed(jobs):
            alone = job.company(self._settings.in_flight) == 1
            job.deaths += 1
            if alone and job.deaths >= _DEATHS:
                why = f"{job.deaths} Ray actors died while they drew it, the last: {_why(error)}"
                yield Generation.failed(job.request.key, why)
            else:
                supply.put_back(job)


def import_ray() -> Any:
    """The ``ray`` module, or one line on how to get it."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(
            f"the ray engine needs Ray, which is not installed here: pip install 'bvpo[ray]' ({error})"
        ) from error
    return ray


def _cause(error: Any) -> BaseException | None:
    """The exception as it was raised inside the actor, if it is that."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else None


def _why(error: BaseException) -> str:
    """In one line: the exception inside the actor, or what Ray says of its end."""
    cause = _cause(error)
    if cause is not None:
        return f"{type(cause).__name__}: {_one_line(cause)}"
    told = _one_line(error)
    start = max(0, told.find("The actor is dead because"))  # Ray's addresses and ids come first
    return told[start : start + 150]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    flat = [{**described["fingerprint"], "caps": described["caps"]} for described in (one, other)]
    names = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
    return "; ".join(f"{name}: {flat[0].get(name)!r} and {flat[1].get(name)!r}" for name in names)
