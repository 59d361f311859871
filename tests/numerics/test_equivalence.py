"""One optimizer step does not depend on how it is computed: layouts, micro-batches, per-sequence backward,
checkpointing, head chunks, adapters. Compared in float64 with norms that stay in float64."""

from __future__ import annotations

import pytest
import torch
from training_fixtures import (
    make_trainer,
    random_quads,
    step_gradients,
    tiny_causal_lm,
    use_exact_norms,
)

from bvpo.strict import UserError

pytestmark = pytest.mark.filterwarnings("ignore")

RAGGED = random_quads(8, seed=3, ragged_views=True, tails=True)
TIGHT = 1e-11


def gradients(folder, quads=RAGGED, family="qwen2", seed=2, **settings):
    """Loss and gradient away from the reference, for one step over all quads."""
    trainer = make_trainer(folder, use_exact_norms(tiny_causal_lm(family, seed=seed)), quads, beta=0.3, **settings)
    trainer.fill_reference(trainer.model)
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    with torch.no_grad():
        for i, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    assert base is not None
    return (*step_gradients(trainer), trainer)


def assert_same(one, other, tolerance=TIGHT):
    assert abs(one[0] - other[0]).item() <= tolerance * max(1.0, abs(one[0].item()))
    assert one[1].norm() > 1e-4
    assert ((one[1] - other[1]).norm() / one[1].norm()).item() <= tolerance


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma3"])
def test_tree_packed_and_padded_agree(tmp_path, family):
    """Mutations: prefix keys gathered from the neighbouring quad; unscored prompt tail scored."""
    results = {name: gradients(tmp_path / name, family=family, layout=name) for name in ("tree", "packed", "padded")}
    assert all(result[2].layout == name for name, result in results.items())
    assert_same(results["padded"], results["tree"])
    assert_same(results["padded"], results["packed"])


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_single_is_a_step_too(tmp_path, family, monkeypatch):
    """With a cached reference, in micro-batches. Mutations: its tokens counted as the tree's; a rank that runs another
    number of forwards than its peers let into sharded training."""
    one = gradients(tmp_path / "padded", family=family, layout="padded")
    other = gradients(tmp_path / "single", family=family, layout="single", tokens_per_micro_batch=100)
    assert len(other[2]._train_steps[0]["step"].micro_batches) > 2
    assert_same(one, other)
    monkeypatch.setattr("bvpo.training.trainer.is_launched_sharded", lambda: True)
    with pytest.raises(UserError, match="this model cannot be sharded"):
        make_trainer(tmp_path / "sharded", tiny_causal_lm(family), RAGGED, layout="single")


def test_gemma2_soft_caps_agree_in_float32(tmp_path):
    """Gemma-2 caps attention scores and logits. transformers' own padded path is not finite in float64, so float32.
    Mutation: the soft cap's derivative left out of the head's backward."""
    results = []
    for name in ("tree", "padded"):
        model = tiny_causal_lm("gemma2", seed=2, dtype=torch.float32, attn_implementation="eager")
        trainer = make_trainer(tmp_path / name, model, RAGGED, beta=0.3, layout=name, loss="simpo", gamma=0.5)
        results.append(step_gradients(trainer))
    assert_same(results[0], results[1], tolerance=2e-4)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_micro_batches_only_partition_a_step(tmp_path, budget):
    """8 quads in 8, some, or 1 backward passes, with ragged views. Mutation: a view's mean over the micro-batch."""
    one = gradients(tmp_path / "a")
    other = gradients(tmp_path / "b", tokens_per_micro_batch=budget)
    counts = {len(other[2]._train_steps[0]["step"].micro_batches)}
    assert counts <= ({8} if budget == 1 else {1} if budget == 10_000 else set(range(2, 8)))
    assert_same(one, other)


