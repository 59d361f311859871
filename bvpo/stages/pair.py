"""``bvpo pair CONFIG.toml``: from scored samples to quads.

Reads ``prompts.jsonl``, ``samples/`` and ``scores/`` of the experiment folder, writes ``quads.jsonl`` (other splits than
train: ``quads.SPLIT.jsonl``), ``pairing.json`` (what became of every prompt and view) and, for use with TRL, the folder
``preferences``. It is quick and runs anew each time. It scores nothing and trains nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, dump_toml
from bvpo.data.export import preference_card, write_preference_folder, write_preference_jsonl
from bvpo.data.overview import SCORE_COLUMNS, last_scores
from bvpo.data.pairing import DROPS, Candidate, Choice, select_pairs, with_traces
from bvpo.data.pairing_report import Report
from bvpo.data.scores import NO_ANSWER, answer_text
from bvpo.experiment import (
    Experiment,
    RecordStore,
    write_atomically,
)
from bvpo.files import disk_errors, hash_file
from bvpo.keys import content_hash
from bvpo.records import VIEWS, Pair, Prompt, Quad, Response, Sample, Score, View
from bvpo.strict import UserError, field_types, from_dict, parse_json, to_dict, write_jsonl

logger = logging.getLogger(__name__)

ABOUT = "Choose pairs from the scored samples. Writes quads.jsonl, a report, and TRL preference sets."
Choices = dict[str, dict[View, tuple[Choice, ...]]]  # prompt id -> view -> pairs


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("pair", argv, ABOUT)
    run(config, options)
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Pairs all prompts, or the first ``--limit``; with ``--dry-run`` it says what would come out."""
    experiment = Experiment.of(config)
    experiment.require_whole()
    prompts = {prompt.id: prompt for prompt in experiment.prompts(options.limit)}
    samples = experiment.samples()
    scores = read_scores(experiment.scores())
    report = Report(scorer=scores.scorer)
    candidates = find_candidates(prompts, samples, scores, config, report)
    choices = choose(prompts, candidates, config, report)
    _say(report)
    if not any(choices.values()):
        raise UserError("pair: no prompt has a pair in any view; the counts above say why")
    if options.dry_run:
        logger.info("dry run: nothing was written")
        return
    entry = experiment.stage("pair")
    earlier = {} if entry is None else entry.counts.get("splits", {})
    experiment.forget("pair")  # nothing of an earlier pairing stays
    identity = {"pair": to_dict(config.pair), "seed": config.seed}
    experiment.begin("pair", config=identity, fingerprints={"scorer": scores.scorer})
    with disk_errors(experiment.folder, "writing quads"):
        files = write_quads(experiment, prompts, samples, choices, report)
        for split in set(earlier) - set(files):
            experiment.quads(split).unlink(missing_ok=True)
        _say_pairs(report)
        export(experiment.preferences, files if config.pair.export else {}, config, report)
    experiment.write_config(dump_toml(config))
    write_atomically(experiment.pairing, json.dumps(report.summary(), indent=1) + "\n")
    shards = {path.name: hash_file(path) for path in files.values()}
    experiment.finish("pair", counts=report.summary()["quads"], shards=shards)
    logger.info("written      %s", ", ".join(str(path) for path in files.values()))


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """What pairs are chosen from, and the quads that came of it."""
    experiment = Experiment.of(config)
    quads = {path.name: hash_file(path) for path in experiment.quads_files()}
    return {**experiment.marks("prompts", "samples", "scores"), "quads": quads}


# ---------------------------------------------------------------------------------------------------------------------
# who competes


@dataclass(slots=True)
class Scores:
    """The last score of every sample: a value, or an error."""

    scorer: str
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def read_scores(store: RecordStore[Score]) -> Scores:
    """All scores, which must come from one scorer: values of two scorers cannot be compared."""
    if not len(store):
        raise UserError(f"{store.folder}: no scores; score the samples first")
    scorer, *others = dict.fromkeys(row["scorer"] for row in store.columns("scorer"))
    if others:
        raise UserError(
            f"{store.folder}: holds scores of {scorer} and of {others[0]}, which cannot be compared; remove the folder and "
            "score again"
        )
    found = Scores(scorer=scorer)
    for key, last in last_scores(store.columns(*SCORE_COLUMNS), scorer).items():
        if last.value is None:
            found.errors[key] = last.error or "unknown error"
        else:
            found.values[key] = last.value
    return found


