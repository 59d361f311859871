"""``bvpo sample CONFIG.toml``: from prompts to sampled responses in both views.

Reads ``prompts.jsonl`` of the experiment folder, writes ``samples/`` (one record per response) and ``samples/failed/`` (what
could not be drawn, with the error). Each sample is named by all that decides it and seeded by its name, so a run that was
stopped, killed or spread over machines ends with the same samples. Under changed settings it refuses to go on. It scores
nothing and starts no server.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, SampleConfig, dump_toml
from bvpo.engines.base import Engine, Generation, Request, Sampling, create_engine
from bvpo.engines.estimate import Estimate
from bvpo.experiment import (
    Experiment,
    RecordWriter,
    StageEntry,
)
from bvpo.experiment.sampleplan import Draw, SamplePlan, SampleSpec, in_shard, plan_samples, shard_of, walk
from bvpo.files import hash_file
from bvpo.formats import FORMATS, ReasoningFormat, end_ids, resolve_format, view_prompt
from bvpo.formats.prompts import template_source
from bvpo.keys import content_hash, seed_from_key
from bvpo.records import VIEWS, Message, Prompt, Sample, View
from bvpo.strict import UserError, to_dict

logger = logging.getLogger(__name__)

RETRY = "--retry-failed"
ABOUT = (
    "Sample responses to the prompts in both views. Prints what it will cost, goes on where it stopped when run again. "
    f"A sample that failed stays failed until {RETRY} is given, which draws it again."
)
HOPELESS = 50  # samples of a run that fail before any succeeds: it is the engine that is wrong, not they
_MOST_ERRORS = 5  # kinds of errors that are listed
_MANY_PROMPTS = 5000  # of which planning takes a while
_GROWING = ("num_samples", "views", "splits")  # may grow without a sample changing
_PROBE = (Message(role="user", content="Why?"),)


def main(argv: Sequence[str]) -> int | None:
    run(*parse_command("sample", argv, ABOUT))
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Draws what is missing; ``--limit`` keeps to the first prompts, ``sample.shard`` to a part of them."""
    from transformers.utils import logging as transformers_logging

    from bvpo.models import load_tokenizer

    transformers_logging.disable_progress_bar()  # one bar: ours
    experiment = Experiment.of(config)
    experiment.require_whole()
    everything = _prompts(experiment, config.sample)
    tokenizer = load_tokenizer(config.model)
    fmt = resolve_format(tokenizer, config.model.format, config.model.custom_format)
    sampling = _sampling(config.sample, end_ids(tokenizer, fmt))
    with ExitStack() as stack:
        engine = create_engine(config.sample.engine, engine_options(config, fmt))
        stack.callback(engine.close)
        fingerprint = json.loads(json.dumps(engine.fingerprint()))  # as the manifest holds it
        identity = _identity(config, experiment, fmt, tokenizer, fingerprint)
        grown = _check(experiment, identity)
        store, failed = experiment.samples(), experiment.failed()
        spec = SampleSpec(
            reasoning_format=fmt,
            model_revision=content_hash({name: fingerprint[name] for name in _WEIGHTS if name in fingerprint}),
            sampling=to_dict(sampling),
            run_seed=config.seed,
        )
        shard = shard_of(config.sample.shard)
        failed_keys = set() if options.retry_failed else {row["key"] for row in failed.columns("key")}
        prompts = [prompt for prompt in everything[: options.limit] if in_shard(prompt, shard)]
        if len(prompts) >= _MANY_PROMPTS:
            logger.info("writing %s prompts in tokens and looking up what is done", f"{len(prompts):,}")
        plan = plan_samples(
            prompts,
            tokenizer,
            spec,
            views=config.sample.views,
            num_samples=config.sample.num_samples,
            is_done=store.__contains__,
            has_failed=failed_keys.__contains__,
        )
        _require_writable(plan)
        _say_plan(config, fmt, plan, sampling, options.retry_failed)
        if options.dry_run:
            logger.info("dry run: nothing was sampled")
            return
        if grown:
            experiment.forget("sample")
        experiment.begin("sample", **identity)
        experiment.write_config(dump_toml(replace(config, sample=replace(config.sample, shard=""))))
        work = Work(plan=plan, spec=spec, sampling=sampling, chat=_asks_for_chat(config.sample))
        work.writer = stack.enter_context(store.open_writer())
        work.failures = stack.enter_context(failed.open_writer())
        report = draw_samples(work, engine)
        num_shared = plan.num_shared
        if len(prompts) < len(everything):  # prompts of other parts, too, may read the same tokens as an earlier one
            num_shared = _count_shared(everything, tokenizer, spec, config.sample)
    _finish(experiment, config.sample, len(everything), num_shared, report)


