"""What ``bvpo compare`` says: A - B of two evaluations over prompts, and of methods over seeds and prompts.

In: the verdicts of both sides, by seed where there are several. Out: one row per benchmark, mode and metric, and which
method of one comparison is paired with which of another. Only what both sides have is paired; nothing is compared unpaired.
Pure. That both sides mean the same prompts and scorers is for the caller to make sure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bvpo.evaluation.metrics import MODES, Mode, OverSeeds, PairedDifference, mean_over_seeds
from bvpo.evaluation.results import SHARES, Runs, benchmarks_in, difference, metrics_of, seed_values
from bvpo.strict import UserError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """A - B of two evaluations in one metric. ``notes`` say how the two were made differently."""

    benchmark: str
    mode: Mode
    metric: str
    paired: PairedDifference
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsRow:
    """A - B of two methods in one metric, paired by seed and prompt. ``mean_a`` and ``mean_b`` are over what is paired, so
    that ``mean_a - mean_b`` is the difference."""

    method_a: str
    method_b: str
    benchmark: str
    mode: Mode
    metric: str
    mean_a: float | None
    mean_b: float | None
    difference: OverSeeds


Pair = tuple[str, str]
"""A method of A and a method of B."""


def method_pairs(a: Sequence[str], b: Sequence[str], wanted: Sequence[str], same: bool) -> list[Pair]:
    """Which method of A is compared with which of B: those ``wanted`` (``NAME``, or ``A_NAME,B_NAME``), else every one that
    both have. ``same``: A and B are one comparison, where a method cannot be compared with itself."""
    pairs = [_wanted(text, a, b) for text in wanted]
    if same and (not pairs or any(one == other for one, other in pairs)):
        raise UserError(
            f"A and B are the same comparison: name two of its methods with --method ONE,OTHER; it has {', '.join(a)}"
        )
    pairs = list(dict.fromkeys(pairs or [(name, name) for name in a if name in b]))
    if not pairs:
        raise UserError(
            f"no method in common: A has {', '.join(a)}, B has {', '.join(b)}; --method A_NAME,B_NAME names a pair"
        )
    return pairs


def _wanted(text: str, a: Sequence[str], b: Sequence[str]) -> Pair:
    names = [name.strip() for name in text.split(",")]
    if len(names) > 2:
        raise UserError(f"--method: got {text!r}, expected NAME or A_NAME,B_NAME")
    for side, name, there in (("A", names[0], a), ("B", names[-1], b)):
        if name not in there:
            raise UserError(f"--method: {side} has no method {name!r}{did_you_mean(name, there)}")
    return names[0], names[-1]


def seeds_rows(pair: Pair, a: Runs, b: Runs, *, level: float = 0.95) -> Iterator[SeedsRow]:
    """Every metric that both methods have values of. Shares that are 0 everywhere, such as unclosed traces where there is
    no trace, are left out."""
    for benchmark in benchmarks_in(a):
        for mode in MODES:
            for metric in metrics_of(a, benchmark, mode):
                ours, theirs = (seed_values(runs, benchmark, mode, metric) for runs in (a, b))
                found = difference((a, b), benchmark, mode, metric, level=level)
                if found is None or (metric in SHARES and not _any(ours) and not _any(theirs)):
                    continue
                yield SeedsRow(
                    method_a=pair[0],
                    method_b=pair[1],
                    benchmark=benchmark,
                    mode=mode,
                    metric=metric,
                    mean_a=mean_over_seeds(_paired(ours, theirs)).value,
                    mean_b=mean_over_seeds(_paired(theirs, ours)).value,
                    difference=found,
                )


_Values = Mapping[str, Mapping[str, float]]  # seed -> prompt -> value


def _paired(values: _Values, other: _Values) -> dict[str, dict[str, float]]:
    """The values whose seed and prompt the other side has, too."""
    return {
        seed: {prompt: value for prompt, value in prompts.items() if prompt in other.get(seed, {})}
        for seed, prompts in values.items()
    }


def _any(values: _Values) -> bool:
    return any(value for prompts in values.values() for value in prompts.values())
