"""[pair]: which responses become pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bvpo.config.ranges import Problems, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """Pairing: which of a prompt's scored responses become chosen and rejected, in each view by itself."""

    strategy: Literal["best_worst", "top_vs_random", "all_pairs"] = "best_worst"
    """'best_worst': highest against lowest score (the paper); 'top_vs_random': highest against a random other;
    'all_pairs': every two, widest margins first."""
    ties: Literal["drop", "shorter", "index"] = "drop"
    """What to do with equal scores: 'drop' and count, or prefer the 'shorter' answer or the lower sample 'index'."""
    min_margin: Annotated[float, at_least(0)] = 0.0
    """Smallest difference of the two scores, >= 0; pairs below it are dropped and counted."""
    max_pairs: Annotated[int | None, at_least(1)] = None
    """Most pairs of a prompt and view for 'all_pairs', >= 1; none keeps all."""
    no_answer: Literal["reject", "drop"] = "drop"
    """A response of the empty view without an answer: 'reject' lets it lose to every answer of its prompt, so that falling
    silent is taught against; 'drop' leaves it out (the paper). It is never chosen."""
    no_answer_trace: Literal["reject", "drop"] = "drop"
    """The same for the trace view, where most are traces that never closed: what is rejected is all that was sampled."""
    traces: Annotated[int, at_least(1)] = 1
    """Most traces of each answer in a trace pair, >= 1; more than 1 are for train.trace_estimator 'traces'."""
    export: bool = True
    """Also write the pairs as TRL preference sets, one per view, into the folder preferences."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.max_pairs is not None and self.strategy != "all_pairs":
            found.append(("max_pairs", f"got {self.max_pairs}, but strategy {self.strategy!r} never reads it"))
        if self.ties != "drop" and self.min_margin > 0:
            found.append(("ties", f"got {self.ties!r}, but min_margin {self.min_margin:g} already drops every tie"))
        return found