def find_candidates(
    prompts: Mapping[str, Prompt],
    samples: RecordStore[Sample],
    scores: Scores,
    config: ExperimentConfig,
    report: Report,
) -> dict[tuple[str, View], list[Candidate]]:
    """The samples of every prompt and view, reduced to what pairing looks at."""
    found: defaultdict[tuple[str, View], list[Candidate]] = defaultdict(list)
    for row in samples.columns("key", "prompt_id", "view", "index", "answer", "error"):
        if row["prompt_id"] not in prompts:
            continue
        text = None if row["error"] else answer_text(row["answer"])
        value = scores.values.get(row["key"]) if text is not None else None
        report.add_sample(row["view"], _standing(text, value, scores.errors.get(row["key"])))
        content = None if text is None else content_hash(text)[:32]
        candidate = Candidate(
            key=row["key"],
            index=row["index"],
            content=content,
            value=value,
            length=len(text or ""),
            drawn=not row["error"],
        )
        found[row["prompt_id"], row["view"]].append(candidate)
    return found


def _standing(text: str | None, value: float | None, error: str | None) -> str:
    """How one sample is counted."""
    if text is None:
        return NO_ANSWER
    if value is not None:
        return "scored"
    return "failed to score" if error else "not scored yet"


def choose(
    prompts: Mapping[str, Prompt],
    candidates: Mapping[tuple[str, View], Sequence[Candidate]],
    config: ExperimentConfig,
    report: Report,
) -> Choices:
    """The pairs of every prompt and view; each ends in pairs or in one counted reason."""
    choices: Choices = {}
    for prompt_id in prompts:
        chosen: dict[View, tuple[Choice, ...]] = {}
        for view in VIEWS:
            group = candidates.get((prompt_id, view), ())
            silence = config.pair.no_answer if view == "empty" else config.pair.no_answer_trace
            selection = select_pairs(
                group,
                config.pair,
                name=f"{prompt_id}/{view}",
                seed=config.seed,
                reject_silence=silence == "reject",
            )
            report.add_selection(view, selection)
            pairs = selection.pairs
            if view == "trace" and config.pair.traces > 1:
                pairs = tuple(with_traces(pair, group, config.pair.traces) for pair in pairs)
                report.traces.update(1 + len(pair.more) for pair in pairs)
            if pairs:
                chosen[view] = pairs
        choices[prompt_id] = chosen
    return choices


# ---------------------------------------------------------------------------------------------------------------------
# quads


def write_quads(
    experiment: Experiment,
    prompts: Mapping[str, Prompt],
    samples: RecordStore[Sample],
    choices: Choices,
    report: Report,
) -> dict[str, Path]:
    """One file per split, in the order of the prompts; split -> file. A file is replaced whole."""
    splits: defaultdict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts.values():
        if choices[prompt.id]:
            splits[prompt.split].append(prompt)
    files: dict[str, Path] = {}
    with tempfile.TemporaryFile(dir=experiment.folder) as stream:
        spool = Spool(stream, samples, choices)
        for split, members in splits.items():
            files[split] = experiment.quads(split)
            quads = (quad for prompt in members for quad in _quads(prompt, choices[prompt.id], spool))
            before = sum(report.quads.values())
            write_jsonl(files[split], report.watch(quads))
            report.splits[split] = sum(report.quads.values()) - before
    return files


def _quads(prompt: Prompt, choices: Mapping[View, Sequence[Choice]], spool: Spool) -> Iterator[Quad]:
    """The k-th trace pair meets the k-th empty pair; what has no partner makes a quad with one view. Further traces of a
    pair follow as members of its group."""
    rows = zip_longest(choices.get("trace", ()), choices.get("empty", ()))
    for number, (trace, empty) in enumerate(rows, start=1):
        name = prompt.id if number == 1 else f"{prompt.id}-{number}"
        more = () if trace is None else trace.more
        group = name if more else None
        yield Quad(
            id=name,
            messages=prompt.messages,
            trace=_pair(trace, "trace", spool),
            empty=_pair(empty, "empty", spool),
            group=group,
        )
        for member, choice in enumerate(more, start=2):
            pair = _pair(choice, "trace", spool)
            yield Quad(id=f"{name}+{member}", messages=prompt.messages, trace=pair, group=group)


def _pair(choice: Choice | None, view: View, spool: Spool) -> Pair | None:
    if choice is None:
        return None
    chosen, rejected = spool.sample(choice.chosen.key), spool.sample(choice.rejected.key)
    if (chosen.prompt_ids, chosen.completion_start) != (rejected.prompt_ids, rejected.completion_start):
        raise UserError(
            f"prompt {chosen.prompt_id!r}, {view} view: samples {chosen.index} and {rejected.index} were drawn from "
            "different prompt tokens and cannot be paired; sample them again with one tokenizer and format"
        )
    return Pair(
        view=view,
        chosen=_response(chosen, choice.chosen),
        rejected=_response(rejected, choice.rejected),
        prompt_ids=chosen.prompt_ids,
        completion_start=chosen.completion_start,
    )


