"""What an endpoint really does, measured on about 25 short requests before the first real one.

In: a way to call one endpoint, and the ways of asking that are allowed. Out: a :class:`Report`: how to talk to the endpoint
(:class:`Wire`), one finding per check (see ``checks``) and the resulting :class:`Caps`. Servers ignore fields they do not
know and answer 200, so nothing is believed that was not seen. Chat endpoints are measured in ``chat``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from bvpo.engines.base import Caps, Generation, Request, Sampling
from bvpo.engines.http.checks import Finding, Notes, Policy, Report
from bvpo.engines.http.endpoints import GaveUp, Job
from bvpo.engines.http.wire import Vocabulary, Wire, returned_ids
from bvpo.strict import UserError
from bvpo.web import BadAnswer, parse_object, usage_count

# Asks the endpoint, with a retry; raises GaveUp or EndpointsLost.
Ask = Callable[[Job], Awaitable[Any]]
# Draws one sample: a seed and a temperature.
Draw = Callable[[int, float], Awaitable[Generation]]

_TEXT = "Question: name three colours and say why you like them.\nAnswer:"
_TOKENS = 16
# Hot enough that two seeds differ on any model.
_HOT = 1.5
_SEEDS = (11, 4, 23, 7)
# Equal to the first seed for a server that keeps only 31 or 32 bits.
_WIDE_SEEDS = (2**31 + 11, 2**32 + 11)
_CROWD = 8
# A nucleus so small that only the most probable token is in it.
_TINY_NUCLEUS = 1e-5
_SAME_LOGPROB = 0.02


async def preflight(url: str, ask: Ask, candidates: Sequence[Wire], policy: Policy) -> Report:
    """Measure a completions endpoint; ``candidates`` are the ways of asking, best first."""
    notes = Notes(policy)
    vocabulary = candidates[0].vocabulary
    prompt = probe_prompt(vocabulary)
    wire = await _negotiate(ask, candidates, prompt, notes)
    signature = None
    if wire is not None and not notes.refused:
        try:
            wire, signature = await _Probe(ask, wire, prompt, notes).run()
        except (GaveUp, BadAnswer) as error:
            raise UserError(f"{url}: its preflight failed: {error}") from None
    same = notes.ok("same_seed")
    caps = Caps(
        token_prompts=wire is not None and wire.prompts == "ids" and not wire.retokenise,
        seed=same,
        logprobs=wire is not None and wire.logprobs,
        batch_invariant=same and notes.ok("concurrency"),
    )
    return Report(url=url, findings=tuple(notes.findings), caps=caps, wire=wire, signature=signature)


def probe_prompt(vocabulary: Vocabulary | None) -> tuple[int, ...]:
    """A short prompt with exactly one BOS where the tokenizer has one; without a tokenizer, some small ids."""
    if vocabulary is None:
        return tuple(range(5, 17))
    ids = vocabulary.encode(_TEXT)
    return tuple(ids if vocabulary.bos is None else [vocabulary.bos, *ids])


async def _negotiate(ask: Ask, candidates: Sequence[Wire], prompt: tuple[int, ...], notes: Notes) -> Wire | None:
    """The first way of asking by which the server reads the prompt's very tokens and returns ids, else one without ids."""
    reads_right: list[Wire] = []
    problems: list[str] = []
    for wire in candidates:
        way = f"{wire.dialect} fields, prompt as {wire.prompts}"
        try:
            body = wire.body(_request(prompt, _SEEDS[0], max_new_tokens=2))
            answer = await ask(Job(path="completions", body=body, read=parse_object))
        except (GaveUp, UserError) as error:
            problems.append(f"{way}: {error}")
            continue
        problem = _misread(answer, prompt)
        if problem is not None:
            problems.append(f"{way}: {problem}")
        elif _has_ids(first_choice(answer)):
            notes.add("prompt_tokens", None)
            notes.add("token_ids", None)
            return wire
        else:
            reads_right.append(wire)
    notes.add("prompt_tokens", None if reads_right else "; ".join(dict.fromkeys(problems)))
    return _without_ids(reads_right[0], notes) if reads_right else None


def _misread(answer: dict[str, Any], prompt: tuple[int, ...]) -> str | None:
    read = first_choice(answer).get("prompt_token_ids")
    count = len(read) if isinstance(read, list) else usage_count(answer, "prompt_tokens")
    if count is None:
        return "does not say how many prompt tokens it read"
    if count != len(prompt):
        return f"read {count} prompt tokens, sent {len(prompt)}"
    return "read other prompt tokens than were sent" if isinstance(read, list) and tuple(read) != prompt else None