def test_batch_times_accumulation_means_the_same_step(tmp_path):
    """TRL's way to say a batch: per_device_train_batch_size x gradient_accumulation_steps. Mutation: accumulation is
    left to transformers' loop, which would divide the loss again."""
    one = gradients(tmp_path / "a", quads_per_step=None, per_device_train_batch_size=8)
    other = gradients(tmp_path / "b", quads_per_step=None, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert one[2].args.quads_per_step == other[2].args.quads_per_step == 8
    assert_same(one, other)


@pytest.mark.parametrize("anchor", ["none", "nll", "kl"])
def test_sequence_backward_agrees(tmp_path, anchor):
    """Mutation: the cached gradient of a missing branch sent to its neighbour."""
    extra = {} if anchor == "none" else {"anchor": anchor, "anchor_weight": 0.2}
    one = gradients(tmp_path / "a", **extra)
    other = gradients(tmp_path / "b", backward="sequence", **extra)
    assert_same(one, other)


def test_gradient_checkpointing_agrees(tmp_path):
    """Mutation: the recomputed forward loses the attention plan."""
    one = gradients(tmp_path / "a")
    model_calls = []
    other_trainer = make_trainer(tmp_path / "b", use_exact_norms(tiny_causal_lm("qwen2", seed=2)), RAGGED, beta=0.3)
    other_trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer = other_trainer.model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: model_calls.append(1))  # recomputation stops inside its forward
    other_trainer.fill_reference(other_trainer.model)
    with torch.no_grad():
        for i, parameter in enumerate(other_trainer.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    model_calls.clear()
    other = step_gradients(other_trainer)
    assert len(model_calls) == 2 * len(RAGGED), "every layer must run twice: forward and recomputation"
    assert_same(one, other)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_head_chunks_do_not_change_the_result(tmp_path, chunk):
    """Mutation: the last, shorter chunk dropped."""
    assert_same(gradients(tmp_path / "a"), gradients(tmp_path / "b", head_chunk=chunk))


def test_held_reference_equals_cached(tmp_path):
    """Mutation: the held copy shares the policy's weights."""
    assert_same(gradients(tmp_path / "a"), gradients(tmp_path / "b", reference="held"))


def test_lora_run_equals_its_merged_weights(tmp_path):
    """The adapter's log-probs are those of the merged model, and its reference those of the base model.
    Mutations: the head trains although it is frozen; the reference pass with the adapter on."""
    from peft import LoraConfig

    settings = {"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)}
    trainer = make_trainer(
        tmp_path / "lora", use_exact_norms(tiny_causal_lm("qwen2", seed=2)), RAGGED, beta=0.3, **settings
    )
    trainer.fill_reference(trainer.model)
    loss, gradient = step_gradients(trainer)
    adapter = make_trainer(
        tmp_path / "adapter",
        use_exact_norms(tiny_causal_lm("qwen2", seed=2)),
        RAGGED,
        beta=0.3,
        reference="adapter",
        **settings,
    )
    assert_same((loss, gradient), step_gradients(adapter))
    merged = use_exact_norms(trainer.model.merge_and_unload())
    merged.requires_grad_(True)
    base = tiny_causal_lm("qwen2", seed=2)
    check = make_trainer(tmp_path / "merged", merged, RAGGED, beta=0.3, ref_model=use_exact_norms(base))
    merged_loss, _ = step_gradients(check)
    assert abs(merged_loss - loss).item() <= 1e-10
    assert loss.item() != pytest.approx(0.6931, abs=1e-3), "the adapter must matter"


def test_kl_anchor_equals_full_vocabulary_oracle(tmp_path):
    """The chunked KL against kl_from_logits on full logits, trace view only. Mutations: KL(policy || reference); KL over
    the answer too; the empty view anchored."""
    from bvpo.method.losses import kl_from_logits
    from bvpo.training.layout import LAYOUTS

    quads = random_quads(3, seed=5, ragged_views=False)
    plain = gradients(tmp_path / "a", quads=quads)
    anchored = gradients(tmp_path / "b", quads=quads, anchor="kl", anchor_weight=0.25)
    trainer = anchored[2]
    reference = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    layout = LAYOUTS["padded"](quads)
    inputs = {"input_ids": layout.input_ids_RT, "attention_mask": layout.attention_mask_RT}
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=9))
    model.load_state_dict(trainer.model.state_dict())
    logits, ref_logits = (m(**inputs).logits.flatten(0, 1)[layout.rows_N] for m in (model, reference))
    kl_N = kl_from_logits(ref_logits, logits)
    parts = kl_N.split(list(layout.segment_sizes))
    total = sum(parts[2 * slot].sum() for slot, (_, b) in enumerate(layout.slots) if b < 2)
    expected = 0.25 * total / len(quads)
    expected.backward()
    oracle = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(anchored[0] - plain[0] - expected).item() <= 1e-10
    difference = anchored[1] - plain[1]
    assert ((difference - oracle).norm() / oracle.norm()).item() <= 1e-9


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_bf16_autocast_is_near_float32(tmp_path, adapter):
    """Weights stay float32, products run in bf16, log-prob sums and gradients stay float32. Mutations: no autocast (then
    the results would be equal); sums of log-probs in bf16 (then the loss would be off by far more)."""
    from peft import LoraConfig

    results = {}
    for precision in ("fp32", "bf16"):
        extra = (
            {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)} if adapter else {}
        )
        model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
        trainer = make_trainer(
            tmp_path / precision, model, RAGGED, precision=precision, loss="simpo", gamma=0.5, **extra
        )
        results[precision] = step_gradients(trainer)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    (full_loss, full), (half_loss, half) = results["fp32"], results["bf16"]
    assert half_loss.dtype == half.dtype == torch.float32
    assert 0 < abs(full_loss - half_loss).item() < 0.02
    assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.99


