"""A language model as the judge, behind any OpenAI-compatible chat endpoint.

In: answers; a cache of earlier replies. Out: ratings ('pointwise'), or the share of comparisons that an answer wins
against its rivals, each two in both orders ('pairwise'). Requests run concurrently, are repeated with growing pauses when
they fail for a passing reason, and are never repeated once answered. A reply without a verdict, or that is no reply, is a
failure, never a number. The key comes from the environment and appears in no log, error, fingerprint or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import openai

from bvpo.config import JudgeConfig, ScoreConfig
from bvpo.keys import content_hash
from bvpo.scorers.base import Estimate, Needs, Outcome, ReplyCache, ScoreItem, about_tokens, one_line
from bvpo.scorers.judging import NoVerdict, Verdict, load_rubric, tally
from bvpo.strict import UserError
from bvpo.web import (
    OPENAI_URL,
    BadAnswer,
    environment_url,
    http_client,
    is_openais,
    named_key,
    only_choice,
    parse_object,
    redact,
    usage_count,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

MAX_UNREACHABLE = 20  # requests in a row that never got an answer: the endpoint is gone, not the request bad
_ASSUMED_REPLY = 1024  # tokens, where max_tokens sets no limit
_OPENAI_KEY = "OPENAI_API_KEY"
_NO_KEY = "EMPTY"  # what a server that needs no key is sent; the client refuses to send nothing
_UNNAMED = "no key was sent, because score.judge.api_key_env names none for this address"
_REFUSED = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


def create(config: ScoreConfig, cache: ReplyCache | None = None) -> JudgeScorer:
    return JudgeScorer(config.judge, cache or MemoryCache())


class MemoryCache:
    """Replies of this process only."""

    def __init__(self) -> None:
        self._replies: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, reply: str, served_by: str) -> None:
        self._replies[key] = reply


class NoReply(Exception):
    """A request that failed for good; the text is safe to store."""


class JudgeScorer:
    """Asks the judge; see the module's docstring."""

    _config: JudgeConfig

    def __init__(self, config: JudgeConfig, cache: ReplyCache) -> None:
        self._config, self._cache = config, cache
        self._rubric = load_rubric(config)
        self._asked: dict[str, asyncio.Future[str]] = {}  # requests on their way: two answers share a comparison

    @property
    def needs(self) -> Needs:
        return Needs(rivals=self._rubric.mode == "pairwise")

    def fingerprint(self) -> dict[str, Any]:
        """The address is left out: the model's name is trusted to mean the same model wherever it is served."""
        rubric = self._rubric
        scale = [rubric.rating_min, rubric.rating_max] if rubric.mode == "pointwise" else None
        return {
            "scorer": "judge",
            "mode": rubric.mode,
            "template": content_hash(rubric.template),
            "pattern": rubric.pattern.pattern,
            "scale": scale,
            "request": self._body(""),
        }

    def estimate(self, items: Iterable[ScoreItem]) -> Estimate:
        config, tokens = self._config, 0
        seen: set[str] = set()
        for text in itertools.chain.from_iterable(map(self._texts, items)):
            key = self._key(text)
            if key not in seen and self._cache.get(key) is None:
                seen.add(key)
                tokens += about_tokens(text)
        out = len(seen) * (config.max_tokens or _ASSUMED_REPLY)
        dollars = None
        if config.price_input is not None and config.price_output is not None:
            dollars = (tokens * config.price_input + out * config.price_output) / 1e6
        return Estimate(num_calls=len(seen), input_tokens=tokens, output_tokens=out, dollars=dollars, what="requests")

    def score(self, items: Iterable[ScoreItem]) -> Iterator[Outcome]:
        client = Endpoint(self._config)
        work = self._compare if self._rubric.mode == "pairwise" else self._rate
        return run_concurrently(items, lambda item: work(item, client), self._config.concurrency, client.close)

    def close(self) -> None:
        pass

    # ------------------------------------------------------------------------------------------------ the two modes

    def _texts(self, item: ScoreItem) -> list[str]:
        """Every request that the score of an item takes. A comparison serves both answers and is asked once."""
        if self._rubric.mode == "pointwise":
            return [self._rubric.request(item.messages, {"answer": item.answer})]
        return [text for rival in item.rivals for text in self._game(item, rival)]

    def _game(self, item: ScoreItem, rival: str) -> tuple[str, str]:
        """The comparison with the answer first, and with the rival first."""
        places = (item.answer, rival), (rival, item.answer)
        first, second = (self._rubric.request(item.messages, {"answer_a": a, "answer_b": b}) for a, b in places)
        return first, second

    async def _rate(self, item: ScoreItem, client: Endpoint) -> Outcome:
        (text,) = self._texts(item)
        try:
            return Outcome.of(item.key, self._rubric.rating(await self._ask(text, self._rubric.rating, client)))
        except (NoReply, NoVerdict) as error:
            return Outcome.failed(item.key, str(error))

    async def _compare(self, item: ScoreItem, client: Endpoint) -> Outcome:
        """All comparisons of one answer. If one fails the answer does: a share of what is left over would favour whoever
        missed the stronger rival."""
        if not item.rivals:
            return Outcome.failed(item.key, "no other answer to compare with")
        texts = self._texts(item)
        winner = self._rubric.winner
        replies = await asyncio.gather(*(self._ask(text, winner, client) for text in texts), return_exceptions=True)
        problems = [reply for reply in replies if isinstance(reply, BaseException)]
        for problem in problems:
            if not isinstance(problem, NoReply | NoVerdict):
                raise problem
        if problems:
            return Outcome.failed(item.key, f"{len(problems)} of {len(texts)} comparisons failed: {problems[0]}")
        verdicts: list[Verdict] = [winner(reply) for reply in replies if isinstance(reply, str)]
        result = tally(list(zip(verdicts[::2], verdicts[1::2], strict=True)))
        extra = {"games": result.num_games, "order_contradictions": result.num_contradicted}
        return Outcome.of(item.key, result.share, extra)

    # ------------------------------------------------------------------------------------------------ one request

    def _body(self, text: str) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {"model": config.model, "messages": [{"role": "user", "content": text}]}
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.max_tokens is not None and "max_completion_tokens" not in config.request:
            body["max_tokens"] = config.max_tokens
        return {**body, **config.request}

    def _key(self, text: str) -> str:
        return content_hash(self._body(text))

    async def _ask(self, text: str, parse: Callable[[str], object], client: Endpoint) -> str:
        """A reply that ``parse`` finds a verdict in: a kept one, one on its way, or a new one."""
        key = self._key(text)
        known = self._cache.get(key)
        if known is not None:
            with contextlib.suppress(NoVerdict):  # kept under another pattern
                parse(known)
                return known
        if key not in self._asked:
            task = asyncio.ensure_future(self._fetch(key, text, parse, client))
            self._asked[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await self._asked[key]

    async def _fetch(self, key: str, text: str, parse: Callable[[str], object], client: Endpoint) -> str:
        """A new reply; only one that holds a verdict is kept."""
        reply, served_by = await client.reply(self._body(text))
        parse(reply)
        self._cache.put(key, reply, served_by)
        return reply

    def _forget(self, key: str, done: asyncio.Future[str]) -> None:
        self._asked.pop(key, None)
        if not done.cancelled():
            done.exception()  # taken note of, so that asyncio does not report it when nobody waits any more


class Endpoint:
    """The connection to one endpoint, for one event loop."""

    def __init__(self, config: JudgeConfig) -> None:
        url = config.base_url or environment_url() or OPENAI_URL
        self._key = api_key(config, url)
        self._gate = asyncio.Semaphore(config.concurrency)
        self._hint = f"check {config.api_key_env or _OPENAI_KEY}" if self._key else _UNNAMED
        self._unreachable = 0
        self.usage: Counter[str] = Counter()
        self._client = openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=url,
            max_retries=config.retries,
            timeout=config.timeout,
            http_client=http_client(url, self._key or _NO_KEY, config.timeout),
        )

    async def reply(self, body: dict[str, Any]) -> tuple[str, str]:
        """The reply and the name of the model that gave it. :class:`NoReply` when this request fails for good,
        :class:`UserError` when all would."""
        async with self._gate:
            try:
                answer = await self._client.chat.completions.with_raw_response.create(**_arguments(body))
            except _REFUSED as error:
                what = f"{error.status_code} {type(error).__name__}"
                hint = self._hint if error.status_code != 404 else "check score.judge.model and base_url"
                raise UserError(f"score.judge: the endpoint refuses every request ({what}); {hint}") from None
            except openai.APIConnectionError as error:  # timeouts included
                raise self._lost(error) from None
            except openai.OpenAIError as error:
                self._unreachable = 0
                raise NoReply(self.safe(str(error))) from None
        self._unreachable = 0
        try:
            return self._read(answer.content)
        except BadAnswer as error:
            raise NoReply(self.safe(f"unusable answer: {error}")) from None

    def _read(self, raw: bytes) -> tuple[str, str]:
        """Reply and model of a raw answer; :class:`BadAnswer` where it is none, :class:`NoReply` where it says nothing."""
        answer = parse_object(raw)
        choice = only_choice(answer)
        for name, field in (("replies", ""), ("tokens in", "prompt_tokens"), ("tokens out", "completion_tokens")):
            self.usage[name] += (usage_count(answer, field) or 0) if field else 1
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        if content is not None and not isinstance(content, str):
            raise BadAnswer("the message's content is no text")
        if not content:
            raise NoReply(self.safe(f"the reply is empty (finish reason {choice.get('finish_reason')})"))
        if choice.get("finish_reason") == "length":
            raise NoReply("the reply was cut at its longest length (score.judge.max_tokens) before it ended")
        model = answer.get("model")
        return self._clean(content), self._clean(model) if isinstance(model, str) else ""

    def _clean(self, text: str) -> str:
        """Text of a server's as files can hold it: without the key, which it may repeat, and as UTF-8."""
        return redact(text.encode("utf-8", "replace").decode(), self._key)

    async def close(self) -> None:
        await self._client.close()
        if self.usage:
            logger.info("judge        %s", ", ".join(f"{count:,} {name}" for name, count in self.usage.items()))

    def safe(self, text: str) -> str:
        """An error text as it may be stored: one line, without the key."""
        return one_line(redact(text, self._key))

    def _lost(self, error: Exception) -> Exception:
        self._unreachable += 1
        reason = self.safe(str(error.__cause__ or error))
        if self._unreachable >= MAX_UNREACHABLE:
            return UserError(
                f"score.judge: {self._unreachable} requests in a row got no answer from the endpoint ({reason}); when it "
                "is back, run the same command with --retry-failed"
            )
        return NoReply(f"no answer from the endpoint: {reason}")