def _without_ids(wire: Wire, notes: Notes) -> Wire | None:
    problem = "the server returns no token ids"
    if notes.policy.allow_retokenise and wire.vocabulary is not None:
        detail = f"{problem}; allow_retokenise makes them from the text"
        notes.findings.append(Finding(check="token_ids", outcome="downgraded", detail=detail))
        return replace(wire, retokenise=True)
    needed = "allow_retokenise" if wire.vocabulary is not None else "tokenizer and allow_retokenise"
    notes.add("token_ids", f"{problem}; set {needed} to make them from the text all the same")
    return None


async def check_sampling(draw: Draw, notes: Notes) -> tuple[Generation, Generation]:
    """Seeds and temperature, by what is drawn; returns a hot and a greedy sample."""
    hot = await draw(_SEEDS[0], _HOT)
    again = await draw(_SEEDS[0], _HOT)
    notes.add("same_seed", None if _same(hot, again) else "the same request twice gave different samples")
    others = [await draw(seed, _HOT) for seed in _SEEDS[1:]]
    distinct = len({g.token_ids for g in (hot, *others)})
    problem = f"{len(_SEEDS)} seeds at temperature {_HOT} gave {distinct} different sample{'s' * (distinct != 1)}"
    notes.add("temperature", None if distinct == len(_SEEDS) else problem)
    await _check_wide_seeds(draw, hot, notes)
    greedy = await draw(_SEEDS[0], 0.0)
    greedy_again = await draw(_SEEDS[1], 0.0)
    same = _same(greedy, greedy_again)
    notes.add("greedy", None if same else "temperature 0 gave different samples for different seeds")
    seeds = [_SEEDS[0] if i % 2 else 1000 + i for i in range(_CROWD)]
    crowd = await asyncio.gather(*(draw(seed, _HOT) for seed in seeds))
    strays = sum(not _same(g, hot) for g, seed in zip(crowd, seeds, strict=True) if seed == _SEEDS[0])
    problem = f"{strays} of {_CROWD // 2} repeats of one request differed while {_CROWD} requests were open"
    notes.add("concurrency", problem if strays else None)
    return hot, greedy


async def _check_wide_seeds(draw: Draw, hot: Generation, notes: Notes) -> None:
    for seed in _WIDE_SEEDS:
        try:
            wide = await draw(seed, _HOT)
        except GaveUp as error:
            notes.add("wide_seeds", f"the seed {seed} is refused: {error}")
            return
        if _same(wide, hot):
            notes.add("wide_seeds", f"the seeds {seed} and {_SEEDS[0]} gave the same sample")
            return
    notes.add("wide_seeds", None)


