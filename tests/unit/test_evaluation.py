"""The numbers of an evaluation: prompts weigh alike, intervals cover, pairs are made by prompt, nothing vanishes."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bvpo.config import EvaluateConfig, validate
from bvpo.evaluation.benchmark_prompts import read_prompts
from bvpo.evaluation.metrics import (
    EMPTY,
    MODES,
    Mode,
    Verdict,
    difference_over_seeds,
    dropped,
    mean_over_seeds,
    paired_difference,
    pass_at_k,
    prompt_values,
    share_lowest,
    summarize,
)
from bvpo.experiment import Experiment
from bvpo.records import Message, Prompt
from bvpo.stats import Interval, difference_interval, mean_interval, share_interval
from bvpo.strict import FieldError, UserError, read_jsonl, to_dict, write_jsonl


def verdict(prompt: str, index: int = 0, *, mode: Mode = "thinking", **changes: Any) -> Verdict:
    fields: dict[str, Any] = {"values": {"right": 1.0}, "tokens": 10, "trace_tokens": 6, "closed": True} | changes
    return Verdict(prompt_id=prompt, mode=mode, index=index, **fields)


def right(value: float) -> dict[str, Any]:
    return {"values": {"right": value}}


# ------------------------------------------------------------------------------------------------ one mode


def test_a_result_by_hand() -> None:
    """Two prompts, three samples and one. Prompt means 2/3 and 0, so the metric is 1/3, not 2/4; mean tokens 20 and 40: 30.
    Mutation: a mean over samples, the other mode's verdicts counted, or cut and unclosed exchanged."""
    found = summarize(
        [
            verdict("a", 0, **right(1.0), tokens=10, trace_tokens=4),
            verdict("a", 1, **right(1.0), tokens=20, trace_tokens=5),
            verdict("a", 2, **right(0.0), tokens=30, trace_tokens=30, closed=False, cut=True),
            verdict("b", 0, **right(0.0), tokens=40, trace_tokens=1, cut=True),
            verdict("b", 0, mode="nothinking", **right(1.0), tokens=999),
        ],
        "thinking",
        ["right"],
    )
    metric = found.metrics["right"]
    assert (found.num_prompts, found.num_samples, metric.num_samples) == (2, 4, 4)
    assert metric.binary and metric.missing == {}
    assert metric.estimate.value == pytest.approx(1 / 3) and metric.estimate.num_prompts == 2
    assert found.unclosed.value == pytest.approx(1 / 6) and found.cut.value == pytest.approx(2 / 3)
    assert found.tokens.value == pytest.approx(30)
    assert found.trace_tokens.value == pytest.approx((13 + 1) / 2)
    assert found.answer_tokens.value == pytest.approx((7 + 39) / 2)
    # pass@1 is the metric; pass@2 and pass@3 rest on the only prompt with as many samples
    assert {k: at.value for k, at in metric.pass_at.items()} == {"1": pytest.approx(1 / 3), "2": 1.0, "3": 1.0}
    assert {k: at.num_prompts for k, at in metric.pass_at.items()} == {"1": 2, "2": 1, "3": 1}


def test_what_is_missing_is_counted_by_reason() -> None:
    """Mutation: a missing value taken for 0, a prompt without values kept in the mean, or rare reasons lost."""
    verdicts = [verdict("a", 0, values={"right": 0.5}), verdict("a", 1, values={}, missing={"right": "unclosed trace"})]
    verdicts += [verdict("b", 0, values={}, missing={"right": "unclosed trace"})]
    verdicts += [verdict("c", 0, values={}, missing={}, tokens=None, trace_tokens=None, closed=False)]
    verdicts += [verdict(f"d{n}", 0, values={}, missing={"right": f"error {n}"}) for n in range(25)]
    found = summarize(verdicts, "thinking", ["right"])
    metric = found.metrics["right"]
    assert metric.estimate.value == 0.5 and metric.estimate.num_prompts == 1 and metric.num_samples == 1
    assert metric.missing["unclosed trace"] == 2 and metric.missing["other reasons"] == 7
    assert sum(metric.missing.values()) == len(verdicts) - 1 and len(metric.missing) == 21
    assert not metric.binary and not metric.pass_at
    assert found.num_prompts == 28 and found.tokens.num_prompts == 27
    assert prompt_values(verdicts, "thinking", "right") == {"a": 0.5}


def test_nothing_at_all() -> None:
    """Mutation: a division by no prompt."""
    found = summarize([], "thinking", ["right"])
    assert found.metrics["right"].estimate.value is None and found.tokens.value is None and found.num_prompts == 0
    assert json.dumps(to_dict(found), allow_nan=False)


