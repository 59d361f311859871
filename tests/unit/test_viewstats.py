"""The measurements behind the paper's Tables 3 to 5, by hand and against plain Python."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from bvpo.evaluation.viewstats import Comparison, Measures, Settings, compare_views
from bvpo.records import View

FAST = Settings(num_resamples=100)


def measures(rows: list[tuple[str, View, list[float], int | None]]) -> Measures:
    """Rows of (prompt, view, log-probabilities, first answer token)."""
    found = Measures()
    for prompt, view, logprobs, start in rows:
        found.add(
            prompt_id=prompt,
            view=view,
            logprobs=logprobs,
            num_tokens=len(logprobs),
            answer_from=start,
            cut=False,
            closed=view == "empty" or start is not None,
        )
    return found


def compared(found: Measures) -> dict[str, Comparison]:
    return {one.name: one for one in compare_views(found.columns(), FAST)}


def values(one: Comparison) -> tuple[Any, ...]:
    return tuple(side.value if side else None for side in (one.first, one.second, one.ratio))


def test_every_quantity_by_hand() -> None:
    """Two prompts, two samples in each view. Mutation: any sum, sign, mean or table exchanged for its neighbour."""
    found = compared(
        measures(
            [
                ("a", "trace", [-1.0, -1.0, -2.0], 2),  # log p -4
                ("a", "trace", [-1.0] * 8, 6),  # log p -8
                ("a", "empty", [-1.0, -1.0], None),  # -2
                ("a", "empty", [-2.0, -2.0], None),  # -4
                ("b", "trace", [-3.0] * 2, 1),  # -6
                ("b", "trace", [-2.5] * 4, 1),  # -10
                ("b", "empty", [-1.0], None),  # -1
                ("b", "empty", [-1.0, -2.0, -1.0], None),  # -4
            ]
        )
    )
    # within: log p of a: var(-4, -8) = 8, of b: var(-6, -10) = 8; empty: 2 and 4.5
    assert values(found["var_logp_within"]) == pytest.approx((8.0, 3.25, 8 / 3.25))
    # lengths: var(3, 8) = 12.5 and var(2, 4) = 2; empty: 0 and 2
    assert values(found["var_length_within"]) == pytest.approx((7.25, 1.0, 7.25))
    all_t, all_e = statistics.variance([-4, -8, -6, -10]), statistics.variance([-2, -4, -1, -4])
    assert values(found["var_logp_all"]) == pytest.approx((all_t, all_e, all_t / all_e))
    long_t, long_e = statistics.variance([3, 8, 2, 4]), statistics.variance([2, 2, 1, 3])
    assert values(found["var_length_all"]) == pytest.approx((long_t, long_e, long_t / long_e))
    assert values(found["length"]) == pytest.approx((4.25, 2.0, 2.125))
    # by prompt: a (4/3 + 1) / 2 and (1 + 2) / 2, b (3 + 2.5) / 2 and (1 + 4/3) / 2; all tokens: 28 over 17 and 11 over 8
    assert values(found["nll"]) == pytest.approx((47 / 24, 4 / 3, 47 / 32))
    assert values(found["nll_pooled"]) == pytest.approx((28 / 17, 11 / 8, 28 / 17 / (11 / 8)))
    # a (2/3 + 3/4) / 2, b (1/2 + 1/4) / 2; 10 of 17 tokens
    assert values(found["trace_share"]) == pytest.approx((13 / 24, None, None))
    assert values(found["trace_share_pooled"]) == pytest.approx((10 / 17, None, None))
    # a 1 and (2 + 1) / 2, b (3 + 2.5) / 2 twice; traces: 2 + 6 + 3 + 2.5 over 10 tokens; answers: 2 + 2 + 3 + 7.5 over 7
    assert values(found["nll_parts"]) == pytest.approx((1.875, 2.125, 15 / 17))
    assert values(found["nll_parts_pooled"]) == pytest.approx((1.35, 14.5 / 7, 1.35 / (14.5 / 7)))
    assert {one.num_prompts for one in found.values()} == {2}
    assert [one.table for one in found.values()] == [3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5]


def test_the_forced_marker_counts_where_its_log_probability_is_known() -> None:
    """One forced token of log p -3 before an answer of one. Mutation: it counts in no length, in the trace view, or as
    certain where its log-probability is not known."""
    for known, nll in ((-3.0, 2.0), (None, 1.0)):
        found = measures([("a", "trace", [-1.0, -2.0], 1)])
        found.add(
            prompt_id="a", view="empty", logprobs=[-1.0], num_tokens=1, answer_from=None, cut=False, closed=True,
            forced_tokens=1, forced_logp=known,
        )  # fmt: skip
        by_name = compared(found)
        assert values(by_name["length"]) == pytest.approx((2.0, 2.0, 1.0))
        assert values(by_name["nll"]) == values(by_name["nll_pooled"]) == pytest.approx((1.5, nll, 1.5 / nll))


def test_prompts_weigh_alike() -> None:
    """A prompt with many samples counts once where prompts are averaged. Mutation: averaging over samples."""
    rows: list[tuple[str, View, list[float], int | None]] = [("a", "trace", [-1.0] * 10, 1)] * 8
    rows += [("b", "trace", [-1.0] * 2, 1), ("a", "empty", [-1.0], None), ("b", "empty", [-1.0], None)]
    assert compared(measures(rows))["length"].first.value == pytest.approx(6.0)


def test_what_is_left_out_is_counted() -> None:
    """Mutation: a missing log-probability taken for 0, an unclosed trace as an answer of no tokens, a prompt of one view
    compared, or any of these not counted."""
    found = measures(
        [
            ("a", "trace", [-1.0, -1.0], 1),
            ("a", "trace", [-1.0, -3.0], None),  # never closes
            ("a", "empty", [-1.0], None),
            ("a", "empty", [-3.0], None),
            ("b", "trace", [-1.0], 1),
            ("b", "trace", [-2.0], 1),  # b has no empty view
            ("c", "trace", [-1.0], 1),
            ("c", "empty", [-1.0], None),  # c has one sample a view
        ]
    )
    found.add(prompt_id="a", view="trace", logprobs=None, num_tokens=50, answer_from=3, cut=True, closed=True)
    by_name = compared(found)
    within, share, parts = by_name["var_logp_within"], by_name["trace_share"], by_name["nll_parts"]
    assert (within.num_prompts, within.num_samples) == (1, 4)
    assert within.dropped == {
        "prompts with fewer than two samples in a view": 2,
        "samples without log-probabilities": 1,
    }
    assert by_name["var_length_within"].num_samples == 5
    assert by_name["length"].dropped == {"prompts with samples of one view only": 1}
    assert share.dropped == {"samples without an end of the trace": 1}
    pooled, parts_pooled = by_name["trace_share_pooled"], by_name["nll_parts_pooled"]
    assert share.num_samples == pooled.num_samples == 5
    assert share.first.value == pytest.approx(((1 / 2 + 3 / 50) / 2 + 1 + 1) / 3)
    assert pooled.first.value == pytest.approx((1 + 1 + 1 + 1 + 3) / (2 + 1 + 1 + 1 + 50))
    unknown = {"samples without an end of the trace": 1, "samples without log-probabilities": 1}
    assert (parts_pooled.dropped, parts_pooled.num_samples) == (unknown, 4)
    assert parts.dropped == unknown | {"samples without a token in either part": 3}
    assert (parts.num_samples, parts.num_prompts) == (1, 1)


def test_large_log_probabilities_keep_their_variance() -> None:
    """Variance 1 around -1e9. Mutation: squares summed before centring (all digits lost)."""
    rows: list[tuple[str, View, list[float], int | None]] = []
    for prompt in "ab":
        for shift in (-1.0, 0.0, 1.0):
            rows += [(prompt, "trace", [-1e9 + shift], 1), (prompt, "empty", [-1e9 + 2 * shift], None)]
    found = compared(measures(rows))
    assert values(found["var_logp_within"]) == pytest.approx((1.0, 4.0, 0.25))
    assert values(found["var_logp_all"]) == pytest.approx((0.8, 3.2, 0.25))


def test_exchanging_the_views_inverts_the_ratios() -> None:
    """Mutation: a ratio that is not trace over empty, or intervals that depend on which view comes first."""
    dice = random.Random(3)
    rows: list[tuple[str, View, list[float], int | None]] = []
    for prompt in range(12):
        for view, size in (("trace", 20), ("empty", 6)):
            for _ in range(4):
                rows.append((str(prompt), view, [-dice.random() for _ in range(dice.randrange(1, size))], 0))
    swapped = [(p, "empty" if v == "trace" else "trace", logprobs, start) for p, v, logprobs, start in rows]
    one, other = compared(measures(rows)), compared(measures(swapped))  # type: ignore[arg-type]
    for name in ("var_logp_within", "var_length_within", "var_logp_all", "length", "nll", "nll_pooled"):
        first, second = one[name].first, other[name].second
        assert second is not None
        assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))
        a, b = one[name].ratio, other[name].ratio
        assert a is not None and b is not None and a.value and b.value and a.low and b.high
        assert a.value == pytest.approx(1 / b.value)
        assert a.low == pytest.approx(1 / b.high, rel=0.05)


def test_one_view_alone_and_nothing_at_all() -> None:
    """Mutation: a division by zero, or a zero where there is no number."""
    alone = compared(measures([("a", "trace", [-1.0, -2.0], 1), ("a", "trace", [-1.0], 1)]))
    assert values(alone["length"]) == (None, None, None)
    assert alone["length"].dropped == {"prompts with samples of one view only": 1}
    assert alone["trace_share"].first.value == pytest.approx(3 / 4)
    nothing = compared(Measures())
    assert all(one.first.value is None and one.num_samples == 0 for one in nothing.values())


def test_the_order_of_the_samples_changes_nothing() -> None:
    """A killed run stores them in another order. Mutation: sums in the order of arrival, or prompts numbered as they are
    met, so that the same resample means other prompts."""
    chance = random.Random(3)
    rows: list[tuple[str, View, list[float], int | None]] = []
    for prompt in range(12):
        for view in ("trace", "trace", "trace", "empty", "empty"):
            logprobs = [-chance.random() for _ in range(chance.randint(2, 9))]
            rows.append((f"p{prompt}", view, logprobs, 1 if view == "trace" else None))
    first = compared(measures(rows))
    chance.shuffle(rows)
    assert compared(measures(rows)) == first