def _count_shared(prompts: Sequence[Prompt], tokenizer: Any, spec: SampleSpec, settings: SampleConfig) -> int:
    """Samples that no part draws, because an earlier prompt of any part reads the same tokens."""

    def there(key: str) -> bool:
        return True

    options = {"views": settings.views, "num_samples": settings.num_samples, "is_done": there, "has_failed": there}
    return plan_samples(prompts, tokenizer, spec, **options).num_shared


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The prompts; the samples are what it makes. The model is known without asking an engine."""
    return Experiment.of(config).marks("prompts", "samples")


# ---------------------------------------------------------------------------------------------------------------------
# what is asked for


def _prompts(experiment: Experiment, settings: SampleConfig) -> list[Prompt]:
    """The prompts of the splits that are sampled."""
    path, prompts = experiment.prompts_file, list(experiment.prompts())
    there = sorted({prompt.split for prompt in prompts})
    if unknown := [split for split in settings.splits if split not in there]:
        raise UserError(f"sample.splits: no prompt is in split {unknown[0]!r}; {path} has {', '.join(there)}")
    kept = [prompt for prompt in prompts if not settings.splits or prompt.split in settings.splits]
    if not kept:
        raise UserError(f"{path}: holds no prompts")
    return kept


def _sampling(settings: SampleConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_token_ids=tuple(sorted(stop_token_ids)),
    )


def engine_options(config: ExperimentConfig, fmt: ReasoningFormat) -> dict[str, Any]:
    """What the engine is made with: the model's settings, and the options of the config."""
    model, settings = config.model, config.sample
    own: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if settings.engine == "openai":
        own["endpoints"] = list(settings.endpoints)
        own["tokenizer"] = model.tokenizer or model.path
        own["revision"] = None if model.tokenizer else model.revision
        if _asks_for_chat(settings):
            if fmt.name not in FORMATS:
                raise UserError("sample.options.api: a chat endpoint needs a registered format, not one of your own")
            own["format"] = fmt.name
    else:
        own |= {"model": model.path, "revision": model.revision, "tokenizer": model.tokenizer}
    return own | settings.options


def _asks_for_chat(settings: SampleConfig) -> bool:
    return settings.engine == "openai" and settings.options.get("api") == "chat"


# The parts of an engine's fingerprint that name the weights; they go into every sample's key.
_WEIGHTS = ("model", "revision", "content", "parameters")


def _identity(
    config: ExperimentConfig, experiment: Experiment, fmt: ReasoningFormat, tokenizer: Any, engine: dict[str, Any]
) -> dict[str, Any]:
    """All that the samples depend on; what does not change a sample (shard, batching, addresses) is left out."""
    settings = to_dict(config.sample)
    for name in ("shard", "endpoints", "options"):
        del settings[name]
    settings["engine"] = engine["engine"]  # Ray is a way to run an engine, not another one
    facts = {name: getattr(fmt, name) for name in fmt.__slots__ if name not in ("models", "verified", "lead", "detect")}
    return {
        "config": {"sample": settings, "format": fmt.name, "seed": config.seed},
        "fingerprints": {
            "engine": engine,
            "format": content_hash(facts),
            # an edited chat template is another experiment
            "tokenizer": content_hash([template_source(tokenizer), [_probe(tokenizer, fmt, view) for view in VIEWS]]),
            "prompts": hash_file(experiment.prompts_file),
        },
    }


def _probe(tokenizer: Any, fmt: ReasoningFormat, view: View) -> list[int] | str:
    """How a short conversation is written in a view: equal for tokenizers that write prompts alike."""
    try:
        return list(view_prompt(tokenizer, fmt, _PROBE, view).prompt_ids)
    except UserError as error:
        return str(error)


def _check(experiment: Experiment, identity: Mapping[str, Any]) -> bool:
    """Refuses to mix samples of two settings; true when these are the earlier ones, asking for more."""
    entry = experiment.stage("sample")
    if entry is not None and _grows(entry, identity["config"]):
        earlier = dict(identity["config"])
        earlier["sample"] = {**earlier["sample"], **{name: entry.config["sample"][name] for name in _GROWING}}
        experiment.check("sample", **{**identity, "config": earlier})
        return True
    experiment.check("sample", **identity)
    return False


