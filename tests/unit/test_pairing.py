"""Pairing: properties over random candidates, and each rule by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.config import PairConfig
from bvpo.data.pairing import DROPS, STRATEGIES, Candidate, Drop, Selection, select_pairs, with_traces
from bvpo.data.pairing_report import Report, quantiles
from bvpo.records import VIEWS

# few texts and few values, so that duplicates and ties are common; sixteenths add and scale exactly in binary
values = st.one_of(st.none(), st.integers(-24, 24).map(lambda i: i / 16))
texts = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "d", "e", "f"]))


@st.composite
def candidate_lists(draw: st.DrawFn, max_size: int = 8) -> list[Candidate]:
    """Samples of one prompt and view: distinct indices and keys; equal answers have one score, as scoring gives them."""
    score: dict[str | None, float | None] = {}
    found = []
    for index in range(draw(st.integers(0, max_size))):
        text = draw(texts)
        value = None if text is None else score.setdefault(text, draw(values))
        found.append(
            Candidate(key=f"k{index}", index=index, content=text, value=value, length=len(text or "") + index % 3)
        )
    return found


configs = st.builds(
    PairConfig,
    strategy=st.sampled_from(sorted(STRATEGIES)),
    ties=st.sampled_from(["drop", "shorter", "index"]),
    min_margin=st.sampled_from([0.0, 0.25, 1.0]),
    max_pairs=st.one_of(st.none(), st.integers(1, 4)),
)


def pick(candidates: list[Candidate], config: PairConfig, name: str = "p", seed: int = 0) -> Selection:
    return select_pairs(candidates, config, name=name, seed=seed)


def keys(selection: Selection) -> list[tuple[str, str]]:
    return [(pair.chosen.key, pair.rejected.key) for pair in selection.pairs]


def make(*rows: tuple[str | None, float | None], lengths: tuple[int, ...] = ()) -> list[Candidate]:
    return [
        Candidate(key=f"k{i}", index=i, content=text, value=value, length=lengths[i] if lengths else 1)
        for i, (text, value) in enumerate(rows)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# properties


@given(candidate_lists(), configs, st.randoms(use_true_random=False))
def test_order_of_input_never_matters(candidates: list[Candidate], config: PairConfig, random: Any) -> None:
    """Mutation: `ranked = scored` unsorted, or drawing from the list as it came."""
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert pick(shuffled, config) == pick(candidates, config)


@given(
    candidate_lists(), st.integers(-8, 8), st.sampled_from([0.25, 0.5, 2.0, 8.0]), st.sampled_from(sorted(STRATEGIES))
)
def test_shifted_and_scaled_scores_choose_the_same(
    candidates: list[Candidate], shift: int, scale: float, strategy: Any
) -> None:
    """Mutation: comparing with 0, or ranking by absolute score."""
    config = PairConfig(strategy=strategy)
    moved = [replace(c, value=None if c.value is None else c.value * scale + shift) for c in candidates]
    before, after = pick(candidates, config), pick(moved, config)
    assert keys(after) == keys(before) and after.drop == before.drop


@given(st.lists(candidate_lists(max_size=5), max_size=6), configs)
def test_pairs_and_drops_account_for_every_prompt_and_view(groups: list[list[Candidate]], config: PairConfig) -> None:
    """Mutation: returning neither pairs nor a reason, a reason that DROPS does not know, or counting a prompt twice."""
    report = Report(scorer="s")
    num_pairs = 0
    for number, group in enumerate(groups):
        for view in VIEWS:
            selection = pick(group, config, name=f"{number}/{view}")
            assert (selection.drop in DROPS) != bool(selection.pairs)
            num_pairs += len(selection.pairs)
            report.add_selection(view, selection)
    for view in VIEWS:
        summary = report.views[view].summary()
        assert summary["prompts"] == len(groups)
        assert summary["prompts_paired"] + sum(summary["prompts_dropped"].values()) == len(groups)
    assert num_pairs == sum(one.num_pairs for one in report.views.values())


@given(candidate_lists(), configs)
def test_a_pair_is_a_preference_between_two_answers(candidates: list[Candidate], config: PairConfig) -> None:
    """Mutation: pairing an answer with its own duplicate, a response without score, or the worse over the better."""
    for pair in pick(candidates, config).pairs:
        assert pair.chosen.content != pair.rejected.content and pair.chosen.content is not None
        assert pair.margin is not None and (pair.margin > 0 or (config.ties != "drop" and pair.margin == 0))
        assert pair.margin >= config.min_margin


@given(candidate_lists())
def test_best_worst_spans_all_scores(candidates: list[Candidate]) -> None:
    """Mutation: rejecting the second best."""
    scored = [c.value for c in candidates if c.content is not None and c.value is not None]
    for pair in pick(candidates, PairConfig()).pairs:
        assert (pair.chosen.value, pair.rejected.value) == (max(scored), min(scored))


@given(candidate_lists(), configs)
def test_duplicates_of_an_answer_change_nothing(candidates: list[Candidate], config: PairConfig) -> None:
    """Mutation: dropping `_distinct`: a repeated answer would be drawn more often and fill `max_pairs`."""
    copies = [replace(c, key=f"{c.key}x", index=c.index + 100) for c in candidates]
    if len({c.content for c in candidates if c.content is not None}) > 1:
        assert pick(candidates + copies, config) == pick(candidates, config)


@given(candidate_lists(), st.integers(1, 4))
def test_all_pairs_are_all_and_the_widest_first(candidates: list[Candidate], most: int) -> None:
    """Mutation: cutting before sorting, or losing count of what was cut."""
    every = pick(candidates, PairConfig(strategy="all_pairs"))
    margins = [pair.margin for pair in every.pairs]
    assert margins == sorted(margins, reverse=True)
    value_of = {c.content: c.value for c in candidates if c.content is not None and c.value is not None}
    levels = Counter(value_of.values())
    pairs_of_unequal = math.comb(len(value_of), 2) - sum(math.comb(n, 2) for n in levels.values())
    assert len(every.pairs) == pairs_of_unequal
    some = pick(candidates, PairConfig(strategy="all_pairs", max_pairs=most))
    assert some.pairs == every.pairs[:most] and some.num_cut == max(0, len(every.pairs) - most)


# ---------------------------------------------------------------------------------------------------------------------
# by hand


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((), "no_samples"),
        (((None, None), (None, None)), "unscorable"),
        ((("a", None), ("b", None)), "unscorable"),
        ((("a", 1.0), (None, None)), "single"),
        ((("a", 1.0), ("b", None)), "single"),
        ((("a", 1.0), ("a", 1.0), (None, None)), "all_identical"),
        ((("a", None), ("a", None)), "all_identical"),
        ((("a", 1.0), ("a", 1.0), ("b", None)), "single"),
        ((("a", 1.0), ("b", 1.0)), "tie"),
        ((("a", 1.0), ("b", 0.9)), "below_margin"),
    ],
)
def test_each_reason(rows: tuple[tuple[str | None, float | None], ...], reason: str) -> None:
    """Mutation: asking for ties before identical answers, or calling a missing score a tie."""
    config = PairConfig(min_margin=0.5)
    assert pick(make(*rows), config).drop == reason
    assert pick(make(*rows), PairConfig()).drop == (None if reason == "below_margin" else reason)


def test_every_reason_is_explained() -> None:
    """Mutation: a new reason without a sentence for people."""
    assert set(DROPS) == set(get_args(Drop))


def test_tie_policies() -> None:
    """Mutation: the longer answer chosen, the higher index chosen, or ties kept by default."""
    tied = make(("long", 1.0), ("s", 1.0), lengths=(9, 2))
    assert pick(tied, PairConfig()).drop == "tie"
    assert keys(pick(tied, PairConfig(ties="shorter"))) == [("k1", "k0")]
    assert keys(pick(tied, PairConfig(ties="index"))) == [("k0", "k1")]


def test_equal_extremes_go_by_policy() -> None:
    """Several best and several worst: the lowest index is best, the highest is worst; or by length under 'shorter'."""
    rows = make(("a", 2.0), ("b", 2.0), ("c", 1.0), ("d", 1.0), lengths=(5, 3, 4, 1))
    assert keys(pick(rows, PairConfig())) == [("k0", "k3")]
    assert keys(pick(rows, PairConfig(ties="shorter"))) == [("k1", "k2")]


def test_margin_is_inclusive() -> None:
    """Mutation: `>` instead of `>=`."""
    assert keys(pick(make(("a", 1.0), ("b", 0.5)), PairConfig(min_margin=0.5))) == [("k0", "k1")]


def test_top_vs_random_draws_every_other_one_and_repeats_itself() -> None:
    """Mutation: a random state instead of a hash, the top drawn against itself, or the seed ignored."""
    rows = make(("a", 4.0), ("b", 3.0), ("c", 2.0), ("d", 1.0))
    config = PairConfig(strategy="top_vs_random")
    drawn = Counter(keys(pick(rows, config, name=f"p{i}"))[0] for i in range(600))
    assert set(drawn) == {("k0", "k1"), ("k0", "k2"), ("k0", "k3")}
    assert all(140 < count < 260 for count in drawn.values())  # 200 each, 5 standard deviations
    again = [keys(pick(rows, config, name=f"p{i}", seed=1)) for i in range(50)]
    assert again == [keys(pick(rows, config, name=f"p{i}", seed=1)) for i in range(50)]
    assert again != [keys(pick(rows, config, name=f"p{i}", seed=2)) for i in range(50)]


def test_top_vs_random_draws_among_what_the_top_beats() -> None:
    """Mutation: a draw among all others, which drops half of these prompts as ties though two answers score lower."""
    rows = make(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 0.0), ("e", 0.5))
    drawn = [pick(rows, PairConfig(strategy="top_vs_random"), name=f"p{i}") for i in range(60)]
    assert {keys(selection)[0] for selection in drawn} == {("k0", "k3"), ("k0", "k4")}
    wide = [pick(rows, PairConfig(strategy="top_vs_random", min_margin=0.75), name=f"p{i}") for i in range(20)]
    assert {keys(selection)[0] for selection in wide} == {("k0", "k3")}
    assert pick(rows[:3], PairConfig(strategy="top_vs_random")).drop == "tie"
    assert pick(rows, PairConfig(strategy="top_vs_random", min_margin=2.0)).drop in ("below_margin", "tie")


def test_further_traces_of_the_same_answers() -> None:
    """Mutations: another answer's trace; the first sample twice; order of storage; more than asked for; the longer side's
    number; a sample without a score."""
    rows = make(
        ("b", 0.0), ("a", 1.0), ("a", 1.0), ("b", 0.0), ("c", 0.5), ("a", None), ("a", 1.0), ("b", 0.0), ("a", 1.0)
    )
    (choice,) = pick(rows, PairConfig()).pairs
    assert (choice.chosen.key, choice.rejected.key, choice.more) == ("k1", "k0", ())
    for most, expected in ((1, []), (2, [("k2", "k3")]), (9, [("k2", "k3"), ("k6", "k7")])):
        more = with_traces(choice, rows[::-1], most).more
        assert [(one.chosen.key, one.rejected.key) for one in more] == expected
    assert with_traces(choice, rows[:7], 9).more == with_traces(choice, rows, 2).more, "as many as both have"


def test_quantiles_are_values_that_occur() -> None:
    """Mutation: an index past the end, or an interpolated number that no pair has."""
    assert quantiles([]) == {}
    found = quantiles([3.0, 1.0, 2.0])
    assert found["q0"] == 1.0 and found["q50"] == 2.0 and found["q100"] == 3.0 and found["mean"] == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# silence


def reject(candidates: list[Candidate], **settings: Any) -> list[tuple[str, str]]:
    return keys(select_pairs(candidates, PairConfig(**settings), name="p", seed=0, reject_silence=True))


def test_silence_loses_to_every_answer_and_is_never_chosen() -> None:
    """Mutation: silence ranked by a score, paired with silence, put under min_margin or ties, or standing in for a failed
    score; without the setting nothing may change."""
    mixed = make(("a", 2.0), (None, None), ("b", -5.0), (None, None))
    assert reject(mixed) == [("k0", "k1")] and keys(pick(mixed, PairConfig())) == [("k0", "k2")]
    assert reject(make((None, None), ("a", -9.0)), min_margin=3.0) == [("k1", "k0")], "one answer is enough"
    assert reject(make(("a", 1.0), ("b", 1.0), (None, None))) == [("k0", "k2")], "equal scores, and both above silence"
    assert reject(make(("a", None), (None, None))) == [] == reject(make((None, None), (None, None)))
    failed = [replace(one, drawn=one.content is not None) for one in mixed]
    assert reject(failed) == [("k0", "k2")], "a response that could not be drawn is no silence"


def test_all_pairs_puts_silence_behind_the_lowest_score() -> None:
    """Mutation: pairs against silence first, so that max_pairs would keep nothing else."""
    rows = make(("a", 2.0), ("b", 1.0), ("c", 0.0), (None, None))
    every = [("k0", "k2"), ("k0", "k3"), ("k0", "k1"), ("k1", "k2"), ("k1", "k3"), ("k2", "k3")]
    assert reject(rows, strategy="all_pairs") == every
    assert reject(rows, strategy="all_pairs", max_pairs=1) == every[:1]


@given(candidate_lists(), configs)
def test_silence_is_at_most_rejected(candidates: list[Candidate], config: PairConfig) -> None:
    """Mutation: choosing among all candidates where nothing has a score."""
    for pair in select_pairs(candidates, config, name="p", seed=0, reject_silence=True).pairs:
        assert pair.chosen.content is not None and pair.chosen.value is not None
        assert (pair.margin is None) == (pair.rejected.content is None)
