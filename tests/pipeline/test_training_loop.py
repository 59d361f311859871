"""The real training loop on tiny models: resuming, metrics, evaluation, checkpoints of another run, divergence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, write_tokens

from bvpo.strict import UserError
from bvpo.training.checkpoints import damage, read

pytestmark = pytest.mark.filterwarnings("ignore")

QUADS = random_quads(13, seed=11, ragged_views=True, tails=True)
SETTINGS = {
    "beta": 0.3,
    "learning_rate": 1e-3,
    "quads_per_step": 3,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
}


class StopAt:
    """A callback that stops the run after a step, as a preemption would."""

    def __new__(cls, step):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == step

        return Stop()


def trainer(folder, quads=QUADS, **settings):
    model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
    return make_trainer(folder, model, quads, **(SETTINGS | settings))


def entries(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop):
    """Bit for bit, within and between epochs (an epoch has 5 steps). Mutations: the epoch's order not restored on
    resume; the reference recomputed from the trained weights; dropped optimizer state."""
    whole = trainer(tmp_path / "whole", alpha=0.9, alpha_schedule="cosine", alpha_end=0.1)
    whole.train()
    part = trainer(tmp_path / "part", callbacks=[StopAt(stop)], alpha=0.9, alpha_schedule="cosine", alpha_end=0.1)
    part.train()
    assert part.state.global_step == stop
    resumed = trainer(tmp_path / "part", alpha=0.9, alpha_schedule="cosine", alpha_end=0.1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 10
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(entries(whole), entries(resumed), strict=True):
        assert {k: v for k, v in one.items() if "per_second" not in k} == {
            k: v for k, v in other.items() if "per_second" not in k
        }


def test_metrics_of_both_views_are_logged(tmp_path):
    """Mutation: statistics divided by micro-batches instead of pairs."""
    run = trainer(tmp_path, tokens_per_micro_batch=90)
    run.train()
    first = entries(run)[0]
    for view in ("trace", "empty"):
        assert first[f"{view}/loss"] == pytest.approx(0.6931, abs=1e-3), "step 0 starts at log 2"
        assert first[f"{view}/rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(0.5 * first["trace/loss"] + 0.5 * first["empty/loss"], rel=1e-5)
    assert {
        "alpha",
        "tokens_per_second",
        "grad_norm",
        "trace/kl",
        "empty/logps/chosen",
        "trace/lengths/rejected",
    } <= set(first)
    pairs = sum(entry.get("trace/pairs", 0) for entry in entries(run)[:5])
    assert pairs == sum(quad.branches[0] is not None for quad in QUADS), "an epoch sees every pair once"
    last = [entry for entry in entries(run) if "trace/loss" in entry][-1]
    assert last["trace/rewards/margins"] > 0.05, "training separates chosen from rejected"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [entry["loss"] for entry in entries(run)]


def test_evaluation_covers_all_held_out_quads(tmp_path):
    """At the start every DPO loss is log 2. Mutation: evaluation weighs views by the training step's pair counts."""
    held_out = random_quads(7, seed=12)
    run = trainer(tmp_path, eval_strategy="epoch", eval_dataset=write_tokens(tmp_path / "eval", held_out))
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert before["eval_trace/pairs"] + before["eval_empty/pairs"] == sum(sum(q.has_view) for q in held_out)
    run.train()
    after = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(after) == 2 and after[-1] != before["eval_loss"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Mutation: resuming under another beta goes unnoticed."""
    trainer(tmp_path, callbacks=[StopAt(2)]).train()
    with pytest.raises(UserError, match=r"another run.*beta: 0.3 -> 0.4"):
        trainer(tmp_path, beta=0.4).train(resume_from_checkpoint=True)


def test_other_data_is_another_run(tmp_path):
    """Mutation: the identity leaves out the data."""
    trainer(tmp_path, callbacks=[StopAt(2)]).train()
    with pytest.raises(UserError, match="train_data"):
        trainer(tmp_path, quads=random_quads(13, seed=99)).train(resume_from_checkpoint=True)


def test_divergence_stops_with_one_line(tmp_path):
    """Mutation: transformers' NaN filter replaces the loss by the last finite one."""
    run = trainer(tmp_path, learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0)
    with pytest.raises(UserError, match="diverged"):
        run.train()


def test_half_precision_weights_are_refused_unless_named(tmp_path):
    """Mutation: bf16 master weights accepted silently."""
    model = tiny_causal_lm("qwen2", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="pure_bf16"):
        make_trainer(tmp_path, model, QUADS)
    make_trainer(tmp_path, tiny_causal_lm("qwen2", dtype=torch.bfloat16), QUADS, precision="pure_bf16")


def test_reference_is_computed_once(tmp_path, monkeypatch):
    """A second run with another loss and alpha makes no reference forward. Mutation: beta in the cache's key."""
    from bvpo.training import reference

    calls = []
    original = reference.reference_sums
    monkeypatch.setattr(reference, "reference_sums", lambda *a: calls.append(1) or original(*a))
    cache = str(tmp_path / "cache")
    trainer(tmp_path / "a", reference_cache=cache, max_steps=1).train()
    first = len(calls)
    assert first == len(QUADS)
    trainer(tmp_path / "b", reference_cache=cache, max_steps=1, beta=0.7, alpha=0.1, loss="hinge").train()
    assert len(calls) == first
    changed = tiny_causal_lm("qwen2", seed=3, dtype=torch.float32)
    make_trainer(tmp_path / "c", changed, QUADS, **(SETTINGS | {"reference_cache": cache, "max_steps": 1})).train()
    assert len(calls) == 2 * first, "other weights are another reference"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpoo"}, "did you mean 'dpo'"),
        ({"layout": "trees"}, "layout: got 'trees'"),
        ({"alpha": 1.5}, "alpha"),
        ({"anchor_weight": 0.1}, "anchor"),
        ({"reference": "adapter"}, "no adapter"),
        ({"gamma": 2.0}, "does not read it"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path, settings, message):
    """Mutation: any of these accepted."""
    with pytest.raises(UserError, match=message) as error:
        trainer(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_saved_model_is_a_plain_folder(tmp_path):
    """The saved model loads with transformers alone and names no implementation of ours. Mutation: 'bvpo' attention
    written to config.json."""
    from transformers import AutoModelForCausalLM

    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert "bvpo" not in (tmp_path / "final" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for (name, one), other in zip(run.model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(run.model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits, atol=1e-5)


def test_generation_during_training_uses_ordinary_attention(tmp_path):
    """Callbacks may generate with the model under training. Mutation: our attention without a plan ignores padding."""
    run = trainer(tmp_path, max_steps=1)
    run.train()
    plain = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
    plain.load_state_dict(run.model.state_dict())
    ids = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    one, other = (
        m.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for m in (run.model, plain)
    )
    assert torch.equal(one, other)


def test_another_model_is_another_run(tmp_path):
    """The checkpoint's policy would train against the new model's reference. Mutation: the identity leaves out the
    reference's weights."""
    trainer(tmp_path, callbacks=[StopAt(2)]).train()
    other = tiny_causal_lm("qwen2", seed=5, dtype=torch.float32)
    with pytest.raises(UserError, match="reference_weights"):
        make_trainer(tmp_path, other, QUADS, **SETTINGS).train(resume_from_checkpoint=True)


def test_another_adapter_is_another_run(tmp_path):
    """Its settings scale the same weights. Mutation: the identity leaves out the adapter."""
    from peft import LoraConfig

    def lora(alpha):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return trainer(tmp_path, callbacks=[StopAt(2)], peft_config=config)

    lora(4).train()
    assert lora(4).identity() == lora(4).identity()
    read(Path(lora(4).newest_checkpoint()), lora(4).identity())
    with pytest.raises(UserError, match=r"another run.*adapter.*'lora_alpha': 4.*'lora_alpha': 8"):
        lora(8).train(resume_from_checkpoint=True)


def test_the_hub_gets_neither_data_nor_reference(tmp_path):
    """transformers uploads the output folder but for what starts with an underscore. Mutation: folders named otherwise."""
    run = trainer(tmp_path)
    run.train()
    named = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert {name for name in named if not name.startswith(("_", "checkpoint-"))} == set()
    assert "_reference" in named


def test_an_uploaded_checkpoint_can_be_resumed_from(tmp_path, monkeypatch):
    """Mutations: the upload before the marker is written, as transformers has it; none at all."""
    from transformers import Trainer

    uploaded = []

    def upload(self, folder):
        uploaded.append((Path(folder).name, damage(Path(folder))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", upload)
    run = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    run.args.push_to_hub = True
    run.train()
    assert uploaded == [("checkpoint-1", ""), ("checkpoint-2", "")]


def test_the_same_weights_under_another_config_are_another_reference(tmp_path):
    """Rope settings are no part of the weights. Mutation: a cache keyed by the weights alone, whose values then give a
    first loss far from log 2."""
    for base in (10000.0, 100.0):
        rope = {"rope_type": "default", "rope_theta": base}
        model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32, rope_parameters=rope)
        settings = SETTINGS | {"reference_cache": str(tmp_path / "cache"), "max_steps": 1}
        run = make_trainer(tmp_path / str(base), model, QUADS, **settings)
        run.train()
        assert entries(run)[0]["trace/loss"] == pytest.approx(0.693147, abs=1e-5)


def test_evaluation_drops_nothing_and_keeps_its_set(tmp_path):
    """Mutations: ``last_step = "drop"`` applied to held-out quads; a set given to evaluate() once replaces the trainer's
    own in later evaluations."""
    five, two = (
        write_tokens(tmp_path / f"eval{n}", random_quads(n, seed=12, ragged_views=False, vocab=90)) for n in (5, 2)
    )
    run = trainer(tmp_path, eval_dataset=five, last_step="drop")
    assert run.evaluate()["eval_trace/pairs"] == 5
    assert run.evaluate(two)["eval_trace/pairs"] == 2
    assert run.evaluate()["eval_trace/pairs"] == 5


def test_divergence_after_the_last_log_entry_is_seen(tmp_path):
    """Mutation: only log entries are checked, and the model of a run whose last steps are NaN is saved."""
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))

    with pytest.raises(UserError, match="diverged"):
        trainer(tmp_path, callbacks=[Break()], max_steps=3, logging_steps=2).train()


def test_steps_skipped_by_loss_scaling_are_no_divergence():
    """fp16's gradient overflows while its scale is found. Mutation: an infinite norm ends every fp16 run."""
    from bvpo.training.trainer import _require_finite

    _require_finite({"loss": 0.7, "grad_norm": float("inf")}, may_skip_steps=True)
    with pytest.raises(UserError, match="grad_norm"):
        _require_finite({"loss": 0.7, "grad_norm": float("inf")}, may_skip_steps=False)