def _grows(entry: StageEntry, config: Mapping[str, Any]) -> bool:
    before, now = entry.section("sample"), config["sample"]
    if not all(name in before for name in _GROWING) or all(before[name] == now[name] for name in _GROWING):
        return False
    more_views = set(before["views"]) <= set(now["views"])
    more_splits = not now["splits"] or (bool(before["splits"]) and set(before["splits"]) <= set(now["splits"]))
    return now["num_samples"] >= before["num_samples"] and more_views and more_splits


def _require_writable(plan: SamplePlan) -> None:
    """One odd prompt fails alone; when no prompt can be written, the settings are wrong."""
    if plan.unwritable and not plan.draws and not plan.num_done:
        first = plan.unwritable[0]
        raise UserError(f"prompt {first.prompt.id!r}, {first.view} view: {first.error}")


# ---------------------------------------------------------------------------------------------------------------------
# the work


@dataclass(slots=True, kw_only=True)
class Work:
    """What is drawn, and where it goes. ``waiting`` maps the keys of the requests that the engine holds to their samples."""

    plan: SamplePlan
    spec: SampleSpec
    sampling: Sampling
    chat: bool
    writer: RecordWriter[Sample] = field(init=False)
    failures: RecordWriter[Sample] = field(init=False)
    waiting: dict[str, tuple[Draw, int]] = field(default_factory=dict)

    def requests(self) -> Iterator[Request]:
        for draw, index in walk(self.plan):
            ids = draw.prompt_ids
            key = self.spec.key(ids, draw.view, index)
            self.waiting[key] = (draw, index)
            seed = seed_from_key(key)
            if self.chat:
                yield _chat_request(draw, Request(key=key, prompt_ids=ids, seed=seed, params=self.sampling))
            else:
                yield Request(key=key, prompt_ids=ids, seed=seed, params=self.sampling)


def _chat_request(draw: Draw, request: Request) -> Request:
    from bvpo.engines.http.chat import ChatRequest  # loads the HTTP client

    return ChatRequest(
        key=request.key,
        prompt_ids=request.prompt_ids,
        seed=request.seed,
        params=request.params,
        messages=draw.prompt.messages,
        view=draw.view,
    )


@dataclass(slots=True)
class Report:
    """What one run did."""

    num_drawn: int = 0
    num_failed: int = 0
    num_unclosed: int = 0
    num_cut: int = 0
    new_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        if sample.error is not None:
            self.num_failed += 1
            self.errors[sample.error] += 1
            if self.num_failed >= HOPELESS and not self.num_drawn:
                raise UserError(f"sample: the first {self.num_failed} all failed, the last with: {sample.error}")
            return
        self.num_drawn += 1
        self.num_unclosed += sample.answer is None
        self.num_cut += sample.finish == "length"
        self.new_tokens += len(sample.token_ids)


def draw_samples(work: Work, engine: Engine) -> Report:
    """Writes a record for every missing sample, each as soon as the engine has it."""
    report = Report()
    for unwritable in work.plan.unwritable:
        for number, key in enumerate(unwritable.keys):
            work.failures.append(_failed(key, unwritable.prompt.id, unwritable.view, number, (), unwritable.error))
            report.errors[unwritable.error] += 1
    num_left = work.plan.num_left
    if not num_left:
        return report  # without loading a model
    generations = engine.generate(work.requests())
    try:
        for generation in _with_bar(generations, num_left, report):
            sample = to_sample(generation, *work.waiting.pop(generation.key), work.spec.reasoning_format)
            (work.failures if sample.error is not None else work.writer).append(sample)
            report.add(sample)
    except KeyboardInterrupt:
        logger.info("stopping: %s of %s samples were drawn and are stored", f"{report.num_drawn:,}", f"{num_left:,}")
        raise
    finally:
        generations.close()  # type: ignore[attr-defined]  # servers must not go on working for nobody
    assert not work.waiting, f"the engine returned nothing for {len(work.waiting)} requests"
    return report


def to_sample(generation: Generation, draw: Draw, index: int, fmt: ReasoningFormat) -> Sample:
    """The record of one generation, taken apart into trace and answer. A trace that never closed has no answer."""
    if generation.finish == "error":
        error = generation.error or "unknown error"
        return _failed(generation.key, draw.prompt.id, draw.view, index, draw.prompt_ids, error)
    split = fmt.split(generation.text, draw.view)
    return Sample(
        key=generation.key,
        prompt_id=draw.prompt.id,
        view=draw.view,
        index=index,
        prompt_ids=draw.prompt_ids,
        completion_start=draw.completion_start,
        token_ids=generation.token_ids,
        text=generation.text,
        trace=split.trace,
        answer=split.answer,
        finish=generation.finish,
        logprobs=generation.logprobs,
    )


