"""One tiny model behind test servers, and engines that talk to them without long waits."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from models_fixtures import tiny_model, tiny_tokenizer
from servers.completions_server import CompletionsServer

from bvpo.engines.base import Generation, Request, Sampling
from bvpo.engines.http.engine import OpenAIEngine, create
from bvpo.engines.local.engine import EmbeddedEngine, from_model

QUICK: dict[str, Any] = {"retry_base_s": 0.01, "retry_cap_s": 0.5, "timeout_s": 60.0, "connect_timeout_s": 30.0}


@cache
def tiny_engine(seed: int = 0) -> EmbeddedEngine:
    return from_model(tiny_model(seed=seed, layers=1), tiny_tokenizer())


@cache
def tokenizer_folder() -> str:
    folder = Path(mkdtemp(prefix="bvpo-tokenizer-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


_MEMORIES: dict[int, dict[Any, Generation]] = {}


def server(*traits: str, seed: int = 0, fresh: bool = False, **options: Any) -> CompletionsServer:
    """A server over the tiny model of this seed; ``fresh`` draws every sample anew, which takes longer."""
    memory = None if fresh else _MEMORIES.setdefault(seed, {})
    return CompletionsServer(tiny_engine(seed), tiny_tokenizer(), traits=traits, memory=memory, **options)


@contextmanager
def connected(servers: Sequence[CompletionsServer], **options: Any) -> Iterator[OpenAIEngine]:
    """An engine over these servers, with their tokenizer; all of it is closed at the end."""
    settings = {"endpoints": [s.url for s in servers], "tokenizer": tokenizer_folder()} | QUICK | options
    engine = create(**settings)
    try:
        yield engine
    finally:
        engine.close()
        for each in servers:
            each.stop()


def requests(count: int = 8, *, tokens: int = 12, **sampling: Any) -> list[Request]:
    """Requests over three prompts that start with the BOS token."""
    bos = tiny_tokenizer().bos_token_id
    prompts = [(bos, *range(start, start + 6)) for start in (20, 40, 60)]
    params = Sampling(**({"max_new_tokens": tokens, "temperature": 1.0} | sampling))
    return [Request(key=f"k{i}", prompt_ids=prompts[i % 3], seed=10**12 + 7 * i, params=params) for i in range(count)]


def by_key(generations: Sequence[Generation]) -> dict[str, Generation]:
    found = {g.key: g for g in generations}
    assert len(found) == len(generations), "a request was answered twice"
    return found
