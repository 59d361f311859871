"""[data]: which pairs are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bvpo.config.ranges import FILLED, Problems, at_least, below, each_once


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Preference data: quads, or one TRL preference set per view."""

    quads: str = ""
    """JSON-lines file of quads (one prompt's trace pair and empty pair per line)."""
    trace: str = ""
    """TRL preference set of the trace view: a local json, jsonl or parquet file, a folder, or a Hub name."""
    empty: str = ""
    """TRL preference set of the empty view, matched to the trace set by prompt."""
    trace_split: Annotated[str, FILLED] = "train"
    """Split of the trace set."""
    empty_split: Annotated[str, FILLED] = "train"
    """Split of the empty set."""
    eval_quads: str = ""
    """JSON-lines file of held-out quads: for evaluation during training, and the reliability of what the model then says."""
    eval_fraction: Annotated[float, below(0, 1)] = 0.0
    """Share of the quads held out instead of a file, in [0, 1); chosen by seed, split by prompt. The report's reliability
    diagram needs held-out quads."""
    views: Annotated[tuple[Literal["trace", "empty"], ...], each_once("one or both of trace and empty, each once")] = (
        "trace",
        "empty",
    )
    """Views that are trained on. With alpha 1 or 0 throughout the other view counts nothing and may be left out, which
    saves its compute (and its metrics)."""
    limit: Annotated[int | None, at_least(1)] = None
    """Use only the first quads, at least 1; none uses all."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.quads and (self.trace or self.empty):
            found.append(("quads", "set together with data.trace or data.empty; choose quads or preference sets"))
        if self.eval_quads and self.eval_fraction > 0:
            found.append(("eval_fraction", "set together with data.eval_quads; choose one"))
        return found
