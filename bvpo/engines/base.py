"""What every text-generation engine takes and gives: requests of token ids in, one generation per request out.

A :class:`Request` holds prompt token ids, a seed and the sampling parameters of exactly one sample (there is no ``n``); an
:class:`Engine` yields a :class:`Generation` for each as soon as it is finished, in any order. Which engines exist is written
in :data:`ENGINES`; :func:`create_engine` imports one on demand. This module loads no torch and knows nothing of prompts,
views, formats or storage.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bvpo.records import Finish
from bvpo.strict import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a response is sampled.

    ``temperature`` 0 takes the most probable token; ``top_k`` 0 and ``top_p`` 1 switch the two truncations off. They apply
    in this order: temperature, top-k, top-p over what top-k left. A response ends after ``max_new_tokens`` tokens, or at
    one of the model's own end-of-sequence tokens or of ``stop_token_ids``, which is then its last token.
    """

    max_new_tokens: int
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "an integer of at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, "temperature", self.temperature, "a finite number of at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "an integer of at least 0 (0 = off)")
        _require(
            all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids of at least 0"
        )


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"sampling: field {field!r}: got {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to draw. ``key`` comes back on the generation; ``seed`` is any integer and alone decides the randomness."""

    key: str
    prompt_ids: tuple[int, ...]
    seed: int
    params: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What became of one request.

    ``finish`` is "stop" (``token_ids`` ends with the sampled stop token, ``text`` does not show it), "length", or "error"
    (``error`` says why in one line, and ``token_ids`` is empty). ``logprobs`` are natural logs under the untempered,
    untruncated model, one per token; ``None`` where the engine cannot give them.
    """

    key: str
    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[float, ...] | None = None
    error: str | None = None

    @classmethod
    def failed(cls, key: str, error: str) -> Generation:
        """The generation of a request that could not be served."""
        return cls(key=key, token_ids=(), text="", finish="error", error=error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What an engine can promise.

    ``token_prompts``: prompts are taken as token ids and never re-tokenised. ``seed``: the same request gives the same
    sample when it is sent alone. ``logprobs``: every sampled token comes with its log-probability. ``batch_invariant``: the
    same request gives the same sample whatever else is in flight.
    """

    token_prompts: bool
    seed: bool
    logprobs: bool
    batch_invariant: bool


@runtime_checkable
class Engine(Protocol):
    """Samples responses. Requests are pulled from the iterable ahead of need, so it must not wait for generations."""

    @property
    def caps(self) -> Caps: ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change whenever the samples of this engine may change."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield one generation per request, each as soon as it is finished, in any order."""
        ...

    def close(self) -> None:
        """Free what the engine holds (weights, connections); it cannot generate afterwards."""
        ...


# name -> "module:factory"; a factory takes keyword options only and returns an Engine.
ENGINES: dict[str, str] = {
    "embedded": "bvpo.engines.local.engine:create",
    "openai": "bvpo.engines.http.engine:create",
    "vllm": "bvpo.engines.vllm:create",
    "ray": "bvpo.engines.ray:create",
}


def create_engine(name: str, options: Mapping[str, Any]) -> Engine:
    """Build the engine registered under ``name``, importing its module now; options it does not take are refused."""
    if name not in ENGINES:
        raise UserError(f"engine: got {name!r}, expected one of {', '.join(sorted(ENGINES))}")
    module, _, attribute = ENGINES[name].partition(":")
    factory: Callable[..., Engine] = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(factory).parameters
    known = list(parameters)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"engine {name!r}: unknown option {option!r}{hint} (it takes: {', '.join(known)})")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"engine {name!r}: needs option {missing[0]!r}")
    return factory(**options)
