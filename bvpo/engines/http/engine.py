"""The HTTP engine: samples responses from any number of OpenAI-compatible servers at once, through ``/v1/completions``.

In: requests of token ids. Out: generations as they finish; the same request gives the same sample on one endpoint or many.
Every endpoint passes a preflight before its first request, and every answer is checked; what cannot be used is tried again,
elsewhere if possible, and then becomes an error generation. When no endpoint is left, it stops with one line and loses
nothing. It starts no server (see ``serving``) and holds no model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bvpo.engines.base import Caps, Generation, Request
from bvpo.engines.estimate import Estimate, Measured, Meter, Price, estimate
from bvpo.engines.http.chat import ChatWire, preflight_chat
from bvpo.engines.http.checks import Policy, Report, agreement
from bvpo.engines.http.endpoints import (
    Endpoint,
    EndpointsLost,
    Fault,
    GaveUp,
    Job,
    Pool,
    RetryPolicy,
    api_key,
    base_url,
)
from bvpo.engines.http.loop import LoopThread
from bvpo.engines.http.preflight import Ask, preflight
from bvpo.engines.http.wire import Dialect, PromptForm, Reading, Vocabulary, Wire
from bvpo.formats import resolve_format
from bvpo.strict import UserError, did_you_mean

logger = logging.getLogger(__name__)

# Attempts per preflight request: enough for a hiccup, few enough that a server that cannot is known in seconds.
_PREFLIGHT_ATTEMPTS = 2
# The client's own limit per endpoint; a call beyond it would wait unseen.
_MOST_CONNECTIONS = 1000
_CHOICES = {"api": ("completions", "chat"), "dialect": ("auto", "vllm", "plain"), "prompts": ("auto", "ids", "text")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of :func:`create` that are not about retries."""

    endpoints: tuple[str, ...]
    model: str
    tokenizer: str | None
    revision: str | None
    trust_remote_code: bool
    api: str
    format: str
    dialect: str
    prompts: str
    api_key_env: str
    concurrency: int
    policy: Policy

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise UserError("openai engine: endpoints: got none, expected at least one address")
        if len(set(self.endpoints)) < len(self.endpoints):
            raise UserError(f"openai engine: endpoints: an address appears twice in {', '.join(self.endpoints)}")
        if not 1 <= self.concurrency <= _MOST_CONNECTIONS:
            raise UserError(
                f"openai engine: concurrency: got {self.concurrency!r}, expected an integer from 1 to {_MOST_CONNECTIONS}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"openai engine: {name}: got {getattr(self, name)!r}{did_you_mean(getattr(self, name), choices)}"
                )
        if self.api == "chat" and self.tokenizer is None:
            raise UserError("openai engine: api 'chat' needs the model's tokenizer: set tokenizer")

    def dialects(self) -> tuple[Dialect, ...]:
        return {"auto": ("vllm", "plain"), "vllm": ("vllm",), "plain": ("plain",)}[self.dialect]

    def forms(self) -> tuple[PromptForm, ...]:
        """Token ids first; text only where a tokenizer can check that it says the same."""
        forms: dict[str, tuple[PromptForm, ...]] = {"ids": ("ids",), "text": ("text",), "auto": ("ids", "text")}
        return ("ids",) if self.prompts == "auto" and self.tokenizer is None else forms[self.prompts]


