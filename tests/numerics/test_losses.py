"""The per-pair losses: hand values, identities and limits of each, and one suite over every entry of the registry.

The suite's checks are plain functions of a loss's name, so the loss of docs/extending.md goes through them as well.
Reference values were computed with 40 decimal digits.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.method import losses
from bvpo.method.losses import LOSSES, PairLogps, kl_from_logits, nll_anchor, pair_loss, resolve_loss
from bvpo.strict import UserError

F64 = torch.float64
SMOOTHED = {"label_smoothing": 0.1}
REFERENCE_LOSSES = [name for name, entry in LOSSES.items() if entry.needs_reference]

# a value away from the default for every hyperparameter: what "this parameter matters" is tested with
OTHER = {"beta": 0.7, "label_smoothing": 0.2, "gamma": 0.3, "length_weight": 0.05}


def vector(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def one_pair() -> PairLogps:
    """log-ratios +1 (chosen, 4 tokens) and -0.5 (rejected, 6 tokens): margin 1.5."""
    return PairLogps(
        chosen=vector(-12.0),
        rejected=vector(-15.0),
        ref_chosen=vector(-13.0),
        ref_rejected=vector(-14.5),
        chosen_lengths=torch.tensor([4]),
        rejected_lengths=torch.tensor([6]),
    )


def random_pairs(num: int = 6, *, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = F64) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(num, generator=generator, dtype=F64).mul(scale).to(dtype)

    def lengths() -> Tensor:
        return torch.randint(1, 40, (num,), generator=generator)

    chosen, rejected = noise() - 30, noise() - 30
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=chosen + noise(),
        ref_rejected=rejected + noise(),
        chosen_lengths=lengths(),
        rejected_lengths=lengths(),
    )


def with_ratios(chosen: Tensor, rejected: Tensor, *, length: int = 10) -> PairLogps:
    """Pairs with the given log-ratios to a reference of log-prob -20, all of one length."""
    reference, lengths = torch.full_like(chosen, -20.0).detach(), torch.full(chosen.shape, length)
    return PairLogps(
        chosen=reference + chosen,
        rejected=reference + rejected,
        ref_chosen=reference,
        ref_rejected=reference,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
    )


def select(logps: PairLogps, index: Tensor) -> PairLogps:
    columns = {field.name: getattr(logps, field.name) for field in fields(logps)}
    return PairLogps(**{name: value if value is None else value[index] for name, value in columns.items()})


def margins(logps: PairLogps) -> Tensor:
    chosen, rejected = losses.log_ratios(logps)
    return chosen - rejected


def with_gradients(logps: PairLogps) -> PairLogps:
    return replace(
        logps, chosen=logps.chosen.clone().requires_grad_(), rejected=logps.rejected.clone().requires_grad_()
    )


def every_setting(name: str) -> list[LossConfig]:
    """The loss with its defaults, and with every parameter moved away from them."""
    moved = {param: OTHER.get(param, 0.5) for param in LOSSES[name].params}
    return [LossConfig(name=name), LossConfig(name=name, **moved)]


# --- the suite over every entry --------------------------------------------------------------------------------------


def check_signature(name: str) -> None:
    """Mutation: a hyperparameter that ``params`` does not name, or a parameter of the loss that nothing reads."""
    entry = LOSSES[name]
    first, *rest = inspect.signature(entry.fn).parameters.values()
    assert [p.name for p in rest] == list(entry.params)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)
    assert first.annotation in (PairLogps, "PairLogps")
    assert entry.doc and inspect.getdoc(entry.fn)
    for param in entry.params:
        changed = pair_loss(LossConfig(name=name, **{param: OTHER.get(param, 0.5)}), random_pairs()).loss
        assert not torch.allclose(changed, pair_loss(name, random_pairs()).loss), f"{param} changes nothing"


def check_one_value_per_pair(name: str) -> None:
    """Mutation: a mean or a sum inside the loss; rewards that carry gradients."""
    logps = with_gradients(random_pairs(6))
    for config in every_setting(name):
        out = pair_loss(config, logps)
        assert out.loss.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (6,)
        assert out.loss.requires_grad
        assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def check_equivariance(name: str) -> None:
    """Mutation: any coupling between pairs (a batch statistic, a sort), or a shift by one."""
    logps, order = random_pairs(6), torch.tensor([3, 0, 5, 1, 4, 2])
    for config in every_setting(name):
        whole = pair_loss(config, logps)
        shuffled = pair_loss(config, select(logps, order))
        assert torch.equal(shuffled.loss, whole.loss[order])
        assert torch.equal(shuffled.chosen_rewards, whole.chosen_rewards[order])
        alone = [pair_loss(config, select(logps, torch.tensor([i]))).loss for i in range(6)]
        assert torch.equal(torch.cat(alone), whole.loss)


def check_gradients(name: str) -> None:
    """Mutation: a ``detach`` or a non-differentiable operation on the way from log-probs to loss."""
    base = random_pairs(4, scale=0.3)
    for config in every_setting(name):

        def loss(chosen: Tensor, rejected: Tensor, config: LossConfig = config) -> Tensor:
            return pair_loss(config, replace(base, chosen=chosen, rejected=rejected)).loss

        inputs = (base.chosen.clone().requires_grad_(), base.rejected.clone().requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs)


def check_direction_at_reference(name: str) -> None:
    """Mutation: a flipped sign. At the reference every loss must raise the chosen and lower the rejected response."""
    base = random_pairs(5)
    logps = with_gradients(replace(base, ref_chosen=base.chosen, ref_rejected=base.rejected))
    for config in every_setting(name):
        chosen, rejected = torch.autograd.grad(pair_loss(config, logps).loss.sum(), (logps.chosen, logps.rejected))
        assert (chosen < 0).all() and (rejected > 0).all()


def check_extreme_margins(name: str) -> None:
    """Mutation: ``log(sigmoid(x))`` or ``exp`` without a bound instead of ``logsigmoid``."""
    for dtype in (torch.float32, F64):
        ratios = vector(-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4, dtype=dtype)
        for config in every_setting(name):
            for chosen, rejected in ((ratios, torch.zeros_like(ratios)), (torch.zeros_like(ratios), ratios)):
                logps = with_gradients(with_ratios(chosen, rejected, length=1))
                loss = pair_loss(config, logps).loss
                gradients = torch.autograd.grad(loss.sum(), (logps.chosen, logps.rejected))
                assert loss.dtype == dtype
                assert all(torch.isfinite(value).all() for value in (loss, *gradients))


def check_reference_is_read(name: str) -> None:
    """Mutation: ``needs_reference`` that does not say what the loss does."""
    logps = random_pairs()
    without = replace(logps, ref_chosen=None, ref_rejected=None)
    if LOSSES[name].needs_reference:
        with pytest.raises(UserError, match="needs reference log-probs"):
            pair_loss(name, without)
    else:
        assert torch.equal(pair_loss(name, without).loss, pair_loss(name, logps).loss)


def check_zero_trace_bias(name: str) -> None:
    """Mutation: a registry flag that contradicts the exact gradients of a model small enough to enumerate."""
    bias, marginal = trace_bias_at_reference(name, temperature=1.0)
    if LOSSES[name].zero_trace_bias_at_reference:
        assert bias <= 1e-12 * marginal
    else:
        assert bias >= 1e-2 * marginal


def trace_bias_at_reference(name: str, *, temperature: float) -> tuple[float, float]:
    """|E grad L_t - grad L_marginal| and |grad L_marginal| at policy = reference; 4 traces x 2 answers, enumerated.

    Answer 0 is chosen. Traces are drawn from the reference given their answer, from logits divided by ``temperature``.
    """
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 2, generator=generator, dtype=F64).requires_grad_()
    lengths = torch.randint(2, 30, (4, 2), generator=generator)
    config = LossConfig(name=name, **{param: OTHER.get(param, 0.5) for param in LOSSES[name].params})

    joint = logits.flatten().log_softmax(0).view(4, 2)  # log pi(r, y)
    sampled = (logits.detach() / temperature).flatten().softmax(0).view(4, 2)
    given = sampled / sampled.sum(0)  # p(r | y)
    weights = (given[:, None, 0] * given[None, :, 1]).flatten()  # independent traces for the two answers

    def pairs(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> PairLogps:
        return PairLogps(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=chosen.detach(),
            ref_rejected=rejected.detach(),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )

    chosen, rejected = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    view = pairs(joint[chosen, 0], joint[rejected, 1], lengths[chosen, 0], lengths[rejected, 1])
    answers = joint.logsumexp(0)
    marginal = pairs(answers[:1], answers[1:], torch.tensor([3]), torch.tensor([5]))
    (g_view,) = torch.autograd.grad((weights * pair_loss(config, view).loss).sum(), logits, retain_graph=True)
    (g_marginal,) = torch.autograd.grad(pair_loss(config, marginal).loss.sum(), logits)
    return (g_view - g_marginal).norm().item(), g_marginal.norm().item()


SUITE = [
    check_signature,
    check_one_value_per_pair,
    check_equivariance,
    check_gradients,
    check_direction_at_reference,
    check_extreme_margins,
    check_reference_is_read,
    check_zero_trace_bias,
]


@pytest.mark.parametrize("check", SUITE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, check):
    """Each check's docstring names the mutation it guards against."""
    check(name)


