"""The verbs of the ``bvpo`` command and how one is run by name. A verb's module loads on use, so that this one is free.

In: a verb, and the words after it or a config; out: what the verb's own module does. Verbs that drive other verbs (``run``,
``evaluate``) call them here by name, as a user would on the command line: stages never import one another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from bvpo.command import StageOptions
from bvpo.config import ExperimentConfig

VERBS: dict[str, tuple[str, str]] = {
    "run": ("bvpo.stages.run", "run a chain of stages, or compare methods over seeds, by one command"),
    "prompts": ("bvpo.stages.prompts", "collect prompts, clean and decontaminate them, split them"),
    "sample": ("bvpo.stages.sample", "draw responses to the prompts in both views"),
    "score": ("bvpo.stages.score", "score the final answer of every sample"),
    "pair": ("bvpo.stages.pair", "choose pairs from the scored samples: quads, and preference sets for TRL"),
    "train": ("bvpo.stages.train", "align the model on quads: preference pairs of both views"),
    "evaluate": ("bvpo.stages.evaluate", "evaluate a model on benchmarks, with and without thinking"),
    "analyze": ("bvpo.stages.analyze", "measure how the two views differ: variances, lengths, likelihoods"),
    "report": ("bvpo.stages.report", "write results.json and the report page of an experiment"),
    "status": ("bvpo.stages.status", "show how far each stage of an experiment is"),
    "inspect": ("bvpo.stages.inspect", "read prompts with their samples, scores and pairs"),
    "compare": ("bvpo.stages.compare", "compare two evaluations, or methods over seeds, prompt by prompt"),
    "tiny": ("bvpo.stages.tiny", "make a tiny reasoning model and prompts to align it on"),
    "lab": ("bvpo.stages.lab", "check the theory on models whose every trace is enumerated"),
}
"""Verb -> (module, one line for ``--help``), in the order of the work."""


def run_words(verb: str, words: Sequence[str]) -> int:
    """``bvpo VERB WORDS...``; returns the exit code."""
    return importlib.import_module(VERBS[verb][0]).main(words) or 0


def stage_fingerprint(verb: str, config: ExperimentConfig) -> dict[str, Any]:
    """What the stage depends on besides its settings: the files it reads, and the code that works on them."""
    find: Callable[[ExperimentConfig], dict[str, Any]] | None
    find = getattr(importlib.import_module(VERBS[verb][0]), "fingerprint", None)
    return {} if find is None else find(config)


READERS = ("analyze",)
"""Verbs of a chain that take the experiment's folder instead of its config."""


def run_stage(verb: str, config: ExperimentConfig, options: StageOptions | None = None) -> None:
    """One stage on a config that is already there; raises what the stage raises."""
    module = importlib.import_module(VERBS[verb][0])
    if verb in READERS:
        module.main([str(config.folder)])
    else:
        module.run(config, options or StageOptions())
