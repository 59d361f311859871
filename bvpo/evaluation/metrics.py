"""What an evaluation says: per benchmark and mode the metrics of a model, and paired differences between two models.

In: one :class:`Verdict` per sample, or one value per prompt and seed. Out: :class:`ModeResult`, :class:`PairedDifference`,
:class:`OverSeeds`: values with intervals over prompts (several samples of one prompt are averaged first), how many prompts
and samples they rest on, and what is missing and why. Pure. It grades nothing and reads no file.

Legend: P prompts, S seeds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from bvpo.records import View
from bvpo.stats import Floats, Interval, difference_interval, mean_interval, share_interval, t_quantile

Mode = Literal["thinking", "nothinking"]
MODES: tuple[Mode, Mode] = ("thinking", "nothinking")
MODE_VIEWS: dict[Mode, View] = {"thinking": "trace", "nothinking": "empty"}
MODE_TITLES: dict[Mode, str] = {"thinking": "Thinking", "nothinking": "NoThinking"}

_MOST_REASONS = 20  # kinds of errors that are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One sample of a benchmark, judged: a line of ``verdicts.jsonl``.

    ``values`` holds a number per metric that counts this sample; a metric that does not has its reason in ``missing``.
    ``tokens`` are the sampled ones, ``trace_tokens`` those up to the end of the trace, closing marker included (all of them
    where the trace never closed; ``None`` where its end is not known). ``cut``: stopped by the length limit. ``answered``:
    whether any text follows the trace. ``at_lowest`` names the metrics in which this response, having no answer, counts as
    the lowest score seen, and the most that it may count (:func:`share_lowest`).
    """

    prompt_id: str
    mode: Mode
    index: int
    values: dict[str, int | float]
    missing: dict[str, str] = field(default_factory=dict)
    tokens: int | None
    trace_tokens: int | None
    closed: bool
    cut: bool = False
    answered: bool = True
    at_lowest: dict[str, int | float | None] = field(default_factory=dict)

    @property
    def answer_tokens(self) -> int | None:
        return None if self.tokens is None or self.trace_tokens is None else self.tokens - self.trace_tokens


UNCLOSED, EMPTY = "unclosed trace", "empty answer"
"""Reasons in ``missing`` of a response without an answer that is left out because that was asked for."""


def dropped(verdict: Verdict, metric: str) -> bool:
    """Whether the metric leaves this response out for want of an answer."""
    return metric not in verdict.values and verdict.missing.get(metric) in (UNCLOSED, EMPTY)


def share_lowest(groups: Sequence[Sequence[Verdict]]) -> list[list[Verdict]]:
    """The verdicts of one benchmark, of one model or of all that are compared, with one lowest score for silence.

    In each metric it is the lowest value that any answer of any group got, in both modes. One number for all groups keeps
    paired differences fair: with a number of its own, a model whose worst answer is better would be silent more cheaply.
    """
    lowest: dict[str, float] = {}
    for verdict in (verdict for group in groups for verdict in group):
        for metric, value in verdict.values.items():
            if metric not in verdict.at_lowest:
                lowest[metric] = min(float(value), lowest.get(metric, float(value)))
    return [[_at_lowest(verdict, lowest) for verdict in group] for group in groups]


