"""[sample]: how responses are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from bvpo.config.ranges import FILLED, SHARE, Problems, Range, all_filled, at_least, each_once
from bvpo.web import ADDRESS, is_address

_ENGINE_OPTIONS_FROM_ELSEWHERE = {
    "endpoints": "sample.endpoints",
    "revision": "model.revision",
    "tokenizer": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "format": "model.format",
}


def _is_shard(text: str) -> bool:
    """Or nothing."""
    part, slash, parts = text.partition("/")
    numbers = part.isdecimal() and parts.isdecimal() and len(text) < 20
    return not text or (bool(slash) and numbers and int(part) < int(parts))


# Here, because a function inside an annotation cannot see the module's names.
_ADDRESSES = Range(lambda v: all(map(is_address, v)), f"for each server {ADDRESS}")
_SHARD = Range(_is_shard, "a part such as 0/4, from 0/4 to 3/4")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Sampling: which responses are drawn, with what engine, and which part of them by this process."""

    engine: Annotated[str, FILLED] = "embedded"
    """What generates: 'embedded' (transformers, in this process), 'openai' (compatible servers), 'vllm' (in process), or
    'ray' (one of these as actors on many machines)."""
    endpoints: Annotated[tuple[str, ...], _ADDRESSES] = ()
    """Addresses of the servers of engine 'openai', such as http://127.0.0.1:8000/v1; several share the work."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other option of the engine, by its own name, such as options.max_batch_rows = 32; see docs/sampling.md."""
    views: Annotated[tuple[Literal["trace", "empty"], ...], each_once("one or both of trace and empty, each once")] = (
        "trace",
        "empty",
    )
    """Which views are sampled; one may be added later."""
    num_samples: Annotated[int, at_least(1)] = 5
    """Samples per prompt and view, >= 1; more may be asked for later, and only those are drawn then."""
    temperature: Annotated[float, at_least(0)] = 0.8
    """Sampling temperature, >= 0; 0 takes the most probable token, so that all samples of a prompt are the same."""
    top_p: Annotated[float, SHARE] = 1.0
    """Share of the probability that nucleus sampling keeps, in (0, 1]; 1 keeps all."""
    top_k: Annotated[int, at_least(0)] = 0
    """Most probable tokens that are kept, >= 0; 0 keeps all."""
    max_new_tokens: Annotated[int, at_least(1)] = 4096
    """Longest response in tokens, >= 1; a longer one is cut, and a trace that is cut has no answer."""
    splits: Annotated[tuple[str, ...], all_filled("names of splits")] = ()
    """Splits of the prompts that are sampled; empty samples all."""
    shard: Annotated[str, _SHARD] = ""
    """'i/N' samples the i-th of N parts of the prompts (from 0), chosen by hash: one part per machine; empty samples all."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.engine == "openai" and not self.endpoints:
            found.append(("endpoints", "not set, but engine 'openai' needs the addresses of its servers"))
        if self.engine != "openai" and self.endpoints:
            found.append(("endpoints", f"set, but engine {self.engine!r} never reads it; set engine to 'openai'"))
        for key in self.options:
            # the one engine whose model has a name of its own: what the servers call it
            own = (
                "model.path" if key == "model" and self.engine != "openai" else _ENGINE_OPTIONS_FROM_ELSEWHERE.get(key)
            )
            if own:
                found.append((f"options.{key}", f"is set by bvpo itself; write {own} instead"))
        return found
