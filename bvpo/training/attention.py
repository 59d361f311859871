"""Attention for one-row layouts: every span of the row attends to its prefix and to itself, nothing else.

Registered with transformers as the attention implementation ``bvpo``, so it runs inside the model's own layers: rotary
positions, norms, projections and sliding windows stay the model's. In: queries, keys and values of one packed row and
an :class:`~bvpo.training.layout.AttentionPlan`. Out: the attention output. Without a plan (generation, padded layout)
it is transformers' SDPA. Dense 4-D masks are never built: they make sharing slower than no sharing.

Kernels differ in speed only. ``segments`` runs scaled-dot-product attention span by span and works everywhere;
``torch_varlen`` and ``flash_attn`` are variable-length GPU kernels. A GPU kernel is used only after it has agreed with
``segments`` on random inputs on the very machine (:func:`choose_kernel`).

Shape legend: T tokens of the row, K gathered keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bvpo.strict import UserError
from bvpo.training.layout import AttentionPlan, Span, plan_attention

logger = logging.getLogger(__name__)

IMPLEMENTATION = "bvpo"
QUERY_BLOCK = 512
# Keyword arguments that some models pass to attention and that change its result: refused, not implemented here.
_UNSUPPORTED = ("s_aux", "position_bias", "sinks", "indices", "block_indices")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one layer asks for. ``window`` counts the tokens a query sees, itself included."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


Kernel = Callable[[Tensor, Tensor, Tensor, AttentionPlan, AttentionSpec], Tensor]  # [T,H,D], [T,G,D] x2 -> [T,H,D]


def attend_segments(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, spec: AttentionSpec) -> Tensor:
    """Span by span with scaled-dot-product attention; the reference for all other kernels."""
    outputs = [_attend_span(query, key, value, span, spec) for span in plan.spans]
    return torch.cat(outputs, dim=0)


def _attend_span(query: Tensor, key: Tensor, value: Tensor, span: Span, spec: AttentionSpec) -> Tensor:
    q = query[span.start : span.stop]
    k, v = key[span.start : span.stop], value[span.start : span.stop]
    num_prefix = span.prefix_stop - span.prefix_start
    if num_prefix:
        k = torch.cat([key[span.prefix_start : span.prefix_stop], k])
        v = torch.cat([value[span.prefix_start : span.prefix_stop], v])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if spec.softcap is None and num_prefix == 0 and (spec.window is None or spec.window >= k.shape[2]):
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=spec.scale, dropout_p=spec.dropout, enable_gqa=grouped
        )
    else:
        # Blocks of queries bound the mask (memory linear in length) and skip the keys that no query of a block sees.
        blocks = range(0, q.shape[2], QUERY_BLOCK)
        out = torch.cat([_attend_block(q, k, v, num_prefix, start, spec) for start in blocks], dim=2)
    return out[0].transpose(0, 1)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, num_prefix: int, start: int, spec: AttentionSpec) -> Tensor:
    stop = min(start + QUERY_BLOCK, q.shape[2])
    last_key = num_prefix + stop
    first_key = 0 if spec.window is None else max(0, num_prefix + start + 1 - spec.window)
    q, k, v = q[:, :, start:stop], k[:, :, first_key:last_key], v[:, :, first_key:last_key]
    mask = _additive_mask(stop - start, last_key - first_key, spec.window, q.dtype, q.device)
    if spec.softcap is not None:
        return _softcapped(q, k, v, mask, spec)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=spec.scale, dropout_p=spec.dropout, enable_gqa=grouped
    )


def _additive_mask(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Bottom-right causal: query i sees keys up to ``i + num_keys - num_queries``, at most ``window`` of them."""
    # A view of one band per process: SDPA keeps its mask for backward, and own masks would cost memory quadratically.
    before = num_keys - num_queries
    width = 1024
    while width < before:
        width *= 2
    return _band(max(QUERY_BLOCK, num_queries), width, window, dtype, device)[
        :num_queries, width - before : width + num_queries
    ]


@functools.lru_cache(maxsize=4)
def _band(rows: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, before + rows]: column c stands for the key at distance ``c - before`` from the first query."""
    query = torch.arange(rows, device=device)[:, None]
    key = torch.arange(-before, rows, device=device)[None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.zeros(rows, before + rows, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    assert spec.softcap is not None
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * spec.scale
    scores = torch.tanh(scores / spec.softcap) * spec.softcap
    probs = torch.softmax((scores + mask).to(_at_least_fp32(q.dtype)), dim=-1).to(v.dtype)
    return torch.matmul(F.dropout(probs, spec.dropout), v)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def attend_flash(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, spec: AttentionSpec) -> Tensor:
    """The flash-attn package: bottom-right causal alignment for unequal query and key lengths, windows, soft caps."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    window = (-1, -1) if spec.window is None else (spec.window - 1, 0)
    return flash_attn_varlen_func(
        query,
        key.index_select(0, plan.keys),
        value.index_select(0, plan.keys),
        plan.query_starts,
        plan.key_starts,
        plan.max_queries,
        plan.max_keys,
        dropout_p=spec.dropout,
        softmax_scale=spec.scale,
        causal=True,
        window_size=window,
        softcap=spec.softcap or 0.0,
    )


