"""How good the tiny model is: accuracy, reward and trace lengths in both modes, through the embedded sampling engine.

In: a saved model and prompts. Out: plain numbers with their intervals and n. One sample per prompt; its seed follows from
the prompt, so the same weights give the same numbers. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bvpo.engines.base import Engine, Request, Sampling, create_engine
from bvpo.formats import answer_offset, decode_completion, end_ids, get_format, view_prompt
from bvpo.keys import hash_int
from bvpo.records import Message, View
from bvpo.stats import Interval, mean_interval, share_interval
from bvpo.tiny.reward import MALFORMED, correct, reward
from bvpo.tiny.sft import FORMAT
from bvpo.tiny.tasks import Ask

_MOST_TOKENS = 256
_ROWS = 256  # more than the engine's default: rows of this model are small


@dataclass(frozen=True, slots=True)
class Answered:
    """One sample: whether its answer is right, its reward, and the length of its trace (``None``: never closed)."""

    correct: float
    reward: float
    trace_tokens: int | None


def measure_base(folder: Path, prompts: Sequence[Ask], benchmark: Sequence[Ask]) -> dict[str, Any]:
    """All numbers of ``tiny.json``: prompts at the temperature of sampling, the benchmark at that of evaluation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = create_engine("embedded", {"model": str(folder), "max_batch_rows": _ROWS})
    try:
        found = {}
        for name, asks, temperature in (("prompts", prompts, 0.8), ("benchmark", benchmark, 0.6)):
            views: tuple[tuple[str, View], ...] = (("thinking", "trace"), ("nothinking", "empty"))
            modes = {mode: _summary(answer(engine, tokenizer, asks, view, temperature)) for mode, view in views}
            found[name] = {"temperature": temperature, **modes}
        return found
    finally:
        engine.close()


def answer(engine: Engine, tokenizer: Any, asks: Sequence[Ask], view: View, temperature: float) -> list[Answered]:
    """One sample per prompt, in the order of the prompts."""
    fmt = get_format(FORMAT)
    ends = tuple(sorted(end_ids(tokenizer, fmt)))
    sampling = Sampling(max_new_tokens=_MOST_TOKENS, temperature=temperature, stop_token_ids=ends)
    requests = [
        Request(
            key=str(index),
            prompt_ids=view_prompt(tokenizer, fmt, [Message(role="user", content=ask.text)], view).prompt_ids,
            seed=hash_int(f"{view} {ask.text}", "bvpo-tiny-measure") >> 11,
            params=sampling,
        )
        for index, ask in enumerate(asks)
    ]
    found: dict[int, Answered] = {}
    for generation in engine.generate(requests):
        ask, ids = asks[int(generation.key)], generation.token_ids
        text = fmt.split(decode_completion(tokenizer, fmt, ids), view).answer
        messages = [{"role": "user", "content": ask.text}]
        offset = answer_offset(tokenizer, fmt, view, ids)
        found[int(generation.key)] = Answered(
            correct=0.0 if text is None else correct(messages, text),
            reward=MALFORMED if text is None else reward(messages, text),
            trace_tokens=offset - 1 if offset and view == "trace" else None,
        )
    return [found[index] for index in range(len(asks))]


def _summary(answered: Sequence[Answered]) -> dict[str, Any]:
    traces = np.array([a.trace_tokens for a in answered if a.trace_tokens is not None], dtype=np.float64)
    found: dict[str, Any] = {
        "accuracy": _plain(share_interval(np.array([a.correct for a in answered]), len(answered))),
        "reward": _plain(mean_interval(np.array([a.reward for a in answered]))),
    }
    if len(traces):
        spread = round(float(traces.std()), 2)
        found["trace_tokens"] = {"mean": round(float(traces.mean()), 2), "sd": spread, "n": len(traces)}
    return found


def _plain(interval: Interval) -> dict[str, Any]:
    numbers = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {**{k: None if v is None else round(v, 4) for k, v in numbers.items()}, "n": interval.num_prompts}
