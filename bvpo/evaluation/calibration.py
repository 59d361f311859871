"""Are the probabilities that a preference model states right as often as they say? On pairs that it was not trained on.

In: margins, the log-odds that the response which the scorer preferred is the better one, of pairs grouped by prompt (and
seed). Out: :class:`Bin` (stated probability against share right, for a reliability diagram), the expected calibration
error, and :class:`CalibrationRow` with accuracy, Brier score and log loss. Pure. It fits and corrects nothing.

A pair has no positive class: which response comes first is arbitrary. So each pair is read as a statement about the side
that the model prefers, with probability max(p, 1 - p) = sigmoid(|margin|) in [0.5, 1]; it is right where margin > 0, and a
tie (margin 0, probability 0.5) is half right.

Legend: N pairs, P prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from bvpo.evaluation.metrics import OverSeeds, mean_over_seeds
from bvpo.records import VIEWS, View
from bvpo.stats import Floats, share_interval

NUM_BINS, NUM_ADAPTIVE = 10, 5
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPair:
    """A line of ``held_out.jsonl``: what a trained model says of a pair that it was not trained on.

    ``id`` is the quad's, ``prompt`` a hash of the conversation (quads of one prompt share it). ``margin``: the chosen minus
    the rejected implicit reward. ``score_margin``: the same of the scorer's values, ``None`` where they are not known.
    """

    id: str
    view: View
    prompt: str
    margin: float
    score_margin: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs whose stated probability lies between ``start`` and ``end``.

    ``confidence`` (stated) and ``right`` (observed) are means over prompts of the means over each prompt's pairs; ``low``
    and ``high`` are Wilson's interval for ``right``, ``None`` with one prompt.
    """

    start: float
    end: float
    num_pairs: int
    num_prompts: int
    confidence: float
    right: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRow:
    """One method in one view on its held-out pairs. ``accuracy``, ``brier`` and ``log_loss`` are means over seeds; the bins
    and the calibration errors pool the pairs of all seeds. ``ece_by_chance``: what a perfectly calibrated model would show
    as ``ece`` with as many prompts at the same probabilities, about."""

    method: str
    view: View
    num_pairs: int
    num_prompts: int
    accuracy: OverSeeds
    brier: OverSeeds
    log_loss: OverSeeds
    ece: float
    ece_by_chance: float
    adaptive_ece: float
    bins: tuple[Bin, ...]
    adaptive_bins: tuple[Bin, ...]


# ---------------------------------------------------------------------------------------------------------------------
# per pair


def confidences(margins_N: Floats) -> Floats:
    """Probability that the model gives the side that it prefers, in [0.5, 1]."""
    return expit(np.abs(margins_N))


def rights(margins_N: Floats) -> Floats:
    """1 where the model prefers what the scorer preferred, 0 where the other, 0.5 for a tie."""
    return np.where(margins_N == 0, 0.5, (margins_N > 0).astype(np.float64))


def brier_scores(margins_N: Floats) -> Floats:
    """(1 - p)^2 with p the probability of what the scorer preferred: 0 is perfect, 0.25 says nothing, 1 is the worst."""
    return expit(-margins_N) ** 2  # not 1 - expit(m), which is 0 from m = 37 on


def log_losses(margins_N: Floats) -> Floats:
    """-log p = softplus(-margin), in nats; log 2 = 0.693 says nothing. Exact at any margin."""
    return np.logaddexp(0.0, -margins_N)


# ---------------------------------------------------------------------------------------------------------------------
# reliability


def reliability_bins(
    margins_N: Floats, prompts_N: Sequence[Hashable] | None = None, *, num_bins: int = NUM_BINS, level: float = 0.95
) -> tuple[Bin, ...]:
    """Bins of equal width on [0.5, 1]; those without pairs are left out. Without ``prompts_N`` every pair is a prompt."""
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    stated_N = confidences(margins_N)
    places_N = np.clip(np.searchsorted(edges, stated_N, side="right") - 1, 0, num_bins - 1)
    members = ((float(edges[b]), float(edges[b + 1]), np.flatnonzero(places_N == b)) for b in range(num_bins))
    return tuple(_bin(a, b, index, margins_N, prompts_N, level) for a, b, index in members if len(index))


