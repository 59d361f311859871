"""Alpha schedules and the mixture of the two views: limits, exact ends, and that a step may be cut up in any way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.config import AlphaConfig, LossConfig
from bvpo.method.losses import PairLogps, pair_loss
from bvpo.method.mixing import AlphaSource, ScheduledAlpha, Weights, alpha_at, mix_views, view_weight
from bvpo.strict import UserError

F64 = torch.float64
unit = st.floats(0, 1)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedule_values():
    """Mutation: value and end exchanged, a whole cosine period instead of half, or progress squared."""
    linear, cosine = (AlphaConfig(schedule=name, value=0.9, end=0.1) for name in ("linear", "cosine"))
    assert [alpha_at(AlphaConfig(value=0.3), p) for p in (0, 0.4, 1)] == [0.3, 0.3, 0.3]
    assert [alpha_at(linear, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.9, 0.7, 0.5, 0.1])
    quarter = 0.1 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert [alpha_at(cosine, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.9, quarter, 0.5, 0.1])


@given(st.sampled_from(["linear", "cosine"]), unit, unit, unit, unit)
@settings(max_examples=200, deadline=None)
def test_schedules_stay_between_their_exact_ends(schedule, value, end, p, q):
    """Mutation: rounding that misses the end (``value + way * (end - value)`` does), or a schedule that turns back."""
    config = AlphaConfig(schedule=schedule, value=value, end=end)
    assert alpha_at(config, 0.0) == value and alpha_at(config, 1.0) == end
    first, second = alpha_at(config, min(p, q)), alpha_at(config, max(p, q))
    assert 0 <= first <= 1 and 0 <= second <= 1
    assert (second - first) * (end - value) >= -1e-15


def test_scheduled_alpha_is_an_alpha_source():
    """Mutation: an observation that moves a fixed schedule, or a config that is checked only when the run starts."""
    source: AlphaSource = ScheduledAlpha(AlphaConfig(schedule="linear", value=1.0, end=0.0))
    source.observe({"trace_variance": 4.0, "empty_variance": 1.0})
    assert source.value(0.25) == 0.75
    with pytest.raises(UserError, match="value"):
        ScheduledAlpha(AlphaConfig(value=1.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AlphaConfig(schedule="cosin", end=0.1), "no 'cosin'; did you mean 'cosine'"),  # type: ignore[arg-type]
        (AlphaConfig(value=-0.1), "field 'value': got -0.1"),
        (AlphaConfig(value=math.nan), "field 'value': got nan"),
        (AlphaConfig(schedule="linear", end=1.1), "field 'end': got 1.1"),
        (AlphaConfig(schedule="linear"), "'end'.*needs the final alpha"),
        (AlphaConfig(end=0.3), "'end'.*'constant' never reads it"),
    ],
)
def test_refused_schedules(config, message):
    """Mutation: an ``end`` that nothing reads, or a weight outside [0, 1], accepted in silence."""
    with pytest.raises(UserError, match=message):
        alpha_at(config, 0.5)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_run(progress):
    """Mutation: step counts passed where a share of the run belongs."""
    with pytest.raises(ValueError, match="progress"):
        alpha_at(AlphaConfig(), progress)


# --- the mixture -----------------------------------------------------------------------------------------------------


def test_hand_value():
    """0.25 * 6 / 3 + 0.75 * 10 / 4. Mutation: alpha on the wrong view, or one count for both views."""
    loss = mix_views({"trace": scalar(6.0), "empty": scalar(10.0)}, Weights.of(0.25, {"trace": 3, "empty": 4}))
    assert loss.shape == () and loss.item() == pytest.approx(2.375, rel=1e-15)


def test_alpha_one_and_zero_are_the_single_views():
    """Value and gradient, exactly. Mutation: any leak of the other view."""
    trace, empty = scalar(6.0).requires_grad_(), scalar(10.0).requires_grad_()
    for alpha, value, gradients in ((1.0, 2.0, (1 / 3, 0.0)), (0.0, 2.5, (0.0, 0.25))):
        loss = mix_views({"trace": trace, "empty": empty}, Weights.of(alpha, {"trace": 3, "empty": 4}))
        assert loss.item() == value
        # both views hang on the graph (allow_unused=False): every rank runs the same backward
        assert tuple(g.item() for g in torch.autograd.grad(loss, (trace, empty))) == gradients


def test_a_view_without_pairs_contributes_zero_and_alpha_stays():
    """Mutation: 0 / 0, or the present view's weight raised to 1."""
    sums = {"trace": scalar(6.0), "empty": scalar(0.0)}
    assert mix_views(sums, Weights.of(0.25, {"trace": 3, "empty": 0})).item() == pytest.approx(0.5)
    assert mix_views({"trace": scalar(6.0)}, Weights.of(0.25, {"trace": 3, "empty": 0})).item() == pytest.approx(0.5)
    # pairs of a view that lie on other ranks still count
    assert mix_views({"trace": scalar(6.0)}, Weights.of(0.25, {"trace": 3, "empty": 9})).item() == pytest.approx(0.5)
    assert mix_views({}, Weights.of(0.25, {"trace": 3, "empty": 9})).item() == 0.0
    assert view_weight(0.25, "empty", 0) == 0.0


