"""Models and tokenizers for training: loading, adapters, precision rules, and what the hardware can do.

In: names, paths or ready objects from the user. Out: objects the trainer can rely on, or one line that says what is wrong.
Weights come from safetensors only, and remote code is never trusted here: load such a model yourself and pass it.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from bvpo.models import loading, read_tokenizer
from bvpo.strict import UserError
from bvpo.training.arguments import BVPOConfig

# Dense bf16 peak of one device, FLOP/s, by a part of the name that torch reports (vendors' data sheets, no sparsity).
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def load_policy(model: Any, args: BVPOConfig) -> Any:
    """The model itself, or the one at that path or Hub name: fp32 master weights unless ``pure_bf16`` is asked for."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    dtype = torch.bfloat16 if args.precision == "pure_bf16" else torch.float32
    with loading(f"model {str(model)!r} cannot be loaded"):
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """The tokenizer itself, or the one beside the model."""
    if tokenizer is None:
        tokenizer = model if isinstance(model, (str, os.PathLike)) else getattr(model.config, "name_or_path", "")
        if not tokenizer:
            raise UserError("processing_class: got none, and the model does not say where its tokenizer is")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = read_tokenizer(f"tokenizer {str(tokenizer)!r} cannot be loaded", str(tokenizer))
    return tokenizer


def with_adapter(model: Any, peft_config: Any, args: BVPOConfig) -> Any:
    """Adds the adapter. Adapters that prepend virtual tokens move every position and are refused."""
    if peft_config is None:
        if hasattr(model, "get_base_model"):
            _require_plain_adapter(next(iter(model.peft_config.values())))
        return model
    if hasattr(model, "get_base_model"):
        raise UserError("peft_config: the model already has an adapter; pass one of the two")
    from peft import get_peft_model

    _require_plain_adapter(peft_config)
    return get_peft_model(model, peft_config)


# What peft notes in an adapter's configuration and what does not change the numbers.
_NOTES = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})


def adapter_settings(model: Any) -> dict[str, Any]:
    """What the adapters of a model are, by their names; empty without one."""
    return {
        name: {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
            if key not in _NOTES
        }
        for name, config in (getattr(model, "peft_config", None) or {}).items()
    }


def _require_plain_adapter(config: Any) -> None:
    if getattr(config, "is_prompt_learning", False):
        raise UserError(
            f"peft_config: {config.peft_type} prepends virtual tokens, which shared prefixes do not support"
        )


def agree(args: BVPOConfig, decide: Callable[[], str]) -> str:
    """What rank 0 decides, on all ranks: with memory-efficient loading the others hold no weights to look at."""
    if max(1, args.world_size) == 1 or not torch.distributed.is_initialized():
        return decide()
    found: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            found[0] = decide()
        except UserError as error:  # the others would wait for an answer
            found[1] = error
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def check_precision(model: nn.Module, args: BVPOConfig) -> None:
    """Half-precision master weights lose most updates at preference-tuning learning rates: only by name."""
    trainable = {p.dtype for p in model.parameters() if p.requires_grad}
    half = trainable & {torch.bfloat16, torch.float16}
    if half and args.precision != "pure_bf16":
        raise UserError(
            f"precision: trainable weights are {next(iter(half))}; at these learning rates about 99 % of such weights "
            "would not move in a step. Load the model with dtype=torch.float32 (bf16 autocast stays), or set "
            "precision = 'pure_bf16'"
        )
    if not trainable:
        raise UserError("model: no parameter requires a gradient")
    # After one forward pass in evaluation mode bitsandbytes runs an inference kernel there, which has no gradient.
    if args.device.type == "cpu" and any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise UserError("model: a 4-bit base on a CPU does not carry gradients; load it unquantised, or train on a GPU")
    if args.backward == "sequence" and has_dropout(model):
        raise UserError("backward: 'sequence' runs each forward twice and needs dropout 0")


def has_dropout(model: nn.Module) -> bool:
    """Whether a module, an adapter's included, has a dropout probability above 0."""
    return any(
        "drop" in f"{type(module).__name__}.{name}".lower() and isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
    )


def num_dense_parameters(model: Any) -> int:
    """Parameters that take part in a matrix product for every token (embeddings are looked up, not multiplied)."""
    embedding = model.get_input_embeddings()
    total = sum(p.numel() for p in model.parameters())
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return total if tied else total - embedding.weight.numel()


def is_launched_sharded() -> bool:
    """Whether ``accelerate launch`` asked for FSDP or DeepSpeed (it sets the environment, not the arguments)."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "").lower() == "true" for name in names)


def describe_numerics(device: torch.device) -> str:
    """What decides the last digits of a log-prob besides the model: device, libraries, attention kernels at hand."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    flash = importlib.util.find_spec("flash_attn") is not None
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, flash-attn {flash}"


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device where we know it; utilisation is reported only then."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def keep_outputs_wide(accelerator: Any) -> None:
    """Takes the rounding of module outputs and of gradient reductions out of accelerate's FSDP2 policy.

    accelerate sets ``output_dtype = reduce_dtype = bf16``. Our module output is a sum of log-probs over thousands of
    tokens, which bf16 would round by several nats. Computation stays in bf16 (``param_dtype``).
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def shard_frozen(model: Any, accelerator: Any) -> Any:
    """Shards a frozen reference with FSDP2, layer by layer as its policy is."""
    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise UserError("reference: a held reference needs FSDP2 (fsdp_version: 2); with FSDP1 use 'cached'")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=mixed, reshard_after_forward=True)
    return fully_shard(model, mp_policy=mixed, reshard_after_forward=True)


def end_process() -> None:
    """Ends one process of several with exit code 0, without taking the interpreter down; does nothing in a single process.

    A thread of gloo that lets go of its last tensor while the interpreter goes down aborts its process: "terminate called
    without an active exception", exit code -6, after all work is done. Under DDP ``destroy_process_group`` leaves those
    threads. What the interpreter does before that point is done here: threads, exit handlers, buffers.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
