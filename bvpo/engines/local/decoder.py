"""Continuous batching over one ``transformers`` model: prompts are computed once, their samples decode side by side.

In: the model, the limits of a batch, and rows (a request each) that are admitted with their computed prompt. Out of every
step: the rows that finished, and those that had to leave because the cache budget was reached (they resume later where
they stopped). Finished rows leave at once and others may take their place. It does not decide who is admitted when, does
not touch text, and does not load models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bvpo.engines.base import Request
from bvpo.engines.local.noise import noise_key
from bvpo.engines.local.sampling import RowParams, sample_tokens
from bvpo.engines.local.slots import POSITION_MULTIPLE, SlotCache, layer_windows, prompt_states, round_up

# A row is admitted only with room for this many tokens, so that it is not sent away again at once.
_HEADROOM = 2 * POSITION_MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """``max_rows`` samples and ``max_tokens`` cache positions (rows times allocated length) at a time.

    Prompts are computed in pieces of ``prefill_chunk`` tokens. Smaller batches than ``min_rows`` are padded to it, see
    :meth:`padded`.
    """

    max_rows: int
    max_tokens: int
    prefill_chunk: int
    min_rows: int

    def padded(self, num_rows: int) -> int:
        """How many rows the model is run on, unused ones included, so that a row is rounded as in any other batch.

        On x86 CPUs matrix kernels change below about 16 rows, and element-wise ones treat the last odd half of a vector
        apart. With this padding a float32 row comes out bit for bit the same from batches of any size (one thread, MKL).
        """
        return max(num_rows + num_rows % 2, self.min_rows)


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A request in progress; ``limit`` is its number of new tokens, ``stop_ids`` what ends it."""

    request: Request
    limit: int
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        """Everything that comes before the next token."""
        return (*self.request.prompt_ids, *self.token_ids)

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.stop_ids

    @property
    def broken(self) -> bool:
        """The model gave no usable distribution for the last token (NaN or infinite logits)."""
        return bool(self.logprobs) and not self.logprobs[-1] > float("-inf")

    @property
    def finished(self) -> bool:
        return self.stopped or self.broken or len(self.token_ids) >= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedPrompt:
    """Keys and values of ``num_tokens`` tokens and the logits ``[1, V]`` of the next one."""

    states: list[tuple[Tensor, Tensor]]
    logits: Tensor
    num_tokens: int


