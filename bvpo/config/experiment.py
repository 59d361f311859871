"""The whole config: one tree, read from TOML and the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from bvpo.config.data import DataConfig
from bvpo.config.evaluate import EvaluateConfig
from bvpo.config.layers import Layer, build, parse_flags, place_of, read_toml
from bvpo.config.model import ModelConfig
from bvpo.config.pair import PairConfig
from bvpo.config.prompts import PromptsConfig
from bvpo.config.ranges import FILLED, NAME, SEED, Problems, validate
from bvpo.config.run import RunConfig
from bvpo.config.sample import SampleConfig
from bvpo.config.score import ScoreConfig
from bvpo.config.tiny import TinyConfig
from bvpo.config.train import TrainConfig
from bvpo.strict import FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """One experiment: one folder, one config."""

    name: Annotated[str, NAME]
    """Name of the experiment and of its folder."""
    root: Annotated[str, FILLED] = "experiments"
    """Folder that holds the experiment's folder."""
    seed: Annotated[int, SEED] = 42
    """Seed of everything random, in [0, 2**32)."""
    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def folder(self) -> Path:
        """The experiment's."""
        return Path(self.root) / self.name

    def contradictions(self) -> Problems:
        held_out = bool(self.data.eval_quads) or self.data.eval_fraction > 0
        if self.train.eval != "no" and not held_out:
            problem = f"got {self.train.eval!r}, but no quads are held out; set data.eval_quads or data.eval_fraction"
            yield "train.eval", problem
        # One view alone needs all the weight: alpha 1 or 0 throughout.
        alpha, views = self.train.alpha, self.data.views
        needed = 1.0 if views == ("trace",) else 0.0
        if len(views) == 1 and not (alpha.schedule == "constant" and alpha.value == needed):
            problem = f"got only {views[0]!r}, which needs train.alpha.value = {needed:g} and its schedule 'constant'"
            yield "data.views", problem


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Defaults < TOML file < ``--section.field value`` overrides, checked; errors name ``path:line`` or the flag."""
    layers: list[Layer] = [read_toml(ExperimentConfig, path), parse_flags(ExperimentConfig, overrides)]
    config = build(ExperimentConfig, layers)
    try:
        validate(config)
    except FieldError as error:
        raise error.at(place_of(error.field, layers)) from None
    return config
