"""The settings of an experiment: a file per section, each field with its range and documentation beside it.

``load_config(path, flags)`` reads and checks all of it; ``dump_toml`` writes it back so that it reads equal. No torch here.
"""

from bvpo.config.data import DataConfig
from bvpo.config.evaluate import BenchmarkConfig, EvaluateConfig, benchmarks_of
from bvpo.config.experiment import ExperimentConfig, load_config
from bvpo.config.model import ModelConfig
from bvpo.config.pair import PairConfig
from bvpo.config.prompts import PromptsConfig
from bvpo.config.ranges import validate
from bvpo.config.run import RunConfig, TuneConfig
from bvpo.config.sample import SampleConfig
from bvpo.config.score import FunctionScorerConfig, JudgeConfig, RewardModelConfig, ScoreConfig
from bvpo.config.tiny import TinyConfig
from bvpo.config.toml import dump_toml
from bvpo.config.train import AlphaConfig, AnchorConfig, LoraSettings, LossConfig, TrainConfig

__all__ = [
    "AlphaConfig",
    "AnchorConfig",
    "BenchmarkConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "FunctionScorerConfig",
    "JudgeConfig",
    "LoraSettings",
    "LossConfig",
    "ModelConfig",
    "PairConfig",
    "PromptsConfig",
    "RewardModelConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "TinyConfig",
    "TrainConfig",
    "TuneConfig",
    "benchmarks_of",
    "dump_toml",
    "load_config",
    "validate",
]
