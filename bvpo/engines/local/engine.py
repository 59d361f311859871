"""The embedded engine: samples responses from a ``transformers`` model in this process, on CPU or one GPU.

In: requests of token ids. Out: generations as they finish. Requests with the same prompt share its computation, samples
decode together in one changing batch, and each draws its randomness from its own seed, so that neither the batch nor its
order decides what is sampled. It refuses models whose state is not a key/value cache, and does not spread a model over
several devices: for that, serve the model and use an HTTP engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import torch

from bvpo.engines.base import Caps, Generation, Request
from bvpo.engines.local.decoder import BatchLimits, ComputedPrompt, Decoder, Row
from bvpo.engines.local.model_check import cache_bytes_per_token, check_model
from bvpo.engines.local.sampling import SAMPLER
from bvpo.engines.local.slots import POSITION_MULTIPLE, layer_windows, round_up
from bvpo.models import (
    ModelPlan,
    ModelSource,
    context_length,
    hash_parameters,
    identify,
    load_model,
    plan_model,
    versions,
)
from bvpo.strict import UserError

# Memory for keys and values when max_batch_tokens is not given.
_CACHE_BYTES_CPU = 2 << 30
_CACHE_SHARE_OF_FREE_GPU = 0.6
# Requests looked at ahead of need, in full batches: samples of one prompt within this window share its computation.
_LOOKAHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How much the engine does at a time; none of it changes a sample beyond rounding.

    ``max_batch_tokens`` counts cache positions (rows times the allocated length of the longest); ``None`` takes what fits
    into 2 GiB on CPU and into 60 % of the free memory on a GPU.
    """

    max_batch_rows: int = 64
    max_batch_tokens: int | None = None
    prefill_chunk: int = 2048
    min_batch_rows: int = 16

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"embedded engine: field {name!r}: got {value!r}, expected an integer of at least 1")


def create(
    *,
    model: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    max_batch_rows: int = 64,
    max_batch_tokens: int | None = None,
    prefill_chunk: int = 2048,
    min_batch_rows: int = 16,
) -> EmbeddedEngine:
    """An engine for the model at ``model`` (a folder or Hub id); weights are loaded when they are first needed."""
    source = ModelSource(
        path=model,
        revision=revision,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        device=device,
    )
    batch = BatchSettings(
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
        prefill_chunk=prefill_chunk,
        min_batch_rows=min_batch_rows,
    )
    plan = plan_model(source)
    layer_windows(plan.config)  # refuses unsupported models before their weights are read
    return EmbeddedEngine(plan, cache(lambda: identify(plan)), None, batch)


def from_model(model: Any, tokenizer: Any, batch: BatchSettings | None = None) -> EmbeddedEngine:
    """An engine around a model in memory; every call of ``fingerprint`` hashes its parameters as they are then."""
    plan = ModelPlan(
        source=ModelSource(path=str(model.config._name_or_path)),
        config=model.config,
        device=model.device,
        dtype=model.dtype,
    )
    return EmbeddedEngine(
        plan, lambda: {"parameters": hash_parameters(model)}, (model.eval(), tokenizer), batch or BatchSettings()
    )


