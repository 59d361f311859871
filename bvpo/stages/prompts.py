"""``bvpo prompts CONFIG.toml``: from raw prompt collections to ``prompts.jsonl``.

Reads the sources that ``[prompts]`` names, drops what is unfit (malformed, too long, repeated, or part of a benchmark),
assigns splits, and leaves in ``ROOT/NAME``: ``prompts.jsonl``, ``prompts.dropped.jsonl`` with a reason for each, and an
entry in the manifest. The same sources, settings and seed give the same files. It samples nothing and loads no model;
a tokenizer only when ``prompts.max_tokens`` is set.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, PromptsConfig, dump_toml
from bvpo.data.cleaning import (
    REASONS,
    Drop,
    assign_split,
    contamination_drops,
    exact_duplicate_drops,
    near_duplicate_drops,
    normal_conversation,
    parse_messages,
    prompt_id,
    structural_problem,
)
from bvpo.data.sources import (
    Source,
    benchmark_files,
    fingerprint_file,
    fingerprint_source,
    parse_source,
    read_benchmark,
    read_source,
)
from bvpo.experiment import Experiment
from bvpo.files import disk_errors, make_folder
from bvpo.keys import content_hash, hash_int
from bvpo.records import Message, Prompt
from bvpo.strict import UserError, to_dict, write_jsonl

logger = logging.getLogger(__name__)

ABOUT = "Collect prompts, drop what is unfit or part of a benchmark, split the rest. Writes prompts.jsonl."


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedPrompt:
    """One line of ``prompts.dropped.jsonl``."""

    id: str
    reason: str
    detail: str
    source: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt that has passed every check so far."""

    id: str
    messages: tuple[Message, ...]
    source: str


@dataclass(slots=True)
class Cleaning:
    """The state between the checks: who is left, and who was dropped and why."""

    candidates: list[Candidate] = field(default_factory=list)
    dropped: list[DroppedPrompt] = field(default_factory=list)

    def apply(self, find_drops: Callable[[list[tuple[Message, ...]], list[str]], list[Drop]]) -> None:
        """Runs one check over all that are left."""
        drops = find_drops([c.messages for c in self.candidates], [c.id for c in self.candidates])
        for drop in drops:
            lost = self.candidates[drop.index]
            self.dropped.append(DroppedPrompt(id=lost.id, reason=drop.reason, detail=drop.detail, source=lost.source))
        gone = {drop.index for drop in drops}
        self.candidates = [c for index, c in enumerate(self.candidates) if index not in gone]


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("prompts", argv, ABOUT)
    run(config, options)
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Cleans the sources and writes the result; with ``--dry-run`` it says what it would write."""
    settings = config.prompts
    if not settings.sources:
        raise UserError("prompts.sources: nothing to read; name files, folders or Hub data sets")
    experiment = Experiment.of(config)
    sources, benchmarks = _sources(settings), benchmark_files(settings.decontaminate)
    identity = _identity(config, sources, benchmarks)
    if _has_samples(experiment.samples_folder):
        experiment.check("prompts", **identity)
    cleaned = clean(settings, sources, benchmarks, _token_counter(config) if settings.max_tokens else None)
    prompts = list(_prompts(choose(cleaned.candidates, settings.count, config.seed), config))
    kept = prompts if options.limit is None else prompts[: options.limit]
    num_clean = len(cleaned.candidates)
    counts = _counts(kept, cleaned.dropped, num_left_out=num_clean - len(prompts), num_cut=len(prompts) - len(kept))
    _say(counts, cleaned.dropped, benchmarks)
    if not kept:
        raise UserError(f"prompts: none of the {counts['read']:,} prompts is left; the counts above say why")
    if options.dry_run:
        logger.info("dry run: %s would get %d prompts; nothing was written", experiment.prompts_file, len(kept))
        return
    make_folder(experiment.folder)
    experiment.forget("prompts")
    experiment.begin("prompts", **identity)
    with disk_errors(experiment.folder, "writing prompts"):
        write_jsonl(experiment.dropped_file, cleaned.dropped)
        write_jsonl(experiment.prompts_file, kept)
    experiment.write_config(dump_toml(config))
    experiment.finish("prompts", counts=counts)
    places = experiment.prompts_file, experiment.dropped_file.name
    logger.info("written to %s; the dropped ones, with reasons, to %s", *places)


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The sources and the benchmarks that they are kept clear of."""
    return _identity(config, _sources(config.prompts), benchmark_files(config.prompts.decontaminate))["fingerprints"]


def _sources(settings: PromptsConfig) -> list[Source]:
    default = Source(path="", split=settings.split, column=settings.column, id_column=settings.id_column)
    return [parse_source(text, default) for text in settings.sources]


def clean(
    settings: PromptsConfig,
    sources: Sequence[Source],
    benchmarks: Sequence[Path],
    count_tokens: Callable[[list[str]], list[int]] | None,
) -> Cleaning:
    """All checks in order. The first of several equal prompts stays, so appending to the sources changes nothing."""
    state = Cleaning()
    for source in sources:
        _read(source, settings, state)
    _require_distinct_ids(state.candidates)
    if count_tokens is not None:
        state.apply(lambda conversations, ids: _token_drops(conversations, settings.max_tokens or 0, count_tokens))
    state.apply(exact_duplicate_drops)
    threshold = settings.near_duplicates
    if threshold is not None:
        state.apply(
            lambda conversations, ids: near_duplicate_drops(
                conversations, ids, threshold=threshold, shingle=settings.shingle_words
            )
        )
    if benchmarks:
        items = [item for path in benchmarks for item in read_benchmark(path, settings.decontaminate_fields)]
        places, texts = [place for place, _ in items], [text for _, text in items]
        logger.info("looking for %s benchmark items of %s files", f"{len(items):,}", len(benchmarks))
        state.apply(
            lambda conversations, ids: contamination_drops(conversations, texts, places, ngram=settings.ngram_words)
        )
    return state


