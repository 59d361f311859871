"""Measures a loaded model on a few tokens before it is used: is it decoded rightly, and what does its cache weigh.

In: a model. Out: a refusal in one line, or a number. It generates nothing for anyone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bvpo.engines.base import Request, Sampling
from bvpo.engines.local.decoder import BatchLimits, Decoder, Row
from bvpo.strict import UserError

_ATTENTION_KINDS = ("sdpa", "eager")
_PROMPT_LENGTHS = (3, 6)


def check_model(model: Any) -> None:
    """Refuse a model that the decoder would run wrongly: its steps must give the logits of a plain forward pass.

    Positions, masks and cache are handed to the model from outside. An architecture that ignores or reinterprets one of
    them does not crash, it shifts its logits; so the two are compared once, on rows of unequal length.
    """
    kind = model.config._attn_implementation
    if kind not in _ATTENTION_KINDS:
        raise UserError(
            f"attention implementation {kind!r}: the embedded engine needs one of {', '.join(_ATTENTION_KINDS)}"
        )
    worst, scale = _distance_from_plain_forward(model)
    if math.isnan(worst):
        raise UserError(f"model type {model.config.model_type!r}: its logits are not finite (NaN) on a plain prompt")
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not worst <= tolerance * max(1.0, scale):
        raise UserError(
            f"model type {model.config.model_type!r}: decoding in a shared batch gives other logits than a plain forward "
            f"pass (off by {worst:.3g}), so the embedded engine cannot run it; serve it with another engine"
        )


@torch.inference_mode()
def _distance_from_plain_forward(model: Any) -> tuple[float, float]:
    """Largest absolute difference of next-token logits, and the largest absolute logit."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    limits = BatchLimits(max_rows=len(_PROMPT_LENGTHS), max_tokens=1 << 20, prefill_chunk=4, min_rows=1)
    decoder = Decoder(model, limits)
    for length in _PROMPT_LENGTHS:
        ids = tuple((7 * i + 3) % vocab for i in range(length))
        request = Request(key="check", prompt_ids=ids, seed=0, params=Sampling(max_new_tokens=8))
        row = Row(request=request, limit=8, stop_ids=frozenset())
        decoder.admit(decoder.compute_prompt(ids), [row])
        if not decoder.rows or decoder.rows[-1] is not row:
            return float("nan"), 0.0
    decoder.step()
    stepped = decoder.next_logits().float()
    device = model.device
    plain = [model(torch.tensor([row.ids], device=device)).logits[0, -1].float() for row in decoder.rows]
    expected = torch.stack(plain)
    return float((stepped - expected).abs().max()), float(expected.abs().max())


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    limits = BatchLimits(max_rows=1, max_tokens=1, prefill_chunk=1, min_rows=1)
    prompt = Decoder(model, limits).compute_prompt([0])
    return sum(state.element_size() * state.numel() for layer in prompt.states for state in layer)
