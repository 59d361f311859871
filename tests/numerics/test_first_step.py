"""What must hold before any weight moves: no noise in the policy, a loss that starts where it must, a gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from training_fixtures import make_trainer, random_quads, tiny_causal_lm

from bvpo.config import LossConfig
from bvpo.method.losses import LOSSES, PairLogps, pair_loss, resolve_loss
from bvpo.strict import UserError
from bvpo.training.loading import has_dropout

pytestmark = pytest.mark.filterwarnings("ignore")

QUADS = random_quads(4, ragged_views=False)
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "use_cache": False
}  # fmt: skip
NOISY: dict[str, dict[str, Any]] = {
    "SeedOss": {"attention_dropout": 0.1, "residual_dropout": 0.1},  # floats that modules keep
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.2, "head_dim": None},
    "Phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},  # nn.Dropout
    "Phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.6},  # samples its experts
    "Mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
}


def noisy(family: str) -> Any:
    torch.manual_seed(0)
    settings = {k: v for k, v in (SIZES | NOISY[family]).items() if v is not None}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 if "embed" in name else 0.2)
    return model


def first(folder: Path, model: Any, quads: Any = QUADS, **settings: Any) -> dict[str, float]:
    trainer = make_trainer(
        folder, model, quads, **({"max_steps": 1, "logging_steps": 1, "telemetry_steps": 0} | settings)
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("family", sorted(NOISY))
def test_noise_is_off_unless_asked_for(tmp_path: Path, family: str) -> None:
    """Mutations: only ``nn.Dropout`` turned off (SeedOss), modules not kept in evaluation mode (Phimoe, Mixtral), the
    setting not read."""
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    logs = first(tmp_path / "off", noisy(family), **settings)
    assert [logs[f"{view}/loss"] for view in ("trace", "empty")] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert logs["trace/rewards/margins"] == pytest.approx(0, abs=1e-5)
    loud = first(tmp_path / "on", noisy(family), dropout=True)
    assert abs(loud["trace/rewards/margins"]) > 1e-3


def test_rope_of_its_own_length_agrees_with_the_reference(tmp_path: Path) -> None:
    """Margins of the first step are 0 although the reference pass groups quads otherwise. Mutation: the frequencies of a
    longer sequence, in the row or before it, reach a shorter one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope, max_position_embeddings=12)
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, transformers.LlamaForCausalLM(config), QUADS, max_steps=1, logging_steps=1)
    assert trainer.layout == "single"
    trainer.train()
    logs = trainer.state.log_history[0]
    assert [logs[f"{view}/rewards/margins"] for view in ("trace", "empty")] == pytest.approx([0, 0], abs=1e-6)


def test_an_adapter_keeps_its_dropout(tmp_path: Path) -> None:
    """Mutation: every module silenced; peft's setting would be read and not followed."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")
    for name, arguments in (("ours", {"peft_config": lora}), ("given", {})):
        model = noisy("Phimoe" if name == "ours" else "SeedOss")
        model = model if arguments else get_peft_model(model, lora)
        trainer = make_trainer(tmp_path / name, model, QUADS, **arguments)
        trainer.model.train()
        own = [m for n, m in trainer.model.named_modules() if "lora_dropout." in n]
        assert own and all(m.p == 0.3 and m.training for m in own)


class Noise(nn.Module):
    """What nobody can know of, in a module that decides about gradient checkpointing by its mode."""

    gradient_checkpointing = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.05 * torch.randn_like(hidden) if self.training else hidden


def test_noise_that_cannot_be_switched_off_is_refused(tmp_path: Path) -> None:
    """Mutation: a model accepted without measuring."""
    model = tiny_causal_lm("qwen2", dtype=torch.float32)
    model.model.norm = nn.Sequential(model.model.norm, Noise())
    with pytest.raises(UserError, match="noise that cannot be switched off"):
        make_trainer(tmp_path, model, QUADS, layout="padded")


def test_sequence_backward_needs_no_dropout_at_all(tmp_path: Path) -> None:
    """It runs each forward twice. Mutations: floats that modules keep not found; a quiet model refused."""
    model = noisy("SeedOss")
    assert has_dropout(model)
    with pytest.raises(UserError, match="needs dropout 0"):
        make_trainer(tmp_path / "a", model, QUADS, backward="sequence", dropout=True)
    make_trainer(tmp_path / "b", model, QUADS, backward="sequence")
    assert not has_dropout(model)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_declared_start_is_the_loss_at_the_reference(tmp_path: Path, name: str) -> None:
    """Mutations: a wrong value in the registry; one declared where it depends on lengths (rdpo); the check of the
    first loss reading another loss than the run's."""
    given = {"beta": 0.7, "label_smoothing": 0.2, "length_weight": 0.1, "gamma": 0.5}
    config = LossConfig(name=name, **{key: given[key] for key in LOSSES[name].params})  # type: ignore[arg-type]
    entry, values = resolve_loss(config)
    same = torch.tensor([-9.0, -4.0], dtype=torch.float64)
    lengths = torch.tensor([3, 8])
    logps = PairLogps(
        chosen=same, rejected=2 * same, ref_chosen=same, ref_rejected=2 * same,
        chosen_lengths=lengths, rejected_lengths=lengths + 5,
    )  # fmt: skip
    loss = pair_loss(config, logps).loss
    if entry.at_reference is None:
        assert name in ("rdpo", "simpo") and loss[0] != pytest.approx(math.log(2))
    else:
        assert loss.tolist() == pytest.approx([entry.at_reference(**values)] * 2, abs=1e-12)
    first(tmp_path, tiny_causal_lm("qwen2", dtype=torch.float32), loss=name, alpha=0.3, **values)