def test_trace_bias_needs_temperature_one():
    """docs/losses.md: away from T = 1 even DPO's trace view is biased. Mutation: an oracle that always finds zero."""
    bias, marginal = trace_bias_at_reference("dpo", temperature=0.8)
    assert bias >= 1e-2 * marginal


# --- values, identities and limits of single losses ------------------------------------------------------------------

HAND_VALUES = [
    (LossConfig(name="dpo", beta=0.4), 0.43748795048588562645),
    (LossConfig(name="dpo", beta=0.4, **SMOOTHED), 0.49748795048588562645),
    (LossConfig(name="robust", beta=0.4, **SMOOTHED), 0.36248795048588562645),
    (LossConfig(name="hinge", beta=0.4), 0.4),
    (LossConfig(name="dpo_norm", beta=0.4), 0.62870109197325959139),  # 0.4 (1/4 + 0.5/6) inside
    (LossConfig(name="ipo", beta=0.4), 0.84027777777777777778),  # (1/4 + 0.5/6 - 1/0.8)^2
    (LossConfig(name="rdpo", beta=0.4, length_weight=0.05), 0.47407698418010668087),  # 0.6 - 0.05 * 2 inside
    (LossConfig(name="simpo", beta=2.0, gamma=0.7), 1.8677860293862659170),  # 2 (-12/4 + 15/6) - 0.7 inside
]


