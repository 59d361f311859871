"""Several OpenAI-compatible endpoints as one: who gets the next call, what is tried again, and who is put aside.

In: a key and a job (path, JSON body, how to read the answer) per call. Out: what the job read, or one of two verdicts in one
line: :class:`GaveUp` (this call failed for good) and :class:`EndpointsLost` (nobody is left to ask, run again later). Knows
HTTP and the ``openai`` client, but nothing of prompts, tokens or preflights. All methods run on one event loop.

A fault counts against the call (an answer that cannot be used), against the endpoint (it cannot be reached, is silent,
breaks off, answers nothing but rubbish), or against both. Endpoint faults count once per round: when a server dies, its 64
open calls are one sign of it, not 64.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import openai

from bvpo.engines.http.wire import Path
from bvpo.strict import UserError, show
from bvpo.web import ADDRESS, BadAnswer, http_client, is_address, named_key, redact

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a server that needs no key is sent; the client refuses to send nothing.
_NO_KEY = "EMPTY"
_BUSY_ANSWERS_PER_CALL = 200

FaultKind = Literal["unreachable", "lost", "silent", "busy", "denied", "refused", "failed", "bad"]
# Fault kinds that say that the connection, not the answer, is broken.
_CONNECTION_FAULTS = ("unreachable", "lost", "silent")


class Fault(Exception):
    """One call to one endpoint that brought nothing; ``retry_after`` in seconds where the server named it."""

    def __init__(
        self, kind: FaultKind, message: str, retry_after: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        self.status = status


class GaveUp(Exception):
    """A call failed for good; the endpoints may be fine. ``status`` is the last HTTP status of a refusal."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointsLost(UserError):
    """No endpoint is left. What was not answered is not recorded as failed, so running again goes on from here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to wait and how often to try.

    ``timeout_s`` is for one whole response (nothing is streamed, so it must cover the longest one). Waits grow from
    ``base_s`` twofold up to ``cap_s``, which also bounds an honoured Retry-After.
    """

    timeout_s: float = 1800.0
    connect_timeout_s: float = 10.0
    probe_timeout_s: float = 10.0
    max_attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 60.0
    max_rounds: int = 6
    max_busy_rounds: int = 40
    max_bad_in_a_row: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name != "seed" and not value > 0:
                raise UserError(f"openai engine: field {name!r}: got {value!r}, expected a number above 0")

    def wait(self, key: str, attempt: int) -> float:
        """Seconds before attempt ``attempt`` + 1: exponential, with a jitter of up to half that follows from the key."""
        full = min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 30))
        digest = hashlib.blake2b(
            f"{self.seed}\0{key}\0{attempt}".encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        return full * (0.5 + int.from_bytes(digest, "big") / 2**65)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call to one endpoint: POST ``body`` to ``path``, and turn the raw answer into what the caller wants."""

    path: Path
    body: dict[str, Any]
    read: Callable[[bytes], Any]


def base_url(url: str) -> str:
    """The normalised address: scheme and host are required, ``/v1`` is added to a bare host, credentials are refused."""
    if not is_address(url):
        raise UserError(
            f"endpoint: got {show(url)}, expected {ADDRESS}, such as http://127.0.0.1:8000/v1; a key goes into an "
            "environment variable, which api_key_env names"
        )
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def api_key(variable: str) -> str | None:
    """The key from the environment variable of this name; no name, no key."""
    return named_key(variable, "api_key_env") if variable else None


class Endpoint:
    """One server: its client and how it has behaved so far."""

    def __init__(self, url: str, key: str | None, concurrency: int, policy: RetryPolicy) -> None:
        self.url = url
        self.concurrency = concurrency
        self.in_flight = 0
        self.answered = 0
        self.aside: str | None = None  # why it gets no more calls
        self.paused_until = 0.0
        self._key = key
        self._policy = policy
        self._rounds = self._busy_rounds = self._bad_in_a_row = 0
        self._last_fault = -1.0
        self._open: set[asyncio.Future[Any]] = set()
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key or _NO_KEY,
            max_retries=0,
            timeout=openai.Timeout(policy.timeout_s, connect=policy.connect_timeout_s),
            http_client=http_client(url, key or _NO_KEY),
        )

    async def ask(self, job: Job) -> Any:
        """One attempt; raises :class:`Fault`. When the endpoint is put aside meanwhile, the attempt ends at once."""
        attempt = asyncio.ensure_future(self._post(job))
        self._open.add(attempt)
        try:
            await asyncio.wait({attempt})
        finally:
            attempt.cancel()
            self._open.discard(attempt)
        if attempt.cancelled():
            raise Fault("unreachable", self.aside or "the call was cancelled")
        return attempt.result()

    async def _post(self, job: Job) -> Any:
        rest = {name: value for name, value in job.body.items() if name not in ("model", "prompt", "messages")}
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                if job.path == "completions":
                    answer = await self.client.completions.with_raw_response.create(
                        model=job.body["model"], prompt=job.body["prompt"], extra_body=rest
                    )
                else:
                    answer = await self.client.chat.completions.with_raw_response.create(
                        model=job.body["model"], messages=job.body["messages"], extra_body=rest
                    )
            return job.read(answer.content)
        except BadAnswer as error:
            raise Fault("bad", self._public(f"unusable answer: {error}")) from None
        except TimeoutError:
            raise Fault("silent", f"no answer within {self._policy.timeout_s:g} s") from None
        except openai.OpenAIError as error:
            raise self._fault(error) from None

    def _fault(self, error: openai.OpenAIError) -> Fault:
        if isinstance(error, openai.APITimeoutError):
            connecting = type(error.__cause__).__name__ == "ConnectTimeout"
            if connecting:
                return Fault("unreachable", f"no connection within {self._policy.connect_timeout_s:g} s")
            return Fault("silent", f"no answer within {self._policy.timeout_s:g} s")
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            kind = "unreachable" if type(cause).__name__ == "ConnectError" else "lost"
            word = "cannot connect" if kind == "unreachable" else "the connection broke off"
            return Fault(kind, self._public(f"{word}: {cause}"))
        if isinstance(error, openai.APIStatusError):
            return self._status_fault(error)
        return Fault("bad", self._public(f"unusable answer: {error}"))

    def _status_fault(self, error: openai.APIStatusError) -> Fault:
        status = error.status_code
        text = self._public(f"HTTP {status}: {_server_message(error)}")
        if status in (429, 503):
            return Fault("busy", text, retry_after=retry_after(error.response.headers, time.time()), status=status)
        if status in (401, 403):
            return Fault("denied", f"{text} (the key comes from the variable named in api_key_env)", status=status)
        if 400 <= status < 500 and status not in (408, 409):
            return Fault("refused", text, status=status)
        return Fault("failed", text, status=status)

    def _public(self, message: str) -> str:
        """One line without the key, which some servers repeat in their complaints."""
        return redact(" ".join(message.split()), self._key)[:300]

    async def get(self, path: str) -> Any:
        """JSON of a GET next to the API (``models``) or on the server's root (``/version``); raises :class:`Fault`."""
        url = f"{self.url.removesuffix('/v1')}{path}" if path.startswith("/") else f"{self.url}/{path}"
        try:
            async with asyncio.timeout(self._policy.probe_timeout_s):
                return await self.client.get(url, cast_to=object)
        except TimeoutError:
            raise Fault("silent", f"no answer within {self._policy.probe_timeout_s:g} s") from None
        except openai.OpenAIError as error:
            raise self._fault(error) from None
        except (ValueError, RecursionError) as error:
            raise Fault("bad", self._public(f"unusable answer: {error}")) from None

    async def note_fault(self, fault: Fault, started: float) -> None:
        """Draw conclusions for the endpoint from a call that started at ``started`` (loop time)."""
        if fault.kind == "denied":
            self.put_aside(str(fault))
        elif fault.kind in ("failed", "bad") or fault.status == 404:
            # 404 after a preflight: the model is no longer served there, for nobody.
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self._policy.max_bad_in_a_row:
                self.put_aside(f"{self._bad_in_a_row} unusable answers in a row, the last: {fault}")
        elif fault.kind == "silent" and not await self._alive():
            self.put_aside(f"{fault}, and its list of models does not answer either")
        elif fault.kind in _CONNECTION_FAULTS or fault.kind == "busy":
            self._note_round(fault, started)

    def _note_round(self, fault: Fault, started: float) -> None:
        if started < self._last_fault:
            return  # began before the last one came back: the same round
        busy = fault.kind == "busy"
        self._rounds, self._busy_rounds = self._rounds + (not busy), self._busy_rounds + busy
        rounds, most = (
            (self._busy_rounds, self._policy.max_busy_rounds) if busy else (self._rounds, self._policy.max_rounds)
        )
        if rounds >= most:
            self.put_aside(f"{fault} ({rounds} times in a row)")
            return
        wait = self._policy.wait(self.url, rounds)
        if fault.retry_after is not None:
            wait = max(wait, min(fault.retry_after, self._policy.cap_s))
        now = _now()
        self._last_fault, self.paused_until = now, max(self.paused_until, now + wait)
        logger.warning("%s: %s; next try in %.1f s", self.url, fault, wait)

    def note_answer(self) -> None:
        self.answered += 1
        self._rounds = self._busy_rounds = self._bad_in_a_row = 0

    def put_aside(self, reason: str) -> None:
        """No more calls; those that are open end now and go elsewhere."""
        if self.aside is None:
            self.aside = reason
            logger.warning("%s is put aside: %s", self.url, reason)
            for attempt in self._open:
                attempt.cancel()

    async def _alive(self) -> bool:
        try:
            await self.get("models")
        except Fault as fault:
            return fault.kind not in _CONNECTION_FAULTS
        return True


class Pool:
    """Endpoints that share the work: the next call goes to the one with the fewest open calls."""

    def __init__(self, endpoints: Sequence[Endpoint], policy: RetryPolicy) -> None:
        self.endpoints = list(endpoints)
        self._policy = policy
        self._freed = asyncio.Event()

    async def call(
        self,
        key: str,
        job_for: Callable[[Endpoint], Job],
        only: Endpoint | None = None,
        max_attempts: int | None = None,
    ) -> Any:
        """Ask until there is a usable answer; raises :class:`GaveUp` or :class:`EndpointsLost`."""
        most = max_attempts or self._policy.max_attempts
        attempts = busy = 0
        avoid: Endpoint | None = None
        while True:
            endpoint = await self._acquire(avoid, only)
            started = _now()
            try:
                result = await endpoint.ask(job_for(endpoint))
            except Fault as fault:
                await endpoint.note_fault(fault, started)
                last = fault
            else:
                endpoint.note_answer()
                return result
            finally:
                endpoint.in_flight -= 1
                self._wake()
            attempts += last.kind in ("lost", "silent", "failed", "bad")
            busy += last.kind == "busy"
            if last.kind == "refused":
                raise GaveUp(str(last), last.status)
            if attempts >= most or busy >= _BUSY_ANSWERS_PER_CALL:
                raise GaveUp(f"{attempts + busy} attempts, the last: {last}", last.status)
            avoid = endpoint
            if last.kind in ("failed", "bad"):
                await asyncio.sleep(self._policy.wait(key, attempts))

    async def _acquire(self, avoid: Endpoint | None, only: Endpoint | None) -> Endpoint:
        """A place at an endpoint, the least loaded one; one that just failed this call only if there is no other."""
        while True:
            live = [e for e in self.endpoints if e.aside is None and only in (None, e)]
            if not live:
                raise EndpointsLost(self._obituary(only))
            now = _now()
            others = [e for e in live if e is not avoid] or live
            ready = [e for e in others if e.in_flight < e.concurrency and e.paused_until <= now]
            if ready:
                chosen = min(ready, key=lambda e: e.in_flight)
                chosen.in_flight += 1
                return chosen
            paused = [e.paused_until - now for e in others if e.paused_until > now]
            self._freed.clear()
            try:
                async with asyncio.timeout(min(paused, default=None)):
                    await self._freed.wait()
            except TimeoutError:
                pass

    def _wake(self) -> None:
        self._freed.set()

    def _obituary(self, only: Endpoint | None) -> str:
        gone = [only] if only else self.endpoints
        reasons = "; ".join(f"{e.url}: {e.aside}" for e in gone)
        return f"no endpoint is left: {reasons}" if len(gone) > 1 else reasons

    async def close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.client.close()


def retry_after(headers: Any, now: float) -> float | None:
    """Seconds to wait according to Retry-After (seconds or a date) or retry-after-ms."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
        except (ValueError, TypeError):
            pass
    return None


def _server_message(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        for field in ("message", "detail"):
            if body.get(field):
                return str(body[field])
    return str(body or error.message)


def _now() -> float:
    return asyncio.get_running_loop().time()
