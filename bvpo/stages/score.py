"""``bvpo score CONFIG.toml``: from samples to scores of their final answers.

Reads ``prompts.jsonl`` and ``samples/`` of the experiment folder, writes ``scores/`` (and ``judge/``, the replies of a
language-model judge). Every sample gets a record: a value, or an error in words. Equal answers to one prompt are scored
once. Run again, it goes on where it stopped; under another scorer it refuses. It chooses no pairs.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, dump_toml
from bvpo.data.overview import SCORE_COLUMNS, last_scores
from bvpo.data.scores import ATTEMPT, CONTENT, NO_ANSWER, answer_text, content_key, scorer_id
from bvpo.experiment import (
    Experiment,
    RecordStore,
    RecordWriter,
)
from bvpo.records import Prompt, Sample, Score, View
from bvpo.scorers.base import Needs, Outcome, ScoreItem, Scorer, create_scorer
from bvpo.scorers.replies import ReplyStore
from bvpo.strict import UserError

logger = logging.getLogger(__name__)

RETRY = "--retry-failed"
ABOUT = (
    "Score the final answer of every sample. Prints what it will cost, goes on where it stopped when run again. "
    f"A failed score stays failed until {RETRY} is given, which tries it again."
)
HOPELESS = 50  # answers of a run that fail before any succeeds: it is the scorer that is wrong, not they
_MOST_ERRORS = 5  # kinds of errors that are listed


def main(argv: Sequence[str]) -> int | None:
    run(*parse_command("score", argv, ABOUT))
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Scores what has no score yet; ``--limit`` keeps to the first prompts."""
    experiment = Experiment.of(config)
    experiment.require_whole()
    prompts = {prompt.id: prompt for prompt in experiment.prompts(options.limit)}
    samples = experiment.samples()
    if not len(samples):
        raise UserError(f"{experiment.samples_folder}: nothing to score; sample first")
    with ExitStack() as stack:
        replies = None
        if config.score.scorer == "judge":
            replies = ReplyStore(Path(config.score.judge.cache or experiment.judge_folder))
            stack.callback(replies.close)
        scorer = create_scorer(config.score, replies)
        stack.callback(scorer.close)
        identity: dict[str, Any] = {"config": {"scorer": config.score.scorer}, "fingerprints": _identity(scorer)}
        experiment.check("score", **identity)
        name = scorer_id(config.score.scorer, scorer.fingerprint())
        store = experiment.scores()
        work = find_work(prompts, samples, store, name, scorer.needs, retry_failed=options.retry_failed)
        _say_work(name, work, scorer, options.retry_failed)
        if options.dry_run:
            logger.info("dry run: nothing was scored")
            return
        experiment.begin("score", **identity)
        experiment.write_config(dump_toml(config))
        writer = stack.enter_context(store.open_writer())
        report = _score(work, scorer, name, writer)
    store.seal()
    _finish(experiment, store, name, work, report, replies)


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The scorer (its code, template or weights), and what it scores."""
    scorer = create_scorer(config.score)
    try:
        return {**_identity(scorer), **Experiment.of(config).marks("prompts", "samples", "scores")}
    finally:
        scorer.close()


def _identity(scorer: Scorer) -> dict[str, Any]:
    return {"scorer": scorer.fingerprint()}


# ---------------------------------------------------------------------------------------------------------------------
# what is left to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample. ``content`` names its answer to its prompt, ``None`` without one; ``attempt`` counts earlier scores."""

    key: str
    prompt_id: str
    view: View
    content: str | None
    attempt: int = 0


class _Answer(NamedTuple):
    key: str
    prompt_id: str
    view: View
    text: str | None
    why_not: str


