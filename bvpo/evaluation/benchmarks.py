"""What ``bvpo evaluate`` works on: which model, and each benchmark with its prompts and functions, ready to run.

In: an experiment's config. Out: the model as the stages that sample know it, and a :class:`Benchmark`, which holds the
config of its own experiment folder. Everything is read and loaded here, so that mistakes come before any work; nothing is
sampled or scored, and only an adapter's merged model is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bvpo.command import StageOptions
from bvpo.config import (
    BenchmarkConfig,
    ExperimentConfig,
    FunctionScorerConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
)
from bvpo.config.toml import UNSET
from bvpo.evaluation.benchmark_prompts import BenchmarkPrompts, read_prompts, source_mark
from bvpo.evaluation.metrics import MODE_VIEWS, Mode
from bvpo.experiment import Experiment
from bvpo.scorers.base import ReplyCache, Scorer, create_scorer
from bvpo.scorers.function import FIELD, FunctionScorer
from bvpo.strict import UserError

Rule = Literal["scored", "lowest"]


def evaluated_model(config: ExperimentConfig) -> ModelConfig:
    """The model as the stages that sample know it. One from elsewhere comes with its own tokenizer."""
    wanted = config.evaluate.model
    if wanted == "base":
        return config.model
    if wanted:
        return replace(config.model, path=wanted, revision=None, tokenizer=None)
    final = Experiment.of(config).final
    if not final.is_dir():
        raise UserError(
            f"{final}: no trained model; train first, or name another with evaluate.model ('base': model.path)"
        )
    return replace(config.model, path=str(final), revision=None)


def whole_model(model: ModelConfig, target: Path, options: StageOptions) -> ModelConfig:
    """The model itself, or an adapter merged into its base: engines sample from whole models."""
    from bvpo.training.merging import base_of, is_adapter, merge_adapter

    if not is_adapter(Path(model.path)):
        return model
    if options.dry_run and not target.is_dir():
        return replace(model, path=base_of(Path(model.path)))  # as large as the merged one
    merge_adapter(Path(model.path), target, trust_remote_code=model.trust_remote_code)
    return replace(model, path=str(target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark, ready to run. ``config`` is that of its own experiment folder."""

    name: str
    settings: BenchmarkConfig
    modes: tuple[Mode, ...]
    config: ExperimentConfig
    read: BenchmarkPrompts
    more: dict[str, FunctionScorer] = field(default_factory=dict)
    no_answer: Literal["count", "drop"] = "count"

    @property
    def experiment(self) -> Experiment:
        return Experiment(self.folder)

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.settings.metric, *self.settings.more)

    def without_answer(self, metric: str) -> float | Rule | None:
        """What a response without an answer counts: a number, what the metric's scorer says of the empty text (a function,
        or a judge that rates), or the lowest score (comparisons, reward models); ``None`` leaves it out."""
        if metric in self.settings.unclosed:
            value = self.settings.unclosed[metric]
            return None if value == UNSET else float(value)
        if self.no_answer == "drop":
            return None
        return "scored" if self._of_function(metric) or self._rated_by_judge else "lowest"

    def most_for_silence(self, metric: str) -> float | None:
        """The most that a response without an answer may count where it has no score. It loses every comparison of a judge,
        and gets the lowest rating of one that gives it none; a function that fails on the empty text finds nothing right;
        the scores of a reward model have no such number, and the lowest that is seen decides alone."""
        if self._of_function(metric):
            return 0.0
        if self.config.score.scorer == "judge":
            return self.config.score.judge.rating_min if self._rated_by_judge else 0.0
        return None

    @property
    def _rated_by_judge(self) -> bool:
        """Whether a judge gives the main metric by rating each answer alone. Further metrics are functions."""
        return self.config.score.scorer == "judge" and self.config.score.judge.mode == "pointwise"

    def _of_function(self, metric: str) -> bool:
        return metric in self.more or self.config.score.scorer == "function"

    def scorer_of(self, metric: str, replies: ReplyCache | None) -> Scorer:
        """``replies``: those that a judge gave already."""
        return self.more[metric] if metric in self.more else create_scorer(self.config.score, replies)


def prepare(config: ExperimentConfig, model: ModelConfig, name: str, own: BenchmarkConfig) -> Benchmark:
    """Reads the prompts and loads the functions, so that their mistakes come before any work."""
    settings, place = config.evaluate, f"evaluate.benchmarks.{name}"
    experiment = Experiment.of(config)
    score = config.score
    if own.scorer == "function":
        _function(own.function, f"{place}.function")
        score = ScoreConfig(scorer="function", function=FunctionScorerConfig(path=own.function))
    try:
        read = read_prompts(own.source, experiment, own.limit)
    except UserError as error:
        raise UserError(f"{place}.source: {str(error).removeprefix('prompts.sources: ')}") from None
    sample = SampleConfig(
        engine=config.sample.engine,
        endpoints=config.sample.endpoints,
        options=config.sample.options,
        views=tuple(MODE_VIEWS[mode] for mode in settings.modes),
        num_samples=own.num_samples or settings.num_samples,
        temperature=settings.temperature if own.temperature is None else own.temperature,
        top_p=settings.top_p,
        max_new_tokens=own.max_new_tokens or settings.max_new_tokens,
    )
    return Benchmark(
        name=name,
        settings=own,
        modes=settings.modes,
        config=ExperimentConfig(
            name=name, root=str(experiment.evaluation), seed=config.seed, model=model, sample=sample, score=score
        ),
        read=read,
        more={metric: _function(path, f"{place}.more.{metric}") for metric, path in own.more.items()},
        no_answer=settings.no_answer,
    )


def benchmark_mark(config: ExperimentConfig, own: BenchmarkConfig) -> dict[str, Any]:
    """What a benchmark's results depend on besides settings and model: its prompts and what judges the answers."""
    score = config.score
    if own.scorer == "function":
        score = ScoreConfig(scorer="function", function=FunctionScorerConfig(path=own.function))
    return {
        "source": source_mark(own.source, Experiment.of(config)),
        "scorer": create_scorer(score).fingerprint(),
        "more": {metric: _function(path, metric).fingerprint() for metric, path in own.more.items()},
    }


def _function(path: str, place: str) -> FunctionScorer:
    try:
        return FunctionScorer(FunctionScorerConfig(path=path))
    except UserError as error:
        raise UserError(f"{place}{str(error).removeprefix(FIELD)}") from None