class EmbeddedEngine:
    """See the module's docstring; build one with :func:`create` or :func:`from_model`."""

    def __init__(
        self,
        plan: ModelPlan,
        identify_model: Callable[[], dict[str, Any]],
        loaded: tuple[Any, Any] | None,
        batch: BatchSettings,
    ) -> None:
        self._plan = plan
        self._identify = identify_model
        self._batch = batch
        self._loaded = loaded
        self._checked = False
        self._closed = False

    @property
    def caps(self) -> Caps:
        # Half precision rounds logits coarsely enough for another batch size to change samples; on GPUs the kernels change
        # with the batch size too, and what that does to float32 has not been measured.
        exact = self._plan.dtype in (torch.float32, torch.float64) and self._plan.device.type == "cpu"
        return Caps(token_prompts=True, seed=True, logprobs=True, batch_invariant=exact)

    def fingerprint(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "engine": "embedded",
            **self._identify(),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": plan.device.type,
            "sampler": SAMPLER,
            **versions(),
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        model, tokenizer = self._model()
        limits = self._limits(model)
        queue = _Queue(requests, _Admission(model, tokenizer, limits), _LOOKAHEAD * limits.max_rows)
        decoder = Decoder(model, limits)
        while True:
            for row in _admit(queue, decoder):
                yield _generation(row, tokenizer)
            yield from queue.take_refused()
            if not decoder.rows:
                return
            finished, evicted = decoder.step()
            queue.put_back(evicted)
            for row in finished:
                yield _generation(row, tokenizer)

    def close(self) -> None:
        self._loaded, self._closed = None, True
        if self._plan.device.type == "cuda":
            torch.cuda.empty_cache()

    def _model(self) -> tuple[Any, Any]:
        assert not self._closed, "the engine was closed"
        if self._loaded is None:
            self._loaded = load_model(self._plan)
        if not self._checked:
            check_model(self._loaded[0])
            self._checked = True
        return self._loaded

    def _limits(self, model: Any) -> BatchLimits:
        batch = self._batch
        return BatchLimits(
            max_rows=batch.max_batch_rows,
            max_tokens=batch.max_batch_tokens or self._affordable_tokens(model),
            prefill_chunk=batch.prefill_chunk,
            min_rows=batch.min_batch_rows,
        )

    def _affordable_tokens(self, model: Any) -> int:
        """Cache positions that fit into the memory set aside for them."""
        memory = _CACHE_BYTES_CPU
        if model.device.type == "cuda":
            memory = int(torch.cuda.mem_get_info(model.device)[0] * _CACHE_SHARE_OF_FREE_GPU)
        return max(POSITION_MULTIPLE, memory // cache_bytes_per_token(model))


class _Admission:
    """Turns requests into rows, or says in one line why not."""

    def __init__(self, model: Any, tokenizer: Any, limits: BatchLimits) -> None:
        self._eos_ids = stop_token_ids(model, tokenizer)
        self._vocab = model.config.get_text_config(decoder=True).vocab_size
        self._context = context_length(model.config)
        self._max_tokens = limits.max_tokens

    def row(self, request: Request) -> Row | str:
        ids, limit = request.prompt_ids, request.params.max_new_tokens
        if not ids:
            return "prompt_ids: got no tokens, expected at least one"
        outside = next((i for i in ids if not 0 <= i < self._vocab), None)
        if outside is not None:
            return f"prompt_ids: got token {outside}, expected ids from 0 to {self._vocab - 1}"
        if self._context is not None:
            limit = min(limit, self._context - len(ids))
            if limit < 1:
                return f"prompt_ids: got {len(ids)} tokens, expected fewer than the model's {self._context}"
        if round_up(len(ids) + limit) > self._max_tokens:
            return (
                f"prompt and response may take {len(ids) + limit} tokens, and the batch budget holds {self._max_tokens}: "
                "raise max_batch_tokens or lower max_new_tokens"
            )
        return Row(request=request, limit=limit, stop_ids=self._eos_ids.union(request.params.stop_token_ids))


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The model's own end-of-sequence tokens: those of its generation configuration and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(ids if own is None else [*ids, own])


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that continue the same tokens, and those tokens' computation once it is there."""

    ids: tuple[int, ...]
    rows: deque[Row]
    prompt: ComputedPrompt | None = None


class _Queue:
    """Requests that wait, grouped by prompt within a window of ``lookahead``; rows that were sent away go first."""

    def __init__(self, requests: Iterable[Request], admission: _Admission, lookahead: int) -> None:
        self._requests = iter(requests)
        self._admission = admission
        self._lookahead = lookahead
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._returned: deque[_Group] = deque()
        self._num_waiting = 0
        self._refused: list[Generation] = []

    def head(self) -> _Group | None:
        """The group to admit next; its prompt stays computed until the last of its rows is taken."""
        self._pull()
        if self._returned:
            return self._returned[0]
        return next(iter(self._groups.values()), None)

    def take(self, group: _Group, num: int) -> list[Row]:
        """Remove up to ``num`` rows from the head group."""
        taken = [group.rows.popleft() for _ in range(min(num, len(group.rows)))]
        returned = bool(self._returned) and self._returned[0] is group
        if not returned:
            self._num_waiting -= len(taken)
        if not group.rows:
            if returned:
                self._returned.popleft()
            else:
                del self._groups[group.ids]
        return taken

    def put_back(self, rows: list[Row]) -> None:
        self._returned.extend(_Group(row.ids, deque([row])) for row in rows)

    def take_refused(self) -> list[Generation]:
        refused, self._refused = self._refused, []
        return refused

    def _pull(self) -> None:
        for request in islice(self._requests, max(0, self._lookahead - self._num_waiting)):
            row = self._admission.row(request)
            if isinstance(row, str):
                self._refused.append(Generation.failed(request.key, row))
                continue
            self._groups.setdefault(request.prompt_ids, _Group(request.prompt_ids, deque())).rows.append(row)
            self._num_waiting += 1


def _admit(queue: _Queue, decoder: Decoder) -> Iterator[Row]:
    """Fill the batch from the queue; yields the rows that are finished with their first token."""
    while (group := queue.head()) is not None:
        room = decoder.room_for(max(group.rows, key=lambda row: row.limit))
        if room < 1:
            return
        if group.prompt is None:
            group.prompt = decoder.compute_prompt(group.ids)
        yield from decoder.admit(group.prompt, queue.take(group, room))


def _generation(row: Row, tokenizer: Any) -> Generation:
    if row.broken:
        return Generation.failed(
            row.request.key, f"the model's logits are not finite at new token {len(row.token_ids)}"
        )
    shown = row.token_ids[:-1] if row.stopped else row.token_ids
    return Generation(
        key=row.request.key,
        token_ids=tuple(row.token_ids),
        # Special tokens are kept: in some reasoning formats they are the markers of the trace.
        text=tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        finish="stop" if row.stopped else "length",
        logprobs=tuple(row.logprobs),
    )
