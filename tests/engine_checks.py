"""What every engine must do, whatever is inside it: ``check_engine`` fails where one breaks the contract of
``bvpo/engines/base.py``. Engines whose ``caps`` promise less are held to what they promise."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

from bvpo.engines.base import Engine, Generation, Request


def draw(engine: Engine, requests: Sequence[Request]) -> dict[str, Generation]:
    """One generation per request, or a failure."""
    found: dict[str, Generation] = {}
    for generation in engine.generate(iter(requests)):
        assert generation.key not in found, f"{generation.key} was answered twice"
        found[generation.key] = generation
    assert found.keys() == {request.key for request in requests}, "not one generation per request"
    return found


def check_engine(engine: Engine, requests: Sequence[Request], *, impossible: Request) -> None:
    """``requests`` differ in their seeds and are long enough to differ; ``impossible`` cannot be served."""
    found = draw(engine, requests)
    for request in requests:
        check_generation(engine, request, found[request.key])
    assert len({found[request.key].token_ids for request in requests}) > 1, "all seeds give one sample"

    first, *others = [request.key for request in requests]
    if engine.caps.seed:
        assert same(draw(engine, requests[:1])[first], found[first]), "another sample when drawn alone"
    if engine.caps.batch_invariant:
        shuffled = random.Random(0).sample(list(requests), len(requests))
        again = draw(engine, shuffled)
        assert all(same(again[key], found[key]) for key in others), "another sample in other company"

    short = [replace(request, params=replace(request.params, max_new_tokens=1)) for request in requests]
    assert all(len(generation.token_ids) == 1 for generation in draw(engine, short).values()), "the limit is not kept"
    greedy = [replace(request, params=replace(request.params, temperature=0.0)) for request in requests]
    by_prompt = {(request.prompt_ids, draw(engine, [request])[request.key].token_ids) for request in greedy[:4]}
    assert len(by_prompt) == len({request.prompt_ids for request in greedy[:4]}), "greedy, and yet several samples"

    mixed = draw(engine, [impossible, requests[0]])
    assert mixed[impossible.key].finish == "error" and mixed[first].finish != "error", "a failure is not alone"
    check_generation(engine, impossible, mixed[impossible.key])

    fingerprint = engine.fingerprint()
    assert fingerprint == engine.fingerprint() == json.loads(json.dumps(fingerprint)), "not stable JSON"
    assert {"content", "model", "parameters"} & fingerprint.keys(), "the fingerprint names no weights"
    stop_early(engine, requests)


def check_generation(engine: Engine, request: Request, generation: Generation) -> None:
    ids, params = generation.token_ids, request.params
    if generation.finish == "error":
        assert generation.error and "\n" not in generation.error and not ids and not generation.text
        return
    assert generation.error is None and 1 <= len(ids) <= params.max_new_tokens
    stops = set(params.stop_token_ids)
    assert not stops & set(ids[:-1]), "it went on after a stop token"
    assert generation.finish == "stop" or len(ids) == params.max_new_tokens or not stops & set(ids)
    assert not engine.caps.logprobs or generation.logprobs is not None
    if generation.logprobs is not None:
        assert len(generation.logprobs) == len(ids) and max(generation.logprobs) <= 0


def same(one: Generation, other: Generation) -> bool:
    """Token ids, text and ending exactly; log-probabilities up to the rounding of another batch."""
    if (one.token_ids, one.text, one.finish) != (other.token_ids, other.text, other.finish):
        return False
    pairs = zip(one.logprobs or (), other.logprobs or (), strict=True)
    return all(abs(a - b) <= 1e-4 for a, b in pairs)


def stop_early(engine: Engine, requests: Sequence[Request]) -> None:
    """Takes one generation and stops, as ctrl-C does: an engine must bear that, and be of use afterwards."""
    stream = engine.generate(iter(requests))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    draw(engine, requests[:1])
