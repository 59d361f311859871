"""Which layout a model family gets: the table of docs/training.md, measured on tiny random models of the real classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bvpo.strict import UserError
from bvpo.training import policy
from bvpo.training.layout import LAYOUTS
from bvpo.training.miniature import miniature, thresholds
from bvpo.training.policy import _probe_quads, branch_outputs, choose_layout, install

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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_gets_the_layout_that_the_page_says(family: str) -> None:
    """Mutation: a recurrent or unknown attention accepted for shared prefixes, where state or masks would leak."""
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    model = tiny(family)
    install(model)
    layout = choose_layout(model, "auto")
    assert family in listed(layout), layout
    if layout == "padded":
        with pytest.raises(UserError, match="use layout = 'auto'"):
            choose_layout(model, "tree")


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(kind(vocab_size=97, **(BASE | settings)))
    install(model)
    return model.eval()


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_rope_that_depends_on_the_batch_runs_each_sequence_alone(rope: str) -> None:
    """Mutations: the trial stays below the original length; the frequencies of an earlier, longer sequence stay."""
    limit = 24 if rope == "dynamic" else 96
    model = build("Llama", rope_parameters=ROPES[rope], max_position_embeddings=limit)
    assert choose_layout(model, "auto", 24) == "tree"  # within the original length nothing changes
    assert choose_layout(model, "auto") == "single"
    quads = _probe_quads(model, 90)
    ours = branch_outputs(model, LAYOUTS["single"](quads[1:] + quads[:1]))[..., :2].sum(-1)
    for quad, sums in zip(quads[1:] + quads[:1], ours, strict=True):
        for branch, ours_sum in zip(quad.branches, sums, strict=True):
            fresh = build("Llama", rope_parameters=ROPES[rope], max_position_embeddings=limit)
            ids = torch.tensor([*quad.prefix_ids, *branch.ids])[None]  # type: ignore[union-attr]
            logps = torch.log_softmax(fresh(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            expected = logps[len(quad.prefix_ids) + branch.scored_from - 1 :].sum()  # type: ignore[union-attr]
            torch.testing.assert_close(ours_sum, expected, rtol=1e-5, atol=1e-4)


WINDOWED: dict[str, dict[str, Any]] = {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}


def test_a_window_that_reaches_the_mask_alone_is_not_shared() -> None:
    """Mutation: a trial that is shorter than the window; windows of layers not counted and hidden states not compared."""
    assert choose_layout(build("Qwen2Moe", **EXPERTS, **WINDOWED), "auto") == "padded"
    assert choose_layout(build("Qwen2Moe", **EXPERTS, **WINDOWED), "auto", 30) == "tree"  # no sequence meets its window
    assert choose_layout(build("Qwen2", **WINDOWED), "auto") == "tree"


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