@pytest.mark.parametrize("backward", ["micro_batch", "sequence"])
def test_a_policy_that_is_not_its_reference_is_refused(tmp_path: Path, backward: str) -> None:
    """PiSSA moves a part of the weights into the adapter, so that switching it off is another model. Mutations: no check;
    a check that resumed or given references would meet, too."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    model = tiny_causal_lm("qwen2", dtype=torch.float32)
    with pytest.raises(UserError, match=r"does not compute what the reference does.*nats over \d+ tokens.*not 0.6931"):
        first(tmp_path / "a", model, peft_config=lora, backward=backward)
    random = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # asked for: away from the reference
    first(tmp_path / "b", tiny_causal_lm("qwen2", dtype=torch.float32), peft_config=random, backward=backward)
    other = tiny_causal_lm("qwen2", dtype=torch.float32, seed=5)
    first(tmp_path / "c", tiny_causal_lm("qwen2", dtype=torch.float32), ref_model=other, backward=backward)


def test_a_mixture_that_does_not_add_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: log-ratios alone checked; views weighted wrongly train in silence."""
    from bvpo.training.objective import Objective

    whole = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda *a: (1.1 * (found := whole(*a))[0], found[1]))
    with pytest.raises(
        UserError, match=r"the first loss is 0\.762462, but with policy = reference it must be 0\.693147"
    ):
        first(tmp_path, tiny_causal_lm("qwen2", dtype=torch.float32))


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros_like(grad)


@pytest.mark.parametrize("kind", ["zero", "detached"])
def test_a_gradient_of_zero_stops_the_run(tmp_path: Path, kind: str) -> None:
    """Mutations: no check (grad_norm 0 at every step); a traceback of autograd in place of a line."""
    model = tiny_causal_lm("qwen2", dtype=torch.float32)
    model.lm_head.requires_grad_(False)
    cut: Any = Cut.apply if kind == "zero" else torch.Tensor.detach
    model.model.norm.register_forward_hook(lambda module, args, out: cut(out))
    message = {"zero": "gradient is exactly zero", "detached": "no gradient reaches"}[kind]
    with pytest.raises(UserError, match=message):
        first(tmp_path, model)


def test_a_gradient_may_be_zero_where_the_loss_asks_for_nothing(tmp_path: Path) -> None:
    """A satisfied hinge, a view without weight, pairs of twins. Mutation: grad_norm 0 taken for an error by itself."""
    import dataclasses

    model = tiny_causal_lm("qwen2", dtype=torch.float32)
    twins = [dataclasses.replace(q, branches=(q.branches[0], q.branches[0], None, None)) for q in QUADS]
    assert first(tmp_path / "twins", model, twins)["grad_norm"] < 1e-6
    only_trace = [dataclasses.replace(q, branches=(*q.branches[:2], None, None)) for q in QUADS]
    assert first(tmp_path / "weightless", model, only_trace, alpha=0.0)["grad_norm"] == 0
    other = tiny_causal_lm("qwen2", dtype=torch.float32, seed=5)
    satisfied = []
    for quad in QUADS:
        with torch.no_grad():
            gaps = [margin(model, other, quad, v) for v in (0, 2)]
        b = quad.branches
        pairs = [b[i : i + 2] if gap > 0 else b[i : i + 2][::-1] for i, gap in zip((0, 2), gaps, strict=True)]
        satisfied.append(dataclasses.replace(quad, branches=(*pairs[0], *pairs[1])))
    logs = first(tmp_path / "hinge", model, satisfied, ref_model=other, loss="hinge", beta=50.0)
    assert logs["grad_norm"] == 0 and logs["loss"] == 0


def margin(model: Any, other: Any, quad: Any, v: int) -> float:
    ratios = []
    for branch in quad.branches[v : v + 2]:
        ids = torch.tensor([[*quad.prefix_ids, *branch.ids]], dtype=torch.long)
        start = len(quad.prefix_ids) + branch.scored_from
        logps = [torch.log_softmax(m(input_ids=ids).logits[0, :-1], -1) for m in (model, other)]
        sums = [table.gather(1, ids[0, 1:, None])[start - 1 :].sum() for table in logps]
        ratios.append(float(sums[0] - sums[1]))
    return ratios[0] - ratios[1]


def test_a_4_bit_base_on_a_cpu_is_refused(tmp_path):
    """Adapters of its last layers would still have a gradient, and others a wrong one: no zero gives it away. A stand-in
    for bitsandbytes' class. Mutation: only a gradient of exactly zero is refused."""

    class Linear4bit(torch.nn.Linear):
        pass

    model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
    model.model.layers[0].mlp.down_proj.__class__ = Linear4bit
    with pytest.raises(UserError, match="4-bit base on a CPU"):
        make_trainer(tmp_path, model, random_quads(3, seed=1))
