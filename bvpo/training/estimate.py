"""What a run will cost, before it starts: parameters, memory per device, tokens, arithmetic.

In: the model's configuration (no weights are loaded), the tokenised data and the trainer's arguments. Out: an
:class:`Estimate` and the decision whether it can fit. Weights, gradients and optimizer states are exact counts;
activations are a model of what transformers' decoder layers keep for backward, meant to be right within a factor of
about 1.5, and say so. Time is not guessed here: the progress bar knows it once steps have been measured.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bvpo.method.losses import LOSSES
from bvpo.strict import UserError
from bvpo.training.arguments import BVPOConfig
from bvpo.training.batching import plan_epoch
from bvpo.training.loading import is_launched_sharded
from bvpo.training.tokens import TokenDataset

GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory in bytes per device; tokens are those that the model processes in the layout that it most likely gets (shared
    prefixes once in the tree, padding counted in padded rows)."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    quads: int
    optimizer_steps: int
    tokens_per_epoch: int
    train_flops: float
    reference_flops: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations

    def lines(self) -> list[str]:
        """The estimate for people, one fact per line."""
        return [
            f"model        {_short(self.parameters)} parameters, {_short(self.trainable)} trained",
            f"data         {self.quads:,} quads, {self.tokens_per_epoch:,} tokens an epoch",
            f"work         {self.optimizer_steps:,} optimizer steps, {_short(self.train_flops)}FLOP training"
            + (f" + {_short(self.reference_flops)}FLOP reference (once)" if self.reference_flops else ""),
            f"memory       about {_size(self.memory)} per device: weights {_size(self.weights)}, gradients "
            f"{_size(self.gradients)}, optimizer {_size(self.optimizer)}"
            + (f", reference {_size(self.reference)}" if self.reference else "")
            + f", activations ~{_size(self.activations)}",
        ]


def estimate_run(
    config: Any, tokens: TokenDataset, args: BVPOConfig, *, lora_rank: int | None, needs_held_reference: bool
) -> Estimate:
    """``config`` is the model's transformers configuration; ``lora_rank`` is None for full training."""
    with torch.device("meta"):
        model = _skeleton(config)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = parameters if lora_rank is None else _lora_parameters(model, lora_rank)
    sharded = max(1, args.world_size) if _is_sharded(args) else 1
    width = 2 if args.precision == "pure_bf16" else 4
    compute_width = 2 if args.bf16 or args.precision == "pure_bf16" else 4
    autocast_copy = 2 * parameters if args.bf16 else 0
    layout = _likely_layout(model, args)
    run_tokens, num_rows = tokens.run_tokens(layout)
    plan = plan_epoch(
        run_tokens,
        tokens.group_has_view,
        num_rows=num_rows,
        quads_per_step=args.quads_per_step or 1,
        tokens_per_micro_batch=args.tokens_per_micro_batch,
        world_size=max(1, args.world_size),
        seed=0,
        epoch=0,
        last_step=args.last_step,  # type: ignore[arg-type]
    )
    steps = args.max_steps if args.max_steps > 0 else round(plan.num_steps * args.num_train_epochs)
    per_epoch = int(run_tokens.sum())
    largest = int(run_tokens.max())
    has_reference_pass = args.reference == "cached" and not needs_held_reference and LOSSES[args.loss].needs_reference
    dense = parameters - (0 if config.get_text_config().tie_word_embeddings else _embedding_size(model))
    return Estimate(
        parameters=parameters,
        trainable=trainable,
        weights=width * parameters // sharded,
        gradients=width * trainable // sharded,
        optimizer=_optimizer_bytes(model, args, lora_rank, width) // sharded,
        reference=width * parameters // sharded if needs_held_reference else 0,
        activations=_activations(config.get_text_config(), largest, args, compute_width) + autocast_copy // sharded,
        quads=tokens.num_groups,
        optimizer_steps=steps,
        tokens_per_epoch=per_epoch,
        train_flops=6.0 * dense * per_epoch * steps / max(1, plan.num_steps),
        reference_flops=2.0 * dense * per_epoch if has_reference_pass else 0.0,
    )


def _likely_layout(model: Any, args: BVPOConfig) -> str:
    """The layout asked for; for 'auto' what the class tells before the trainer measures it."""
    if args.layout != "auto":
        return args.layout
    shares = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_is_stateful", False)
    return "tree" if shares else "padded"


