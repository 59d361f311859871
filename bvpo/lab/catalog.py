"""The worlds and losses that the laboratory works with, by name, so that every check means the same ones.

In: a seed. Out: worlds, and one setting of every loss of the registry. A loss that is added to the registry is in.
"""

from __future__ import annotations

from typing import Any

from bvpo.config import LossConfig
from bvpo.lab.policies import Policy, Tabular, Transformer
from bvpo.lab.results import Table
from bvpo.lab.worlds import Sampling, World, make_world
from bvpo.method.losses import LOSSES

POLICIES: dict[str, Policy] = {
    "tabular": Tabular(num_prompts=6, num_traces=40, num_answers=5),
    "transformer": Transformer(num_prompts=6, num_symbols=3, depth=3, num_answers=5, width=12),
    "small tabular": Tabular(num_prompts=4, num_traces=12, num_answers=4),
    "small transformer": Transformer(num_prompts=4, num_symbols=3, depth=2, num_answers=4, width=10),
    "held-out transformer": Transformer(num_prompts=8, num_symbols=3, depth=2, num_answers=4, width=12),
    "tiny tabular": Tabular(num_prompts=2, num_traces=4, num_answers=3),
    "tiny transformer": Transformer(num_prompts=2, num_symbols=3, depth=1, num_answers=3, width=4),
    "two traces": Tabular(num_prompts=2, num_traces=2, num_answers=3),
}
"""Full size for the numbers that are reported, small for runs of many steps, tiny where every quad is enumerated."""

PAPER_SAMPLING = Sampling(temperature=0.8)

DPO = LossConfig(name="dpo", beta=0.1)

_AWAY_FROM_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo_norm": {"beta": 1.0},
    "robust": {"label_smoothing": 0.1},
    "rdpo": {"length_weight": 0.02},
    "simpo": {"beta": 2.5, "gamma": 1.0},
}


def every_loss() -> dict[str, LossConfig]:
    """One setting of each loss, and label-smoothed DPO; a loss that is not listed gets its defaults."""
    found = {name: LossConfig(name=name, **_AWAY_FROM_DEFAULTS.get(name, {})) for name in LOSSES}
    return found | {"dpo, smoothed": LossConfig(name="dpo", label_smoothing=0.1)}


def world_of(name: str, seed: int, *, sampling: Sampling | None = None, shared: bool = False) -> World:
    return make_world(POLICIES[name], seed, sampling=sampling, shared=shared)


def describe_worlds() -> Table:
    """Sizes of the worlds."""
    rows = tuple(
        (name, p.num_prompts, p.tree.num_traces, len(p.answer_lengths), p.num_params) for name, p in POLICIES.items()
    )
    return Table(
        title="The worlds",
        note="Every trace, and so every response, is enumerated, in float64. Trace 0 is the empty one.",
        header=("world", "prompts", "traces", "answers", "parameters"),
        rows=rows,
    )