def create(
    *,
    endpoints: str | Sequence[str],
    model: str = "",
    tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    api: str = "completions",
    format: str = "auto",
    dialect: str = "auto",
    prompts: str = "auto",
    api_key_env: str = "",
    concurrency: int = 64,
    timeout_s: float = 1800.0,
    connect_timeout_s: float = 10.0,
    max_attempts: int = 6,
    retry_base_s: float = 0.5,
    retry_cap_s: float = 60.0,
    allow: Sequence[str] = (),
    require: Sequence[str] = (),
    allow_retokenise: bool = False,
    seed: int = 0,
) -> OpenAIEngine:
    """An engine over the servers at ``endpoints``; nothing is asked of them before it is first used.

    ``model`` is the served name (empty: the only one served). ``tokenizer`` is the model's own, a folder or Hub name:
    strongly advised, as it lets the preflight notice a wrong model; ``revision`` is the tokenizer's. ``concurrency`` is per
    endpoint. ``allow`` and ``require`` name checks (see docs). ``seed`` only spreads the waiting times of retries.
    """
    addresses = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    settings = Settings(
        endpoints=tuple(base_url(address) for address in addresses),
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
        api=api,
        format=format,
        dialect=dialect,
        prompts=prompts,
        api_key_env=api_key_env,
        concurrency=concurrency,
        policy=Policy(allow=tuple(allow), require=tuple(require), allow_retokenise=allow_retokenise),
    )
    retry = RetryPolicy(
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        max_attempts=max_attempts,
        base_s=retry_base_s,
        cap_s=retry_cap_s,
        seed=seed,
    )
    return OpenAIEngine(settings, retry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What the preflight settled: a report per usable endpoint, by address, and how the engine as a whole may be used."""

    reports: dict[str, Report]
    model: str
    server: dict[str, Any]
    caps: Caps


class OpenAIEngine:
    """See the module's docstring; build one with :func:`create`."""

    def __init__(self, settings: Settings, retry: RetryPolicy) -> None:
        self._settings = settings
        self._retry = retry
        self._key = api_key(settings.api_key_env)
        self._loop = LoopThread()
        self._pool: Pool | None = None
        self._ready: Ready | None = None
        self._meter = Meter()
        self.drifted = 0

    @property
    def caps(self) -> Caps:
        return self.preflight().caps

    def fingerprint(self) -> dict[str, Any]:
        """Model, server version and what the preflight sampled; not the addresses, which do not change a sample."""
        ready = self.preflight()
        reports = list(ready.reports.values())
        ways = {
            (type(r.wire).__name__, getattr(r.wire, "dialect", ""), getattr(r.wire, "prompts", "")) for r in reports
        }
        return {
            "engine": "openai",
            "model": ready.model,
            "server": ready.server,
            "asked": sorted(" ".join(way) for way in ways),
            "token_ids": "sampled" if not any(r.failed("token_ids") for r in reports) else "retokenised",
            "drawn": sorted({r.signature for r in reports if r.signature}),
        }

    @property
    def measured(self) -> Measured | None:
        """The rate on the first requests, once all of those are finished."""
        return self._meter.measured

    def estimate(self, requests: Iterable[Request], price: Price | None = None) -> Estimate:
        """Tokens, time and money for these requests; time only after some were sampled (see ``Estimate.basis``)."""
        return estimate(requests, self.measured, price)

    def preflight(self) -> Ready:
        """Check every endpoint, once; refuses with one line if any of them must not be used."""
        if self._ready is None:
            self._ready = self._loop.run(self._prepare())
        return self._ready

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        ready = self.preflight()
        assert self._pool is not None
        waiting = iter(requests)
        window = self._settings.concurrency * len(ready.reports)
        finished: queue.SimpleQueue[Future[Generation]] = queue.SimpleQueue()
        open_requests: set[Future[Generation]] = set()
        lost: EndpointsLost | None = None
        unfinished = 0
        try:
            while True:
                if lost is None:
                    for request in islice(waiting, window - len(open_requests)):
                        future = self._loop.submit(self._serve(request))
                        open_requests.add(future)
                        future.add_done_callback(finished.put)
                if not open_requests:
                    break
                future = finished.get()
                open_requests.discard(future)
                try:
                    generation = future.result()
                except EndpointsLost as error:
                    lost, unfinished = error, unfinished + 1
                    continue
                yield generation
        finally:
            # Also when the caller stops early or presses ctrl-C: the servers must not go on working for nobody.
            for future in open_requests:
                future.cancel()
        self._warn_of_drift()
        if lost is not None:
            raise EndpointsLost(f"{lost}; {unfinished} requests were not answered, run again to go on") from None

    def close(self) -> None:
        if self._pool is not None:
            self._loop.run(self._pool.close())
            self._pool = None
        self._loop.stop()

    async def _serve(self, request: Request) -> Generation:
        assert self._pool is not None and self._ready is not None
        reports = self._ready.reports
        self._meter.sent(request.key, time.monotonic())

        def job_for(endpoint: Endpoint) -> Job:
            wire = reports[endpoint.url].wire
            assert wire is not None
            return Job(path=wire.path, body=wire.body(request), read=lambda raw: wire.read(request, raw))

        try:
            reading: Reading = await self._pool.call(request.key, job_for)
        except EndpointsLost:
            raise
        except (GaveUp, UserError) as error:
            self._meter.finished(request.key, 0, time.monotonic())
            return Generation.failed(request.key, str(error))
        self.drifted += reading.drifted
        self._meter.finished(request.key, len(reading.generation.token_ids), time.monotonic())
        return reading.generation

    async def _prepare(self) -> Ready:
        settings = self._settings
        vocabulary = None
        if settings.tokenizer is not None:
            vocabulary = Vocabulary.load(settings.tokenizer, settings.revision, settings.trust_remote_code)
        endpoints = [Endpoint(url, self._key, settings.concurrency, self._retry) for url in settings.endpoints]
        self._pool = Pool(endpoints, self._retry)
        outcomes = await asyncio.gather(*(self._examine(e, vocabulary) for e in endpoints), return_exceptions=True)
        reports: dict[str, Report] = {}
        served: list[dict[str, Any]] = []
        for endpoint, outcome in zip(endpoints, outcomes, strict=True):
            if isinstance(outcome, EndpointsLost):
                endpoint.put_aside(endpoint.aside or str(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                reports[endpoint.url], model = outcome
                served.append(model)
        if not reports:
            raise EndpointsLost("; ".join(f"{e.url}: {e.aside}" for e in endpoints))
        self._judge(list(reports.values()))
        names = {model["id"] for model in served}
        return Ready(
            reports=reports,
            model=", ".join(sorted(names)),
            server={
                name: sorted({m[name] for m in served if m[name] is not None})
                for name in ("root", "version", "context")
            },
            caps=_weakest([r.caps for r in reports.values()]),
        )

    async def _examine(self, endpoint: Endpoint, vocabulary: Vocabulary | None) -> tuple[Report, dict[str, Any]]:
        assert self._pool is not None
        pool, settings = self._pool, self._settings

        async def ask(job: Job) -> Any:
            return await pool.call("preflight", lambda _: job, only=endpoint, max_attempts=_PREFLIGHT_ATTEMPTS)

        model = await _served_model(endpoint, settings.model)
        if settings.api == "chat":
            report = await self._examine_chat(endpoint, ask, model, vocabulary)
        else:
            wires = [
                Wire(
                    model=model["id"],
                    dialect=d,
                    prompts=f,
                    vocabulary=vocabulary,
                    server_adds_bos=bos,
                    context=model["context"],
                    logprobs=False,  # the preflight switches them on when they are right
                )
                for d in settings.dialects()
                for f in settings.forms()
                for bos in ((False, True) if f == "text" else (False,))
            ]
            report = await preflight(endpoint.url, ask, wires, settings.policy)
        return report, model

    async def _examine_chat(
        self, endpoint: Endpoint, ask: Ask, model: dict[str, Any], vocabulary: Vocabulary | None
    ) -> Report:
        assert vocabulary is not None
        fmt = resolve_format(vocabulary.tokenizer, self._settings.format)
        wire = ChatWire(model=model["id"], vocabulary=vocabulary, format=fmt)
        return await preflight_chat(endpoint.url, ask, wire, self._settings.policy)

    def _judge(self, reports: list[Report]) -> None:
        """Refuse what failed, and tell what was downgraded."""
        joint = agreement(reports, self._settings.policy)
        told = [(r.url, f) for r in reports for f in r.findings] + ([("endpoints", joint)] if joint else [])
        for where, finding in told:
            if finding.outcome == "downgraded":
                logger.warning("preflight of %s: %s", where, finding.line())
        refused = [f"{where}: {finding.line()}" for where, finding in told if finding.outcome == "refused"]
        if refused:
            raise UserError(f"preflight refuses {'; '.join(refused)}")
        if self._settings.tokenizer is None:
            logger.warning("no tokenizer was named: ids are checked neither for range nor for the right vocabulary")

    def _warn_of_drift(self) -> None:
        if self.drifted:
            logger.warning(
                "%d responses were made into tokens from their text, and not into as many as the server sampled",
                self.drifted,
            )


async def _served_model(endpoint: Endpoint, wanted: str) -> dict[str, Any]:
    """The served model: ``id``, and ``root``, ``context`` and ``version`` where the server tells them."""
    try:
        listing = await endpoint.get("models")
    except Fault as fault:
        if fault.kind in ("unreachable", "lost", "silent", "denied"):
            raise EndpointsLost(str(fault)) from None
        if not wanted:
            raise UserError(f"{endpoint.url}: it does not list its models ({fault}); name one with model") from None
        listing = {}
    cards = listing.get("data") if isinstance(listing, dict) else None
    cards = [card for card in cards or [] if isinstance(card, dict) and isinstance(card.get("id"), str)]
    names = [card["id"] for card in cards]
    if not wanted and len(names) != 1:
        raise UserError(f"{endpoint.url}: it serves {', '.join(names) or 'no model'}; name one with model")
    if wanted and names and wanted not in names:
        raise UserError(f"{endpoint.url}: it does not serve {wanted!r}{did_you_mean(wanted, names)}")
    card = next((c for c in cards if c["id"] == (wanted or names[0])), {})
    context, root = card.get("max_model_len"), str(card.get("root") or "")
    return {
        "id": wanted or names[0],
        "root": None
        if os.path.isabs(root)
        else root or None,  # a Hub name; a folder may move without changing anything
        "context": context if type(context) is int else None,
        "version": await _version(endpoint),
    }


async def _version(endpoint: Endpoint) -> str | None:
    try:
        answer = await endpoint.get("/version")
    except Fault:
        return None  # not every server has one
    return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None


def _weakest(caps: list[Caps]) -> Caps:
    """What holds at every endpoint."""
    return Caps(
        token_prompts=all(c.token_prompts for c in caps),
        seed=all(c.seed for c in caps),
        logprobs=all(c.logprobs for c in caps),
        batch_invariant=all(c.batch_invariant for c in caps),
    )