@pytest.mark.parametrize(("config", "expected"), HAND_VALUES, ids=lambda v: v.name if isinstance(v, LossConfig) else "")
def test_hand_values(config, expected):
    """Mutation: any sign, factor, or chosen/rejected exchanged in the line that implements the equation."""
    assert pair_loss(config, one_pair()).loss.item() == pytest.approx(expected, rel=1e-15)


def test_hand_rewards():
    """Mutation: rewards without beta, per token where sums belong, or with the loss's own offset in them."""
    for name in REFERENCE_LOSSES:
        out = pair_loss(LossConfig(name=name, beta=0.4), one_pair())
        assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((0.4, -0.2), rel=1e-15)
    out = pair_loss(LossConfig(name="simpo", beta=2.0), one_pair())
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((-6.0, -5.0), rel=1e-15)


ratio_lists = st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=8)
betas = st.floats(1e-3, 10)
smoothings = st.floats(0, 0.49)


def pairs_of(ratios: list[tuple[float, float]]) -> PairLogps:
    chosen, rejected = torch.tensor(ratios, dtype=F64).unbind(1)
    return with_ratios(chosen, rejected)


@given(ratio_lists, betas, smoothings)
@settings(max_examples=60, deadline=None)
def test_swap_identities(ratios, beta, eps):
    """Exchanging the responses adds the scaled margin. Mutation: smoothing on the wrong side; robust not divided."""
    logps = pairs_of(ratios)
    margin = beta * margins(logps)
    close = {"rtol": 1e-9, "atol": 1e-9 * (1 + margin.abs().max().item())}

    def swapped_minus_straight(config: LossConfig) -> Tensor:
        return pair_loss(config, logps.swap()).loss - pair_loss(config, logps).loss

    plain = swapped_minus_straight(LossConfig(name="dpo", beta=beta))
    smooth = swapped_minus_straight(LossConfig(name="dpo", beta=beta, label_smoothing=eps))
    robust = swapped_minus_straight(LossConfig(name="robust", beta=beta, label_smoothing=eps))
    torch.testing.assert_close(plain, margin, **close)
    torch.testing.assert_close(smooth, (1 - 2 * eps) * margin, **close)
    torch.testing.assert_close((1 - 2 * eps) * robust, margin, **close)


