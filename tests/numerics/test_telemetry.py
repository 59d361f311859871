"""Looks at gradient noise: right gradients, sketches that can be compared, and a training that does not notice them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_fixtures import make_trainer, random_quads, step_gradients, tiny_causal_lm, use_exact_norms

from bvpo.method.online_alpha import StepPairs
from bvpo.strict import UserError
from bvpo.training.probe import samples as looks
from bvpo.training.probe.sketching import BUCKETS, CountSketch
from bvpo.training.probe.telemetry import expected_pairs, measure

pytestmark = pytest.mark.filterwarnings("ignore")

QUADS = random_quads(24, seed=11, ragged_views=False, tails=True)
CPU = torch.device("cpu")


# --- sketches --------------------------------------------------------------------------------------------------------


def test_sketches_keep_inner_products_on_average():
    """Over 60 seeds, within 4 standard errors, for vectors longer than a block that repeat themselves (as gradients of
    repeated structure do). Mutations: one sign per bucket; blocks that share all their signs; a block's tail dropped."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=generator, dtype=torch.float64)
    a = [base.repeat(500), torch.randn(3, 700, generator=generator, dtype=torch.float64)]
    b = [a[0] + 0.5, a[1] * 2]
    exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    found = []
    for seed in range(60):
        sketch = CountSketch((seed, 7), CPU, torch.float64)
        found.append(float(sketch(a) @ sketch(b)))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - exact) < 4 * error
    assert np.std(found) / exact < 3 * np.sqrt(2 / BUCKETS), "no better than one number"


def test_sketches_are_linear_and_small_models_take_one_block():
    """Mutation: another order of signs for each gradient."""
    generator = torch.Generator().manual_seed(1)
    a, b = ([torch.randn(s, generator=generator) for s in ((3, 5), (700,), (300_000,))] for _ in range(2))
    for end in (2, 3):  # joined, and tensor by tensor
        sketch = CountSketch((3,), CPU)
        both = sketch([x + 2 * y for x, y in zip(a[:end], b[:end], strict=True)])
        torch.testing.assert_close(both, sketch(a[:end]) + 2 * sketch(b[:end]), rtol=1e-4, atol=1e-3)
        assert not torch.equal(sketch(a[:end]), CountSketch((4,), CPU)(a[:end]))


# --- gradients -------------------------------------------------------------------------------------------------------


def moved(folder, quads=QUADS, **settings):
    """A trainer away from the reference, with its reference filled."""
    trainer = make_trainer(folder, use_exact_norms(tiny_causal_lm("qwen2", seed=2)), quads, beta=0.3, **settings)
    trainer.fill_reference(trainer.model)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    return trainer


def oracle(folder, quad, alpha, **settings):
    """The gradient of a step with this quad alone, and its sketch."""
    trainer = moved(folder, [quad], alpha=alpha, **settings)
    _, gradient = step_gradients(trainer)
    return CountSketch((5, 6), CPU, torch.float64)([gradient])


