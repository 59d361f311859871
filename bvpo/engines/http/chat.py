"""Chat-only endpoints: the trace view where they return the reasoning apart, the empty view where they continue a prefix.

In: a :class:`ChatRequest`, which carries the conversation besides its token ids. Out: the body for
``/v1/chat/completions``, and a generation whose token ids are *made* from trace and answer by the reasoning format: a chat
endpoint never shows what was sampled, and it drops whitespace around the trace. So all of this needs ``allow_retokenise``,
and a completions endpoint is always the better choice. Prompts are checked by their token count in every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bvpo.engines.base import Caps, Generation, Request, Sampling
from bvpo.engines.http.checks import Finding, Notes, Policy, Report
from bvpo.engines.http.endpoints import GaveUp, Job
from bvpo.engines.http.preflight import Ask, check_sampling, seed_bits, signature
from bvpo.engines.http.wire import Path, Reading, Vocabulary, finish_reason, sent_seed
from bvpo.formats import ReasoningFormat, completion_ids, end_ids, render, view_prompt
from bvpo.formats.prompts import conversation, encode
from bvpo.records import Message, View
from bvpo.strict import UserError
from bvpo.web import BadAnswer, only_choice, parse_object, usage_count

_PROBE = (Message(role="user", content="Name three colours and say why you like them."),)
_TOKENS = 16
_WORDS = ("Red", "Red, green and")
# Long enough for a short trace to close; the model may still not close it.
_APART_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Request):
    """A request that a chat endpoint can serve too: ``prompt_ids`` is ``messages`` written in ``view``."""

    messages: tuple[Message, ...]
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWire:
    """How to talk to one chat endpoint. ``prefix``: it continues a half-written assistant turn."""

    model: str
    vocabulary: Vocabulary
    format: ReasoningFormat
    prefix: bool = True
    seed_bits: int = 63

    @property
    def path(self) -> Path:
        return "chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        if not isinstance(request, ChatRequest):
            raise UserError("a chat endpoint needs the conversation (ChatRequest), and this request has token ids only")
        if request.view == "empty" and not self.prefix:
            raise UserError(
                "the empty view needs an endpoint that continues the forced empty trace; this chat endpoint does not, use "
                "the model's /v1/completions"
            )
        params = request.params
        body: dict[str, Any] = {
            "model": self.model,
            "messages": conversation(self.format, request.messages, request.view),
            "n": 1,
            "seed": sent_seed(request.seed, self.seed_bits),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(params.stop_token_ids),
            "skip_special_tokens": False,
            "stream": False,
            "chat_template_kwargs": self.format.kwargs(request.view),
        }
        if request.view == "trace":
            return body
        forced = {"role": "assistant", "content": self.format.empty_open + self.format.empty_close}
        body["messages"] = [*body["messages"], forced]
        return body | {"continue_final_message": True, "add_generation_prompt": False}

    def read(self, request: Request, raw: bytes) -> Reading:
        """Check one answer and write its trace and answer as tokens; raises :class:`BadAnswer`."""
        assert isinstance(request, ChatRequest)
        answer = parse_object(raw)
        choice = only_choice(answer)
        finish = finish_reason(choice)
        self._check_prompt(request, answer)
        reasoning, content = message_parts(choice)
        ids, text = self._written(request.view, reasoning, content, finish)
        counted = usage_count(answer, "completion_tokens")
        generation = Generation(key=request.key, token_ids=tuple(ids), text=text, finish=finish)
        drifted = counted is not None and counted != len(ids)
        return Reading(generation=generation, prompt_tokens=len(request.prompt_ids), drifted=drifted)

    def expected_prompt(self, request: ChatRequest) -> int:
        """How many tokens the server must have read for the prompt."""
        if request.view == "empty":
            return len(request.prompt_ids)
        tokenizer = self.vocabulary.tokenizer
        return len(encode(tokenizer, render(tokenizer, self.format, request.messages, "trace")))

    def _check_prompt(self, request: ChatRequest, answer: dict[str, Any]) -> None:
        expected, counted = self.expected_prompt(request), usage_count(answer, "prompt_tokens")
        if counted != expected:
            raise BadAnswer(f"the server read {counted} prompt tokens, the {request.view} view's prompt has {expected}")

    def _written(
        self, view: View, reasoning: str | None, content: str | None, finish: Literal["stop", "length"]
    ) -> tuple[Sequence[int], str]:
        fmt, tokenizer = self.format, self.vocabulary.tokenizer
        finished = finish == "stop"
        if view == "empty":
            if reasoning and content:
                raise BadAnswer("a trace in the empty view: the forced empty trace was not continued")
            # A parser that never sees the closing marker takes the whole answer for reasoning.
            trace, answer = None, content or reasoning or ""
        else:
            trace, answer = reasoning or "", content
            if content and any(marker in content for marker in fmt.close):
                raise BadAnswer("the trace comes inside the content, not apart")
            if not answer:  # cut inside the trace, or ended there: no closing marker was seen
                ids = encode(tokenizer, trace)
                return (*ids, *end_ids(tokenizer, fmt)[:1]) if finished else ids, trace
        try:
            return completion_ids(tokenizer, fmt, view, trace, answer, finished), fmt.join(
                view, trace, answer, finished
            )
        except UserError as error:
            raise BadAnswer(str(error)) from None


def message_parts(choice: dict[str, Any]) -> tuple[str | None, str | None]:
    """Reasoning and content of a choice's message; vLLM renamed ``reasoning_content`` to ``reasoning``."""
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadAnswer("the choice holds no message")
    content = message.get("content")
    reasoning = message.get("reasoning")
    reasoning = message.get("reasoning_content") if reasoning is None else reasoning
    for name, value in (("content", content), ("reasoning", reasoning)):
        if value is not None and not isinstance(value, str):
            raise BadAnswer(f"the message's {name} is no text")
    return reasoning, content


