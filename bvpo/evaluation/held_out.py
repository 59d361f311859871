"""Held-out margins with what the scorer said of the same pairs: the records of ``held_out.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bvpo.data.preferences import prompt_key
from bvpo.evaluation.calibration import HeldOutPair
from bvpo.records import VIEWS, Pair, View
from bvpo.training.data import QuadSource
from bvpo.training.held_out import Margins
from bvpo.training.tokens import TokenDataset

_PROMPT_DIGITS = 16


def held_out_pairs(found: Sequence[Margins], tokens: TokenDataset, source: QuadSource) -> Iterator[HeldOutPair]:
    """The margins with what the quads themselves say, in the order of the quads, the trace view first."""
    prompts: dict[str, str] = {}
    scores: dict[tuple[str, View], float | None] = {}
    for quad in source:
        repeated = quad.id in prompts  # then a name does not tell whose scores these are
        prompts[quad.id] = prompt_key(quad.messages)[:_PROMPT_DIGITS]
        for view in VIEWS:
            scores[quad.id, view] = None if repeated else _score_margin(quad.pair(view))
    for start, margin in zip(tokens.group_starts[:-1].tolist(), found, strict=True):
        name = tokens[start].id
        for view in VIEWS:
            if view in margin:
                yield HeldOutPair(
                    id=name,
                    view=view,
                    prompt=prompts[name],
                    margin=margin[view],
                    score_margin=scores[name, view],
                )


def _score_margin(pair: Pair | None) -> float | None:
    if pair is None or pair.chosen.score is None or pair.rejected.score is None:
        return None
    return pair.chosen.score - pair.rejected.score
