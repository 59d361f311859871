"""What pairing did, in numbers: the fate of every prompt and view, margins, lengths. Pure.

In: samples, selections and quads as they pass. Out: plain values for ``pairing.json``. Every prompt is counted once per
view: paired, or dropped for one reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bvpo.data.pairing import DROPS, Selection
from bvpo.records import VIEWS, Pair, Quad, View

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(slots=True)
class ViewReport:
    """What became of one view."""

    samples: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    num_paired: int = 0  # prompts
    num_pairs: int = 0
    num_cut: int = 0  # pairs over max_pairs
    num_silent: int = 0  # pairs whose rejected response has no answer
    margins: list[float] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=lambda: {"chosen": [], "rejected": []})
    unfinished: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        return {
            "samples": dict(self.samples),
            "prompts": self.num_paired + sum(self.dropped.values()),
            "prompts_paired": self.num_paired,
            "prompts_dropped": {reason: self.dropped[reason] for reason in DROPS if self.dropped[reason]},
            "pairs": self.num_pairs,
            "pairs_over_max": self.num_cut,
            "pairs_rejecting_silence": self.num_silent,
            "margin": quantiles(self.margins),
            "tokens": {side: quantiles(lengths) for side, lengths in self.tokens.items()},
            "chosen_longer": _share(sum(c > r for c, r in zip(*self.tokens.values(), strict=True)), self.num_pairs),
            "unfinished": dict(self.unfinished),
        }


@dataclass(slots=True)
class Report:
    """Everything that ``pairing.json`` says."""

    scorer: str
    views: dict[View, ViewReport] = field(default_factory=lambda: {view: ViewReport() for view in VIEWS})
    splits: dict[str, int] = field(default_factory=dict)
    quads: Counter[str] = field(default_factory=Counter)
    traces: Counter[int] = field(
        default_factory=Counter
    )  # traces per answer -> trace pairs; empty unless several are kept

    def add_sample(self, view: View, standing: str) -> None:
        self.views[view].samples[standing] += 1

    def add_selection(self, view: View, selection: Selection) -> None:
        one = self.views[view]
        one.num_cut += selection.num_cut
        one.num_pairs += len(selection.pairs)
        one.num_silent += sum(pair.rejected.content is None for pair in selection.pairs)
        if selection.drop is None:
            one.num_paired += 1
        else:
            one.dropped[selection.drop] += 1

    def watch(self, quads: Iterator[Quad]) -> Iterator[Quad]:
        """The same quads, measured as they pass; members of a group beyond the first say nothing new."""
        for quad in quads:
            if not quad.leads:
                yield quad
                continue
            self.quads["both views" if quad.trace and quad.empty else "trace only" if quad.trace else "empty only"] += 1
            for pair in filter(None, (quad.trace, quad.empty)):
                self._measure(self.views[pair.view], pair)
            yield quad

    def _measure(self, one: ViewReport, pair: Pair) -> None:
        if pair.chosen.score is not None and pair.rejected.score is not None:  # silence has no score
            one.margins.append(pair.chosen.score - pair.rejected.score)
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            one.tokens[side].append(len(response.token_ids or ()))
            one.unfinished[side] += not response.finished

    def summary(self) -> dict[str, Any]:
        return {
            "scorer": self.scorer,
            "quads": {**dict(self.quads), "total": sum(self.quads.values()), "splits": self.splits},
            "views": {view: one.summary() for view, one in self.views.items()},
            **({"traces": {str(num): self.traces[num] for num in sorted(self.traces)}} if self.traces else {}),
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and :data:`QUANTILES`, each a value that occurs (the lower neighbour, no interpolation)."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"q{100 * q:g}": ordered[int(q * (len(ordered) - 1))] for q in QUANTILES}
    return {"mean": sum(ordered) / len(ordered), **found}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