def choose(candidates: Sequence[Candidate], count: int | None, seed: int) -> list[Candidate]:
    """``count`` of them by the hash of content and seed, in their own order; a larger count keeps the earlier choice."""
    if count is None or count >= len(candidates):
        return list(candidates)
    places = [hash_int(normal_conversation(c.messages), f"bvpo-choice-{seed}") for c in candidates]
    chosen = sorted(range(len(candidates)), key=places.__getitem__)[:count]
    return [candidates[index] for index in sorted(chosen)]


def _read(source: Source, settings: PromptsConfig, state: Cleaning) -> None:
    """One source's rows, each checked by itself."""
    for row in read_source(source):
        messages = parse_messages("" if row.value is None else row.value)
        if messages and settings.last_assistant == "strip" and messages[-1].role == "assistant":
            messages = messages[:-1]
        if messages is None:
            id = row.id or content_hash(repr(row.value))[:16]
            detail = "expected a list of messages, each with a role and text"
            state.dropped.append(DroppedPrompt(id=id, reason="malformed", detail=detail, source=row.where))
            continue
        id = row.id or prompt_id(messages)
        problem = structural_problem(messages, settings.max_chars)
        if problem is None:
            state.candidates.append(Candidate(id, messages, row.where))
        else:
            reason, detail = problem
            state.dropped.append(DroppedPrompt(id=id, reason=reason, detail=detail, source=row.where))


def _require_distinct_ids(candidates: Sequence[Candidate]) -> None:
    """One id for two different prompts would mix up their samples."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        other = first.setdefault(candidate.id, candidate)
        if other.messages != candidate.messages:
            raise UserError(
                f"{candidate.source}: id {candidate.id!r} already names another prompt ({other.source}); "
                f"leave prompts.id_column out to name prompts by their content"
            )


def _token_counter(config: ExperimentConfig) -> Callable[[list[str]], list[int]]:
    from bvpo.models import load_tokenizer

    tokenizer = load_tokenizer(config.model, "prompts.max_tokens")

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    return count


def _token_drops(
    conversations: Sequence[Sequence[Message]], max_tokens: int, count_tokens: Callable[[list[str]], list[int]]
) -> list[Drop]:
    drops = []
    for start in range(0, len(conversations), 1000):
        block = conversations[start : start + 1000]
        counts = iter(count_tokens([message.content for messages in block for message in messages]))
        for index, messages in enumerate(block, start=start):
            num = sum(next(counts) for _ in messages)
            if num > max_tokens:
                drops.append(Drop(index=index, reason="too_long_tokens", detail=f"{num} tokens"))
    return drops


def _prompts(candidates: Sequence[Candidate], config: ExperimentConfig) -> Iterator[Prompt]:
    settings = config.prompts
    for candidate in candidates:
        split = assign_split(
            candidate.messages,
            seed=config.seed,
            validation=settings.validation_fraction,
            test=settings.test_fraction,
        )
        yield Prompt(id=candidate.id, messages=candidate.messages, split=split, meta={"source": candidate.source})


# ---------------------------------------------------------------------------------------------------------------------
# what is recorded and said


def _identity(config: ExperimentConfig, sources: Sequence[Source], benchmarks: Sequence[Path]) -> dict[str, Any]:
    """All that the result depends on."""
    model = {"path": config.model.path, "tokenizer": config.model.tokenizer, "revision": config.model.revision}
    return {
        "config": {
            "prompts": to_dict(config.prompts),
            "seed": config.seed,
            **({"model": model} if config.prompts.max_tokens else {}),
        },
        "fingerprints": {
            "data": {source.path: fingerprint_source(source) for source in sources},
            "benchmarks": {str(path): fingerprint_file(path) for path in benchmarks},
        },
    }


def _has_samples(samples: Path) -> bool:
    """Prompts may be made anew until something was sampled for them; then only with the same settings and data."""
    return samples.is_dir() and any(samples.iterdir())


def _counts(
    kept: Sequence[Prompt], dropped: Sequence[DroppedPrompt], *, num_left_out: int, num_cut: int
) -> dict[str, Any]:
    reasons = Counter(drop.reason for drop in dropped)
    return {
        "read": len(kept) + len(dropped) + num_left_out + num_cut,
        "kept": len(kept),
        "not_chosen": num_left_out,
        "cut_by_limit": num_cut,
        "splits": dict(sorted(Counter(prompt.split for prompt in kept).items())),
        "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
    }


def _say(counts: dict[str, Any], dropped: Sequence[DroppedPrompt], benchmarks: Sequence[Path]) -> None:
    splits = ", ".join(f"{name} {num:,}" for name, num in counts["splits"].items())
    logger.info("prompts: %s read, %s kept (%s)", f"{counts['read']:,}", f"{counts['kept']:,}", splits or "none")
    for reason, num in counts["dropped"].items():
        logger.info("  %8s dropped as %s: %s", f"{num:,}", reason, REASONS[reason])
    if counts["not_chosen"]:
        logger.info("  %8s not chosen: prompts.count keeps fewer", f"{counts['not_chosen']:,}")
    if counts["cut_by_limit"]:
        logger.info("  %8s left out by --limit", f"{counts['cut_by_limit']:,}")
    matches = [drop.detail for drop in dropped if drop.reason == "contaminated"]
    for path in benchmarks:
        if num := sum(detail.startswith(f"{path}:") for detail in matches):
            logger.info("  %8s of them contain an item of %s", f"{num:,}", path)