def test_swap_takes_the_lengths_along():
    """Mutation: ``swap`` exchanges log-probs and leaves lengths or references behind."""
    logps = random_pairs()
    config = LossConfig(name="rdpo", beta=0.2, length_weight=0.03)
    extra_tokens = logps.chosen_lengths - logps.rejected_lengths
    difference = pair_loss(config, logps.swap()).loss - pair_loss(config, logps).loss
    torch.testing.assert_close(difference, 0.2 * margins(logps) + 0.03 * extra_tokens)
    twice = logps.swap().swap()
    assert all(torch.equal(getattr(twice, field.name), getattr(logps, field.name)) for field in fields(logps))


@given(ratio_lists, betas)
@settings(max_examples=60, deadline=None)
def test_dpo_equals_numpy(ratios, beta):
    """An oracle that shares no code: log(1 + exp(-z)) by numpy. Mutation: any approximation in the log loss."""
    logps = pairs_of(ratios)
    expected = np.logaddexp(0, -beta * margins(logps).numpy())
    loss = pair_loss(LossConfig(name="dpo", beta=beta), logps).loss
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12, atol=1e-300)  # below: subnormal numbers
    assert (loss >= 0).all()


@given(ratio_lists, betas, smoothings)
@settings(max_examples=60, deadline=None)
def test_robust_is_unbiased(ratios, beta, eps):
    """Its mean over flipped labels is the clean DPO loss. Mutation: terms exchanged, or the divisor 1 - 2 eps lost."""
    logps = pairs_of(ratios)
    config = LossConfig(name="robust", beta=beta, label_smoothing=eps)
    mean = (1 - eps) * pair_loss(config, logps).loss + eps * pair_loss(config, logps.swap()).loss
    clean = pair_loss(LossConfig(name="dpo", beta=beta), logps).loss
    scale = 1 + beta * margins(logps).abs().max().item()
    torch.testing.assert_close((1 - 2 * eps) * mean, (1 - 2 * eps) * clean, rtol=1e-9, atol=1e-9 * scale)


@given(ratio_lists, betas, st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_scale_laws(ratios, beta, factor):
    """beta times log-ratios is all that DPO, hinge and robust see; IPO and SimPO see log-probs per token.

    Mutation: beta applied twice or to one response only; lengths ignored.
    """
    logps = pairs_of(ratios)
    scaled = pairs_of([(c * factor, r * factor) for c, r in ratios])
    for name in ("dpo", "hinge", "robust"):
        left = pair_loss(LossConfig(name=name, beta=beta * factor), logps).loss
        torch.testing.assert_close(left, pair_loss(LossConfig(name=name, beta=beta), scaled).loss, rtol=1e-7, atol=1e-7)
    longer = PairLogps(**{field.name: getattr(logps, field.name) * 3 for field in fields(logps)})
    for name in ("ipo", "simpo", "dpo_norm"):
        config = LossConfig(name=name, beta=beta)
        torch.testing.assert_close(pair_loss(config, longer).loss, pair_loss(config, logps).loss, rtol=1e-7, atol=1e-7)


@given(ratio_lists, betas, st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_more_chosen_is_never_worse(ratios, beta, step):
    """Without smoothing a larger chosen log-prob never raises the loss. Mutation: the margin's sign."""
    better = pairs_of([(c + step, r) for c, r in ratios])
    for name in ("dpo", "dpo_norm", "hinge", "rdpo", "simpo"):
        config = LossConfig(name=name, beta=beta)
        assert (pair_loss(config, better).loss <= pair_loss(config, pairs_of(ratios)).loss).all()


def test_small_beta_limits():
    """beta -> 0 leaves log 2 (hinge: 1). Mutation: an offset inside the sigmoid that is not multiplied by beta."""
    logps = random_pairs()
    for name in ("dpo", "robust", "rdpo"):
        loss = pair_loss(LossConfig(name=name, beta=1e-13), logps).loss
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-11)
    loss = pair_loss(LossConfig(name="simpo", beta=1e-13, gamma=0.0), logps).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-11)
    loss = pair_loss(LossConfig(name="hinge", beta=1e-13), logps).loss
    torch.testing.assert_close(loss, torch.ones_like(loss), rtol=0, atol=1e-11)


