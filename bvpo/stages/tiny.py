"""``bvpo tiny CONFIG.toml``: a tiny reasoning model, made on the spot, with prompts to align it on.

Reads ``[tiny]`` and writes into the folder ``model.path``: a real Qwen2 of about 100,000 parameters trained from scratch,
its tokenizer, ``prompts.jsonl`` and ``tuning.jsonl`` (preference prompts), ``benchmark.jsonl`` and ``tiny.json``, which says
how good it is. A base that was made before is found in a cache. It aligns nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, TinyConfig
from bvpo.strict import UserError

if TYPE_CHECKING:
    from bvpo.tiny.cache import Found

logger = logging.getLogger(__name__)

ABOUT = (
    "Make a tiny reasoning model and its prompts in the folder model.path: a real Qwen2, trained from scratch in about a "
    "minute on one CPU core. --limit N trains for N steps only: a first try, which the next full run replaces."
)


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("tiny", argv, ABOUT)
    run(config, options)
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Makes the base where it is not there yet; ``--limit`` is the most training steps."""
    from bvpo.tiny.cache import Found, ensure_base, limited, present_base

    folder, tiny = Path(config.model.path), limited(config.tiny, options.limit)
    logger.info("bvpo tiny    %s", folder)
    present = present_base(folder, config.tiny, options.limit)  # first: it loads no framework
    if present is not None:
        _say(Found(present, "here"))
        return
    from transformers.utils import logging as transformers_logging

    from bvpo.tiny.base import draw_material, estimate, make_base

    transformers_logging.disable_progress_bar()  # one bar: ours
    _require_format(config)
    if options.dry_run:
        draw_material(tiny)
        cost = estimate(tiny)
        logger.info("model        %s parameters", f"{cost.parameters:,}")
        logger.info("training     %s steps, about %s tokens", f"{tiny.steps:,}", f"{cost.tokens:,}")
        logger.info("dry run: nothing was made")
        return
    _say(ensure_base(folder, config.tiny, _maker(tiny, draw_material, make_base), options.limit))


def _say(found: Found) -> None:
    origin = {"here": "was here already", "cache": "copied from the cache", "made": "trained"}[found.origin]
    logger.info("base         %s parameters, %s", f"{found.description['parameters']:,}", origin)
    for kind, measured in found.description["measured"].items():
        for mode in ("thinking", "nothinking"):
            logger.info("%-12s %s", kind, _sentence(mode, measured[mode]))


def _maker(tiny: TinyConfig, draw: Callable[..., Any], make: Callable[..., Any]) -> Callable[..., Any]:
    """Fills a folder with the base; what can only be checked now is checked before anything is written."""

    def fill(draft: Path, identity: dict[str, Any]) -> None:
        _require_device(tiny.device)
        make(draft, tiny, draw(tiny), identity)

    return fill


def _require_format(config: ExperimentConfig) -> None:
    from bvpo.formats import resolve_format
    from bvpo.tiny.base import tokenizer_of
    from bvpo.tiny.sft import FORMAT

    fmt = resolve_format(tokenizer_of(config.tiny), config.model.format, config.model.custom_format)
    if fmt.name != FORMAT:
        raise UserError(
            f"model.format: got {fmt.name!r}, expected 'auto' or {FORMAT!r}, in which the tiny model thinks"
        )


def _require_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"tiny.device: got {name!r}, expected cpu, cuda or cuda:N") from None
    num = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= num):
        raise UserError(f"tiny.device: got {name!r}, which this machine has not ({num} CUDA devices)")


def _sentence(mode: str, measured: dict[str, Any]) -> str:
    accuracy, reward = measured["accuracy"], measured["reward"]
    text = f"{mode}: accuracy {accuracy['value']:.3f}, reward {reward['value']:.3f} ({accuracy['n']} prompts)"
    if "trace_tokens" in measured:
        text += f", traces of {measured['trace_tokens']['mean']:.0f} tokens (sd {measured['trace_tokens']['sd']:.0f})"
    return text