@pytest.mark.parametrize(("num", "good"), [(n, c) for n in (1, 3, 6) for c in range(n + 1)])
def test_pass_at_k_counts_subsets(num: int, good: int) -> None:
    """Against all subsets of k samples. Mutation: sampling with replacement, 1 - (1 - c/n)^k."""
    marks = [True] * good + [False] * (num - good)
    for k in range(1, num + 1):
        subsets = list(itertools.combinations(marks, k))
        assert pass_at_k(num, good, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


# ------------------------------------------------------------------------------------------------ intervals


def test_a_t_interval_is_scipys() -> None:
    """Mutation: P in place of P - 1, or the normal distribution."""
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    low, high = scipy_stats.t.interval(0.9, 5, loc=values.mean(), scale=scipy_stats.sem(values))
    found = mean_interval(values, level=0.9)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert (mean_interval(values[:1]).value, mean_interval(values[:1]).low) == (3.0, None)


def test_a_share_of_one_is_not_certain() -> None:
    """Wilson's interval of 50 out of 50 with t in place of z: 50 / (50 + t^2). Mutation: a t interval, [1, 1]."""
    t = float(scipy_stats.t.ppf(0.975, 49))
    found = share_interval(np.ones(50), 200)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(50 / (50 + t * t))
    none = share_interval(np.zeros(50), 50)
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(t * t / (50 + t * t))


def test_samples_that_agree_are_no_more_evidence() -> None:
    """Ten equal samples a prompt are as good as one. Mutation: the number of samples in place of the effective one, whose
    interval is a third as wide."""
    shares = np.array([1.0] * 12 + [0.0] * 28)
    one, ten = share_interval(shares, 40), share_interval(shares, 400)
    assert one == ten and one.low is not None and one.high is not None
    wilson = scipy_stats.binomtest(12, 40).proportion_ci(0.95, "wilson")
    assert (one.low, one.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


def test_a_bounded_difference_by_hand() -> None:
    """Bonett and Price: (8 + 1 - 3 - 1) / 52 and its variance, for 8 better and 3 worse of 50. Mutation: the bound not used,
    or used once."""
    differences = np.array([1.0] * 8 + [-1.0] * 3 + [0.0] * 39)
    found = difference_interval(differences, bound=1.0)
    mean, mean_square = 5 / 52, (9 + 4) / 52
    error = math.sqrt((mean_square - mean**2) / 51)
    t = float(scipy_stats.t.ppf(0.975, 51))
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((mean - t * error, mean + t * error))
    same = difference_interval(np.zeros(50), bound=1.0)
    assert same.value == 0 and same.low is not None and same.high is not None and -0.06 < same.low < 0 < same.high
    assert difference_interval(np.zeros(50)).high == 0.0
    with pytest.raises(ValueError, match="bound"):
        difference_interval(np.array([0.0, 2.0]), bound=1.0)


def coverage(draw: Callable[[np.random.Generator], Interval], truth: float, times: int) -> float:
    rng = np.random.default_rng(5)
    found = [draw(rng) for _ in range(times)]
    return sum(one.low is not None and one.high is not None and one.low <= truth <= one.high for one in found) / times


@pytest.mark.parametrize(("prompts", "samples", "share"), [(20, 1, 0.9), (50, 4, 0.95), (50, 8, 0.8)])
def test_shares_are_covered(prompts: int, samples: int, share: float) -> None:
    """Prompts of different difficulty. Standard error 0.008 over 800 data sets. Mutation: the t interval, which covers 0.89
    and 0.91 in the first two cases; or all samples taken for independent, 0.87 and 0.72 in the last two."""

    def draw(rng: np.random.Generator) -> Interval:
        own = rng.beta(2 * share, 2 * (1 - share), prompts)
        return share_interval(rng.binomial(samples, own) / samples, prompts * samples)

    assert 0.925 <= coverage(draw, share, 800) <= 0.985


@pytest.mark.parametrize(("better", "worse"), [(0.2, 0.02), (0.05, 0.0)])
def test_differences_are_covered(better: float, worse: float) -> None:
    """Few of 50 prompts differ. Mutation: the plain t interval, which covers 0.91 where one side never wins."""

    def draw(rng: np.random.Generator) -> Interval:
        differences = rng.choice([1.0, -1.0, 0.0], p=[better, worse, 1 - better - worse], size=50)
        return difference_interval(differences, bound=1.0)

    assert coverage(draw, better - worse, 600) >= 0.94


# ------------------------------------------------------------------------------------------------ pairs


def test_a_paired_difference_by_hand() -> None:
    """Mutation: pairing by position, b - a, or prompts of one side taken into a mean."""
    a = {"x": 1.0, "y": 2.0, "z": 4.0, "only": 100.0}
    b = {"w": -50.0, "z": 1.0, "y": 2.0, "x": 2.0}
    found = paired_difference(a, b)
    assert (found.num_prompts, found.only_a, found.only_b) == (3, 1, 1)
    assert (found.better, found.equal, found.worse) == (1, 1, 1)
    assert (found.mean_a, found.mean_b) == (pytest.approx(7 / 3), pytest.approx(5 / 3))
    expected = scipy_stats.ttest_rel([1, 2, 4], [2, 2, 1]).confidence_interval(0.95)
    assert found.difference.value == pytest.approx(2 / 3)
    assert (found.difference.low, found.difference.high) == pytest.approx((expected.low, expected.high))
    nothing = paired_difference({"x": 1.0}, {"y": 1.0})
    assert nothing.difference.value is None and nothing.mean_a is None and nothing.num_prompts == 0


values = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-10, 10), min_size=2)