def _at_lowest(verdict: Verdict, lowest: Mapping[str, float]) -> Verdict:
    """What has no value and no bound anywhere stays missing: then nobody answered anything."""
    found: dict[str, float] = {}
    for metric, most in verdict.at_lowest.items():
        if known := [value for value in (most, lowest.get(metric)) if value is not None]:
            found[metric] = float(min(known))
    if not verdict.at_lowest:
        return verdict
    kept = {metric: value for metric, value in verdict.values.items() if metric not in verdict.at_lowest}
    missing = {metric: why for metric, why in verdict.missing.items() if metric not in found}
    return replace(verdict, values={**kept, **found}, missing=missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """One metric in one mode. ``estimate`` is the mean over prompts of the mean over each prompt's samples: avg@k where k
    samples were drawn. ``binary``: every value is 0 or 1; ``pass_at`` (such samples only) maps k to the chance that one of k
    samples is right. ``missing`` counts the samples that the metric leaves out, by reason. ``silent`` counts the responses
    without an answer that are in the estimate."""

    name: str
    estimate: Interval
    num_samples: int
    binary: bool
    pass_at: dict[str, Interval] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    silent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeResult:
    """One benchmark in one mode. Token counts are means per sample; samples that could not be drawn are not in them."""

    mode: Mode
    num_prompts: int
    num_samples: int
    metrics: dict[str, MetricResult]
    unclosed: Interval
    no_answer: Interval
    cut: Interval
    tokens: Interval
    trace_tokens: Interval
    answer_tokens: Interval


def summarize(verdicts: Iterable[Verdict], mode: Mode, metrics: Sequence[str], *, level: float = 0.95) -> ModeResult:
    """The verdicts of one mode as numbers; those of other modes are passed over."""
    mine = [verdict for verdict in verdicts if verdict.mode == mode]
    drawn = sum(verdict.tokens is not None for verdict in mine)
    means = {name: _means(mine, of)[1] for name, of in MEASURES.items()}
    return ModeResult(
        mode=mode,
        num_prompts=len({verdict.prompt_id for verdict in mine}),
        num_samples=len(mine),
        metrics={name: _metric(mine, name, level) for name in metrics},
        unclosed=share_interval(means["unclosed"], drawn, level=level),
        no_answer=share_interval(means["no answer"], drawn, level=level),
        cut=share_interval(means["cut"], drawn, level=level),
        tokens=mean_interval(means["tokens"], level=level),
        trace_tokens=mean_interval(means["trace tokens"], level=level),
        answer_tokens=mean_interval(means["answer tokens"], level=level),
    )


def prompt_values(verdicts: Iterable[Verdict], mode: Mode, metric: str) -> dict[str, float]:
    """Prompt -> mean of the metric over its samples; prompts without any value are not in it."""
    return prompt_means(verdicts, mode, lambda verdict: verdict.values.get(metric))


def prompt_means(verdicts: Iterable[Verdict], mode: Mode, of: Callable[[Verdict], float | None]) -> dict[str, float]:
    """Prompt -> mean over its samples of anything that ``of`` knows about them (:data:`MEASURES`, for example)."""
    ids, means_P = _means((verdict for verdict in verdicts if verdict.mode == mode), of)
    return dict(zip(ids, means_P.tolist(), strict=True))


MEASURES: dict[str, Callable[[Verdict], float | None]] = {
    "tokens": lambda verdict: verdict.tokens,
    "trace tokens": lambda verdict: verdict.trace_tokens,
    "answer tokens": lambda verdict: verdict.answer_tokens,
    "unclosed": lambda verdict: None if verdict.tokens is None else not verdict.closed,
    "no answer": lambda verdict: None if verdict.tokens is None else not (verdict.closed and verdict.answered),
    "cut": lambda verdict: None if verdict.tokens is None else verdict.cut,
}
"""What is known of every sample beside its metrics; the last three are 0 or 1."""


def _means(verdicts: Iterable[Verdict], of: Callable[[Verdict], float | None]) -> tuple[list[str], Floats]:
    """Prompts in their order, and the mean per prompt ``[P]`` of what ``of`` knows."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        if (value := of(verdict)) is not None:
            found[verdict.prompt_id].append(float(value))
    return list(found), np.array([sum(values) / len(values) for values in found.values()])


def _metric(verdicts: Sequence[Verdict], name: str, level: float) -> MetricResult:
    values: defaultdict[str, list[float]] = defaultdict(list)
    missing: Counter[str] = Counter()
    for verdict in verdicts:
        if name in verdict.values:
            values[verdict.prompt_id].append(float(verdict.values[name]))
        else:
            missing[str(verdict.missing.get(name, "not judged"))] += 1
    num_samples = sum(map(len, values.values()))
    binary = num_samples > 0 and all(value in (0.0, 1.0) for group in values.values() for value in group)
    means_P = np.array([sum(group) / len(group) for group in values.values()])
    interval = share_interval(means_P, num_samples, level=level) if binary else mean_interval(means_P, level=level)
    return MetricResult(
        name=name,
        estimate=interval,
        num_samples=num_samples,
        binary=binary,
        pass_at=_pass_at(list(values.values()), level) if binary else {},
        missing=_most_common(missing),
        silent=sum(name in verdict.values and not (verdict.closed and verdict.answered) for verdict in verdicts),
    )


def _most_common(reasons: Counter[str]) -> dict[str, int]:
    common = dict(sorted(reasons.most_common(_MOST_REASONS), key=lambda item: (-item[1], item[0])))
    rest = reasons.total() - sum(common.values())
    return {**common, **({"other reasons": rest} if rest else {})}


def _pass_at(groups: Sequence[Sequence[float]], level: float) -> dict[str, Interval]:
    """k -> pass@k for k = 1, 2, 4, ... and all samples; prompts with fewer than k samples are not in it."""
    most = max(map(len, groups))
    ks = sorted({*(2**power for power in range(most.bit_length())), most}) if most > 1 else []
    found = {}
    for k in ks:
        shares_P = np.array([pass_at_k(len(group), int(sum(group)), k) for group in groups if len(group) >= k])
        found[str(k)] = share_interval(shares_P, sum(len(group) for group in groups if len(group) >= k), level=level)
    return found


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that k samples, drawn without replacement from these, hold a right one: unbiased for k fresh samples
    (Chen et al. 2021, 2107.03374): 1 - prod(1 - k/i) over i = n-c+1 .. n."""
    assert 1 <= k <= num_samples, f"pass@{k} of {num_samples} samples"
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - float(np.prod([1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1)]))


