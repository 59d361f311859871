"""What a trained model says of the pairs that were held out: one margin per pair, for the reliability diagram.

In: a model, the runner of the training steps and the held-out quads; out: per quad the margin of each view, and
:class:`~bvpo.core.calibration.HeldOutPair` records with what the scorer said. The margins are the loss's own implicit
rewards, by the very code of training. Nothing is averaged here; :mod:`bvpo.core.calibration` does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from bvpo.core.calibration import HeldOutPair
from bvpo.records import VIEWS, Pair, View
from bvpo.training import reference
from bvpo.training.data import QuadSource
from bvpo.training.gradients import StepRunner
from bvpo.training.objective import STATISTICS, Weights
from bvpo.training.preferences import prompt_key
from bvpo.training.steps import StepDataset, make_micro_batch
from bvpo.training.tokens import TokenDataset

Margins = dict[View, float]
"""Margin of each view that a quad has."""
_MARGIN, _COUNT = STATISTICS.index("rewards/margins"), STATISTICS.index("count")
_NO_WEIGHT = Weights(views=dict.fromkeys(VIEWS, 0.0), anchor=0.0)
_PROMPT_DIGITS = 16


def margins(model: nn.Module, runner: StepRunner, steps: StepDataset, *, show_progress: bool) -> list[Margins]:
    """One entry per quad (with all its traces), in the order of ``steps.tokens``; every rank returns all of them.

    One quad at a time, so that a margin does not depend on which quads are beside it. Ranks take turns and exchange what
    they found; in the last round a rank without a quad repeats one, because sharded models run forwards together.
    """
    tokens, accelerator = steps.tokens, runner.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    found: dict[int, Margins] = {}
    with reference.frozen(model):
        for start in tqdm(range(0, tokens.num_groups, world_size), desc="held-out pairs", disable=not show_progress):
            index = min(start + rank, tokens.num_groups - 1)
            rows, groups = steps.rows([index])
            cached = None if steps.reference is None else steps.reference[rows]
            micro_batch = make_micro_batch([tokens[row] for row in rows], steps.layout, cached, groups=groups)
            _, statistics, _ = runner.loss(model, micro_batch.to(accelerator.device), _NO_WEIGHT)
            sums = zip(VIEWS, statistics.tolist(), strict=True)
            found[index] = {view: row[_MARGIN] / row[_COUNT] for view, row in sums if row[_COUNT]}
    everything = dict(gather_object(list(found.items())))
    return [everything[index] for index in range(tokens.num_groups)]


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