def _failed(key: str, prompt_id: str, view: View, index: int, prompt_ids: tuple[int, ...], error: str) -> Sample:
    return Sample(
        key=key,
        prompt_id=prompt_id,
        view=view,
        index=index,
        prompt_ids=prompt_ids,
        completion_start=len(prompt_ids),
        token_ids=(),
        text="",
        trace=None,
        answer=None,
        finish="error",
        error=error,
    )


def _with_bar(generations: Iterator[Generation], total: int, report: Report) -> Iterator[Generation]:
    """The same generations under a progress bar with rate and time left; it starts with the first of them."""
    from tqdm import tqdm

    bar: Any = None
    try:
        for generation in generations:
            if bar is None:
                # a log file gets a line now and then instead of ten a second
                pace = 0.2 if sys.stderr.isatty() else 30.0
                bar = tqdm(total=total, unit=" samples", desc="sample", mininterval=pace)
            yield generation
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(
                f"{report.new_tokens / seconds:,.0f} tokens/s"
                + (f", {report.num_failed:,} failed" if report.num_failed else ""),
                refresh=False,
            )
            bar.update()
    finally:
        if bar is not None:
            bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def _say_plan(
    config: ExperimentConfig, fmt: ReasoningFormat, plan: SamplePlan, sampling: Sampling, retry_failed: bool
) -> None:
    settings = config.sample
    part = f", part {settings.shard}" if settings.shard else ""
    logger.info("bvpo sample  %s with engine %s, format %s%s", config.model.path, settings.engine, fmt.name, part)
    logger.info(
        "samples      %s asked for, %s done, %s left (%d per prompt in %s)",
        f"{plan.num_asked:,}", f"{plan.num_done:,}", f"{plan.num_left:,}", settings.num_samples,
        " and ".join(settings.views),
    )  # fmt: skip
    if plan.num_failed:
        said = "could not be drawn" if retry_failed else f"failed before and stay as they are; {RETRY} draws them again"
        logger.info("             %s %s", f"{plan.num_failed:,}", said)
    for unwritable in plan.unwritable[:_MOST_ERRORS]:
        logger.warning("             prompt %r, %s view: %s", unwritable.prompt.id, unwritable.view, unwritable.error)
    if plan.num_shared:
        logger.warning(
            "             %s belong to prompts that read the same tokens as an earlier one, and are not drawn twice",
            f"{plan.num_shared:,}",
        )
    if plan.num_left:
        cost = Estimate(
            requests=plan.num_left,
            prompt_tokens=plan.prompt_tokens,
            most_new_tokens=plan.num_left * sampling.max_new_tokens,
            most_cost=0.0,
        )
        logger.info("cost         %s; longest prompt %s tokens", cost.line(), f"{plan.longest_prompt:,}")


def _finish(experiment: Experiment, settings: SampleConfig, num_prompts: int, num_shared: int, report: Report) -> None:
    """Seals what was drawn; the stage is finished when nothing of any part is left."""
    store, failed = experiment.samples(), experiment.failed()
    store.seal()
    failed.seal()
    num_failed = len({row["key"] for row in failed.columns("key") if row["key"] not in store})
    num_asked = num_prompts * len(settings.views) * settings.num_samples
    left = num_asked - num_shared - len(store) - num_failed
    counts = {"asked": num_asked, "samples": len(store), "failed": num_failed, "shared": num_shared}
    if left <= 0:
        experiment.finish("sample", counts=counts, shards=store.shard_hashes())
    for error, num in report.errors.most_common(_MOST_ERRORS):
        logger.info("failed       %s x %s", f"{num:,}", error)
    logger.info(
        "done         %s drawn (%s new tokens), %s without an end of the trace, %s cut at the length limit",
        f"{report.num_drawn:,}", f"{report.new_tokens:,}", f"{report.num_unclosed:,}", f"{report.num_cut:,}",
    )  # fmt: skip
    logger.info(
        "             %s samples in %s, %s failed, %s left",
        f"{len(store):,}", experiment.samples_folder, f"{num_failed:,}", f"{max(0, left):,}",
    )  # fmt: skip
    if num_failed:
        logger.info("             bvpo sample ... %s draws the failed ones again", RETRY)
    if report.num_failed and not report.num_drawn:
        raise UserError(f"sample: all {report.num_failed} failed, most with: {report.errors.most_common(1)[0][0]}")
