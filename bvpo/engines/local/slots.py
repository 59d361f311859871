"""A key/value cache of independent rows for decoding: each row has a slot and its own length.

It serves ``transformers`` models as their ``past_key_values`` for steps of one token per row. Rows are left-aligned (token
``j`` of a row lies at position ``j`` of its slot), so rows of any lengths share a batch, leave it and are replaced without
touching one another, and nothing is copied from step to step. Layers with a sliding window keep their last ``window``
tokens in a ring. Prompts are computed elsewhere, in an ordinary ``DynamicCache``, and copied in.

Legend: R slots, H key/value heads, D head dimension, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bvpo.strict import UserError

# Positions are allocated and attended to in multiples of this, so that shapes repeat from step to step.
POSITION_MULTIPLE = 64


class SlotLayer(CacheLayerMixin):
    """Keys and values ``[R, H, L, D]`` of one layer; ``window`` caps L and turns the positions into a ring."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.rows: Tensor = torch.empty(0, dtype=torch.long)
        self.places: Tensor = self.rows
        self.visible = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("slots are allocated by SlotCache.resize before any step")

    def resize(self, like: tuple[Tensor, Tensor], num_slots: int, length: int, kept_rows: int) -> None:
        """Allocate ``num_slots`` slots of ``length`` positions for states like those given; keep the first rows' content."""
        length = length if self.window is None else min(length, self.window)
        old = (self.keys, self.values)
        # Zeros rather than garbage: masked positions get weight 0, but 0 x NaN is NaN.
        new = [s.new_zeros(num_slots, s.shape[1], length, s.shape[3]) for s in like]
        for source, target in zip(old, new, strict=True):
            if source is not None and kept_rows:
                kept = min(source.shape[2], length)
                target[:kept_rows, :, :kept] = source[:kept_rows, :, :kept]
        self.keys, self.values = new
        self.is_initialized = True

    def load(self, states: tuple[Tensor, Tensor], num_tokens: int, slots: slice) -> None:
        """Copy the states ``[1, H, S, D]`` of the last S of ``num_tokens`` tokens into every slot of ``slots``.

        S is ``num_tokens``, or less where the prompt is longer than a window: then the slots are full rings.
        """
        for source, target in zip(states, self.buffers(), strict=True):
            stored = source.shape[2]
            if stored == num_tokens:
                target[slots, :, :num_tokens] = source
            else:
                assert self.window is not None and target.shape[2] == self.window
                places = torch.arange(num_tokens - stored, num_tokens, device=source.device) % self.window
                target[slots, :, places] = source

    def buffers(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def begin_step(self, rows: Tensor, positions_B: Tensor, longest: int) -> None:
        """Say where the next token of each row goes; ``longest`` is the largest position."""
        self.rows = rows
        self.places = positions_B if self.window is None else positions_B % self.window
        self.visible = min(self.buffers()[0].shape[2], round_up(longest + 1))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one token per row; returns views of everything the rows may attend to (the mask says what they do)."""
        num_rows = key_states.shape[0]
        keys, values = self.buffers()
        keys[self.rows, :, self.places] = key_states[:, :, 0]
        values[self.rows, :, self.places] = value_states[:, :, 0]
        return keys[:num_rows, :, : self.visible], values[:num_rows, :, : self.visible]

    def mask(self, positions_B: Tensor) -> Tensor:
        """Which positions each row attends to: bool ``[B, 1, 1, visible]``. A full ring is attended to entirely."""
        places = torch.arange(self.visible, device=positions_B.device)
        return (places <= positions_B[:, None])[:, None, None]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole slots."""
        for buffer in self.buffers():
            buffer[targets] = buffer[sources]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0

    def get_seq_length(self) -> int:
        return self.visible

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The slots of all layers of one model. ``num_slots`` and ``length`` are what is allocated now."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.slot_layers = [SlotLayer(window) for window in windows]
        super().__init__(layers=list(self.slot_layers))
        self.num_slots = 0
        self.length = 0

    def states(self) -> list[tuple[Tensor, Tensor]]:
        return [layer.buffers() for layer in self.slot_layers]

    def resize(self, like: Sequence[tuple[Tensor, Tensor]], num_slots: int, length: int, kept_rows: int) -> None:
        """Reallocate for states like those given (of a prompt, or one's own), keeping the content of the first rows.

        It goes one layer at a time, so that the peak is one layer more.
        """
        for layer, states in zip(self.slot_layers, like, strict=True):
            layer.resize(states, num_slots, length, kept_rows)
        self.num_slots, self.length = num_slots, length

    def load(self, states: Sequence[tuple[Tensor, Tensor]], num_tokens: int, slots: slice) -> None:
        """Copy a prompt's states into every slot of ``slots``."""
        for layer, layer_states in zip(self.slot_layers, states, strict=True):
            layer.load(layer_states, num_tokens, slots)

    def begin_step(self, positions_B: Tensor, longest: int) -> None:
        rows = torch.arange(positions_B.shape[0], device=positions_B.device)
        for layer in self.slot_layers:
            layer.begin_step(rows, positions_B, longest)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for layer in self.slot_layers:
            layer.move(sources, targets)


def prompt_states(prompt: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[1, H, S, D]`` of each layer of a computed prompt."""
    states = []
    for layer in prompt.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        states.append((layer.keys, layer.values))
    return states


def round_up(length: int) -> int:
    return -(-length // POSITION_MULTIPLE) * POSITION_MULTIPLE


def layer_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer of a model (``None`` = full attention); other kinds of state are refused."""
    text_config = config.get_text_config(decoder=True)
    windows: list[int | None] = []
    for layer in DynamicCache(config=text_config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and getattr(text_config, "attention_chunk_size", None) is None:
            windows.append(layer.sliding_window)
        else:
            name = getattr(config, "model_type", type(config).__name__)
            raise UserError(
                f"model type {name!r}: the embedded engine decodes full and sliding-window attention only, and this model "
                f"has layers of kind {type(layer).__name__}; serve it with another engine"
            )
    if len({w for w in windows if w is not None}) > 1:
        raise UserError("the embedded engine takes one sliding-window size per model, and this one has several")
    return windows