def test_policy_at_reference_gives_log_2():
    """What a run's first step must show. Mutation: reference log-probs of chosen and rejected exchanged."""
    base = random_pairs()
    logps = replace(base, ref_chosen=base.chosen, ref_rejected=base.rejected)
    for name in ("dpo", "robust", "rdpo"):
        assert pair_loss(name, logps).loss.tolist() == pytest.approx([math.log(2)] * 6, rel=1e-15)


def test_smoothed_dpo_is_smallest_at_its_own_confidence():
    """cDPO's gradient vanishes at sigmoid(z) = 1 - eps and points back beyond it. Mutation: eps on the wrong term."""
    best = math.log(0.9 / 0.1)
    ratios = vector(best - 1, best, best + 1).requires_grad_()
    loss = pair_loss(LossConfig(beta=1.0, **SMOOTHED), with_ratios(ratios, torch.zeros(3, dtype=F64))).loss.sum()
    (gradient,) = torch.autograd.grad(loss, ratios)
    assert gradient[0] < 0 < gradient[2] and abs(gradient[1]) < 1e-15


def test_robust_never_stops_pulling():
    """The slope tends to -beta eps / (1 - 2 eps) and stays (docs/losses.md). Mutation: the flipped term's sign."""
    ratios = vector(1e3, 1e4).requires_grad_()
    loss = pair_loss(LossConfig(name="robust", beta=0.5, **SMOOTHED), with_ratios(ratios, torch.zeros(2, dtype=F64)))
    (gradient,) = torch.autograd.grad(loss.loss.sum(), ratios)
    assert gradient.tolist() == pytest.approx([-0.5 * 0.1 / 0.8] * 2, rel=1e-12)


def test_ipo_target_is_per_token():
    """Zero at a per-token margin of 1 / (2 beta), pulling back beyond it. Mutation: sums in place of averages."""
    ratios = vector(9.0, 10.0, 11.0).requires_grad_()  # 5 tokens: 1.8, 2.0, 2.2 per token; target 1 / 0.5 = 2
    out = pair_loss(LossConfig(name="ipo", beta=0.25), with_ratios(ratios, torch.zeros(3, dtype=F64), length=5))
    (gradient,) = torch.autograd.grad(out.loss.sum(), ratios)
    assert out.loss[1].item() == 0
    assert gradient[0] < 0 < gradient[2] and gradient[1] == 0


def test_hinge_is_flat_beyond_one():
    """Mutation: the hinge's corner at beta * margin = 0, or the corner left out."""
    ratios = vector(1.0, 3.0).requires_grad_()
    out = pair_loss(LossConfig(name="hinge", beta=0.5), with_ratios(ratios, torch.zeros(2, dtype=F64)))
    (gradient,) = torch.autograd.grad(out.loss.sum(), ratios)
    assert out.loss.tolist() == [0.5, 0.0] and gradient.tolist() == [-0.5, 0.0]


