"""[run]: chains, comparisons and tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from bvpo.config.ranges import Range, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """Tuning of a comparison (`bvpo run CONFIG --tune`): every method gets a grid, on seeds and prompts of its own."""

    seeds: tuple[int, ...] = ()
    """Seeds of the tuning runs, none of them in run.seeds."""
    final_seeds: tuple[int, ...] = ()
    """Further seeds, on which only the best cells of each method run; the best by all seeds is chosen. Few seeds alone pick
    what was lucky on them."""
    finalists: Annotated[int, at_least(1)] = 3
    """Cells of each method that go on to final_seeds, >= 1."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Settings and the values to try, every combination: grid."train.loss.beta" = [0.1, 0.5]. Settings joined by '+' take
    the same value."""
    grids: dict[str, Any] = field(default_factory=dict)
    """A grid for one method instead, by its name, such as grids.simpo."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that only the tuning runs have, such as settings.prompts.sources for prompts of their own."""
    objective: tuple[str, ...] = ()
    """What is made large: 'benchmark/mode/metric', such as chat/thinking/reward; several are averaged."""
    same: dict[str, Any] = field(default_factory=dict)
    """Methods that take another's tuned values instead of a grid, such as same.dpo-tokens = 'dpo'."""
    file: str = ""
    """TOML file of the tuned values: written by --tune with its log beside it, read by every run. Empty reads none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """`bvpo run`: which stages one command runs, and the comparison of several methods over several seeds."""

    stages: Annotated[tuple[str, ...], Range(lambda v: bool(v) and all(v), "names of verbs")] = (
        "prompts",
        "sample",
        "score",
        "pair",
        "train",
        "evaluate",
    )
    """Verbs of the chain, in their order; each is skipped when it is finished, 'evaluate' also without benchmarks."""
    seeds: tuple[int, ...] = ()
    """Seeds of a comparison: each has its own prompts, samples, pairs and runs. Empty takes num_seeds of them."""
    num_seeds: Annotated[int, at_least(1)] = 1
    """Number of seeds, >= 1, counted up from the experiment's own; read when seeds is empty."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Methods to compare: a partial config for each, such as methods.dpo.train.alpha.value = 1.0. The chain up to pairing
    runs once per seed, training and evaluation once per seed and method. Empty runs the chain once."""
    baseline: str = ""
    """The method that the others are compared with, prompt by prompt; empty takes the first that is trained."""
    declared: dict[str, Any] = field(default_factory=dict)
    """Comparisons that are declared before the seeds run: a table [run.declared.NAME] with better and than (methods) and on
    (benchmark/mode/metric). The report says what became of each, at intervals that hold for all of them together."""
    workers: Annotated[int | None, at_least(1)] = None
    """Processes that work at the same time, >= 1; none takes one per CPU core, or one where there is a GPU."""
    tune: TuneConfig = field(default_factory=TuneConfig)