def test_view_weight():
    """Mutation: weights that do not add up to 1 over all pairs of both views."""
    assert view_weight(0.25, "trace", 3) == 0.25 / 3 and view_weight(0.25, "empty", 4) == 0.75 / 4
    assert 3 * view_weight(0.3, "trace", 3) + 5 * view_weight(0.3, "empty", 5) == pytest.approx(1.0)
    with pytest.raises(AssertionError):
        view_weight(1.2, "trace", 3)
    with pytest.raises(AssertionError):
        view_weight(0.5, "both", 3)  # type: ignore[arg-type]


def test_unknown_view_is_refused():
    """Mutation: a misspelt view that drops out of the loss."""
    with pytest.raises(AssertionError, match="unknown views"):
        mix_views({"traces": scalar(1.0)}, Weights.of(0.5, {"trace": 1, "empty": 1}))  # type: ignore[dict-item]


@given(st.integers(1, 12), st.integers(0, 12), unit, st.integers(0, 2**31 - 1), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_any_partition_of_a_step_gives_the_same_loss_and_gradient(num_trace, num_empty, alpha, seed, num_parts):
    """Micro-batches and ranks only cut the step up. Mutation: local counts in place of global ones."""
    generator = torch.Generator().manual_seed(seed)
    logps = {
        view: (-20 + 3 * torch.randn(2, num, generator=generator, dtype=F64)).requires_grad_()
        for view, num in (("trace", num_trace), ("empty", num_empty))
    }
    counts = {"trace": num_trace, "empty": num_empty}
    part_of = {view: torch.randint(num_parts, (num,), generator=generator) for view, num in counts.items()}

    def share(chosen_pairs: dict[str, torch.Tensor]) -> torch.Tensor:
        sums = {}
        for view, index in chosen_pairs.items():
            if len(index):
                reference, lengths = torch.full((len(index),), -20.0, dtype=F64), torch.ones(len(index))
                pairs = PairLogps(
                    chosen=logps[view][0, index],
                    rejected=logps[view][1, index],
                    ref_chosen=reference,
                    ref_rejected=reference,
                    chosen_lengths=lengths,
                    rejected_lengths=lengths,
                )
                sums[view] = pair_loss(LossConfig(), pairs).loss.sum()
        return mix_views(sums, Weights.of(alpha, counts))

    whole = share({view: torch.arange(num) for view, num in counts.items()})
    parts = [share({view: (part_of[view] == i).nonzero()[:, 0] for view in counts}) for i in range(num_parts)]
    total = torch.stack([part.to(F64) for part in parts]).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
    inputs = tuple(logps.values())
    for got, expected in zip(
        torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True),
        torch.autograd.grad(whole, inputs, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