def api_key(config: JudgeConfig, url: str) -> str:
    """The key that the config names; where it names none, OpenAI's for OpenAI's addresses. Others may need none."""
    if config.api_key_env:
        return named_key(config.api_key_env, "score.judge.api_key_env")
    if not is_openais(url):
        return ""
    return (
        named_key(_OPENAI_KEY, "score.judge.api_key_env")
        if url == OPENAI_URL
        else os.environ.get(_OPENAI_KEY, "").strip()
    )


def _arguments(body: dict[str, Any]) -> dict[str, Any]:
    """The body as the client takes it: fields that it has no name for go along as they are."""
    named = ("model", "messages", "temperature", "max_tokens")
    own = {name: body[name] for name in named if name in body}
    return {**own, "extra_body": {name: value for name, value in body.items() if name not in named}}


def run_concurrently(
    jobs: Iterable[T],
    work: Callable[[T], Awaitable[R]],
    concurrency: int,
    close: Callable[[], Awaitable[None]] | None = None,
) -> Iterator[R]:
    """Results of ``work`` on each job as they finish, ``concurrency`` at a time. Runs an event loop of its own; ending
    the iteration early, or Ctrl-C, cancels what is in flight."""
    rest = iter(jobs)
    with asyncio.Runner() as runner:
        tasks: set[asyncio.Task[R]] = set()
        try:
            while True:
                tasks |= {_start(runner, work, job) for job in itertools.islice(rest, concurrency - len(tasks))}
                if not tasks:
                    return
                done, _ = runner.run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    result = task.result()
                    tasks.discard(task)
                    yield result
        finally:
            for task in tasks:
                task.cancel()
            runner.run(_settle(tasks, close))


def _start(runner: asyncio.Runner, work: Callable[[T], Awaitable[R]], job: T) -> asyncio.Task[R]:
    async def one() -> R:
        return await work(job)

    return runner.get_loop().create_task(one())


async def _settle(tasks: Iterable[asyncio.Task[Any]], close: Callable[[], Awaitable[None]] | None) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
    if close is not None:
        await close()