async def preflight_chat(url: str, ask: Ask, wire: ChatWire, policy: Policy) -> Report:
    """Measure a chat endpoint."""
    notes = Notes(policy)
    mark = None
    if not policy.allow_retokenise:
        problem = "a chat endpoint never returns what was sampled; use /v1/completions, or set allow_retokenise"
        notes.add("token_ids", problem)
    else:
        detail = "a chat endpoint; allow_retokenise writes trace and answer as tokens"
        notes.findings.append(Finding(check="token_ids", outcome="downgraded", detail=detail))
        wire, mark = await _measure(url, ask, wire, notes)
    same = notes.ok("same_seed")
    caps = Caps(token_prompts=False, seed=same, logprobs=False, batch_invariant=same and notes.ok("concurrency"))
    return Report(url=url, findings=tuple(notes.findings), caps=caps, wire=wire, signature=mark)


async def _measure(url: str, ask: Ask, wire: ChatWire, notes: Notes) -> tuple[ChatWire, str | None]:
    async def draw(seed: int, temperature: float, view: View = "trace", tokens: int = _TOKENS) -> Generation:
        request = _request(wire, view, seed, temperature=temperature, max_new_tokens=tokens)

        def read(raw: bytes) -> Generation:
            return wire.read(request, raw).generation

        return await ask(Job(path="chat/completions", body=wire.body(request), read=read))

    problem = await _first_answer(ask, wire)
    if not notes.add("reasoning_apart", problem):
        return wire, None
    try:
        hot, greedy = await check_sampling(draw, notes)
    except GaveUp as error:
        raise UserError(f"{url}: its preflight failed: {error}") from None
    notes.add("prefix", await _prefix_problem(ask, wire))
    mark = signature(hot, greedy) if notes.ok("same_seed") and notes.ok("greedy") else None
    return replace(wire, prefix=notes.ok("prefix"), seed_bits=seed_bits(notes)), mark


async def _first_answer(ask: Ask, wire: ChatWire) -> str | None:
    """Why the reasoning does not come apart, or ``None``."""
    request = _request(wire, "trace", 0, temperature=1.0, max_new_tokens=_APART_TOKENS)

    def read(raw: bytes) -> str | None:
        answer = parse_object(raw)
        reasoning, content = message_parts(only_choice(answer))
        if reasoning:
            return None
        return f"the answer has no reasoning field, its content starts {(content or '')[:40]!r}"

    try:
        return await ask(Job(path="chat/completions", body=wire.body(request), read=read))
    except GaveUp as error:
        return str(error)


async def _prefix_problem(ask: Ask, wire: ChatWire) -> str | None:
    """Why a half-written turn is not continued, or ``None``.

    Longer and longer turns are sent and must all be counted: one length alone could be right by chance, because templates
    put tokens of their own where the forced empty trace should be.
    """
    request = _request(wire, "empty", 0, temperature=0.0, max_new_tokens=1)
    for words in ("", *_WORDS):
        body = wire.body(request)
        body["messages"][-1]["content"] += words
        try:
            answer = await ask(Job(path="chat/completions", body=body, read=parse_object))
        except GaveUp as error:
            return str(error)
        expected = len(request.prompt_ids) + len(wire.vocabulary.encode(words))
        counted = usage_count(answer, "prompt_tokens")
        if counted != expected:
            return f"the server read {counted} prompt tokens instead of {expected}"
    return None


def _request(wire: ChatWire, view: View, seed: int, **sampling: Any) -> ChatRequest:
    prompt = view_prompt(wire.vocabulary.tokenizer, wire.format, _PROBE, view)
    return ChatRequest(
        key=f"preflight-{view}-{seed}",
        prompt_ids=prompt.prompt_ids,
        seed=seed,
        params=Sampling(**sampling),
        messages=_PROBE,
        view=view,
    )