WAYS = {
    "plain": {},
    "sequence": {"backward": "sequence"},
    "anchored": {"anchor": "kl", "anchor_weight": 0.2},
    "held": {"reference": "held"},
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_the_views_own_gradients(tmp_path, way):
    """Each row equals a step's gradient at alpha 1 and alpha 0 with that quad alone, without the anchor. Mutations: the
    empty view's tokens in the trace view's gradient; weights of the step's pair counts; the anchor left in."""
    from bvpo.config import AnchorConfig
    from bvpo.training.objective import Objective

    settings = WAYS[way]
    trainer = moved(tmp_path / "all", **settings)
    trainer.objective = Objective(trainer.args.loss_config(), "joint", AnchorConfig())
    rows = trainer.look(looks.Plan(views=("trace", "empty"), quads=(4, 0, 9)), (5, 6), BUCKETS)
    plain = {} if "anchor" in settings else settings
    for row, index in enumerate((4, 0)):
        for view, alpha in (("trace", 1.0), ("empty", 0.0)):
            expected = oracle(tmp_path / f"{view}{index}", QUADS[index], alpha, **plain)
            np.testing.assert_allclose(rows.sketches[view][row], expected, rtol=1e-8, atol=1e-9)
    assert (rows.drift > 0.01).all() and len(rows.siblings) == 0


def test_drift_is_the_mean_absolute_log_ratio(tmp_path):
    """Against the statistics of a step with that quad alone. Mutations: ratios of single tokens; of the empty view."""
    rows = moved(tmp_path / "a").look(looks.Plan(views=("trace", "empty"), quads=(3, 7)), (1,), BUCKETS)
    alone = moved(tmp_path / "b", [QUADS[3]])
    step_gradients(alone)
    from bvpo.training.objective import describe

    found = describe(alone._statistics)
    rewards = [abs(found[f"trace/rewards/{side}"]) / 0.3 for side in ("chosen", "rejected")]
    assert rows.drift[0] == pytest.approx(np.mean(rewards), rel=1e-9)


def test_adapters_alone_are_looked_at(tmp_path):
    """Mutation: gradients of frozen weights."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer = moved(tmp_path, peft_config=lora)
    taker = looks._Taker.of(trainer.model, trainer._runner(), (1,), BUCKETS)
    assert taker.params and all(p.requires_grad for p in taker.params)
    assert len(taker.params) < len(list(trainer.model.parameters()))
    rows = trainer.look(looks.Plan(views=("trace", "empty"), quads=(0, 1)), (1,), BUCKETS)
    assert np.abs(rows.sketches["trace"]).sum() > 0


# --- which quads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [(2, 2), (3, 3), (6, 4), (16, 8), (128, 32)])
def test_a_look_takes_part_of_the_step(step, expected):
    """At least 4 quads where there are so many, half of the step, at most 32. Mutations: the whole step; quads twice."""
    has_view = np.ones((200, 2), dtype=bool)
    indices = list(range(50, 50 + step))
    plan = looks.choose(indices, has_view, 1, np.random.default_rng(0))
    assert plan is not None and plan.views == ("trace", "empty")
    assert len(set(plan.quads)) == len(plan.quads) == plan.num_rows == expected and set(plan.quads) <= set(indices)
    assert plan != looks.choose(indices, has_view, 1, np.random.default_rng(1)) or step < 4


def test_incomplete_quads_are_passed_over():
    """Mutations: a quad with one view among those compared; nothing said of data with one view."""
    has_view = np.ones((10, 2), dtype=bool)
    has_view[::2, 1] = False
    plan = looks.choose(range(10), has_view, 1, np.random.default_rng(0))
    assert plan is not None and all(i % 2 for i in plan.quads)
    has_view[:, 1] = False
    plan = looks.choose(range(10), has_view, 1, np.random.default_rng(0))
    assert plan is not None and plan.views == ("trace",) and plan.num_rows == 5
    assert looks.choose([3], has_view, 1, np.random.default_rng(0)) is None
    assert looks.choose(range(7), np.ones((7, 2), dtype=bool), 4, np.random.default_rng(0)) is None, "rows of 4 quads"


def test_expected_pairs_are_those_of_an_average_step(tmp_path):
    """Mutation: quads in place of pairs."""
    trainer = make_trainer(tmp_path, tiny_causal_lm("qwen2"), random_quads(9, seed=1), quads_per_step=6)
    assert expected_pairs(trainer._train_steps, 6) == StepPairs(trace=4.0, empty=4.0, both=2.0)


def test_pairs_of_one_prompt_are_found_and_compared(tmp_path):
    """Two neighbours share a prompt. Mutations: any two neighbours taken for siblings; one without a trace pair; the share
    of a prompt's pairs halved or doubled."""
    import dataclasses

    twin = dataclasses.replace(QUADS[7], id="twin", prefix_ids=QUADS[2].prefix_ids)
    without = dataclasses.replace(twin, branches=(None, None, *twin.branches[2:]))
    trainer = moved(tmp_path, [*QUADS[:3], twin, without, QUADS[4]])
    assert [looks.same_prompt(trainer._train_steps, i) for i in range(6)] == [None, None, 3, 2, 3, None]
    plan = looks.Plan(views=("trace", "empty"), quads=(0, 2, 5), siblings=((1, 3),))
    rows = trainer.look(plan, (1,), BUCKETS)
    direct = trainer.look(looks.Plan(views=("trace",), quads=(2, 3)), (1,), BUCKETS)
    np.testing.assert_allclose(rows.siblings[0], direct.sketches["trace"][1])
    found = measure(rows, plan, StepPairs(trace=1, empty=1, both=1))
    apart = ((direct.sketches["trace"][0] - direct.sketches["trace"][1]) ** 2).sum()
    assert found["noise/same_prompt"] == pytest.approx(apart / 2 / found["noise/trace"])


# --- training does not notice ------------------------------------------------------------------------------------------


def trained(folder, quads=QUADS[:12], seed=2, model=None, **settings):
    model = model or tiny_causal_lm("qwen2", seed=seed, dtype=torch.float32, attention_dropout=0.2)
    defaults = {
        "beta": 0.3,
        "learning_rate": 1e-3,
        "quads_per_step": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "dropout": True,
    }
    trainer = make_trainer(folder, model, quads, **(defaults | settings))
    trainer.train()
    return trainer


def adapter():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3)