class _Probe:
    """The checks of a completions endpoint that follow once it is known how to ask."""

    def __init__(self, ask: Ask, wire: Wire, prompt: tuple[int, ...], notes: Notes) -> None:
        self._ask, self._wire, self._prompt, self._notes = ask, wire, prompt, notes

    async def run(self) -> tuple[Wire, str | None]:
        """The wire as it may be used, and a hash of what was sampled if that is reproducible."""
        hot, greedy = await check_sampling(
            lambda seed, temperature: self._sample(seed, temperature=temperature), self._notes
        )
        await self._n()
        await self._length()
        await (self._stop_string(greedy) if self._wire.retokenise else self._stop_token(greedy))
        await self._vocabulary()
        wire = replace(
            self._wire,
            logprobs=await self._logprobs(),
            truncation=await self._truncation(greedy),
            seed_bits=seed_bits(self._notes),
        )
        return wire, signature(hot, greedy) if self._notes.ok("same_seed") and self._notes.ok("greedy") else None

    async def _sample(self, seed: int, wire: Wire | None = None, **sampling: Any) -> Generation:
        wire = wire or self._wire
        request = _request(self._prompt, seed, **sampling)

        def read(raw: bytes) -> Generation:
            return wire.read(request, raw).generation

        return await self._ask(Job(path="completions", body=wire.body(request), read=read))

    async def _answer(self, extra: dict[str, Any], **sampling: Any) -> dict[str, Any]:
        body = self._wire.body(_request(self._prompt, _SEEDS[0], **sampling)) | extra
        return await self._ask(Job(path="completions", body=body, read=parse_object))

    async def _n(self) -> None:
        try:
            choices = (await self._answer({"n": 3})).get("choices")
        except GaveUp as error:
            self._notes.add("n", f"n = 3 is refused: {error}")
            return
        number = len(choices) if isinstance(choices, list) else 0
        self._notes.add("n", None if number == 3 else f"n = 3 gave {number} choice{'s' * (number != 1)}")

    async def _length(self) -> None:
        answer = await self._answer({}, temperature=0.0, max_new_tokens=1)
        ids = _ids_or_none(first_choice(answer))
        count = usage_count(answer, "completion_tokens") if ids is None else len(ids)
        self._notes.add(
            "max_tokens", None if count == 1 else f"a limit of 1 gave {count or 'an unknown number of'} tokens"
        )

    async def _stop_token(self, greedy: Generation) -> None:
        """Stop at a token that the greedy sample is known to contain; the response must end with it."""
        ids = greedy.token_ids
        at = max(i for i in range(len(ids)) if ids[i] not in ids[:i])
        try:
            stopped = await self._sample(_SEEDS[0], temperature=0.0, stop_token_ids=(ids[at],))
        except GaveUp as error:
            self._notes.add("stop", f"a stop token is not honoured or not returned: {error}")
            return
        right = stopped.finish == "stop" and stopped.token_ids == ids[: at + 1]
        self._notes.add(
            "stop", None if right else f"expected to end with token {ids[at]}, got {list(stopped.token_ids)}"
        )

    async def _stop_string(self, greedy: Generation) -> None:
        """The same for a server that returns no ids: stop at a word of the greedy text."""
        words = re.findall(r"[A-Za-z]{1,6}|\d+", greedy.text)
        if not words:
            self._notes.add("stop", f"cannot be measured: the model says no word to stop at, only {greedy.text!r}")
            return
        word = words[len(words) // 2]
        text = str(first_choice(await self._answer({"stop": [word]}, temperature=0.0)).get("text"))
        right = word not in text and len(text) < len(greedy.text)
        problem = "left in the text" if text.endswith(word) and len(text) < len(greedy.text) else "not honoured"
        self._notes.add("stop", None if right else f"the stop string {word!r} is {problem}")

    async def _vocabulary(self) -> None:
        choice = first_choice(await self._answer({}))
        vocabulary, ids = self._wire.vocabulary, _ids_or_none(choice)
        if vocabulary is None or ids is None:
            return  # nothing to compare with; without ids every answer's prompt count is checked
        shown = ids[:-1] if choice.get("finish_reason") == "stop" else ids
        # Half characters at the end are shown differently by servers that decode token by token.
        ours, theirs = (text.replace("\ufffd", "") for text in (vocabulary.decode(shown), str(choice.get("text"))))
        self._notes.add(
            "vocabulary", None if ours == theirs else f"the server's text is {theirs!r}, its ids say {ours!r}"
        )

    async def _logprobs(self) -> bool:
        """Present, one per token, and of the model itself: before temperature and truncation."""
        if self._wire.retokenise:
            return self._notes.add("logprobs", "without the sampled ids they belong to no token")
        asking = replace(self._wire, logprobs=True)
        try:
            cold = await self._sample(_SEEDS[0], asking, temperature=0.0)
            cut = await self._sample(_SEEDS[2], asking, top_p=_TINY_NUCLEUS)
        except GaveUp as error:
            return self._notes.add("logprobs", str(error))
        assert cold.logprobs is not None and cut.logprobs is not None
        off = abs(cold.logprobs[0] - cut.logprobs[0])
        same_token = cold.token_ids[0] == cut.token_ids[0]
        problem = f"they depend on temperature or top_p (one token: off by {off:.2f})"
        return self._notes.add("logprobs", problem if same_token and off > _SAME_LOGPROB else None)

    async def _truncation(self, greedy: Generation) -> frozenset[str]:
        """Which truncations take effect: cut down to one token, hot sampling must be greedy."""
        settings: dict[str, dict[str, Any]] = {"top_p": {"top_p": _TINY_NUCLEUS}}
        if self._wire.dialect == "vllm":
            settings["top_k"] = {"top_k": 1}
        honoured: set[str] = set()
        for name, sampling in settings.items():
            try:
                cut = await self._sample(_SEEDS[2], max_new_tokens=4, **sampling)
            except GaveUp as error:
                self._notes.add(name, f"{sampling} is refused: {error}")
                continue
            if self._wire.retokenise:
                same = greedy.text.startswith(cut.text)
            else:
                same = greedy.token_ids[: len(cut.token_ids)] == cut.token_ids
            if self._notes.add(name, None if same else f"{sampling} at temperature {_HOT} is not greedy"):
                honoured.add(name)
        return frozenset(honoured)


def seed_bits(notes: Notes) -> int:
    """How long the seeds may be that this endpoint is sent."""
    return 63 if notes.ok("wide_seeds") else 31


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The first choice of an answer that has not been checked; empty if there is none."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def signature(*generations: Generation) -> str:
    """A short hash of what was sampled: other weights give another one."""
    return hashlib.sha256(json.dumps([g.token_ids for g in generations]).encode()).hexdigest()[:16]


def _request(prompt: tuple[int, ...], seed: int, **sampling: Any) -> Request:
    params = Sampling(**({"max_new_tokens": _TOKENS, "temperature": _HOT} | sampling))
    return Request(key=f"preflight-{seed}", prompt_ids=prompt, seed=seed, params=params)


def _same(one: Generation, other: Generation) -> bool:
    return one.token_ids == other.token_ids


def _ids_or_none(choice: dict[str, Any]) -> list[int] | None:
    try:
        return returned_ids(choice)
    except BadAnswer:
        return None


def _has_ids(choice: dict[str, Any]) -> bool:
    return bool(_ids_or_none(choice))