def test_length_weight_is_a_charge_per_token():
    """A longer chosen response has a smaller loss, by a shift of its extra tokens; weight 0 is DPO.

    Mutation: the length term subtracted, multiplied by beta, or taken from one response only.
    """
    logps = random_pairs()
    assert torch.equal(pair_loss("rdpo", logps).loss, pair_loss("dpo", logps).loss)
    longer = replace(logps, chosen_lengths=logps.chosen_lengths + 7)
    config = LossConfig(name="rdpo", beta=0.2, length_weight=0.03)
    shifted = replace(logps, chosen=logps.chosen + 7 * 0.03 / 0.2)
    torch.testing.assert_close(pair_loss(config, longer).loss, pair_loss(config, shifted).loss, rtol=1e-12, atol=0)
    assert (pair_loss(config, longer).loss < pair_loss(config, logps).loss).all()


def test_simpo_gamma_is_a_margin():
    """gamma inside the sigmoid is gamma / beta off the per-token margin. Mutation: gamma multiplied by beta."""
    logps = random_pairs()
    mean_margin = logps.chosen / logps.chosen_lengths - logps.rejected / logps.rejected_lengths
    expected = np.logaddexp(0, -2.5 * (mean_margin.numpy() - 1.0 / 2.5))
    loss = pair_loss(LossConfig(name="simpo", beta=2.5, gamma=1.0), logps).loss
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-13)


def test_float32_policy_with_float64_reference():
    """Cached references are float64. Mutation: a cast of the reference to float32 before the difference is taken."""
    exact = with_ratios(vector(0.25, dtype=torch.float32).double(), vector(0.0))
    logps = replace(exact, chosen=exact.chosen.float().requires_grad_(), rejected=exact.rejected.float())
    loss = pair_loss("dpo", logps).loss
    loss.sum().backward()
    assert loss.dtype == F64 and logps.chosen.grad is not None and logps.chosen.grad.dtype == torch.float32
    assert torch.equal(loss, pair_loss("dpo", exact).loss)


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    (LossConfig(name="dppo"), "no loss 'dppo'; did you mean 'dpo'"),
    (LossConfig(name="dpo", gamma=0.5), r"'loss.gamma': got 0.5 \(float\), but loss 'dpo' does not read it"),
    (LossConfig(name="ipo", label_smoothing=0.1), "'loss.label_smoothing': got .* 'ipo' does not read it"),
    (LossConfig(name="simpo", length_weight=0.1), "'loss.length_weight': got .* 'simpo' does not read it"),
    (LossConfig(name="dpo", beta=0.0), "'loss.beta': got 0.0 .* expected a number above 0"),
    (LossConfig(name="dpo", beta=math.nan), "'loss.beta': got nan"),
    (LossConfig(name="dpo", beta=math.inf), "'loss.beta': got inf"),
    (
        LossConfig(name="dpo", label_smoothing=0.5),
        "'loss.label_smoothing': got 0.5 .* expected a number from 0 to below",
    ),
    (LossConfig(name="robust", label_smoothing=-0.1), "'loss.label_smoothing': got -0.1"),
    (LossConfig(name="simpo", gamma=-1.0), "'loss.gamma': got -1.0"),
    (LossConfig(name="rdpo", length_weight=-1.0), "'loss.length_weight': got -1.0"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_refused_settings(config, message):
    """Mutation: a setting that nothing reads passes in silence, or a value outside its range is trained with."""
    with pytest.raises(UserError, match=message):
        resolve_loss(config)
    with pytest.raises(UserError, match=message):
        pair_loss(config, random_pairs())


def test_functions_check_their_own_ranges():
    """Mutation: a loss called without the registry accepts beta = -1 (and trains towards the rejected responses)."""
    for entry in LOSSES.values():
        with pytest.raises(UserError, match=r"loss\.beta"):
            entry.fn(random_pairs(), beta=-1.0)


def test_registry_entry_with_unknown_parameter(monkeypatch):
    """Mutation: a registry line that names a parameter the config cannot set."""
    monkeypatch.setitem(LOSSES, "dpo", replace(LOSSES["dpo"], params=("beta", "temperature")))
    with pytest.raises(UserError, match="'temperature': no such field of LossConfig"):
        resolve_loss(LossConfig())


def test_half_precision_and_shapes_are_refused():
    """Mutation: sums in bfloat16, whose steps near 1,000 nats are 4 nats, or a [B, 1] column that would broadcast."""
    logps = random_pairs()
    with pytest.raises(AssertionError, match="sum in float32"):
        replace(logps, chosen=logps.chosen.bfloat16())
    with pytest.raises(AssertionError, match="expected shape"):
        replace(logps, rejected=logps.rejected[:, None])
    with pytest.raises(AssertionError, match="one reference"):
        replace(logps, ref_chosen=None)


# --- the page on adding a loss ---------------------------------------------------------------------------------------


def test_worked_example_of_the_docs():
    """docs/extending.md as it stands: its code runs, and its loss passes the suite. Mutation: a page gone stale."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    page = page.split("\n## Add a loss\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    before = dict(LOSSES)  # the example must not stay behind in the registry
    try:
        namespace: dict[str, object] = {}
        for block in blocks:
            exec(compile(block, "docs/extending.md", "exec"), namespace)
        (name,) = set(LOSSES) - set(before)
        for check in SUITE:
            check(name)
    finally:
        LOSSES.clear()
        LOSSES.update(before)


# --- anchors ---------------------------------------------------------------------------------------------------------


def test_nll_anchor():
    """Mutation: trace and answer exchanged, or the sign."""
    trace, answer = vector(-3.0, -5.0), vector(-1.0, -2.0)
    assert nll_anchor(trace, answer, "trace").tolist() == [3.0, 5.0]
    assert nll_anchor(trace, answer, "answer").tolist() == [1.0, 2.0]
    assert nll_anchor(trace, answer, "both").tolist() == [4.0, 7.0]
    with pytest.raises(UserError, match=r"anchor\.tokens"):
        nll_anchor(trace, answer, "traces")  # type: ignore[arg-type]


def test_kl_hand_value():
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log(3) / 2. Mutation: the two distributions exchanged (0.1308)."""
    ref, policy = torch.zeros(1, 2, dtype=F64), torch.log(torch.tensor([[0.25, 0.75]], dtype=F64))
    assert kl_from_logits(ref, policy).item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-14)