def _response(sample: Sample, candidate: Candidate) -> Response:
    """Of a trace that never closed, all that was sampled is trace, and the answer is empty."""
    return Response(
        answer=sample.answer or "",
        trace=sample.text if sample.answer is None else sample.trace,
        token_ids=sample.token_ids,
        finished=sample.finish == "stop",
        score=candidate.value,
        sample_key=sample.key,
    )


class Spool:
    """The chosen samples in a temporary file: read from the store once in its own order, then by key, so that memory
    holds one prompt's samples at a time."""

    def __init__(self, stream: IO[bytes], samples: RecordStore[Sample], choices: Choices) -> None:
        keys = {
            candidate.key
            for views in choices.values()
            for pairs in views.values()
            for pair in pairs
            for choice in (pair, *pair.more)
            for candidate in (choice.chosen, choice.rejected)
        }
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        names = [name for name in field_types(Sample) if name != "logprobs"]  # the bulk of a sample, and not needed
        for row in samples.columns(*names, only=keys):
            line = json.dumps(row).encode()
            stream.write(line)
            self._places[row["key"]] = (at, len(line))
            at += len(line)
        if lost := keys - set(self._places):
            raise UserError(
                f"{samples.folder}: {len(lost)} samples could not be read (damaged); sample again, then pair"
            )

    def sample(self, key: str) -> Sample:
        at, size = self._places[key]
        self._stream.seek(at)
        return from_dict(Sample, parse_json(self._stream.read(size).decode()))


# ---------------------------------------------------------------------------------------------------------------------
# TRL preference sets


def export(target: Path, files: Mapping[str, Path], config: ExperimentConfig, report: Report) -> None:
    """``VIEW.jsonl`` (and ``VIEW.SPLIT.jsonl``), and ``VIEW/`` for ``datasets``; those of an earlier pairing go."""
    for view in VIEWS:
        for old in [*target.glob(f"{view}.jsonl"), *target.glob(f"{view}.*.jsonl")]:
            old.unlink()
        shutil.rmtree(target / view, ignore_errors=True)
    facts = {
        "model": f"`{config.model.path}`" + (f" at `{config.model.revision}`" if config.model.revision else ""),
        "scorer": f"`{report.scorer}`",
        "pairs chosen by": f"`{config.pair.strategy}`, ties: `{config.pair.ties}`, min_margin {config.pair.min_margin:g}",
        "experiment": f"`{config.name}`",
    }
    if not files:
        return
    target.mkdir(exist_ok=True)
    lines: dict[View, dict[str, Path]] = {view: {} for view in VIEWS}
    rows: dict[View, dict[str, int]] = {view: {} for view in VIEWS}
    for split, quads in files.items():
        names: dict[View, Path] = {}
        for view in VIEWS:
            names[view] = target / (f"{view}.jsonl" if split == "train" else f"{view}.{split}.jsonl")
        for view, count in write_preference_jsonl(quads, names).items():
            if count:
                lines[view][split], rows[view][split] = names[view], count
    for view in VIEWS:
        if lines[view]:
            write_preference_folder(lines[view], view, target / view, preference_card(view, rows[view], facts))


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def _say(report: Report) -> None:
    for view, one in report.views.items():
        samples = ", ".join(f"{num:,} {name}" for name, num in sorted(one.samples.items(), key=lambda s: -s[1]))
        logger.info("%-12s %s samples: %s", view, f"{sum(one.samples.values()):,}", samples or "none")
        logger.info("             %s prompts paired (%s pairs)", f"{one.num_paired:,}", f"{one.num_pairs:,}")
        if one.num_silent:
            logger.info("             %s of these pairs reject a response without an answer", f"{one.num_silent:,}")
        for reason, num in one.dropped.most_common():
            logger.info("             %s prompts dropped, %s: %s", f"{num:,}", reason, DROPS[reason])  # type: ignore[index]
        if one.samples["not scored yet"]:
            logger.warning("             %s samples have no score yet", f"{one.samples['not scored yet']:,}")
    if report.traces:
        found = ", ".join(f"{num:,} with {traces}" for traces, num in sorted(report.traces.items()))
        logger.info("traces       trace pairs by traces per answer: %s", found)


def _say_pairs(report: Report) -> None:
    for view, one in report.views.items():
        summary = one.summary()
        if one.margins:
            margin, tokens = summary["margin"], summary["tokens"]
            logger.info(
                "%-12s margin: median %.4g (5 %% %.4g, 95 %% %.4g); tokens: chosen %.0f, rejected %.0f on average",
                view, margin["q50"], margin["q5"], margin["q95"], tokens["chosen"]["mean"], tokens["rejected"]["mean"],
            )  # fmt: skip
    quads = ", ".join(f"{num:,} {name}" for name, num in report.quads.items())
    logger.info("quads        %s (%s)", f"{sum(report.quads.values()):,}", quads)
