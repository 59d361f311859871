"""One prompt with everything an experiment knows of it: samples, scores, the chosen pair. Pure.

In: records and rows of the stores. Out: :class:`SampleNote` and :class:`PromptNote` (small, one per sample and prompt, for
lists and filters), and the order in which prompts deserve a look. Reading the stores and showing the result are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bvpo.data.scores import ATTEMPT, CONTENT
from bvpo.records import VIEWS, View

Role = Literal["chosen", "rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastScore:
    """What the last attempt to score a sample gave."""

    value: float | None
    error: str | None
    attempt: int = 0
    content: str | None = None


SCORE_COLUMNS = ("sample_key", "scorer", "value", "error", "extra")
"""Of a score, what :func:`last_scores` looks at."""


def last_scores(rows: Iterable[Mapping[str, Any]], scorer: str | None) -> dict[str, LastScore]:
    """Sample key -> its last score, from rows with :data:`SCORE_COLUMNS`; of one
    scorer, or of whichever comes first where ``scorer`` is ``None``."""
    found: dict[str, LastScore] = {}
    for row in rows:
        scorer = row["scorer"] if scorer is None else scorer
        attempt = int(row["extra"].get(ATTEMPT, 0))
        known = found.get(row["sample_key"])
        if row["scorer"] == scorer and (known is None or attempt > known.attempt):
            found[row["sample_key"]] = LastScore(
                value=row["value"], error=row["error"], attempt=attempt, content=row["extra"].get(CONTENT)
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleNote:
    """A sample without its text. ``size`` is the length of its text in bytes, ``role`` its part in a pair."""

    key: str
    view: View
    index: int
    num_tokens: int
    size: int
    cut: bool
    has_answer: bool
    score: LastScore | None = None
    role: Role | None = None

    @property
    def scorable(self) -> bool:
        """Whether it may take part in a pair: it has an answer, and a score unless nothing was scored yet."""
        return self.has_answer and (self.score is None or self.score.value is not None)


@dataclass(slots=True, kw_only=True)
class PromptNote:
    """A prompt with its samples. ``margins`` holds the smallest margin of the pairs of each view that has one."""

    prompt_id: str
    text: str
    samples: list[SampleNote] = field(default_factory=list)
    margins: dict[View, float] = field(default_factory=dict)

    def of(self, view: View) -> list[SampleNote]:
        return sorted((s for s in self.samples if s.view == view), key=lambda s: s.index)

    @property
    def size(self) -> int:
        return sum(sample.size for sample in self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest response in the trace view."""
        return max((sample.num_tokens for sample in self.samples if sample.view == "trace"), default=0)

    @property
    def num_unscorable(self) -> int:
        return sum(not sample.scorable for sample in self.samples)

    @property
    def margin(self) -> float | None:
        return min(self.margins.values(), default=None)

    def lacking(self, paired: bool) -> list[View]:
        """Views without a pair, or without samples where nothing is paired yet."""
        return [view for view in VIEWS if (view not in self.margins if paired else not self.of(view))]


def worst_margin(note: PromptNote) -> float:
    return float("inf") if note.margin is None else note.margin


SORTS: dict[str, Callable[[PromptNote], float]] = {
    "margin": worst_margin,
    "length": lambda note: -note.longest,
    "unscorable": lambda note: -note.num_unscorable,
}
"""Name of an order -> sort key; what deserves a look comes first."""


def choose_within(
    notes: Sequence[PromptNote], budget: int, cost: Callable[[PromptNote], int], paired: bool
) -> list[PromptNote]:
    """The prompts to show when not all fit: those that deserve a look, in turn from each order, then the others as they
    come. In file order."""
    lists = [iter(sorted(notes, key=key)) for key in SORTS.values()]
    lists.append(iter([note for note in notes if note.lacking(paired)]))
    taken: set[str] = set()
    spent = 0
    for note in [*_in_turn(lists, 50), *notes]:
        if note.prompt_id in taken or spent + cost(note) > budget:
            continue
        taken.add(note.prompt_id)
        spent += cost(note)
    return [note for note in notes if note.prompt_id in taken]


def _in_turn(lists: Sequence[Iterator[PromptNote]], rounds: int) -> Iterator[PromptNote]:
    for _ in range(rounds):
        for one in lists:
            if (note := next(one, None)) is not None:
                yield note
