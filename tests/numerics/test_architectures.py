"""Which layout a model family gets: the table of docs/training.md, measured on tiny random models of the real classes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import parity
from bvpo.strict import UserError
from bvpo.training import policy
from bvpo.training.miniature import miniature, thresholds
from bvpo.training.policy import choose_layout, install

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")} | {
    f"linear_{kind}_head_dim": 8 for kind in ("key", "value")
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
# Class stem -> what its configuration needs besides BASE.
FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere2": {},
    "DeepseekV3": GROUPED | MLA | {"num_key_value_heads": 4, "head_dim": 4},
    "Ernie4_5": {},
    "Exaone4": {},
    "Gemma": {},
    "Gemma2": {"query_pre_attn_scalar": 8},
    "Glm4": {},
    "Glm4Moe": GROUPED,
    "Granite": {},
    "HunYuanDenseV1": {},
    "Llama": {},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mistral": {"sliding_window": 7},
    "Mixtral": {"num_local_experts": 4},
    "Olmo2": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": MOE | {"num_experts": 4},
    "SeedOss": {},
    "SmolLM3": {},
    "Starcoder2": {},
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Jamba": {"num_hidden_layers": 8, "num_experts": 2, "mamba_d_state": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mamba": {"state_size": 4},
    "Qwen3Next": MOE | LINEAR | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 16},
}
REFUSED = {"RecurrentGemma": {"num_hidden_layers": 3, "lru_width": 32}}  # caps its logits under a name of its own


def tiny(family: str) -> Any:
    """Weights large enough that logits are far from uniform, or a leak between sequences would not show."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, use_cache=False, **(BASE | (FAMILIES | REFUSED)[family])
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 if "embed" in name else 0.2)
    return model.eval()


def listed(layout: str) -> set[str]:
    """The families that the page's table has in the row of a layout."""
    row = re.search(rf"^\| `{layout}` \|([^|]*)\|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row, f"{PAGE.name} lost the row of {layout}"
    return set(re.findall(r"`(\w+)`", row[1]))


def test_page_lists_the_families_measured_here() -> None:
    """Mutation: a family claimed on the page that nothing measures."""
    assert listed("tree") | listed("padded") == set(FAMILIES)
    assert not listed("tree") & listed("padded")


def assert_step_is_that_of_plain_sequences(model: Any, plain: Any, layout: str) -> None:
    quads = parity.mixed_quads(plain)
    found = parity.compared(parity.our_step(model, layout, quads), parity.plain_step(plain, quads))
    assert found["loss_error"] <= parity.LOSS and found["gradient_error"] <= parity.GRADIENT, found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_gets_the_layout_that_the_page_says(family: str) -> None:
    """Past its window its step is that of plain single sequences. Mutations: a recurrent or unknown attention accepted
    for shared prefixes, where state or masks would leak; a window not handed to our attention; a scale of the head lost."""
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    model = tiny(family)
    plain = copy.deepcopy(model)
    install(model)
    layout = choose_layout(model, "auto")
    assert family in listed(layout), layout
    if layout == "padded":
        with pytest.raises(UserError, match="use layout = 'auto'"):
            choose_layout(model, "tree")
    assert_step_is_that_of_plain_sequences(model, plain, layout)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip


def build(family: str, **settings: Any) -> Any:
    """Weights as a fresh model has them: near-uniform outputs hide what hidden states show."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(kind(vocab_size=97, **(BASE | settings)))
    install(model)
    return model.eval()


WINDOWED: dict[str, dict[str, Any]] = {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}


INDEXED = (
    GROUPED
    | MLA
    | {"num_key_value_heads": 4, "head_dim": 4, "index_head_dim": 8, "index_n_heads": 32, "index_topk": 24}
)
LIMIT = {"dynamic": 24, "longrope": 96}
# Class stem and variant -> settings, the layout within a limit, and past it.
LIMITED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "Qwen2Moe": (EXPERTS | WINDOWED, 30, "tree", "padded"),  # a window that reaches the mask alone
    "Phimoe": ({"num_local_experts": 4, "sliding_window": 30}, 30, "tree", "padded"),
    "Llama4": (MOE | {"num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 30}, 30, "tree", "padded"),
    "Qwen2": (WINDOWED, 30, "tree", "tree"),
    "Gemma3": ({"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]}, 30, "tree", "tree"),
    "DeepseekV32": (INDEXED, 24, "padded", "single"),  # no tie here, and not for a trial to find
    **{f"Llama {rope}": ({"rope_parameters": ROPES[rope], "max_position_embeddings": LIMIT[rope]}, 24, "tree", "single")
       for rope in ROPES},
    **{f"Phi3 {rope}": ({"rope_parameters": ROPES[rope], "max_position_embeddings": LIMIT[rope],
                         "original_max_position_embeddings": 24}, 24, "tree", "single") for rope in ["longrope"]},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LIMITED))
def test_what_changes_past_a_limit_is_tried_past_it(name: str) -> None:
    """Mutations: a trial shorter than the limit; windows of layers not counted and hidden states not compared; the
    frequencies of an earlier, longer sequence kept; ties among the best keys left to chance."""
    settings, limit, within, past = LIMITED[name]
    family = name.split()[0]
    model = build(family, **settings)
    plain = copy.deepcopy(model)
    assert choose_layout(model, "auto", limit) == within
    assert choose_layout(model, "auto") == past
    if past != "single":
        policy.require_tried(model, past, limit + 1, 500)
    for layout in {within, past} - {"single"}:
        with pytest.raises(UserError, match="give it to the trainer at the start"):
            policy.require_tried(model, layout, limit, limit + 1)
        policy.require_tried(model, layout, limit, limit)
    policy.require_tried(model, "single", limit, 500)
    assert_step_is_that_of_plain_sequences(model, plain, past)


def test_a_long_window_is_tried_on_a_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: a model too large to run past its window taken on trust; a miniature that keeps the long window."""
    long = WINDOWED | {"sliding_window": 4096}
    assert thresholds(miniature(build("Qwen2Moe", **EXPERTS, **long)).config) == [8]
    assert choose_layout(build("Qwen2Moe", **EXPERTS, **long), "auto") == "padded"
    monkeypatch.setattr(policy, "AFFORDABLE", 0.0)
    monkeypatch.setattr(policy, "miniature", lambda model: 1 / 0)
    assert choose_layout(build("Qwen2", **long), "auto") == "single"  # nothing can vouch for more


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    """Mutation: no look at what a later token changes."""
    model = build("Llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 48:
            module.register_forward_hook(lambda _, __, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(UserError, match="is not causal"):
        choose_layout(model, "auto")


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_an_unknown_head_is_refused(family: str) -> None:
    """Mutation: log-probs of logits that the model would not have given."""
    model = tiny(family)
    install(model)
    with pytest.raises(UserError, match="this head is not supported"):
        choose_layout(model, "padded")
    assert family in PAGE.read_text(encoding="utf-8").split("Refused altogether:")[1]