# ---------------------------------------------------------------------------------------------------------------------
# comparisons


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """``a - b`` on the prompts that both have. ``only_a`` and ``only_b`` count the prompts that the other lacks; ``better``,
    ``equal`` and ``worse`` the common ones where a's value is higher, the same or lower. ``num_asked`` and ``num_dropped``
    as in :class:`OverSeeds`."""

    difference: Interval
    mean_a: float | None
    mean_b: float | None
    num_prompts: int
    only_a: int
    only_b: int
    better: int
    equal: int
    worse: int
    num_asked: int = 0
    num_dropped: int = 0


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], *, bound: float | None = None, level: float = 0.95
) -> PairedDifference:
    """Compares two models prompt by prompt; ``a`` and ``b`` map prompt ids to values (see :func:`prompt_values`). ``bound``
    is the largest possible difference, 1 for what is right or wrong; ``None`` where there is no such bound."""
    common = [prompt for prompt in a if prompt in b]
    a_P = np.array([a[prompt] for prompt in common])
    b_P = np.array([b[prompt] for prompt in common])
    return PairedDifference(
        difference=difference_interval(a_P - b_P, bound=bound, level=level),
        mean_a=float(a_P.mean()) if common else None,
        mean_b=float(b_P.mean()) if common else None,
        num_prompts=len(common),
        only_a=len(a) - len(common),
        only_b=len(b) - len(common),
        better=int((a_P > b_P).sum()),
        equal=int((a_P == b_P).sum()),
        worse=int((a_P < b_P).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OverSeeds:
    """A mean over seeds, each of which is a mean over prompts, with an interval for either source of chance.

    ``seed_low, seed_high``: what other seeds would give, a t interval of the values in ``by_seed``. Where every seed has
    prompts of its own, it holds their chance, too; where all seeds share the prompts, it is about these prompts.
    ``prompt_low, prompt_high``: what other prompts would give to the models of these very seeds. Either is ``None`` with
    fewer than two. ``num_values`` counts pairs of seed and prompt, ``only_a`` and ``only_b`` those that one side lacks,
    ``left_out`` names the seeds without any value. Of differences, ``num_asked`` counts the pairs that either side was asked
    for, and ``num_dropped`` the responses of both that were left out for want of an answer.
    """

    value: float | None
    seed_low: float | None
    seed_high: float | None
    prompt_low: float | None
    prompt_high: float | None
    level: float
    num_seeds: int
    num_prompts: int
    num_values: int
    by_seed: dict[str, float]
    left_out: tuple[str, ...] = ()
    only_a: int = 0
    only_b: int = 0
    num_asked: int = 0
    num_dropped: int = 0


def mean_over_seeds(values: Mapping[Any, Mapping[str, float]], *, level: float = 0.95) -> OverSeeds:
    """``values`` maps seed -> prompt id -> value. Seeds weigh alike, and prompts within a seed.

    The prompt interval treats a prompt that several seeds share as one draw: its values are not independent evidence. It is
    the t interval of the linearised mean, which needs no random numbers. With influence u_p = sum over the seeds of p of
    (value - mean of the seed) / (S * prompts of the seed), the variance is sum(u_p^2) * P / (P - G), where G counts the
    different sets of seeds that prompts occur in: 1 where all seeds share all prompts (and it is the interval of prompt
    means), S where each seed has its own (and it is the one stratified by seed).
    """
    groups = {str(seed): dict(prompts) for seed, prompts in values.items() if prompts}
    by_seed = {seed: sum(prompts.values()) / len(prompts) for seed, prompts in groups.items()}
    overall = mean_interval(np.array(list(by_seed.values())), level=level)
    influence: defaultdict[str, float] = defaultdict(float)
    places: defaultdict[str, list[str]] = defaultdict(list)
    for seed, prompts in groups.items():
        for prompt, value in prompts.items():
            influence[prompt] += (value - by_seed[seed]) / (len(groups) * len(prompts))
            places[prompt].append(seed)
    num_prompts, num_sets = len(influence), len(set(map(tuple, places.values())))
    low = high = None
    if overall.value is not None and num_prompts > num_sets:
        variance = sum(u * u for u in influence.values()) * num_prompts / (num_prompts - num_sets)
        half = t_quantile(level, num_prompts - num_sets) * variance**0.5
        low, high = overall.value - half, overall.value + half
    return OverSeeds(
        value=overall.value,
        seed_low=overall.low,
        seed_high=overall.high,
        prompt_low=low,
        prompt_high=high,
        level=level,
        num_seeds=len(groups),
        num_prompts=num_prompts,
        num_values=sum(map(len, groups.values())),
        by_seed=by_seed,
        left_out=tuple(str(seed) for seed in values if str(seed) not in groups),
    )


def difference_over_seeds(
    a: Mapping[Any, Mapping[str, float]], b: Mapping[Any, Mapping[str, float]], *, level: float = 0.95
) -> OverSeeds:
    """``a - b``, paired by seed and prompt, with the intervals of :func:`mean_over_seeds`. Both map seed -> prompt id ->
    value; what only one of them has is counted and left out."""
    differences = {
        seed: {prompt: a[seed][prompt] - b[seed][prompt] for prompt in a.get(seed, {}) if prompt in b.get(seed, {})}
        for seed in [*a, *(seed for seed in b if seed not in a)]
    }
    common = sum(map(len, differences.values()))
    found = mean_over_seeds(differences, level=level)
    return replace(found, only_a=sum(map(len, a.values())) - common, only_b=sum(map(len, b.values())) - common)
