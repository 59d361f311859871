"""The lengths at which a model starts to compute otherwise, and a miniature of it that meets them within a few tokens.

In: a transformers model. Out: :func:`thresholds`, the windows, chunks and rope limits that its configuration names, and
:func:`miniature`, the same class with narrow layers, low thresholds and weights sharp enough that a leak between
sequences shows. What is compared on them is :mod:`bvpo.training.policy`'s business.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Names of lengths past which attention, positions or memory change, and names that only look like such.
_LENGTH = re.compile(
    r"window|chunk|local_att|block_(size|len)|original_max_position|index_topk|floor_scale|rel_extent|max_distance"
    r"|context_len|compress|mem_len|indexer_budget|stride"
)
_PICKS = re.compile(r"index_topk|indexer_budget|keep_window")  # how many keys a query keeps: the rest is masked
_NO_LENGTH = re.compile(r"layer|pattern|num_|use_|feed_forward|_ids|vision|audio|head_dim|lm_head|ratio_bias")
_WIDTH = re.compile(
    r"(hidden_size\w*|intermediate_size\w*|head_dim|headdim|head_size|_dim|_rank|d_model|d_ff|dff|dim_ff|n_embd|n_inner|d_head"
    r"|dim_head|d_inner|d_ssm|lru_width|embedding_size|kv_channels|rotary_dim|dim_model_base|\w*ffn_hidden_size|feed_forward_size"
    r"|\w*_width)$"
)
_NO_WIDTH = re.compile(r"conv|kernel|num_|per_layer_config\.\d+\.num")
_EXPERTS = re.compile(r"(num_(local_)?experts|n_routed_experts|moe_num_experts)$")
_PER_TOKEN = re.compile(r"num_experts_per_tok\w*$|top_?k(_experts)?$|moe_k$")
_LOWEST, _STEP = 8, 5  # thresholds of a miniature: 8, 13, 18, ...
MAX_PARAMETERS = 60_000_000

Edit = Callable[[str, str, int], int]


def setting(config: Any, name: str) -> Any:
    """A field of the text part, None where it has none."""
    text = config.get_text_config()
    try:
        return getattr(text, name, None)
    except RuntimeError:  # some classes refuse to name what may vary from layer to layer
        return text.to_dict().get(name)


def thresholds(config: Any) -> list[int]:
    """Ascending lengths, longer than one token, past which the model may compute something else."""
    return sorted({value for path, name, value in _integers(config.to_dict()) if _is_length(config, path, name, value)})


def picked_keys(config: Any) -> list[int]:
    """Ascending lengths past which a query keeps only its best keys."""
    return sorted({value for _, name, value in _integers(config.to_dict()) if _PICKS.search(name)})


def _is_length(config: Any, path: str, name: str, value: int) -> bool:
    if name == "max_position_embeddings":  # dynamic rope starts to change where the trained positions end
        return value > 1 and "dynamic" in str(setting(config, "rope_parameters"))
    full = f"{path}.{name}"
    return value > 1 and bool(_LENGTH.search(full)) and not _NO_LENGTH.search(full)


def _integers(tree: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, int]]:
    """(path, name, value) of every integer; those in lists go by the list's name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _integers(value, f"{path}.{name}" if name else path, str(key))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _integers(value, path, name)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield path, name, tree


def _edited(tree: Any, edit: Edit, path: str = "", name: str = "") -> Any:
    if isinstance(tree, dict):
        return {k: _edited(v, edit, f"{path}.{name}" if name else path, str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_edited(value, edit, path, name) for value in tree]
    return edit(path, name, tree) if isinstance(tree, int) and not isinstance(tree, bool) else tree


def small_config(config: Any) -> Any:
    """The same configuration with widths divided by one number, few experts, a small vocabulary and low thresholds.

    Counts of heads and layers stay: whatever is derived from them, or listed layer by layer, stays valid."""
    tree = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    factor = _divisor(config)
    low = {length: _LOWEST + _STEP * i for i, length in enumerate(thresholds(config))}
    per_token = max([value for _, name, value in _integers(tree) if _PER_TOKEN.search(name) and value < 64], default=1)

    def edit(path: str, name: str, value: int) -> int:
        full = f"{path}.{name}"
        if _is_length(config, path, name, value):
            return min(value, low[value])
        if name == "mrope_section":
            return max(1, value // factor)
        if _EXPERTS.search(name):
            return min(value, max(16, per_token))
        if name.endswith("vocab_size") and value > 512:
            return 512
        if value > 16 and _WIDTH.search(name) and not _NO_WIDTH.search(full):
            return -(-value // factor) + (-(-value // factor) % 2)
        return value

    tree = _edited(tree, edit)
    _shorten_factors(tree, factor)
    _keep_ids_in_range(tree)
    return type(config).from_dict(tree)


def _divisor(config: Any) -> int:
    """The largest power of two that leaves 8 dimensions to every head and 4 to its rotated part."""
    heads = setting(config, "num_attention_heads") or setting(config, "num_heads") or 1
    hidden = setting(config, "hidden_size") or 64
    sizes = [setting(config, "head_dim") or hidden // max(1, heads if isinstance(heads, int) else 1)]
    fields = _integers(config.get_text_config().to_dict())
    sizes += [value for _, name, value in fields if re.search(r"head_?dim$|d_head$", name) and value > 1]
    sizes += [2 * (setting(config, "qk_rope_head_dim") or 0) or sizes[0]]
    factor = 1
    while min(sizes) // (2 * factor) >= 8:
        factor *= 2
    return factor


def _shorten_factors(tree: Any, factor: int) -> None:
    """longrope has one factor for each rotated pair of dimensions."""
    if not isinstance(tree, dict):
        return
    for name, value in tree.items():
        if name in ("short_factor", "long_factor") and isinstance(value, list):
            tree[name] = value[::factor]
        _shorten_factors(value, factor)


def _keep_ids_in_range(tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _keep_ids_in_range(value)
        elif str(name).endswith("token_id") and isinstance(value, int) and value >= 512:
            tree[name] = 1
        elif str(name).endswith("token_id") and isinstance(value, list):
            tree[name] = [min(int(item), 1) for item in value]


def miniature(model: Any) -> Any:
    """A new model of the same class in float32 on the CPU. Raises whatever its class raises where it cannot be built."""
    config = small_config(model.config)
    config._attn_implementation = getattr(model.config, "_attn_implementation", None)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in type(model)(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its miniature has {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(model)(config).to(torch.float32)
        sharpen(made)
    return made.eval()


def sharpen(model: nn.Module) -> None:
    """Larger weights than a fresh model has: near-uniform attention and outputs would hide what leaks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                fan_in = max(1, parameter.shape[-1] if parameter.ndim != 3 or "conv" in name else parameter.shape[1])
                parameter.normal_(std=1.0 if "embed" in name else 1.5 / fan_in**0.5)
