"""The two dialects of ``/v1/completions`` in bytes: a request becomes a JSON body, an answer becomes a checked generation.

In: a :class:`Request`, or the raw body of an answer. Out: what to send, or a :class:`Reading`; an answer that is not exactly
what was asked for raises :class:`BadAnswer` with the reason in one line. Pure: no sockets, no retries, no clock.

Dialect "vllm" sends the fields that only vLLM (and servers that copy it) know: they return the sampled token ids, so that
nothing is ever tokenised twice. Dialect "plain" sends OpenAI's own fields only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from bvpo.engines.base import Generation, Request
from bvpo.strict import UserError
from bvpo.web import BadAnswer, only_choice, parse_object, show_short, usage_count

Dialect = Literal["vllm", "plain"]
PromptForm = Literal["ids", "text"]
Path = Literal["completions", "chat/completions"]

_TOKEN_ID = "token_id:"
# Sums of rounded probabilities may exceed 1 by a little.
_LARGEST_LOGPROB = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A generation and what the server counted; ``drifted``: re-tokenised to another number of tokens than it counted."""

    generation: Generation
    prompt_tokens: int
    drifted: bool = False


class Talk(Protocol):
    """How to talk to one endpoint."""

    @property
    def path(self) -> Path: ...

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request; :class:`UserError` if this endpoint cannot serve it."""
        ...

    def read(self, request: Request, raw: bytes) -> Reading:
        """The checked answer; :class:`BadAnswer` if it is not what was asked for."""
        ...


class Vocabulary:
    """The client's own tokenizer: text to ids, ids to text, and which ids end a response."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size: int = len(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id

    @classmethod
    def load(cls, path: str, revision: str | None, trust_remote_code: bool) -> Vocabulary:
        from bvpo.models import read_tokenizer  # here: reading an answer needs no transformers

        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        return cls(read_tokenizer(f"tokenizer {path!r}: cannot load it", path, **options))

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How to talk to one endpoint, as its preflight found it.

    ``context`` is the largest number of prompt plus response tokens, where the server names it. ``logprobs``: the
    server's log-probabilities are checked and kept. ``retokenise``: the server returns no ids and the user
    allowed to make them from the text. ``truncation`` names the truncations that take effect.
    """

    model: str
    dialect: Dialect
    prompts: PromptForm
    vocabulary: Vocabulary | None
    server_adds_bos: bool = False
    logprobs: bool = True
    retokenise: bool = False
    truncation: frozenset[str] = frozenset({"top_k", "top_p"})
    seed_bits: int = 63
    context: int | None = None

    @property
    def path(self) -> Path:
        return "completions"

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of one request; always one choice, with every sampling parameter spelled out.

        Servers fill in what is left out from the model's generation_config.json (vLLM does by default), so a parameter that
        is off must be sent as off.
        """
        params = request.params
        self._refuse_unsupported(request)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt_ids) if self.prompts == "ids" else self.prompt_text(request.prompt_ids),
            "n": 1,
            "seed": sent_seed(request.seed, self.seed_bits),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stream": False,
        }
        if self.dialect == "plain":
            if params.stop_token_ids:
                body["stop"] = [self._vocabulary().decode([i]) for i in params.stop_token_ids]
            return body | ({"logprobs": 1} if self.logprobs and not self.retokenise else {})
        return body | {
            "logprobs": 0,  # of the sampled token only; asked for in any case, older servers name ids nowhere else
            "top_k": params.top_k or -1,  # -1 is off everywhere, 0 only in newer servers
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(params.stop_token_ids),
            # Special tokens are kept: in some reasoning formats they are the markers of the trace.
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def prompt_text(self, prompt_ids: Sequence[int]) -> str:
        """The prompt as text for servers that take nothing else; refused where the text would become other tokens."""
        vocabulary = self._vocabulary()
        ids = list(prompt_ids)
        starts_with_bos = vocabulary.bos is not None and ids[:1] == [vocabulary.bos]
        if self.server_adds_bos:
            if not starts_with_bos:
                raise UserError(
                    "the server puts a beginning-of-sequence token before every text, and this prompt has none"
                )
            ids = ids[1:]
        text = vocabulary.decode(ids)
        if vocabulary.encode(text) != ids:
            raise UserError(
                "the prompt does not survive as text: encoded again it is other tokens; use a server that takes ids"
            )
        return text

    def read(self, request: Request, raw: bytes) -> Reading:
        """Check one answer against its request; raises :class:`BadAnswer`."""
        answer = parse_object(raw)
        choice = only_choice(answer)
        text = choice.get("text")
        if not isinstance(text, str):
            raise BadAnswer(f"the choice's text is {show_short(text)}, expected a string")
        finish = finish_reason(choice)
        self._check_prompt(request, answer, choice)
        ids = self._sampled_ids(request, choice, text, finish)
        counted = usage_count(answer, "completion_tokens")
        drifted = counted is not None and counted != len(ids)
        if drifted and not self.retokenise:
            raise BadAnswer(f"counts {counted} new tokens and returns {len(ids)}")
        if not self.retokenise:
            self._check_length(request, ids, finish)
            self._check_stop(request, choice, ids, finish)
        generation = Generation(
            key=request.key,
            token_ids=tuple(ids),
            text=text if self.vocabulary is None else self.vocabulary.decode(ids[:-1] if finish == "stop" else ids),
            finish=finish,
            logprobs=sampled_logprobs(choice, len(ids)) if self.logprobs and not self.retokenise else None,
        )
        return Reading(generation=generation, prompt_tokens=len(request.prompt_ids), drifted=drifted)

    def _refuse_unsupported(self, request: Request) -> None:
        params = request.params
        for name, used in (("top_k", params.top_k > 0), ("top_p", params.top_p < 1)):
            if used and (name not in self.truncation or (name == "top_k" and self.dialect == "plain")):
                raise UserError(
                    f"the endpoint does not honour {name}, and the request sets it to {getattr(params, name)}"
                )

    def _vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise UserError("text prompts and stop strings need the model's tokenizer: set the engine option tokenizer")
        return self.vocabulary

    def _check_prompt(self, request: Request, answer: dict[str, Any], choice: dict[str, Any]) -> None:
        """The server must have read exactly the prompt's tokens: no second BOS, nothing cut off."""
        expected = len(request.prompt_ids)
        seen = choice.get("prompt_token_ids")
        if seen is not None and seen != list(request.prompt_ids):
            raise BadAnswer("the server read other prompt tokens than it was sent")
        counted = usage_count(answer, "prompt_tokens")
        if counted is None and self.prompts == "text":
            raise BadAnswer("no usage.prompt_tokens, so that a doubled BOS could not be noticed")
        if counted is not None and counted != expected:
            raise BadAnswer(f"the server read {counted} prompt tokens instead of {expected}")

    def _sampled_ids(self, request: Request, choice: dict[str, Any], text: str, finish: str) -> list[int]:
        ids = returned_ids(choice)
        if ids is None:
            if not self.retokenise:
                raise BadAnswer("no token ids (neither token_ids nor logprobs with token_id:N)")
            return self._made_ids(request, choice, text, finish)
        limit = None if self.vocabulary is None else self.vocabulary.size
        outside = next((i for i in ids if i < 0 or (limit is not None and i >= limit)), None)
        if outside is not None:
            raise BadAnswer(f"token id {outside} is outside the vocabulary (0 to {limit - 1 if limit else '?'})")
        return ids

    def _made_ids(self, request: Request, choice: dict[str, Any], text: str, finish: str) -> list[int]:
        """Ids made from the text, with the token that must have ended it: the user allowed it, and is told."""
        vocabulary = self._vocabulary()
        ids = vocabulary.encode(text)
        if finish == "stop":
            # vLLM names the stop string that was met; without a name it was the model's own end.
            named = [i for i in request.params.stop_token_ids if vocabulary.decode([i]) == choice.get("stop_reason")]
            ends = [*named, *([] if vocabulary.eos is None else [vocabulary.eos]), *request.params.stop_token_ids]
            if not ends:
                raise BadAnswer("finish_reason is stop, and neither the request nor the tokenizer names a stop token")
            ids.append(ends[0])
        if not ids:
            raise BadAnswer("an empty text that was cut at the length limit")
        return ids

    def _check_length(self, request: Request, ids: list[int], finish: str) -> None:
        most = request.params.max_new_tokens
        if not 1 <= len(ids) <= most:
            raise BadAnswer(f"{len(ids)} tokens, expected 1 to {most}")
        # Shorter than asked for only where the served context ends; anything else is a limit of the server's own.
        full = self.context is not None and len(request.prompt_ids) + len(ids) >= self.context - 1
        if finish == "length" and len(ids) < most and not full:
            raise BadAnswer(f"finish_reason is length after {len(ids)} of {most} tokens")

    def _check_stop(self, request: Request, choice: dict[str, Any], ids: list[int], finish: str) -> None:
        """A finished response ends with its stop token, and none comes earlier."""
        own = None if self.vocabulary is None else self.vocabulary.eos
        ends = {*request.params.stop_token_ids, *([] if own is None else [own])}
        if not ends.isdisjoint(ids[:-1]):
            raise BadAnswer(f"went on after the stop token {next(i for i in ids if i in ends)}")
        reason = choice.get("stop_reason")
        if type(reason) is int:
            ends.add(reason)  # an end-of-sequence token of the model's generation config
        if finish == "stop" and self.vocabulary is not None and ids[-1] not in ends:
            raise BadAnswer(f"finish_reason is stop, and the last token {ids[-1]} is no stop token")
        if finish == "length" and ids[-1] in ends:
            raise BadAnswer(f"ends with the stop token {ids[-1]}, and finish_reason is length")


def sent_seed(seed: int, bits: int) -> int:
    """The seed itself where the server can hold it, else a smaller one that follows from it."""
    return seed if 0 <= seed < 2**bits else seed % (2**bits - 1)


def finish_reason(choice: dict[str, Any]) -> Literal["stop", "length"]:
    """Why the response ended; anything else (aborted, filtered, still running) is no response."""
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"finish_reason is {show_short(reason)}, expected 'stop' or 'length'")
    return reason