class Decoder:
    """The rows of one batch, in slots 0 to ``len(rows) - 1`` of the cache."""

    def __init__(self, model: Any, limits: BatchLimits) -> None:
        self.model = model
        self.limits = limits
        self.rows: list[Row] = []
        self.cache = SlotCache(layer_windows(model.config))
        self.table = _RowTable(limits.padded(limits.max_rows), model.device)
        self._prefill_options = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}

    @torch.inference_mode()
    def compute_prompt(self, ids: Sequence[int]) -> ComputedPrompt:
        """Run the model over one prompt alone, so that its states never depend on what else is in flight."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        input_ids = torch.tensor([ids], device=self.model.device)
        logits = None
        for piece in input_ids.split(self.limits.prefill_chunk, dim=1):
            output = self.model(input_ids=piece, past_key_values=cache, use_cache=True, **self._prefill_options)
            logits = output.logits[:, -1]
        assert logits is not None
        return ComputedPrompt(states=prompt_states(cache), logits=logits, num_tokens=len(ids))

    def room_for(self, row: Row) -> int:
        """How many rows like this one could be admitted now."""
        return min(self.limits.max_rows, self.limits.max_tokens // self._length_with(row)) - len(self.rows)

    def _length_with(self, row: Row) -> int:
        """Positions per slot that a batch with this row needs for a while."""
        return round_up(max(self._longest(), row.length) + min(_HEADROOM, row.limit - len(row.token_ids)))

    def _longest(self) -> int:
        return max((row.length for row in self.rows), default=0)

    @torch.inference_mode()
    def admit(self, prompt: ComputedPrompt, rows: Sequence[Row]) -> list[Row]:
        """Sample the next token of rows that continue ``prompt`` and give slots to those that go on; returns the others."""
        first, length = len(self.rows), max(self._length_with(row) for row in rows)
        self.table.fill(first, rows, prompt.num_tokens)
        self._sample(prompt.logits.expand(len(rows), -1), rows, slice(first, first + len(rows)))
        surviving = [i for i, row in enumerate(rows) if not row.finished]
        self.table.move([first + i for i in surviving], list(range(first, first + len(surviving))))
        self.table.clear_from(first + len(surviving))
        if surviving:
            self._reserve(first + len(surviving), length, length, prompt.states)
            self.cache.load(prompt.states, prompt.num_tokens, slice(first, first + len(surviving)))
            self.rows.extend(rows[i] for i in surviving)
        return [row for row in rows if row.finished]

    @torch.inference_mode()
    def step(self) -> tuple[list[Row], list[Row]]:
        """One token for every row; returns the finished and the evicted rows, neither of which is in the batch any more."""
        evicted = self._grow()
        self._sample(self.next_logits(), self.rows, slice(0, len(self.rows)))
        return self._leave([i for i, row in enumerate(self.rows) if row.finished]), evicted

    def next_logits(self) -> Tensor:
        """Feed each row's last token to the model; returns the logits ``[B, V]`` of the next ones."""
        padded = min(self.limits.padded(len(self.rows)), self.cache.num_slots)
        positions_B = self.table.positions[:padded]
        self.cache.begin_step(positions_B, self._longest() - 1)
        output = self.model(
            input_ids=self.table.last_tokens[:padded, None],
            attention_mask=decode_mask(self.model.config, self.cache, positions_B, self.model.dtype),
            position_ids=positions_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[: len(self.rows), -1]

    def _sample(self, logits_BV: Tensor, rows: Sequence[Row], slots: slice) -> None:
        """Draw one token for each of ``rows``, which sit in ``slots`` of the table."""
        table = self.table
        truncated = any(row.request.params.top_k or row.request.params.top_p < 1 for row in rows)
        tokens_B, logprobs_B = sample_tokens(
            logits_BV, table.keys[slots], table.steps[slots], table.params.select(slots), truncated
        )
        table.advance(slots, tokens_B)
        # One transfer to the host per step: float64 holds token ids exactly.
        tokens, logprobs = torch.stack([tokens_B.double(), logprobs_B.double()]).tolist()
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.token_ids.append(int(token))
            row.logprobs.append(logprob)

    def _leave(self, slots: list[int]) -> list[Row]:
        """Take the rows in ``slots`` out; the last rows move into their places."""
        leaving = [self.rows[i] for i in slots]
        remaining = len(self.rows) - len(slots)
        holes = [i for i in slots if i < remaining]
        gone = set(slots)
        movers = [i for i in range(remaining, len(self.rows)) if i not in gone]
        if movers:
            self.cache.move(*(torch.tensor(i, device=self.model.device) for i in (movers, holes)))
            self.table.move(movers, holes)
        for source, target in zip(movers, holes, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[remaining:]
        self.table.clear_from(remaining)
        return leaving

    def _grow(self) -> list[Row]:
        """Make room for the next token of every row; evicts the rows with the least to lose when the budget is reached."""
        if self._longest() <= self.cache.length:
            return []
        fitting = max(1, self.limits.max_tokens // round_up(self._longest()))
        by_loss = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i].token_ids))
        evicted = self._leave(sorted(by_loss[: max(0, len(self.rows) - fitting)]))
        # Half as much again, so that a long response is copied a few times only; but not beyond what can be used.
        ceiling = max(len(row.request.prompt_ids) + row.limit for row in self.rows)
        self._reserve(len(self.rows), self._longest(), min(ceiling, self.cache.length * 3 // 2), self.cache.states())
        return evicted

    def _reserve(self, num_rows: int, length: int, ample: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See that ``num_rows`` slots of ``length`` positions are allocated; if not, allocate ``ample`` if it fits."""
        cache, budget = self.cache, self.limits.max_tokens
        if num_rows <= cache.num_slots and length <= cache.length:
            return
        fits = budget // num_rows // POSITION_MULTIPLE * POSITION_MULTIPLE
        length = max(round_up(length), min(round_up(max(ample, cache.length)), fits))
        wanted = self.limits.padded(max(num_rows, min(2 * cache.num_slots, self.limits.max_rows)))
        cache.resize(like, max(num_rows, min(wanted, budget // length)), length, len(self.rows))


class _RowTable:
    """What the device knows of each row: noise key, parameters, the last token and its position, the next step."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.keys = torch.zeros(num_rows, 2, dtype=torch.long, device=device)
        self.steps = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.steps)
        self.last_tokens = torch.zeros_like(self.steps)
        self.params = RowParams(
            temperature_B=torch.zeros(num_rows, device=device),
            top_k_B=torch.zeros_like(self.steps),
            top_p_B=torch.ones(num_rows, device=device),
        )

    def _columns(self) -> list[Tensor]:
        params = self.params
        per_sample = [params.temperature_B, params.top_k_B, params.top_p_B]
        return [self.keys, self.steps, self.positions, self.last_tokens, *per_sample]

    def fill(self, first: int, rows: Sequence[Row], num_tokens: int) -> None:
        """Write rows that have ``num_tokens`` tokens so far (the last token comes with :meth:`advance`)."""
        device = self.steps.device
        params = [row.request.params for row in rows]
        values = [
            [noise_key(row.request.seed) for row in rows],
            [len(row.token_ids) for row in rows],
            [num_tokens - 1] * len(rows),
            [0] * len(rows),
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
        ]
        for column, value in zip(self._columns(), values, strict=True):
            column[first : first + len(rows)] = torch.tensor(value, dtype=column.dtype, device=device)

    def advance(self, slots: slice, tokens_B: Tensor) -> None:
        self.last_tokens[slots] = tokens_B
        self.steps[slots] += 1
        self.positions[slots] += 1

    def clear_from(self, first: int) -> None:
        """Let the unused slots, which pad small batches, point at a position that always exists."""
        self.positions[first:] = 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        if sources == targets:
            return
        source, target = (torch.tensor(i, device=self.steps.device) for i in (sources, targets))
        for column in self._columns():
            column[target] = column[source]


def decode_mask(config: Any, cache: SlotCache, positions_B: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The attention mask of one step in the form the model takes it: one, or one per layer type, boolean or additive."""
    masks: dict[str, Tensor] = {}
    for layer in cache.slot_layers:
        kind = "sliding_attention" if layer.is_sliding else "full_attention"
        if kind not in masks:
            allowed = layer.mask(positions_B)
            if config._attn_implementation == "eager":
                masks[kind] = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
            else:
                masks[kind] = allowed
    # The rule of transformers' own create_masks_for_generate.
    if getattr(config.get_text_config(decoder=True), "layer_types", None) is not None:
        return masks
    assert len(masks) == 1
    return next(iter(masks.values()))


def _accepts(model: Any, option: str) -> bool:
    return option in inspect.signature(model.forward).parameters