@dataclass(slots=True, kw_only=True)
class Work:
    """What is there and what is left to do; answers stay in the store until they are scored."""

    prompts: Mapping[str, Prompt]
    samples: RecordStore[Sample]
    needs: Needs
    rivals: dict[tuple[str, View], tuple[str, ...]] = field(default_factory=dict)  # distinct answers of prompt and view
    waiting: dict[str, list[Row]] = field(default_factory=dict)  # content -> the samples that its score serves
    reuse: list[Row] = field(default_factory=list)  # new samples whose answer has a score already
    unscorable: list[tuple[Row, str]] = field(default_factory=list)  # and why
    known: dict[str, tuple[float, str]] = field(default_factory=dict)  # content -> value and the sample it was given to
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def num_todo(self) -> int:
        return len(self.unscorable) + len(self.reuse) + sum(map(len, self.waiting.values()))

    def answers(self, only: Sequence[str] | None = None) -> Iterator[_Answer]:
        """The scored text of each sample of these prompts; of the others, none."""
        names = ("key", "prompt_id", "view", "answer", "error")
        for row in self.samples.columns(*names, only=only):
            if row["prompt_id"] not in self.prompts:
                continue
            text = None if row["error"] else answer_text(row["answer"])
            why = "sampling failed" if row["error"] else "unclosed trace" if row["answer"] is None else "empty answer"
            yield _Answer(row["key"], row["prompt_id"], row["view"], text, why)

    def content(self, answer: _Answer) -> str | None:
        """Equal for samples that one score serves."""
        if answer.text is None:
            return None
        prompt, context = self.prompts[answer.prompt_id], None
        if self.needs.rivals:
            context = self.rivals[answer.prompt_id, answer.view]
        elif self.needs.meta:
            context = prompt.meta
        return content_key(prompt.messages, answer.text, context)

    def items(self) -> Iterator[ScoreItem]:
        """One item per content that waits; its key is the content."""
        contents = {rows[0].key: content for content, rows in self.waiting.items()}
        for answer in self.answers(only=list(contents)):
            assert answer.text is not None
            prompt = self.prompts[answer.prompt_id]
            others = self.rivals.get((answer.prompt_id, answer.view), ())
            yield ScoreItem(
                key=contents[answer.key],
                messages=prompt.messages,
                answer=answer.text,
                rivals=tuple(other for other in others if other != answer.text),
                meta=prompt.meta,
            )


def find_work(
    prompts: Mapping[str, Prompt],
    samples: RecordStore[Sample],
    store: RecordStore[Score],
    scorer_name: str,
    needs: Needs,
    *,
    retry_failed: bool,
) -> Work:
    """Samples whose answer has no score that holds; failed ones among them only with ``retry_failed``."""
    work = Work(prompts=prompts, samples=samples, needs=needs)
    if needs.rivals:
        work.rivals = _rivals(work)
    earlier = last_scores(store.columns(*SCORE_COLUMNS), scorer_name)
    pending: defaultdict[str, list[Row]] = defaultdict(list)
    for answer in work.answers():
        content, last = work.content(answer), earlier.get(answer.key)
        attempt = 0 if last is None else last.attempt + 1
        row = Row(key=answer.key, prompt_id=answer.prompt_id, view=answer.view, content=content, attempt=attempt)
        work.counts["samples"] += 1
        if content is None:
            work.counts["without an answer"] += 1
            if last is None:
                work.unscorable.append((row, answer.why_not))
        elif last is None or last.content != content:  # other content: its rivals changed, more were sampled
            pending[content].append(row)
        elif last.value is None:
            work.counts["failed before"] += 1
            if retry_failed:
                pending[content].append(row)
        else:
            work.counts["scored before"] += 1
            source = min(answer.key, work.known[content][1]) if content in work.known else answer.key
            work.known[content] = (last.value, source)
    for content, rows in pending.items():
        if content in work.known:
            work.reuse += rows
        else:
            work.waiting[content] = sorted(
                rows, key=lambda row: row.key
            )  # the first is scored, in whatever order they came
    return work


