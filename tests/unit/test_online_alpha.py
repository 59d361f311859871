"""The estimate of alpha from gradients: unbiased ingredients, the James-Stein rule, its memory, its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.method import online_alpha
from bvpo.method.gradient_noise import analyze
from bvpo.method.mixing import AlphaSource
from bvpo.method.online_alpha import (
    LEAST_LOOKS,
    LEAST_QUADS,
    OnlineAlpha,
    StepPairs,
    cosine,
    doubt_of_sampling,
    ingredients,
    james_stein,
    products,
)

PAIRS = StepPairs(trace=32, empty=32, both=32)
SIZE = 12


def gradients(rng: np.random.Generator, num: int, distance: float = 1.0, shared: float = 0.6):
    """(trace, empty) [num, SIZE]: V_t = SIZE * (1 + shared^2), V_e = SIZE * (.25 + shared^2), cov = SIZE * shared^2."""
    both = shared * rng.standard_normal((num, SIZE))
    trace = 0.5 + both + rng.standard_normal((num, SIZE))
    empty = 0.5 + both + 0.5 * rng.standard_normal((num, SIZE))
    empty[:, 0] += distance
    return trace, empty


def observed(trace, empty, group: int = 1, pairs: StepPairs = PAIRS) -> dict[str, float]:
    means = [view.reshape(-1, group, SIZE).mean(1) for view in (trace, empty)]
    found = [products(one, other, quads_per_group=group) for one, other in ((0, 0), (1, 1), (0, 1)) for one, other in
             [(means[one], means[other])]]  # fmt: skip
    return ingredients(*found, pairs) | {"noise/quads": float(len(trace)), "noise/drift": 0.0}


@pytest.mark.parametrize("group", [1, 4])
def test_ingredients_are_unbiased_whatever_the_grouping(group):
    """Averages over many looks against the truth, within 4 standard errors. Mutations: a variance over G instead of G - 1;
    group means taken for quads; the distance of sample means, which noise inflates."""
    rng = np.random.default_rng(0)
    looks = [observed(*gradients(rng, 16), group=group) for _ in range(1500)]
    truth = {
        "noise/trace": SIZE * 1.36 / 32,
        "noise/empty": SIZE * 0.61 / 32,
        "noise/covariance": SIZE * 0.36 / 32,
        "noise/trace_signal": SIZE * 0.25,
        "noise/empty_signal": 1.5**2 + (SIZE - 1) * 0.25,
        "noise/distance": 1.0,
    }
    for name, value in truth.items():
        seen = np.array([look[name] for look in looks])
        assert abs(seen.mean() - value) < 4 * seen.std() / math.sqrt(len(seen)), name


def test_missing_pairs_lower_the_counts_they_belong_to():
    """A third of the quads without a trace pair. Mutation: every view divided by the quads of a step."""
    trace, empty = gradients(np.random.default_rng(1), 16)
    whole, part = observed(trace, empty), observed(trace, empty, pairs=StepPairs(trace=20, empty=30, both=18))
    assert part["noise/trace"] == pytest.approx(whole["noise/trace"] * 32 / 20)
    assert part["noise/empty"] == pytest.approx(whole["noise/empty"] * 32 / 30)
    assert part["noise/covariance"] == pytest.approx(whole["noise/covariance"] * 32 * 18 / (20 * 30))
    assert part["noise/distance"] == whole["noise/distance"]
    alone = ingredients(products(trace, trace), None, None, PAIRS)
    assert set(alone) == {"noise/trace", "noise/trace_signal"}


def test_the_rule_is_theorem_2_for_an_unbiased_trace_view():
    """1 - alpha = (v_t - v_te) / (distance + v_t + v_e - 2 v_te), by hand. Mutation: v_te left out of either side."""
    values = {"trace": 4.0, "empty": 2.0, "covariance": 0.5, "distance": 1.0, "trace_signal": 9.0, "empty_signal": 4.0}
    assert james_stein(values) == pytest.approx(1 - 3.5 / 6.0)
    assert james_stein(values | {"distance": -3.0}) == pytest.approx(1 - 3.5 / 5.0), "noise cannot make it negative"
    assert james_stein(values | {"trace": 0.0, "covariance": 0.5}) == 1.0, "a silent trace view needs no help"
    assert cosine(values) == pytest.approx((9 + 4 - 1) / 2 / 6)
    assert cosine(values | {"empty_signal": -0.1}) is None


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-0.9, 0.9), st.floats(0, 100), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_the_rule_is_a_share_and_knows_no_scale(trace, empty, correlation, distance, scale):
    """beta only scales both gradients. Mutations: a clip left out; a norm where a squared norm belongs."""
    values = {
        "trace": trace,
        "empty": empty,
        "covariance": correlation * math.sqrt(trace * empty),
        "distance": distance,
    }
    alpha = james_stein(values)
    assert 0 <= alpha <= 1
    assert james_stein({name: scale**2 * value for name, value in values.items()}) == pytest.approx(alpha)
    assert james_stein(values | {"distance": 2 * distance + 1}) >= alpha, "a further empty view is trusted less"


def test_alpha_waits_for_enough_looks_and_falls_back_far_from_the_reference():
    """Mutations: the first look already decides; drift ignored; the fallback is 0.5 whatever ``value`` is."""
    rng = np.random.default_rng(2)
    source: AlphaSource = (online := OnlineAlpha(0.7, beta=0.1))
    for look in range(1, 7):
        assert source.value(0.0) == 0.7 if look <= LEAST_LOOKS else source.value(0.0) != 0.7
        source.observe(observed(*gradients(rng, LEAST_QUADS // LEAST_LOOKS)))
    assert source.value(0.3) == online.estimate != 0.7
    far = observed(*gradients(rng, 16)) | {"noise/drift": 12.0}
    source.observe(far)
    assert not online.has_drifted, "one look of seven is not yet 3 nats on average"
    source.observe(far)
    assert online.has_drifted and source.value(0.5) == 0.7
    for _ in range(40):
        source.observe(observed(*gradients(rng, 16)))
    assert not online.has_drifted and source.value(0.9) == online.estimate


FAR = [(0.01, 2.9, False), (0.01, 3.1, True), (1.0, 0.29, False), (1.0, 0.31, True)]


@pytest.mark.parametrize(("beta", "drift", "far"), FAR)
def test_the_neighbourhood_has_two_bounds(beta, drift, far):
    """Nats for small beta, reward for large. Mutation: one of the two forgotten."""
    online = OnlineAlpha(0.5, beta=beta)
    online.observe(observed(*gradients(np.random.default_rng(3), 16)) | {"noise/drift": drift})
    assert online.has_drifted is far


def test_younger_looks_count_more_and_state_is_everything():
    """Mutations: a plain mean; a state that leaves out a sum, so that a resumed run differs."""
    rng = np.random.default_rng(4)
    looks = [observed(*gradients(rng, 16, distance=d)) for d in [3.0] * 30 + [0.0] * 30]
    online, resumed = OnlineAlpha(0.5, beta=0.1), OnlineAlpha(0.5, beta=0.1)
    for look in looks[:45]:
        online.observe(look)
    resumed.restore(dict(online.state()))
    for look in looks[45:]:
        online.observe(look)
        resumed.observe(look)
    assert resumed.state() == online.state() and resumed.value(0.0) == online.value(0.0)
    assert online.averages is not None
    weights = np.array([online_alpha.DECAY**age for age in range(59, -1, -1)])
    expected = weights @ np.array([look["noise/distance"] for look in looks]) / weights.sum()
    assert online.averages["distance"] == pytest.approx(expected)
    online.restore({})
    assert online.estimate is None and online.value(0.0) == 0.5


def test_a_look_at_one_view_teaches_nothing():
    """Mutation: missing numbers read as zero, which would send alpha to 1."""
    online = OnlineAlpha(0.5, beta=0.1)
    online.observe({"noise/trace": 1.0, "noise/trace_signal": 1.0, "noise/quads": 16.0})
    assert online.estimate is None and online.state()["quads"] == 0


def test_what_sampling_does_to_the_assumption():
    """Mutation: the paper's T = 0.8 passes without a word, or T = 1 does not."""
    assert doubt_of_sampling({}) is None and doubt_of_sampling({"temperature": 1, "top_p": 1.0, "top_k": 0}) is None
    text = doubt_of_sampling({"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 10})
    assert text is not None and "temperature 0.8, top_p 0.95" in text


# --- bvpo analyze --gradients ----------------------------------------------------------------------------------------


def test_intervals_over_prompts_cover_the_truth():
    """60 samples of 40 prompts with 1 to 3 quads each: 95 % intervals hold the truth in most of them. Mutations: quads
    resampled instead of prompts; a prompt's product with itself kept, or taken off only once in resamples."""
    rng = np.random.default_rng(5)
    hits, count = np.zeros(3), 60
    within = 0.5
    # noise of a prompt is shared by its quads; of a quad it is its own
    v_t, v_e, distance, size = SIZE * 1.36, SIZE * 0.61, 1.0, 32
    excess, gap = (v_t - SIZE * 0.36) / size, distance + (v_t + v_e - 2 * SIZE * 0.36) / size
    truth = [v_t / v_e, 1 - excess / gap, 1 - excess**2 / gap / (v_t / size)]
    for seed in range(count):
        owner = np.repeat(np.arange(40), rng.integers(1, 4, 40))
        own, common = gradients(rng, len(owner)), gradients(rng, 40)
        trace, empty = (
            mean + math.sqrt(within) * (a - mean) + math.sqrt(1 - within) * (b[owner] - mean)
            for a, b, mean in zip(own, common, _means(), strict=True)
        )
        found = analyze(trace, empty, [str(p) for p in owner], [size], seed=seed, num_resamples=100)
        intervals = (found.noise_ratio, found.batches[0].alpha, found.batches[0].error)
        hits += [i.low is not None and i.low <= value <= i.high for i, value in zip(intervals, truth, strict=True)]
    assert (hits / count >= 0.85).all(), hits / count


def _means():
    trace, empty = np.full(SIZE, 0.5), np.full(SIZE, 0.5)
    empty[0] += 1.0
    return trace, empty


def test_analysis_agrees_with_the_looks():
    """The same gradients through both: the same alpha. Mutation: another formula on either side."""
    trace, empty = gradients(np.random.default_rng(6), 64)
    found = analyze(trace, empty, [str(i) for i in range(64)], [32], num_resamples=20)
    online = OnlineAlpha(0.5, beta=0.1)
    online.observe(observed(trace, empty))
    assert found.batches[0].alpha.value == pytest.approx(online.estimate)
    assert found.same_prompt is None
    assert found.noise_trace.value == pytest.approx(
        32 * observed(trace, empty)["noise/trace"] / products(trace, trace).other
    )


def test_pairs_of_one_prompt_tell_their_share_of_the_noise():
    """Mutation: the share of pairs in place of the share of variance."""
    rng = np.random.default_rng(7)
    owner = np.repeat(np.arange(300), 3)
    trace = 1 + 2 * rng.standard_normal((300, SIZE))[owner] + rng.standard_normal((900, SIZE))
    found = analyze(trace, trace, [str(p) for p in owner], [32], num_resamples=50)
    assert found.same_prompt is not None and found.same_prompt.value == pytest.approx(0.2, abs=0.02)