def returned_ids(choice: dict[str, Any]) -> list[int] | None:
    """The sampled ids from ``token_ids`` or from ``logprobs.tokens`` in the form token_id:N; ``None`` if there are none."""
    direct, spelled = choice.get("token_ids"), _spelled_ids(choice)
    if direct is None:
        return spelled
    if not isinstance(direct, list) or any(type(i) is not int for i in direct):
        raise BadAnswer(f"token_ids is {show_short(direct)}, expected a list of integers")
    if spelled is not None and spelled != direct:
        raise BadAnswer("token_ids and logprobs name different tokens")
    return direct


def _spelled_ids(choice: dict[str, Any]) -> list[int] | None:
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t.startswith(_TOKEN_ID) for t in tokens):
        return None
    numbers = [t.removeprefix(_TOKEN_ID) for t in tokens]
    if not tokens or not all(n.isdecimal() for n in numbers):
        return None
    return [int(n) for n in numbers]


def sampled_logprobs(choice: dict[str, Any], num_tokens: int) -> tuple[float, ...]:
    """One finite log-probability per sampled token."""
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) != num_tokens:
        found = "none" if not isinstance(values, list) else str(len(values))
        raise BadAnswer(f"{found} log-probabilities for {num_tokens} tokens")
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value) or value > _LARGEST_LOGPROB:
            raise BadAnswer(f"log-probability {show_short(value)}, expected a finite number of at most 0")
    return tuple(min(0.0, float(value)) for value in values)