@given(st.integers(0, 2**31 - 1), st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_kl_properties(seed, scale):
    """Never negative, 0 at equality, blind to a shift of the logits, torch's value. Mutation: unnormalised logits."""
    generator = torch.Generator().manual_seed(seed)
    ref, policy = scale * torch.randn(2, 5, 11, generator=generator, dtype=F64)
    kl = kl_from_logits(ref, policy)
    assert kl.shape == (5,) and (kl >= -1e-12).all()
    assert kl_from_logits(ref, ref + 3).abs().max() < 1e-12
    torch.testing.assert_close(kl, kl_from_logits(ref - 7, policy + 2), rtol=1e-10, atol=1e-12)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=ref), categorical(logits=policy))
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=1e-9)


def test_kl_gradient_is_policy_minus_reference():
    """The gradient with respect to the policy's logits is p_policy - p_ref. Mutation: a gradient into the reference."""
    generator = torch.Generator().manual_seed(1)
    ref, policy = torch.randn(2, 4, 9, generator=generator, dtype=F64).unbind()
    ref, policy = ref.requires_grad_(), policy.requires_grad_()
    kl_from_logits(ref, policy).sum().backward()
    assert ref.grad is None and policy.grad is not None
    torch.testing.assert_close(policy.grad, policy.softmax(-1) - ref.softmax(-1))
    assert torch.autograd.gradcheck(lambda p: kl_from_logits(ref.detach(), p), (policy.detach().requires_grad_(),))


def test_kl_of_impossible_tokens_and_half_precision():
    """A token that neither model can produce adds nothing; bfloat16 logits are summed in float32. Mutation: 0 * inf."""
    ref = torch.tensor([[0.0, 1.0, -math.inf]])
    policy = torch.tensor([[1.0, 0.0, -math.inf]]).requires_grad_()
    kl = kl_from_logits(ref, policy)
    torch.testing.assert_close(kl, kl_from_logits(ref[:, :2], policy[:, :2]))
    kl.sum().backward()
    assert policy.grad is not None and torch.isfinite(policy.grad).all()
    assert kl_from_logits(ref.bfloat16(), policy.bfloat16()).dtype == torch.float32