def padded_sums(model, quads):
    """[Q, 4, 2] policy sums from plain logits of padded sequences: trace part, answer part."""
    from bvpo.training.layout import LAYOUTS

    layout = LAYOUTS["padded"](quads)
    logits = model(input_ids=layout.input_ids_RT, attention_mask=layout.attention_mask_RT).logits.flatten(0, 1)
    logps = logits[layout.rows_N].log_softmax(-1).gather(1, layout.targets_N[:, None])[:, 0]
    parts = torch.stack([part.sum() for part in logps.split(list(layout.segment_sizes))])
    return parts.view(len(quads), 4, 2)


def oracle_pair(folder, quads, **settings):
    """Our loss and gradient, and plain-logit sums of the same policy and of its reference."""
    ours = gradients(folder, quads=quads, **settings)
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=9))
    model.load_state_dict(ours[2].model.state_dict())
    with torch.no_grad():
        reference = padded_sums(use_exact_norms(tiny_causal_lm("qwen2", seed=2)), quads)
    return ours, model, padded_sums(model, quads), reference


def assert_equals_oracle(ours, model, expected):
    expected.backward()
    oracle = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(ours[0] - expected).item() <= 1e-10
    assert ((ours[1] - oracle).norm() / oracle.norm()).item() <= 1e-9


def test_answer_estimator_scores_the_answer_given_its_trace(tmp_path):
    """alpha = 1: only answer tokens of the trace view count, yet the trace is in the context. Mutations: the closing
    marker counted; the trace's log-probs left in the reference."""
    quads = random_quads(3, seed=5, ragged_views=False)
    ours, model, policy, reference = oracle_pair(tmp_path, quads, alpha=1.0, trace_estimator="answer")
    ratio = (policy - reference)[:, :2, 1]
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratio[:, 0] - ratio[:, 1])).mean()
    assert_equals_oracle(ours, model, expected)


@pytest.mark.parametrize("tokens", ["trace", "answer", "both"])
def test_nll_anchor_equals_plain_logits(tmp_path, tokens):
    """L + weight * mean NLL of the chosen trace-view response. Mutations: the rejected response anchored; the weight
    multiplied by alpha; a mean over tokens."""
    quads = random_quads(3, seed=5, ragged_views=False)
    settings = {"anchor": "nll", "anchor_tokens": tokens, "anchor_weight": 0.25, "alpha": 0.4}
    ours, model, policy, reference = oracle_pair(tmp_path, quads, **settings)
    ratio = (policy - reference).sum(-1)
    losses = [-torch.nn.functional.logsigmoid(0.3 * (ratio[:, b] - ratio[:, b + 1])).mean() for b in (0, 2)]
    parts = {"trace": [0], "answer": [1], "both": [0, 1]}[tokens]
    anchor = -policy[:, 0, parts].sum(-1).mean()
    assert_equals_oracle(ours, model, 0.4 * losses[0] + 0.6 * losses[1] + 0.25 * anchor)


def test_state_space_models_fall_back_to_padded_rows(tmp_path):
    """A recurrent model would leak state between packed sequences without a word. Mutation: the probe removed."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    trainer = make_trainer(tmp_path, MambaForCausalLM(config).double(), random_quads(3, seed=5))
    assert trainer.layout == "padded"


def test_sparse_attention_falls_back_to_padded_rows(tmp_path):
    """DeepSeek-V3.2 hands attention the top-k keys of each query, which ours does not read; sequences shorter than k, like
    the layout probe's, do not show it. Mutation: the indices ignored (12 nats off beyond k tokens)."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, index_topk=64, index_head_dim=16, index_n_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    trainer = make_trainer(tmp_path, DeepseekV32ForCausalLM(config), random_quads(3, seed=5))
    assert trainer.layout == "padded"


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_blocks_of_queries_do_not_change_the_result(tmp_path, monkeypatch, family):
    """Long sequences are attended to in blocks; here blocks of 3. Mutations: a block sees one key too many; the window
    counted from the block's start."""
    from bvpo.training import attention

    one = gradients(tmp_path / "a", family=family)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    assert_same(one, gradients(tmp_path / "b", family=family))
