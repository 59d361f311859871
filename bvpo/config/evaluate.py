"""[evaluate]: benchmarks and how they are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from bvpo.config.ranges import FILLED, NAME, SHARE, Problems, at_least, each_once, range_problems
from bvpo.config.toml import UNSET
from bvpo.strict import FieldError, convert, did_you_mean, from_dict, show

_EXPERIMENT_FOLDERS = ("samples", "scores", "judge", "train", "preferences", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """One benchmark: a table [evaluate.benchmarks.NAME]."""

    source: Annotated[str, FILLED]
    """Prompts: any source that prompts.sources takes, or 'split:NAME' for that split of the experiment's own prompts. The
    field 'id' of a row names it, and its other fields (such as 'reference') are the metadata that functions may take."""
    scorer: Literal["experiment", "function"] = "experiment"
    """What gives the main metric: the scorer of [score], or a function of the benchmark's own."""
    function: str = ""
    """The function of scorer 'function': 'package.module:name' or 'folder/file.py:name', as in score.function.path."""
    metric: Annotated[str, FILLED] = "score"
    """Name of the main metric, such as reward or accuracy."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further metrics, each a function: more.correct = 'package.module:name'."""
    unclosed: dict[str, Any] = field(default_factory=dict)
    """What a response without an answer (its trace never closed, or nothing follows it) counts in a metric: a number, or
    'none' to leave it out and count it, such as unclosed.reward = -3.0. Unless set, evaluate.no_answer says it."""
    num_samples: Annotated[int | None, at_least(1)] = None
    """Samples per prompt and mode, >= 1, instead of evaluate.num_samples."""
    temperature: Annotated[float | None, at_least(0)] = None
    """Sampling temperature, >= 0, instead of evaluate.temperature."""
    max_new_tokens: Annotated[int | None, at_least(1)] = None
    """Longest response in tokens, >= 1, instead of evaluate.max_new_tokens."""
    limit: Annotated[int | None, at_least(1)] = None
    """Use only the first prompts, >= 1."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.scorer == "function" and not self.function:
            found.append(("function", "not set, but scorer 'function' needs it"))
        if self.scorer != "function" and self.function:
            found.append(("function", f"set, but scorer {self.scorer!r} never reads it; set scorer to 'function'"))
        for metric, path in self.more.items():
            if metric == self.metric:
                found.append((f"more.{metric}", "has the name of the main metric; choose another"))
            elif not isinstance(path, str) or ":" not in path:
                found.append((f"more.{metric}", f"got {show(path)}, expected 'package.module:name' or 'file.py:name'"))
        metrics = (self.metric, *self.more)
        for metric, value in self.unclosed.items():
            if metric not in metrics:
                found.append((f"unclosed.{metric}", f"is no metric of this benchmark{did_you_mean(metric, metrics)}"))
            elif value != UNSET and (isinstance(value, bool) or not isinstance(value, int | float)):
                found.append((f"unclosed.{metric}", f"got {show(value)}, expected a number or {UNSET!r}"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of a model on benchmarks in both modes: Thinking (trace view) and NoThinking (empty view)."""

    model: str = ""
    """Model to evaluate: empty takes the experiment's train/final, 'base' takes model.path, else a folder or Hub name."""
    folder: Annotated[str, NAME] = "eval"
    """Folder of the results inside the experiment's; another model needs another one, such as eval_base."""
    modes: Annotated[
        tuple[Literal["thinking", "nothinking"], ...], each_once("one or both of thinking and nothinking, each once")
    ] = ("thinking", "nothinking")
    """Which modes are evaluated; one may be added later."""
    num_samples: Annotated[int, at_least(1)] = 1
    """Samples per prompt and mode, >= 1: metrics are averages over them (avg@k), and 0/1 metrics get pass@k as well."""
    temperature: Annotated[float, at_least(0)] = 0.6
    """Sampling temperature, >= 0."""
    top_p: Annotated[float, SHARE] = 1.0
    """Share of the probability that nucleus sampling keeps, in (0, 1]; 1 keeps all."""
    max_new_tokens: Annotated[int, at_least(1)] = 8192
    """Longest response in tokens, >= 1; a trace that is cut has no answer."""
    no_answer: Literal["count", "drop"] = "count"
    """Responses without an answer: 'count' takes what a function or a pointwise judge says of the empty text, and the lowest
    score where the scorer is another; 'drop' leaves them out, and every line then says how many."""
    benchmarks: dict[str, Any] = field(default_factory=dict)
    """The benchmarks: a table [evaluate.benchmarks.NAME] for each; docs/evaluation.md lists its keys. Engine and scorer are
    those of [sample] and [score]."""

    def contradictions(self) -> Problems:
        """Free tables in the eyes of the overlay, so types and ranges of benchmarks are checked here."""
        found: list[tuple[str, str]] = []
        if self.folder in _EXPERIMENT_FOLDERS:
            found.append(("folder", f"got {self.folder!r}, which holds something else; choose another name"))
        for name, table in self.benchmarks.items():
            where = f"benchmarks.{name}"
            if not NAME.passes(name):
                found.append((where, f"expected {NAME.expected} as the name of a benchmark"))
                continue
            try:
                benchmark = convert(BenchmarkConfig, table)
            except FieldError as error:
                problem = error.problem.removeprefix(f"field {error.field!r}: ")
                found.append((f"{where}.{error.field}".rstrip("."), problem))
                continue
            for problems in (range_problems(benchmark), benchmark.contradictions()):
                found += [(f"{where}.{key}", problem) for key, problem in problems]
        return found


def benchmarks_of(evaluate: EvaluateConfig) -> dict[str, BenchmarkConfig]:
    """Name -> benchmark, of a config that was checked."""
    return {name: from_dict(BenchmarkConfig, table) for name, table in evaluate.benchmarks.items()}