def attend_torch_varlen(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, spec: AttentionSpec) -> Tensor:
    """``torch.nn.attention.varlen``; its keyword arguments grew between torch releases, so they are looked up."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = _varlen_arguments()
    key, value = key.index_select(0, plan.keys), value.index_select(0, plan.keys)
    kwargs: dict[str, Any] = {"scale": spec.scale}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in accepted:
            kwargs["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if "window_size" in accepted:
        kwargs["window_size"] = (-1, 0) if spec.window is None else (spec.window - 1, 0)
    else:
        kwargs["is_causal"] = True
    out = varlen_attn(query, key, value, plan.query_starts, plan.key_starts, plan.max_queries, plan.max_keys, **kwargs)
    assert isinstance(out, Tensor)  # a tuple comes only with return_aux
    return out


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash_serves(spec: AttentionSpec) -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_varlen_serves(spec: AttentionSpec) -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or spec.softcap is not None or spec.dropout:
        return False
    return spec.window is None or "window_size" in _varlen_arguments()


def _always(spec: AttentionSpec) -> bool:
    return True


# Fastest first; each with the test of whether it can serve a layer at all.
KERNELS: dict[str, tuple[Kernel, Callable[[AttentionSpec], bool]]] = {
    "flash_attn": (attend_flash, _flash_serves),
    "torch_varlen": (attend_torch_varlen, _torch_varlen_serves),
    "segments": (attend_segments, _always),
}


@functools.cache
def choose_kernel(
    device_type: str, device_index: int | None, dtype: torch.dtype, heads: tuple[int, int, int], spec: AttentionSpec
) -> str:
    """The fastest kernel that gives the reference's numbers here. GPU kernels need half precision."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "segments"
    device = torch.device(device_type, device_index or 0)
    for name, (kernel, serves) in KERNELS.items():
        if name == "segments" or not serves(spec):
            continue
        problem = _kernel_problem(kernel, device, dtype, heads, spec)
        if problem is None:
            logger.info("attention kernel: %s", name)
            return name
        logger.warning("attention kernel %s is not used: %s", name, problem)
    logger.warning("attention falls back to span-by-span SDPA (correct, slower)")
    return "segments"


def _kernel_problem(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], spec: AttentionSpec
) -> str | None:
    """Compares values and gradients with ``segments`` on a small two-prefix tree; None when they agree."""
    spans = [Span(start=0, stop=33), Span(start=33, stop=97, prefix_start=0, prefix_stop=33)]
    spans += [Span(start=97, stop=110, prefix_start=0, prefix_stop=33), Span(start=110, stop=150)]
    plan = plan_attention(spans).to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    num_query_heads, num_key_heads, head_size = heads
    shapes = [(150, num_query_heads, head_size), (150, num_key_heads, head_size), (150, num_key_heads, head_size)]
    with torch.enable_grad():
        inputs = [torch.randn(s, generator=generator, device=device, dtype=dtype).requires_grad_() for s in shapes]
        weights = torch.randn(shapes[0], generator=generator, device=device, dtype=dtype)
        try:
            results = []
            for attend in (attend_segments, kernel):
                out = attend(*inputs, plan, spec)  # type: ignore[arg-type]
                results.append([out.detach(), *torch.autograd.grad((out * weights).float().sum(), inputs)])
        except (RuntimeError, TypeError, ValueError, ImportError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        error = ((ours - theirs).float().norm() / ours.float().norm()).item()
        if not error < 0.03:  # half precision rounding is about 0.4 %; a wrong alignment is of order 1
            return f"{name} differs by {error:.2g} (relative)"
    return None


def bvpo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bvpo_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The transformers attention interface: [1, H, T, D] in, [1, T, H, D] out."""
    if bvpo_plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserError(
                f'{type(module).__name__} passes {name!r} to attention; use `layout = "padded"` for this model'
            )
    if attention_mask is not None and attention_mask.numel() != 1:
        raise UserError(
            f"{type(module).__name__} changes the attention mask, which shared-prefix layouts cannot follow"
        )
    if getattr(module, "is_causal", True) is False:
        raise UserError(f"{type(module).__name__} is not causal; shared-prefix layouts need causal attention")
    if _windows is not None:
        _windows.append(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spec = AttentionSpec(scale=scale, window=sliding_window, softcap=softcap, dropout=dropout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    heads = (q.shape[1], k.shape[1], q.shape[2])
    name = choose_kernel(q.device.type, q.device.index, q.dtype, heads, spec)
    return KERNELS[name][0](q, k, v, bvpo_plan, spec)[None], None


_windows: list[int | None] | None = None


@contextlib.contextmanager
def windows_seen() -> Iterator[list[int | None]]:
    """The windows that layers ask for inside the block, in order."""
    global _windows
    before, _windows = _windows, []
    try:
        yield _windows
    finally:
        _windows = before


def register() -> None:
    """Makes ``attn_implementation="bvpo"`` known to transformers. Repeating it is harmless."""
    AttentionInterface.register(IMPLEMENTATION, bvpo_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
