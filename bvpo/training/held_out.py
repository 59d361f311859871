"""What a trained model says of the pairs that were held out: one margin per quad and view, by the very code of training."""

from __future__ import annotations

from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from bvpo.records import VIEWS, View
from bvpo.training import reference
from bvpo.training.gradients import StepRunner
from bvpo.training.objective import STATISTICS, Weights
from bvpo.training.steps import StepDataset, make_micro_batch

Margins = dict[View, float]
"""Margin of each view that a quad has."""
_MARGIN, _COUNT = STATISTICS.index("rewards/margins"), STATISTICS.index("count")
_NO_WEIGHT = Weights(views=dict.fromkeys(VIEWS, 0.0), anchor=0.0)


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