@pytest.mark.parametrize("kind", ["dropout", "lora", "tokens", "checkpointing"])
def test_weights_are_the_same_bits_with_and_without_looks(tmp_path, kind):
    """Dropout is on, so every random number counts. Mutations: random states not put back; gradients of a look left in
    ``.grad``; the model left in another mode."""
    settings = {
        "dropout": {},
        "lora": {"peft_config": adapter()},
        "tokens": {"tokens_per_micro_batch": 150},
        "checkpointing": {"gradient_checkpointing": True},
    }[kind]
    runs = [trained(tmp_path / str(every), telemetry_steps=every, **settings) for every in (0, 2)]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert ["noise/trace" in entry for entry in logs[1]] == [True, False, True]
    assert not any("noise/trace" in entry for entry in logs[0])
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == other["loss"] and one["grad_norm"] == other["grad_norm"]


def test_a_look_leaves_gradients_and_random_states_alone(tmp_path):
    """Mutations: ``zero_grad`` in place of putting gradients back; a look that draws from the global generator."""
    trainer = moved(tmp_path)
    trainer.model.train()
    _, before = step_gradients(trainer)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trainer.look(looks.Plan(views=("trace", "empty"), quads=(0, 1, 2)), (1,), BUCKETS)
    assert torch.equal(torch.rand(3), expected) and trainer.model.training
    after = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert torch.equal(before, after)


def test_one_view_alone_has_its_noise_and_no_alpha(tmp_path):
    """Mutation: a missing view taken for one without noise."""
    import dataclasses

    quads = [dataclasses.replace(q, branches=(*q.branches[:2], None, None)) for q in QUADS[:8]]
    run = trained(tmp_path, quads, alpha=1.0, max_steps=1)
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert entry["noise/trace"] > 0
    assert not {"noise/empty", "noise/distance", "alpha_hat"} & set(entry)


def test_the_rule_is_not_quoted_for_biased_losses(tmp_path):
    """SimPO's trace view is biased from the start. Mutation: alpha_hat for every loss."""
    run = trained(tmp_path, loss="simpo", gamma=0.5, max_steps=1)
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert entry["noise/distance"] != 0 and "alpha_hat" not in entry and "noise/drift" not in entry


@pytest.mark.parametrize(
    ("reason", "settings"), [("too few to compare", {"quads_per_step": 1}), ("reentrant", {"gradient_checkpointing": True})]
)  # fmt: skip
def test_what_cannot_be_looked_at_is_said_once(tmp_path, caplog, reason, settings):
    """Mutations: silence; a look that fails; ``auto`` that goes on at its starting value."""
    if "gradient_checkpointing" in settings:
        settings = settings | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trained(tmp_path / "a", **settings)
    said = [record.message for record in caplog.records if "noise telemetry is off" in record.message]
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(UserError, match=reason):
        trained(tmp_path / "b", alpha_schedule="auto", **settings)