@given(values, values)
def test_exchanging_the_sides_changes_the_sign(a: dict[str, float], b: dict[str, float]) -> None:
    """Mutation: an interval or count that is not turned around."""
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.better, one.only_a, one.num_prompts) == (other.worse, other.only_b, other.num_prompts)
    if one.difference.low is not None and other.difference.high is not None:
        assert one.difference.low == pytest.approx(-other.difference.high, abs=1e-9)


# ------------------------------------------------------------------------------------------------ seeds


def table(rng: np.random.Generator, shared: bool, seeds: int = 4, prompts: int = 30) -> dict[int, dict[str, float]]:
    """Values with an effect of the prompt; the prompts are the same for all seeds, or each seed's own."""
    effects = rng.normal(size=(1 if shared else seeds, prompts))
    return {
        s: {
            f"p{p}" if shared else f"s{s}p{p}": float(effects[0 if shared else s, p] + rng.normal())
            for p in range(prompts)
        }
        for s in range(seeds)
    }


def test_seeds_with_the_same_prompts() -> None:
    """The prompt interval is that of the means per prompt: a prompt that all seeds share is one draw. Mutation: each pair of
    seed and prompt as evidence of its own, which is too narrow by the prompts' own effect."""
    rows = table(np.random.default_rng(1), shared=True)
    found = mean_over_seeds(rows)
    per_prompt = np.array([[rows[s][p] for p in rows[0]] for s in rows]).mean(axis=0)
    expected, over = (
        mean_interval(per_prompt),
        mean_interval(np.array([statistics.fmean(r.values()) for r in rows.values()])),
    )
    assert (found.value, found.prompt_low, found.prompt_high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert (found.seed_low, found.seed_high) == pytest.approx((over.low, over.high))
    assert (found.num_seeds, found.num_prompts, found.num_values) == (4, 30, 120)
    assert found.by_seed["2"] == pytest.approx(statistics.fmean(rows[2].values()))


def test_seeds_with_prompts_of_their_own() -> None:
    """The prompt interval is the one stratified by seed: variances within seeds, not between. Mutation: one mean for all
    seeds, which takes differences of seeds for differences of prompts."""
    rows = table(np.random.default_rng(2), shared=False)
    rows[3] = {prompt: value + 100 for prompt, value in rows[3].items()}
    found = mean_over_seeds(rows)
    variance = sum(statistics.variance(list(r.values())) / len(r) for r in rows.values()) / len(rows) ** 2
    half = float(scipy_stats.t.ppf(0.975, 4 * 29)) * math.sqrt(variance)
    assert (found.prompt_low, found.prompt_high) == pytest.approx((found.value - half, found.value + half))  # type: ignore[operator]
    assert found.seed_high is not None and found.prompt_high is not None and found.seed_high > found.prompt_high + 10


def test_unequal_seeds_weigh_alike() -> None:
    """Mutation: a mean over all values, 2.0 here."""
    found = mean_over_seeds({"a": {"p": 1.0, "q": 1.0, "r": 1.0}, "b": {"p": 5.0}, "c": {}})
    assert found.value == 3.0 and found.left_out == ("c",) and found.num_seeds == 2
    assert mean_over_seeds({1: {"p": 1.0}}).seed_low is None and mean_over_seeds({}).value is None


def test_differences_over_seeds_are_paired() -> None:
    """Both methods share the effects of seed and prompt, and differ by 0.5 everywhere; what one lacks is counted. Mutation:
    the difference of two means, whose interval holds those effects."""
    a = table(np.random.default_rng(3), shared=True)
    b = {s: {p: v - 0.5 for p, v in rows.items()} for s, rows in a.items()}
    del b[0]["p3"], b[3]
    a[1]["new"] = 7.0
    found = difference_over_seeds(a, b)
    assert found.value == pytest.approx(0.5) and found.seed_low == pytest.approx(0.5) == found.prompt_high
    assert (found.num_values, found.only_a, found.only_b, found.left_out) == (89, 32, 0, ("3",))


def test_both_intervals_cover() -> None:
    """Seeds and prompts each with an effect on the difference, prompts shared: the seed interval covers the mean over these
    prompts, the prompt interval the mean over these seeds. Standard error 0.011. Mutation: the two exchanged."""
    rng = np.random.default_rng(8)
    by_seed = by_prompt = 0
    for _ in range(400):
        seed_effects, prompt_effects = rng.normal(size=5), rng.normal(size=40)
        noise = 0.5 * rng.normal(size=(5, 40))
        values = {
            s: {f"p{p}": float(seed_effects[s] + prompt_effects[p] + noise[s, p]) for p in range(40)} for s in range(5)
        }
        found = mean_over_seeds(values)
        assert found.seed_low is not None and found.seed_high is not None
        assert found.prompt_low is not None and found.prompt_high is not None
        by_seed += found.seed_low <= prompt_effects.mean() <= found.seed_high
        by_prompt += found.prompt_low <= seed_effects.mean() <= found.prompt_high
    assert 0.92 <= by_seed / 400 <= 0.98 and 0.92 <= by_prompt / 400 <= 0.98


# ------------------------------------------------------------------------------------------------ settings and prompts


@pytest.mark.parametrize(
    ("benchmark", "field", "said"),
    [
        ({}, "source", "missing field 'source'"),
        ({"source": "a", "sorce": "b"}, "sorce", "did you mean 'source'?"),
        ({"source": 3}, "source", "got 3 (int), expected a string"),
        ({"source": "a", "limit": 0}, "limit", "expected 1 or more"),
        ({"source": "a", "temperature": -0.1}, "temperature", "expected 0 or more"),
        ({"source": "a", "scorer": "function"}, "function", "needs it"),
        ({"source": "a", "function": "m:f"}, "function", "never reads it"),
        ({"source": "a", "metric": "x", "more": {"x": "m:f"}}, "more.x", "name of the main metric"),
        ({"source": "a", "more": {"x": 3}}, "more.x", "expected 'package.module:name'"),
        ({"source": "a", "unclosed": {"scor": 1}}, "unclosed.scor", "did you mean 'score'?"),
        ({"source": "a", "unclosed": {"score": "no"}}, "unclosed.score", "expected a number or 'none'"),
        ("text", "", "expected an object"),
    ],
)
def test_mistakes_in_benchmarks(benchmark: Any, field: str, said: str) -> None:
    """Mutation: benchmarks checked when they run, hours later, or a check dropped."""
    with pytest.raises(FieldError, match=re.escape(said)) as caught:
        validate(EvaluateConfig(benchmarks={"good": {"source": "x"}, "bad": benchmark}))
    assert caught.value.field == f"benchmarks.bad.{field}".rstrip(".")


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_names_of_benchmarks_are_folders(name: str) -> None:
    """Mutation: a benchmark that writes outside its evaluation."""
    with pytest.raises(FieldError, match="folder name"):
        validate(EvaluateConfig(benchmarks={name: {"source": "x"}}))
    with pytest.raises(FieldError, match="holds something else"):
        validate(EvaluateConfig(folder="train"))


def test_benchmarks_that_are_right() -> None:
    """Mutation: a check that refuses what the page shows."""
    more = {"correct": "pkg.mod:f"}
    unclosed = {"reward": "none", "correct": 0}
    table: dict[str, Any] = {"source": "s", "metric": "reward", "more": more, "unclosed": unclosed, "num_samples": 4}
    validate(
        EvaluateConfig(benchmarks={"chat": table, "math": {"source": "s", "scorer": "function", "function": "a:b"}})
    )


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_keep_their_other_fields(tmp_path: Path) -> None:
    """Mutation: the reference lost, the id left in the metadata, or a repeated prompt sampled twice."""
    text = lines(
        tmp_path / "b.jsonl",
        {"id": 7, "prompt": "Two plus two?", "reference": "4", "level": 1},
        {"id": "again", "prompt": "Two  plus two?\n", "reference": "4"},
        {"prompt": "No name?", "reference": None},
    )
    found = read_prompts(text, Experiment(tmp_path))
    assert found.prompts[0].id == "7" and len(found.prompts[1].id) == 16
    assert [prompt.meta for prompt in found.prompts] == [{"reference": "4", "level": 1}, {"reference": None}]
    assert (found.repeated, found.trained_on) == (1, 0)
    assert len(read_prompts(text, Experiment(tmp_path), limit=1).prompts) == 1
    named = read_prompts(f"{text}?id=level&column=prompt", Experiment(tmp_path), limit=1).prompts[0]
    assert named.id == "1" and named.meta == {"id": 7, "reference": "4"}


def test_a_split_of_the_experiments_own(tmp_path: Path) -> None:
    """Mutation: all splits taken, or prompts that were trained on not noticed."""
    own = [
        Prompt(id=name, messages=(Message(role="user", content=f"{name}?"),), split=split, meta={"n": name})
        for name, split in (("a", "train"), ("b", "test"), ("c", "test"))
    ]
    write_jsonl(tmp_path / "prompts.jsonl", own)
    assert [prompt.id for prompt in read_prompts("split:test", Experiment(tmp_path)).prompts] == ["b", "c"]
    assert read_prompts("split:test", Experiment(tmp_path)).prompts[0].meta == {"n": "b"}
    text = lines(tmp_path / "b.jsonl", {"prompt": "a?"}, {"prompt": "b?"})
    assert read_prompts(text, Experiment(tmp_path)).trained_on == 1
    with pytest.raises(UserError, match="no prompt is in split 'tset'; did you mean 'test'"):
        read_prompts("split:tset", Experiment(tmp_path))
    with pytest.raises(UserError, match="make the experiment's prompts first"):
        read_prompts("split:test", Experiment(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": 1, "prompt": "a?"}, {"id": "1", "prompt": "b?"}], ":2: id '1' already names another prompt"),
        ([{"prompt": "a?"}, {"prompt": "  "}], ":2: not a prompt: turn 1 (user) has no text"),
        ([{"messages": [{"role": "user"}]}], ":1: expected a text or a list of messages"),
        ([{"id": 1.5, "prompt": "a?"}], ":1: field 'id': got 1.5"),
        ([], "holds no prompts"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    """Mutation: bad rows of a benchmark dropped in silence."""
    with pytest.raises(UserError, match=re.escape(said)):
        read_prompts(lines(tmp_path / "b.jsonl", *rows), Experiment(tmp_path))


def test_verdicts_read_back(tmp_path: Path) -> None:
    """Mutation: a field that the file cannot hold."""
    there = [
        verdict("a"),
        verdict("b", 1, mode="nothinking", values={}, missing={"right": "unclosed trace"}, tokens=None),
    ]
    write_jsonl(tmp_path / "v.jsonl", there)
    assert list(read_jsonl(tmp_path / "v.jsonl", Verdict)) == there and MODES == ("thinking", "nothinking")


def test_silence_shares_one_lowest_score_over_all_that_are_compared() -> None:
    """Mutation: each side's own lowest score, silence itself taken for the lowest, the bound ignored, or a model that never
    answers left without a value beside one that does."""

    def one(prompt: str, value: float | None, most: float | None = None) -> Verdict:
        silent = value is None
        return Verdict(
            prompt_id=prompt, mode="thinking", index=0, values={} if silent else {"r": value}, tokens=3, trace_tokens=1,
            missing={"r": EMPTY} if silent else {}, closed=True, answered=not silent,
            at_lowest={"r": most} if silent else {},
        )  # fmt: skip

    spoke, silent = [one("a", -1.0), one("b", 4.0)], [one("a", 5.0), one("b", None)]
    values = [prompt_values(found, "thinking", "r") for found in share_lowest([spoke, silent])]
    assert values == [{"a": -1.0, "b": 4.0}, {"a": 5.0, "b": -1.0}]
    (alone,) = share_lowest([silent])
    assert prompt_values(alone, "thinking", "r") == {"a": 5.0, "b": 5.0}
    assert [prompt_values(v, "thinking", "r") for v in share_lowest([spoke, alone])] == values, "shared anew, not kept"
    mute = [one("a", None), one("b", None)]
    assert prompt_values(share_lowest([mute])[0], "thinking", "r") == {}
    assert prompt_values(share_lowest([spoke, mute])[1], "thinking", "r") == {"a": -1.0, "b": -1.0}
    assert prompt_values(share_lowest([[one("a", 5.0), one("b", None, 0.0)]])[0], "thinking", "r") == {
        "a": 5.0,
        "b": 0.0,
    }
    assert all(dropped(verdict, "r") for verdict in mute) and not any(dropped(verdict, "r") for verdict in alone)