# Numbers that an optimizer keeps for each weight, by its name in TrainingArguments.optim. 8-bit ones are bitsandbytes' or
# torchao's; "_factored" stands for adafactor's row and column means. Names that are not here count as nothing, because
# only what is certain may refuse a run.
_STATES = {
    "adamw": 2.0, "ademamix": 3.0, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0, "schedule_free": 2.0, "stable_adamw": 2.0,
    "grokadamw": 3.0,
}  # fmt: skip
_BLOCKWISE = 1.0 + 4.0 / 256  # bytes of an 8-bit number and its share of its block's scale


def _optimizer_bytes(model: Any, args: BVPOConfig, lora_rank: int | None, width: int) -> int:
    """Bytes of the optimizer's state that must be on the device: none of a paged one, which moves to the host."""
    name = str(getattr(args.optim, "value", args.optim))
    shapes: list[tuple[int, ...]]
    shapes = [tuple(p.shape) for p in model.parameters()] if lora_rank is None else _lora_shapes(model, lora_rank)
    sizes = [math.prod(shape) for shape in shapes]
    if name.startswith("paged") or "layerwise" in name or "galore" in name or "apollo" in name:
        return 0
    if name == "adafactor":
        factored = [math.prod(s[:-1]) + math.prod((*s[:-2], s[-1])) if len(s) >= 2 else math.prod(s) for s in shapes]
        return 4 * sum(factored)
    count = next((states for part, states in _STATES.items() if name.startswith(part)), 0.0)
    if "4bit" in name:
        return int(count * sum(sizes) / 2)
    if "8bit" in name:
        # bitsandbytes keeps embeddings and small tensors wide
        table = tuple(model.get_input_embeddings().weight.shape) if lora_rank is None else None
        wide = sum(n for n, shape in zip(sizes, shapes, strict=True) if n < 4096 or shape == table)
        return int(count * (4 * wide + _BLOCKWISE * (sum(sizes) - wide)))
    return int(count * width * sum(sizes))


def _is_sharded(args: BVPOConfig) -> bool:
    return bool(args.fsdp or args.deepspeed or is_launched_sharded())


def _skeleton(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _embedding_size(model: Any) -> int:
    return model.get_input_embeddings().weight.numel()


def _lora_parameters(model: Any, rank: int) -> int:
    return sum(math.prod(shape) for shape in _lora_shapes(model, rank))


def _lora_shapes(model: Any, rank: int) -> list[tuple[int, ...]]:
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return [shape for m in linears for shape in ((rank, m.in_features), (m.out_features, rank))]


def _activations(text: Any, longest: int, args: BVPOConfig, width: int) -> int:
    """Bytes kept for backward by the largest micro-batch, plus the head's chunk of vocabulary scores."""
    held = max(longest, args.tokens_per_micro_batch or 0)
    if args.backward == "sequence":
        held = min(held, args.max_length)
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    attention = (heads + 2 * (getattr(text, "num_key_value_heads", None) or heads)) * head_size
    # Per token and layer: two norms (input and normalised, fp32), q/k/v before and after rotation, attention output,
    # both residual sums, gate, up, activation and product of the MLP.
    layer = 16 * hidden + width * (2 * attention + 4 * hidden + 4 * inner)
    layers = text.num_hidden_layers
    kept = held * (layers * width * hidden + layer if args.gradient_checkpointing else layers * layer)
    scores = 3 * 4 * min(args.head_chunk, held) * text.vocab_size + 4 * text.vocab_size * hidden
    return int(kept + scores)


def require_fit(estimate: Estimate, device: torch.device) -> None:
    """Refuses a run whose weights, gradients and optimizer alone exceed the device; warns nobody about less."""
    available = _available(device)
    certain = estimate.memory - estimate.activations
    if available is not None and certain > available:
        raise UserError(
            f"this run needs at least {_size(certain)} per device for weights, gradients and optimizer, and {device.type} "
            f"has {_size(available)}: train adapters (train.lora.enabled = true), shard over more devices (accelerate, "
            "FSDP2), or take a smaller model"
        )


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 1024**2:,.1f} MiB"


def _short(count: float) -> str:
    """1234567 -> '1.2 M'."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"