def _rivals(work: Work) -> dict[tuple[str, View], tuple[str, ...]]:
    found: defaultdict[tuple[str, View], set[str]] = defaultdict(set)
    for answer in work.answers():
        if answer.text is not None:
            found[answer.prompt_id, answer.view].add(answer.text)
    return {group: tuple(sorted(texts)) for group, texts in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the work


@dataclass(slots=True)
class Report:
    """What one run did: distinct answers scored and failed, and the errors by text."""

    num_scored: int = 0
    num_failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self.num_scored += 1
            return
        self.num_failed += 1
        self.errors[outcome.error] += 1
        if self.num_failed >= HOPELESS and not self.num_scored:
            raise UserError(f"score: the first {self.num_failed} answers all failed, the last with: {outcome.error}")


def _score(work: Work, scorer: Scorer, name: str, writer: RecordWriter[Score]) -> Report:
    """Writes a record for every sample of the work, each as soon as its score is known."""
    report = Report()
    for row, why in work.unscorable:
        writer.append(_record(row, name, None, NO_ANSWER, {"why": why}))
    for row in work.reuse:
        assert row.content is not None
        value, source = work.known[row.content]
        writer.append(_record(row, name, value, None, {"same_as": source}))
    if not work.waiting:
        return report
    left = dict(work.waiting)
    outcomes = scorer.score(work.items())
    try:
        for outcome in _with_bar(outcomes, {content: len(rows) for content, rows in left.items()}):
            first, *others = left.pop(outcome.key)
            writer.append(_record(first, name, outcome.value, outcome.error, outcome.extra))
            for row in others:
                writer.append(_record(row, name, outcome.value, outcome.error, {"same_as": first.key}))
            report.add(outcome)
    except KeyboardInterrupt:
        logger.info(
            "stopping: %s of %s answers are scored", f"{len(work.waiting) - len(left):,}", f"{len(work.waiting):,}"
        )
        raise
    finally:
        close = getattr(outcomes, "close", None)
        if close is not None:
            close()  # a judge cancels what is in flight
    assert not left, f"scorer {name} returned nothing for {len(left)} answers"
    return report


def _record(row: Row, name: str, value: float | None, error: str | None, extra: Mapping[str, Any]) -> Score:
    own: dict[str, Any] = {} if row.content is None else {CONTENT: row.content}
    if row.attempt:
        own[ATTEMPT] = row.attempt
    return Score(
        sample_key=row.key,
        prompt_id=row.prompt_id,
        view=row.view,
        scorer=name,
        value=value,
        error=error,
        extra={**own, **extra},
    )


def _with_bar(outcomes: Iterator[Outcome], samples: Mapping[str, int]) -> Iterator[Outcome]:
    """The same outcomes under a progress bar that counts samples; it starts when the scorer has loaded and answered."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar: Any = None
    with logging_redirect_tqdm([logging.getLogger("bvpo")]):
        try:
            for outcome in outcomes:
                if bar is None:
                    # a log file gets a line now and then instead of ten a second
                    bar = tqdm(total=sum(samples.values()), unit=" samples", desc="score", mininterval=_pace())
                bar.update(samples[outcome.key])
                yield outcome
        finally:
            if bar is not None:
                bar.close()


def _pace() -> float:
    return 0.2 if sys.stderr.isatty() else 30.0


# ---------------------------------------------------------------------------------------------------------------------
# a judge's replies


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def _say_work(name: str, work: Work, scorer: Scorer, retry_failed: bool) -> None:
    counts = work.counts
    logger.info("bvpo score   %s", name)
    logger.info("samples      %s", ", ".join(f"{counts[key]:,} {key}" for key in counts) or "none of these prompts")
    if counts["failed before"] and not retry_failed:
        logger.info("             the failed ones stay as they are; %s tries them again", RETRY)
    shared = work.num_todo - len(work.unscorable) - len(work.waiting)
    logger.info("to score     %s distinct answers; they serve %s more samples", f"{len(work.waiting):,}", f"{shared:,}")
    if work.waiting:
        logger.info("cost         %s", scorer.estimate(work.items()))


def _finish(
    experiment: Experiment, store: RecordStore[Score], name: str, work: Work, report: Report, replies: ReplyStore | None
) -> None:
    """Totals over all that was ever scored here; a stage with samples left over is not finished."""
    last = last_scores(store.columns(*SCORE_COLUMNS), name)
    num_scored = sum(score.value is not None for score in last.values())
    num_failed = sum(score.value is None and score.content is not None for score in last.values())
    counts: dict[str, Any] = {"samples": len(last), "scored": num_scored, "failed": num_failed}
    counts["no_answer"] = len(last) - num_scored - num_failed
    if replies is not None and replies.served_by:
        counts["served_by"] = dict(replies.served_by)
    if len(last) == len(work.samples):
        experiment.finish("score", counts=counts, shards=store.shard_hashes())
    for error, num in report.errors.most_common(_MOST_ERRORS):
        logger.info("failed       %s x %s", f"{num:,}", error)
    logger.info(
        "done         %s", ", ".join(f"{value:,} {key}" for key, value in counts.items() if isinstance(value, int))
    )
    if num_failed:
        logger.info("             bvpo score ... %s tries the failed ones again", RETRY)
    if report.num_failed and not num_scored:
        raise UserError(
            f"score: all {report.num_failed} answers failed, most with: {report.errors.most_common(1)[0][0]}"
        )
