"""What a run will take at most, before anything is downloaded or started: counts from the config alone.

In: the experiment config and ``--limit``; out: lines for people. Bounds, not expectations: responses are counted at their
length limit. Times come from the stages' own dry runs, which measure or know the model; nothing here guesses a speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bvpo.config import ExperimentConfig, benchmarks_of
from bvpo.runs.plan import seeds_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most that a run draws, scores, trains on and evaluates; ``None`` where the number of prompts is not known."""

    seeds: int
    trained_methods: int
    evaluated_methods: int
    prompts: int | None
    samples: int | None
    sample_tokens: int | None
    pairs_per_method: int | None
    steps_per_method: int | None
    evaluation_samples: int | None
    evaluation_tokens: int | None

    def lines(self) -> Iterator[str]:
        yield f"work         seeds {self.seeds}, methods trained {self.trained_methods}, evaluated {self.evaluated_methods}"
        if self.prompts is None:
            yield "prompts      not known before they are read; prompts.count or --limit bounds them"
            return
        yield f"sampling     at most {self.samples:,} samples, {self.sample_tokens:,} new tokens (all seeds)"
        yield f"scoring      at most {self.samples:,} answers"
        yield (
            f"training     at most {self.pairs_per_method:,} pairs per view and method, {self.steps_per_method:,} optimizer "
            f"steps each, {self.trained_methods * self.seeds} runs"
        )
        if self.evaluation_samples is not None:
            tokens = f"{self.evaluation_tokens:,}"
            yield f"evaluation   at most {self.evaluation_samples:,} samples, {tokens} new tokens (all methods and seeds)"
        else:
            yield "evaluation   not known before its benchmarks are read"


def bounds(config: ExperimentConfig, limit: int | None = None) -> Bounds:
    """The bounds of a chain or a comparison."""
    methods = config.run.methods or {config.name: {}}
    trained = [name for name, table in methods.items() if not table.get("evaluate", {}).get("model")]
    seeds = len(seeds_of(config)) if config.run.methods else 1
    prompts = _prompts(config, limit)
    views, pairs = len(config.sample.views), None
    if prompts is not None:
        pairs = min(prompts, config.data.limit or prompts)
    samples = None if prompts is None else seeds * prompts * views * config.sample.num_samples
    steps = None if pairs is None else math.ceil(pairs / config.train.quads_per_step * config.train.epochs)
    evaluated = _evaluated(config, prompts, limit)
    runs = seeds * len(methods)
    return Bounds(
        seeds=seeds,
        trained_methods=len(trained),
        evaluated_methods=len(methods),
        prompts=prompts,
        samples=samples,
        sample_tokens=None if samples is None else samples * config.sample.max_new_tokens,
        pairs_per_method=pairs,
        steps_per_method=config.train.max_steps if config.train.max_steps > 0 else steps,
        evaluation_samples=None if evaluated is None else runs * evaluated[0],
        evaluation_tokens=None if evaluated is None else runs * evaluated[1],
    )


def _prompts(config: ExperimentConfig, limit: int | None) -> int | None:
    known = [n for n in (limit, config.prompts.count, _lines(config.prompts.sources)) if n is not None]
    return min(known) if known else None


def _lines(sources: tuple[str, ...]) -> int | None:
    """Lines of local JSON-lines or text files; ``None`` as soon as one source is something else."""
    total = 0
    for source in sources:
        path = Path(source.partition("?")[0])
        if path.suffix not in (".jsonl", ".txt") or not path.is_file():
            return None
        with open(path, "rb") as stream:
            total += sum(1 for _ in stream)
    return total or None


def _evaluated(config: ExperimentConfig, prompts: int | None, limit: int | None) -> tuple[int, int] | None:
    """(samples, new tokens) of one evaluation."""
    samples = tokens = 0
    for own in benchmarks_of(config.evaluate).values():
        known = [n for n in (limit, own.limit, _lines((own.source,))) if n is not None]
        if own.source.startswith("split:") and prompts is not None:
            known.append(prompts)
        if not known:
            return None
        drawn = min(known) * len(config.evaluate.modes) * (own.num_samples or config.evaluate.num_samples)
        samples += drawn
        tokens += drawn * (own.max_new_tokens or config.evaluate.max_new_tokens)
    return samples, tokens
