"""[tiny]: the tiny reasoning model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bvpo.config.ranges import FILLED, POSITIVE, SEED, Problems, at_least, between, each_once


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The tiny reasoning model that `bvpo tiny` makes: a real Qwen2 trained from scratch on two tasks."""

    tasks: Annotated[tuple[Literal["add", "cups"], ...], each_once("one or both of add and cups, each once")] = (
        "add",
        "cups",
    )
    """What its problems are: 'add' adds numbers modulo a number, 'cups' follows a ball under cups that swap places."""
    modulus: Annotated[int, between(2, 1000)] = 7
    """Modulus of 'add', in [2, 1000]: larger is harder, and a guess is right less often."""
    cups: Annotated[int, between(2, 8)] = 4
    """Number of cups, in [2, 8]."""
    chain_min: Annotated[int, between(2, 10)] = 2
    """Fewest numbers of a sum, or swaps of the cups, in [2, 10]."""
    chain_max: Annotated[int, between(2, 10)] = 4
    """Most numbers or swaps of the preference prompts, from chain_min to 10."""
    sft_chain_max: Annotated[int, between(2, 10)] = 5
    """Most numbers or swaps of the training examples, from chain_min to 10."""
    benchmark_min: Annotated[int, between(2, 10)] = 4
    """Fewest numbers or swaps of a benchmark problem, in [2, 10]."""
    benchmark_max: Annotated[int, between(2, 10)] = 5
    """Most numbers or swaps of a benchmark problem, from benchmark_min to 10."""
    filler: Annotated[float, between(0, 0.8)] = 0.5
    """Probability of another filler word before a step of a trace, in [0, 0.8]."""
    false_start: Annotated[float, between(0, 1)] = 0.15
    """Probability that a step of a trace is begun with a wrong result and taken back, in [0, 1]."""
    slip: Annotated[float, between(0, 0.5)] = 0.05
    """Probability that a step of a trace ends in a wrong result that is not taken back, in [0, 0.5]: what alignment can
    repair or make worse."""
    recheck: Annotated[float, between(0, 1)] = 0.35
    """Probability that a trace goes through all steps a second time, in [0, 1]."""
    empty_fraction: Annotated[float, between(0, 1)] = 0.4
    """Share of the training examples with an empty trace, in [0, 1]: what NoThinking is learned from."""
    hidden: Annotated[int, at_least(8)] = 64
    """Width of the model, >= 8; a multiple of 2 * heads."""
    layers: Annotated[int, at_least(1)] = 2
    """Layers, >= 1."""
    heads: Annotated[int, at_least(1)] = 4
    """Attention heads, >= 1."""
    mlp: Annotated[int, at_least(8)] = 168
    """Width of the feed-forward part, >= 8."""
    steps: Annotated[int, at_least(1)] = 2000
    """Steps of supervised training, >= 1."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Examples of a step, >= 1."""
    learning_rate: Annotated[float, POSITIVE] = 3e-3
    """Peak learning rate of the supervised training, > 0; warm-up over a tenth of the steps, then a cosine."""
    seed: Annotated[int, SEED] = 2
    """Seed of weights, corpus, prompts and benchmark, in [0, 2**32). Not every seed learns both tasks equally well."""
    num_prompts: Annotated[int, at_least(1)] = 8000
    """Preference prompts that are written, >= 1, all different."""
    num_tuning: Annotated[int, at_least(1)] = 2000
    """Further preference prompts, >= 1, none of them among the others: what settings may be tuned on."""
    num_benchmark: Annotated[int, at_least(1)] = 400
    """Benchmark problems that are written, >= 1; neither the corpus nor the preference prompts hold any of them."""
    threads: Annotated[int, at_least(1)] = 1
    """CPU threads of the training, >= 1; the weights depend on it in their last digits, so it is part of the cache's key."""
    device: Annotated[str, FILLED] = "cpu"
    """Where the training runs: cpu, cuda or cuda:1."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        for low, high in (
            ("chain_min", "chain_max"),
            ("chain_min", "sft_chain_max"),
            ("benchmark_min", "benchmark_max"),
        ):
            if getattr(self, high) < getattr(self, low):
                problem = f"got {getattr(self, high)}, expected at least {low}, which is {getattr(self, low)}"
                found.append((high, problem))
        if self.hidden % (2 * self.heads):
            found.append(("hidden", f"got {self.hidden}, expected a multiple of 2 * heads, which is {2 * self.heads}"))
        return found
