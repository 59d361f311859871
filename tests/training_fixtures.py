"""Tiny models of real classes and random token quads for the trainer's tests; nothing is downloaded."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bvpo.training.tokens import Branch, TokenDataset, TokenQuad, TokenWriter

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# The sliding windows are shorter than the test sequences, so a wrong window changes the result.
_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 7, "query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_causal_lm(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A random model whose logits are far from uniform, so that differences in attention show."""
    config_class, model_class, extra = _FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**(_SIZES | extra | overrides))
    config.use_cache = False
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.35 if "embed" not in name else 1.0)
    return model.eval()


def random_quads(
    num: int, *, seed: int = 0, ragged_views: bool = True, tails: bool = False, scale: int = 1, vocab: int = VOCAB
) -> list[TokenQuad]:
    """Quads with ragged lengths; with ``ragged_views`` every third lacks a view; ``tails`` adds unscored prompt tails."""
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(3, vocab, int(generator.integers(low, high + 1))).astype(np.int32)

    quads = []
    for i in range(num):
        branches: list[Branch | None] = []
        for b in range(4):
            tokens = ids(6 * scale, 16 * scale) if b < 2 else ids(3 * scale, 8 * scale)
            start = int(generator.integers(0, 3)) if tails and b >= 2 else 0
            branches.append(Branch(ids=tokens, scored_from=start, answer_from=max(start, len(tokens) // 2)))
        if ragged_views and i % 3 == 1:
            branches[0] = branches[1] = None
        if ragged_views and i % 3 == 2:
            branches[2] = branches[3] = None
        quads.append(TokenQuad(id=f"q{i}", prefix_ids=ids(2 * scale, 9 * scale), branches=tuple(branches)))  # type: ignore[arg-type]
    return quads


def with_traces(groups: list[int], *, seed: int = 0, **settings: Any) -> list[TokenQuad]:
    """``random_quads``, the g-th with ``groups[g]`` traces: further quads with its prefix and another trace pair alone."""
    more = iter(random_quads(sum(groups), seed=seed + 1000, ragged_views=False))
    quads = []
    for quad, num in zip(random_quads(len(groups), seed=seed, **settings), groups, strict=True):
        quads.append(quad)
        for member in range(2, num + 1):
            branches = (*next(more).branches[:2], None, None)
            quads.append(TokenQuad(id=f"{quad.id}+{member}", prefix_ids=quad.prefix_ids, branches=branches))
    return quads


def write_tokens(folder: Path, quads: list[TokenQuad], groups: list[int] | None = None) -> TokenDataset:
    """The quads as a dataset on disk, the form the trainer trains on; ``groups`` are the rows of each quad."""
    import hashlib
    import json

    from bvpo.training.refcache import quad_key

    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenWriter(folder)
    for quad in quads:
        writer.add(quad)
    size = writer.close()
    fingerprint = hashlib.sha256(b"".join(quad_key(quad) for quad in quads)).hexdigest()[:16]
    summary: dict[str, Any] = {"fingerprint": fingerprint, "drops": {}, "num_dropped_quads": 0, "bytes": size}
    if groups is not None:
        summary["groups"] = groups
    (folder / "summary.json").write_text(json.dumps(summary))
    return TokenDataset(folder)


def _exact_norm(self: Any, hidden: Any) -> Any:
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.exact_eps)
    return hidden * scale * (self.exact_shift + self.weight)


def use_exact_norms(model: Any) -> Any:
    """Computes RMS norms in the model's own dtype: transformers' classes go through float32, which would hide (and in
    float64 comparisons limit) everything below 1e-8."""
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        module.exact_eps = getattr(module, "variance_epsilon", None) or module.eps
        module.exact_shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
        module.forward = types.MethodType(_exact_norm, module)  # a bound method, so that deep copies stay right
    return model


def word_tokenizer(vocab: int = VOCAB) -> Any:
    """One word per id, w3 .. w{vocab-1}; 0 pad, 1 bos, 2 eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, vocab)}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def make_trainer(folder: Path, model: Any, quads: list[TokenQuad], **settings: Any) -> Any:
    """A ``BVPOTrainer`` on ready tokens; ``settings`` are BVPOConfig fields, and trainer arguments of the same name."""
    from bvpo.training.arguments import BVPOConfig
    from bvpo.training.trainer import BVPOTrainer

    trainer_names = ("ref_model", "peft_config", "eval_dataset", "callbacks", "alpha_source")
    extra = {name: settings.pop(name) for name in trainer_names if name in settings}
    groups = settings.pop("groups", None)
    defaults = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = BVPOConfig(**(defaults | {"quads_per_step": len(groups or quads), "save_strategy": "no"} | settings))
    data = write_tokens(folder / f"tokens-{len(quads)}", quads, groups)
    return BVPOTrainer(model, args, data, processing_class=word_tokenizer(), **extra)


def step_gradients(trainer: Any, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and flat gradient of one optimizer step, without taking it."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, trainer._train_steps[step])
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss, torch.cat(gradients)