def adaptive_bins(
    margins_N: Floats, prompts_N: Sequence[Hashable] | None = None, *, num_bins: int = NUM_ADAPTIVE, level: float = 0.95
) -> tuple[Bin, ...]:
    """Bins with as many pairs each as can be, from the smallest to the largest probability of each. Equal probabilities stay
    together, so the order of the pairs does not matter."""
    order_N = np.argsort(np.abs(margins_N), kind="stable")
    sizes_N = np.abs(margins_N)[order_N]
    places = np.linspace(0, len(order_N), min(num_bins, len(order_N)) + 1).round().astype(np.int64)[1:-1]
    cuts = np.unique(np.searchsorted(sizes_N, sizes_N[places], side="left"))
    found = []
    for index in np.split(order_N, cuts[cuts > 0]):
        if len(index):
            stated = confidences(margins_N[index])
            found.append(_bin(float(stated[0]), float(stated[-1]), index, margins_N, prompts_N, level))
    return tuple(found)


def _bin(
    start: float, end: float, index: Indices, margins_N: Floats, prompts_N: Sequence[Hashable] | None, level: float
) -> Bin:
    names = index.tolist() if prompts_N is None else [prompts_N[i] for i in index]
    right_P = np.array(list(prompt_means(names, rights(margins_N[index])).values()))
    stated_P = np.array(list(prompt_means(names, confidences(margins_N[index])).values()))
    share = share_interval(right_P, len(index), level=level)
    return Bin(
        start=start,
        end=end,
        num_pairs=len(index),
        num_prompts=len(right_P),
        confidence=float(stated_P.mean()),
        right=float(right_P.mean()),
        low=share.low,
        high=share.high,
    )


def prompt_means(prompts_N: Sequence[Hashable], values_N: Floats) -> dict[Hashable, float]:
    """Prompt -> mean over its pairs: several pairs of one prompt are not independent evidence."""
    found: defaultdict[Hashable, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts_N, values_N.tolist(), strict=True):
        found[prompt].append(value)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """Expected calibration error: the mean distance of confidence and share right, each bin weighed by its pairs.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3. It cannot be negative, so it is above 0 by chance alone; compare it with
    :func:`error_by_chance`. ``None`` without pairs.
    """
    total = sum(one.num_pairs for one in bins)
    return sum(one.num_pairs * abs(one.confidence - one.right) for one in bins) / total if total else None


def error_by_chance(bins: Sequence[Bin]) -> float | None:
    """What :func:`calibration_error` would be on average if every stated probability were true.

    Per bin the mean distance of the share of P prompts that are right from c, its mean confidence: the normal approximation
    sqrt(2 / pi * c (1 - c) / P), and never more than 2 c (1 - c), which is the distance of a single one.
    """
    total = sum(one.num_pairs for one in bins)
    if not total:
        return None
    spreads = [(one.num_pairs, one.confidence * (1 - one.confidence), one.num_prompts) for one in bins]
    return sum(n * min((2 / np.pi * v / p) ** 0.5, 2 * v) for n, v, p in spreads) / total


# ---------------------------------------------------------------------------------------------------------------------
# a method over its seeds


def calibration_rows(
    method: str, pairs: Mapping[str, Iterable[HeldOutPair]], *, level: float = 0.95
) -> list[CalibrationRow]:
    """One row per view that has pairs; ``pairs`` maps seeds to what training wrote of its held-out pairs."""
    by_view: defaultdict[View, dict[str, list[HeldOutPair]]] = defaultdict(dict)
    for seed, found in pairs.items():
        for pair in found:
            by_view[pair.view].setdefault(seed, []).append(pair)
    return [_row(method, view, by_view[view], level) for view in VIEWS if view in by_view]


def _row(method: str, view: View, by_seed: Mapping[str, Sequence[HeldOutPair]], level: float) -> CalibrationRow:
    margins = {seed: np.array([pair.margin for pair in pairs]) for seed, pairs in by_seed.items()}
    prompts = {seed: [pair.prompt for pair in pairs] for seed, pairs in by_seed.items()}
    margins_N = np.concatenate(list(margins.values()))
    prompts_N = [prompt for names in prompts.values() for prompt in names]
    bins = reliability_bins(margins_N, prompts_N, level=level)
    adaptive = adaptive_bins(margins_N, prompts_N, level=level)
    ece, by_chance, adaptive_ece = calibration_error(bins), error_by_chance(bins), calibration_error(adaptive)
    assert ece is not None and by_chance is not None and adaptive_ece is not None
    measures = {"accuracy": rights, "brier": brier_scores, "log_loss": log_losses}
    return CalibrationRow(
        method=method,
        view=view,
        num_pairs=len(margins_N),
        num_prompts=len(set(prompts_N)),
        ece=ece,
        ece_by_chance=by_chance,
        adaptive_ece=adaptive_ece,
        bins=bins,
        adaptive_bins=adaptive,
        **{
            name: mean_over_seeds(
                {
                    seed: {str(p): v for p, v in prompt_means(prompts[seed], of(margins[seed])).items()}
                    for seed in margins
                },
                level=level,
            )
            for name, of in measures.items()
        },
    )
