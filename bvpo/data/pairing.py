"""Scored candidates to preference pairs: which response of a prompt is chosen and which is rejected.

In: the candidates of one prompt in one view, in any order, and a :class:`~bvpo.config.PairConfig`. Out: a
:class:`Selection`: pairs, or the one reason why there is none. Only distinct answers compete, a pair always has a
higher and a lower score unless the tie policy says otherwise, silence (no answer) loses to every answer and is never
chosen, and nothing depends on the order of the input. Reads no file and knows no text: equal ``content``, equal answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bvpo.config import PairConfig
from bvpo.keys import hash_int

Drop = Literal["no_samples", "unscorable", "single", "all_identical", "tie", "below_margin"]

DROPS: dict[Drop, str] = {
    "no_samples": "nothing was sampled",
    "unscorable": "no response has a score",
    "single": "only one answer can be used",
    "all_identical": "all responses give the same answer",
    "tie": "all scores are equal",
    "below_margin": "no pair reaches min_margin",
}
"""Why a prompt has no pair in a view; every prompt and view ends in a pair or in exactly one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One sampled response. ``content`` names its answer (equal answers, equal content; ``None``: no answer),
    ``value`` is its score (``None``: none), ``length`` the answer's length in characters. ``drawn`` is false where sampling
    failed, so that there is nothing to train on."""

    key: str
    index: int
    content: str | None
    value: float | None
    length: int = 0
    drawn: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One pair; ``margin`` is the chosen score minus the rejected score, 0 where the tie policy decided, and ``None`` where
    an answer meets silence, which has no score. ``more`` are pairs of further samples of the same two answers."""

    chosen: Candidate
    rejected: Candidate
    more: tuple[Choice, ...] = ()

    @property
    def margin(self) -> float | None:
        return None if self.rejected.content is None else _value(self.chosen) - _value(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Pairs, or why there are none. ``num_cut`` counts pairs that ``max_pairs`` left out."""

    pairs: tuple[Choice, ...] = ()
    drop: Drop | None = None
    num_cut: int = 0

    def __post_init__(self) -> None:
        assert bool(self.pairs) != bool(self.drop), "a selection has pairs or a reason, not both"


def select_pairs(
    candidates: Sequence[Candidate], config: PairConfig, *, name: str, seed: int, reject_silence: bool = False
) -> Selection:
    """The pairs of one prompt in one view. ``name`` (of both) and ``seed`` decide what ``top_vs_random`` draws.
    ``reject_silence``: responses without an answer compete, as one that ranks below all answers."""
    answered = [c for c in candidates if c.content is not None]
    scored = [c for c in answered if c.value is not None]
    silent = sorted((c for c in candidates if c.content is None and c.drawn), key=lambda c: (c.index, c.key))
    last = silent[:1] if reject_silence and scored else []
    drop = None if last else _nothing_to_compare(candidates, answered, scored)
    if drop is not None:
        return Selection(drop=drop)
    ranked = [*sorted(_distinct(scored), key=_preference(config.ties)), *last]

    def is_decided(pair: Choice) -> bool:
        return config.ties != "drop" or pair.margin is None or pair.margin > 0

    def is_wanted(pair: Choice) -> bool:
        return is_decided(pair) and (pair.margin is None or pair.margin >= config.min_margin)

    proposed = STRATEGIES[config.strategy](ranked, name, seed, is_wanted)
    decided = [pair for pair in proposed if is_decided(pair)]
    kept = [pair for pair in decided if is_wanted(pair)]
    if not kept:
        return Selection(drop="below_margin" if decided else "tie")
    most = len(kept) if config.max_pairs is None else config.max_pairs
    return Selection(pairs=tuple(kept[:most]), num_cut=len(kept[most:]))


def _nothing_to_compare(
    candidates: Sequence[Candidate], answered: Sequence[Candidate], scored: Sequence[Candidate]
) -> Drop | None:
    """A reason that holds whatever the strategy; equal answers are told apart from missing scores."""
    if not candidates:
        return "no_samples"
    if not answered:
        return "unscorable"
    if len(answered) == 1:
        return "single"
    if len({c.content for c in answered}) == 1:
        return "all_identical"
    if not scored:
        return "unscorable"
    return "single" if len({c.content for c in scored}) == 1 else None


def _distinct(scored: Iterable[Candidate]) -> list[Candidate]:
    """One candidate per answer: the one of lowest index (then key) speaks for all with the same answer."""
    first: dict[str | None, Candidate] = {}
    for candidate in sorted(scored, key=lambda c: (c.index, c.key)):
        first.setdefault(candidate.content, candidate)
    return list(first.values())


def with_traces(choice: Choice, candidates: Iterable[Candidate], most: int) -> Choice:
    """The pair with ``more``: at most ``most`` pairs in all, as many as both answers have samples for, each answer's in the
    order of sampling. ``candidates`` are those of the same prompt and view. Equal traces all stay: what is estimated from
    them is a mean over draws, and how often a trace was drawn is its weight."""
    if choice.rejected.content is None:
        return choice  # silence has no answer that several traces could lead to
    scored = sorted((c for c in candidates if c.value is not None), key=lambda c: (c.index, c.key))
    chosen, rejected = (_traces(one, scored) for one in (choice.chosen, choice.rejected))
    found = [Choice(chosen=c, rejected=r) for c, r in zip(chosen, rejected, strict=False)]
    return replace(choice, more=tuple(found[1:most]))


def _traces(one: Candidate, ordered: Sequence[Candidate]) -> list[Candidate]:
    """``one``, then the other samples with its answer."""
    return [one, *(c for c in ordered if c.content == one.content and c.key != one.key)]


def _preference(ties: str) -> Callable[[Candidate], tuple[float | int | str, ...]]:
    """Sort key, best first. Among equal scores the shorter answer ranks higher under ``shorter``, then the lower index."""
    if ties == "shorter":
        return lambda c: (-_value(c), c.length, c.index, c.key)
    return lambda c: (-_value(c), c.index, c.key)


def _value(candidate: Candidate) -> float:
    assert candidate.value is not None
    return candidate.value


# ---------------------------------------------------------------------------------------------------------------------
# strategies: (distinct candidates, best first; name of the prompt; seed; which pairs are wanted) -> proposed pairs, the
# most wanted first; they may hold pairs that are not wanted, which are left out and are the reason if none is left

Wanted = Callable[[Choice], bool]
Strategy = Callable[[Sequence[Candidate], str, int, Wanted], list[Choice]]


def best_worst(ranked: Sequence[Candidate], name: str, seed: int, is_wanted: Wanted) -> list[Choice]:
    """The highest and the lowest score: the choice of the BVPO paper."""
    return [Choice(chosen=ranked[0], rejected=ranked[-1])]


def top_vs_random(ranked: Sequence[Candidate], name: str, seed: int, is_wanted: Wanted) -> list[Choice]:
    """The highest score against one of the others that it beats by enough, drawn by a hash of seed and prompt: no order, no
    random state. Where it beats none, the draw is among all, and says why there is no pair."""
    pairs = [Choice(chosen=ranked[0], rejected=c) for c in sorted(ranked[1:], key=lambda c: (c.index, c.key))]
    pairs = [pair for pair in pairs if is_wanted(pair)] or pairs
    return [pairs[hash_int(f"{seed}:{name}", "top-vs-random") % len(pairs)]]


def all_pairs(ranked: Sequence[Candidate], name: str, seed: int, is_wanted: Wanted) -> list[Choice]:
    """Every two of them, the widest margins first. An answer meets silence behind the pair in which it meets the lowest
    score, so that ``max_pairs`` does not keep silence alone."""
    pairs = [Choice(chosen=a, rejected=b) for a, b in itertools.combinations(ranked, 2)]
    lowest = min(_value(c) for c in ranked if c.content is not None)
    margins = {id(pair): _value(pair.chosen) - lowest if pair.margin is None else pair.margin for pair in pairs}
    return sorted(pairs, key=lambda pair: -margins[id(pair)])  # stable: equal margins stay in order of preference


STRATEGIES: dict[str, Strategy] = {"best_worst": best_worst, "top_vs_random": top_vs_random, "all_pairs": all_pairs}
"""Name in ``pair.strategy`` -> how pairs are proposed."""
