"""``bvpo evaluate CONFIG.toml``: a model on benchmarks, in both modes: Thinking (trace view) and NoThinking (empty view).

Every benchmark is an experiment folder of its own, ``ROOT/NAME/eval/BENCHMARK``, sampled and scored by the verbs of that
name; so it resumes, and ``status``, ``inspect`` and ``analyze`` work on it. This stage writes its prompts, and from its
samples and scores ``verdicts.jsonl``, ``thinking.json`` and ``nothinking.json``, and ``results.json`` beside the benchmarks.
The same samples give the same files. It compares no models.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, ModelConfig, benchmarks_of, dump_toml
from bvpo.data.overview import SCORE_COLUMNS, LastScore, last_scores
from bvpo.data.scores import answer_text
from bvpo.data.sources import fingerprint_file
from bvpo.evaluation.benchmarks import Benchmark, benchmark_mark, evaluated_model, prepare, whole_model
from bvpo.evaluation.metrics import (
    EMPTY,
    MODE_TITLES,
    MODE_VIEWS,
    UNCLOSED,
    Mode,
    ModeResult,
    Verdict,
    share_lowest,
    summarize,
)
from bvpo.experiment import (
    Experiment,
    versions,
    write_atomically,
)
from bvpo.files import disk_errors, make_folder, model_mark
from bvpo.formats import answer_offset, resolve_format
from bvpo.records import Prompt, View
from bvpo.report.tables import evaluation_table
from bvpo.scorers.base import ScoreItem, Scorer
from bvpo.scorers.replies import ReplyStore
from bvpo.strict import OtherSettings, UserError, to_dict, to_json, write_jsonl
from bvpo.verbs import run_stage

logger = logging.getLogger(__name__)

RESCORE = "--rescore"
ABOUT = (
    "Evaluate a model on benchmarks in both modes, Thinking and NoThinking: samples, scores, and metrics with intervals. "
    f"Goes on where it stopped when run again. {RESCORE} scores the samples anew after the scorer was changed."
)
SCHEMA = 1
_WEIGHTS = ("model", "revision", "content", "parameters")  # of an engine's fingerprint: what names the weights


def main(argv: Sequence[str]) -> int | None:
    run(*parse_command("evaluate", argv, ABOUT))
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """Evaluates on every benchmark; ``--limit`` keeps to the first prompts of each."""
    settings = config.evaluate
    if not settings.benchmarks:
        raise UserError(
            "evaluate.benchmarks: nothing to evaluate on; describe one in a table [evaluate.benchmarks.NAME]"
        )
    experiment = Experiment.of(config)
    model = whole_model(evaluated_model(config), experiment.evaluation / "merged-model", options)
    benchmarks = [prepare(config, model, name, own) for name, own in benchmarks_of(settings).items()]
    if options.dry_run:
        for benchmark in benchmarks:
            estimate(benchmark, options)
        logger.info("dry run: nothing was evaluated")
        return
    for benchmark in benchmarks:
        require_prompts(benchmark)
    for benchmark in benchmarks:
        draw(benchmark, options)
    make_folder(experiment.folder)
    stage = experiment.evaluate_stage
    experiment.forget(stage)  # results are made anew; samples and scores keep their own entries
    experiment.begin(stage, config={"evaluate": to_dict(settings), "model": model.path, "seed": config.seed})
    experiment.write_config(dump_toml(config))
    results = {benchmark.name: judge(benchmark, options.limit) for benchmark in benchmarks}
    written = Experiment(experiment.evaluation).results
    _write_json(written, {"kind": "evaluation", "schema": SCHEMA, "benchmarks": results})
    if options.limit is None:
        counts = {name: {mode: one["num_samples"] for mode, one in modes.items()} for name, modes in results.items()}
        experiment.finish(stage, counts=counts)
    for line in evaluation_table(results):
        logger.info("%s", line)
    logger.info("written to %s", written)


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The model, when it was trained, the benchmarks, and what judges the answers."""
    experiment = Experiment.of(config)
    train = experiment.stage("train")
    model = evaluated_model(config)
    trained = None if train is None or config.evaluate.model else train.finished
    results = Experiment(experiment.evaluation).results.is_file()
    marks = {name: benchmark_mark(config, own) for name, own in benchmarks_of(config.evaluate).items()}
    return {"model": model_mark(Path(model.path)), "trained": trained, "results": results, "benchmarks": marks}


# ---------------------------------------------------------------------------------------------------------------------
# samples and scores


def require_prompts(benchmark: Benchmark) -> None:
    """Writes the benchmark's prompts; refuses to when there are samples of others."""
    path = benchmark.experiment.prompts_file
    prompts = "".join(to_json(prompt) + "\n" for prompt in benchmark.read.prompts)
    if path.is_file() and path.read_bytes() == prompts.encode("utf-8", "surrogatepass"):
        return
    if benchmark.experiment.stage("sample") is not None:
        raise OtherSettings(
            f"{path}: the benchmark's prompts are others now, and samples of the old ones are there; {_anew(benchmark)}"
        )
    make_folder(benchmark.folder)
    with disk_errors(benchmark.folder, "writing prompts"):
        write_jsonl(path, benchmark.read.prompts)


def draw(benchmark: Benchmark, options: StageOptions) -> None:
    """Samples and scores what is missing."""
    logger.info("evaluate     %s: %s", benchmark.name, _about(benchmark))
    _drive("sample", benchmark, options, _anew(benchmark))
    if options.rescore:
        benchmark.experiment.forget("score")  # scores of the earlier scorer stay in the store, under its name
    _drive("score", benchmark, options, f"{RESCORE} scores the same samples with the scorer as it is now")


def _anew(benchmark: Benchmark) -> str:
    return f"to evaluate anew, remove {benchmark.folder}, or name another evaluate.folder"


def _drive(verb: str, benchmark: Benchmark, options: StageOptions, way_out: str) -> None:
    """Runs a verb on the benchmark's folder; where it refuses other settings, says what to do about it here."""
    try:
        run_stage(verb, benchmark.config, options)
    except OtherSettings as error:
        raise OtherSettings(f"{error}; {way_out}") from error


def estimate(benchmark: Benchmark, options: StageOptions) -> None:
    """What sampling would take; the folder of the benchmark is left as it is."""
    logger.info("evaluate     %s: %s", benchmark.name, _about(benchmark))
    if benchmark.experiment.prompts_file.is_file():
        run_stage("sample", benchmark.config, options)
        return
    with tempfile.TemporaryDirectory() as root:
        aside = replace(benchmark, config=replace(benchmark.config, root=root))
        write_jsonl(aside.experiment.prompts_file, benchmark.read.prompts)
        run_stage("sample", aside.config, options)


def _about(benchmark: Benchmark) -> str:
    read, titles = benchmark.read, " and ".join(MODE_TITLES[mode] for mode in benchmark.modes)
    parts = [f"{len(read.prompts):,} prompts in {titles}"]
    if read.repeated:
        parts.append(f"{read.repeated:,} repeated ones left out")
    if read.trained_on:
        parts.append(f"{read.trained_on:,} of them are in the experiment's training prompts")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# verdicts and results


def judge(benchmark: Benchmark, limit: int | None) -> dict[str, Any]:
    """Writes the verdicts and the result of each mode, and returns mode -> result."""
    (verdicts,) = share_lowest([list(make_verdicts(benchmark, benchmark.read.prompts[:limit]))])
    with disk_errors(benchmark.folder, "writing verdicts"):
        write_jsonl(benchmark.experiment.verdicts, verdicts)
    facts = _facts(benchmark, limit)
    _warn_of_rewarded_silence(benchmark, verdicts)
    results = {}
    for mode in MODE_TITLES:
        path = benchmark.experiment.mode_result(mode)
        if mode not in benchmark.modes:
            path.unlink(missing_ok=True)  # of an earlier evaluation with more modes
            continue
        results[mode] = {**_result(benchmark, summarize(verdicts, mode, benchmark.metrics)), **facts}
        _write_json(path, results[mode])
    return results


def make_verdicts(benchmark: Benchmark, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
    """One per sample that was asked for and drawn, or that could not be drawn; by prompt, mode and index."""
    rows = _read_samples(benchmark)
    scores = _read_scores(benchmark.experiment)
    trace_tokens = _TraceTokens(benchmark.config.model)
    more = {metric: _judge_more(scorer, prompts, rows) for metric, scorer in benchmark.more.items()}
    silence = _score_silence(benchmark, prompts, rows)
    for prompt in prompts:
        for mode in benchmark.modes:
            for index in range(benchmark.config.sample.num_samples):
                row = rows.get((prompt.id, MODE_VIEWS[mode], index))
                if row is None:
                    continue  # its prompt reads the same tokens as an earlier one
                marks = {benchmark.settings.metric: scores.get(row["key"])}
                marks |= {metric: found.get(row["key"]) for metric, found in more.items()}
                if row["error"] is None and answer_text(row["answer"]) is None:
                    marks = {metric: silence.get(metric, {}).get(row["key"]) for metric in marks}
                yield _verdict(benchmark, mode, row, marks, trace_tokens)


def _read_samples(benchmark: Benchmark) -> dict[tuple[str, View, int], dict[str, Any]]:
    """(prompt, view, index) -> the fields of a sample that verdicts need; a failed one where none was drawn."""
    names = ("key", "prompt_id", "view", "index", "token_ids", "answer", "finish", "error")
    found: dict[tuple[str, View, int], dict[str, Any]] = {}
    for store in (benchmark.experiment.samples(), benchmark.experiment.failed()):
        for row in store.columns(*names):
            found.setdefault((row["prompt_id"], row["view"], row["index"]), row)
    return found


def _read_scores(experiment: Experiment) -> dict[str, LastScore]:
    scorer = experiment.scorer()
    assert scorer is not None, f"{experiment.folder} was never scored"
    return last_scores(experiment.scores().columns(*SCORE_COLUMNS), scorer)


def _score_silence(
    benchmark: Benchmark, prompts: Sequence[Prompt], rows: Mapping[tuple[str, View, int], Mapping[str, Any]]
) -> dict[str, dict[str, LastScore]]:
    """Metric -> sample key -> what its scorer says of the empty text. A judge is asked once per prompt, and its replies are
    kept beside those about answers."""
    asked = [metric for metric in benchmark.metrics if benchmark.without_answer(metric) == "scored"]
    replies = ReplyStore(Path(benchmark.config.score.judge.cache or Experiment(benchmark.folder).judge_folder))
    with closing(replies):
        return {
            metric: _judge_more(benchmark.scorer_of(metric, replies), prompts, rows, silence=True) for metric in asked
        }


def _judge_more(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    rows: Mapping[tuple[str, View, int], Mapping[str, Any]],
    *,
    silence: bool = False,
) -> dict[str, LastScore]:
    """Sample key -> what the scorer says of its answer; equal answers to one prompt are judged once. ``silence``: of the
    responses without an answer instead, whose text is empty."""
    by_id = {prompt.id: prompt for prompt in prompts}
    keys: dict[tuple[str, str], list[str]] = {}
    for (prompt_id, _, _), row in rows.items():
        text = answer_text(row["answer"])
        if (text is None) == silence and row["error"] is None and prompt_id in by_id:
            keys.setdefault((prompt_id, text or ""), []).append(row["key"])
    if not keys:
        return {}  # a judge is not even connected to
    items = (
        ScoreItem(key=same[0], messages=by_id[id].messages, answer=text, meta=by_id[id].meta)
        for (id, text), same in keys.items()
    )
    all_keys = {same[0]: same for same in keys.values()}
    return {
        key: LastScore(value=outcome.value, error=outcome.error)
        for outcome in scorer.score(items)
        for key in all_keys[outcome.key]
    }


def _verdict(
    benchmark: Benchmark,
    mode: Mode,
    row: Mapping[str, Any],
    marks: Mapping[str, LastScore | None],
    trace_tokens: _TraceTokens,
) -> Verdict:
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    at_lowest: dict[str, float | None] = {}
    answered = answer_text(row["answer"]) is not None
    for metric, mark in marks.items():
        if row["error"] is not None:
            missing[metric] = f"could not be drawn: {row['error']}"
        elif not answered:
            rule = benchmark.without_answer(metric)
            if isinstance(rule, float):
                values[metric] = rule
            elif rule == "scored" and mark is not None and mark.value is not None:
                values[metric] = mark.value
            else:
                missing[metric] = UNCLOSED if row["answer"] is None else EMPTY
                if rule is not None:
                    at_lowest[metric] = benchmark.most_for_silence(metric)
        elif mark is None or mark.value is None:
            missing[metric] = "not scored" if mark is None else f"failed to score: {mark.error}"
        else:
            values[metric] = mark.value
    drawn = row["error"] is None
    return Verdict(
        prompt_id=row["prompt_id"],
        mode=mode,
        index=row["index"],
        values=values,
        missing=missing,
        tokens=len(row["token_ids"]) if drawn else None,
        trace_tokens=trace_tokens.count(row) if drawn else None,
        closed=row["answer"] is not None,
        cut=row["finish"] == "length",
        answered=answered,
        at_lowest=at_lowest,
    )


class _TraceTokens:
    """Counts the tokens of traces, which takes the model's tokenizer."""

    def __init__(self, model: ModelConfig) -> None:
        from bvpo.models import load_tokenizer

        self._tokenizer = load_tokenizer(model)
        self._format = resolve_format(self._tokenizer, model.format, model.custom_format)

    def count(self, row: Mapping[str, Any]) -> int | None:
        """The closing marker included; all tokens where the trace never closed."""
        if row["answer"] is None:
            return len(row["token_ids"])
        return answer_offset(self._tokenizer, self._format, row["view"], row["token_ids"])


def _warn_of_rewarded_silence(benchmark: Benchmark, verdicts: Sequence[Verdict]) -> None:
    """A response without an answer must not count more than one with an answer does."""
    for metric in benchmark.metrics:
        marked = [one for one in verdicts if metric in one.values]
        real = [float(one.values[metric]) for one in marked if one.closed and one.answered]
        silent = [float(one.values[metric]) for one in marked if not (one.closed and one.answered)]
        if real and silent and fmean(silent) > fmean(real):
            logger.warning(
                "evaluate     %s, %s: a response without an answer counts %g, and one with an answer %g on average; "
                "evaluate.benchmarks.%s.unclosed.%s sets another number, or 'none' to leave it out",
                benchmark.name, metric, fmean(silent), fmean(real), benchmark.name, metric,
            )  # fmt: skip


def _result(benchmark: Benchmark, summary: ModeResult) -> dict[str, Any]:
    return {
        "kind": "evaluation of one mode",
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "main": benchmark.settings.metric,
        **to_dict(summary),
        "without_answer": {metric: benchmark.without_answer(metric) for metric in benchmark.metrics},
    }


def _facts(benchmark: Benchmark, limit: int | None) -> dict[str, Any]:
    """What the numbers depend on; nothing that differs between two runs of the same command."""
    manifest = benchmark.experiment.manifest()
    sample, score = manifest.stage("sample"), manifest.stage("score")
    assert sample is not None and score is not None
    engine = sample.fingerprints["engine"]
    asked = ("views", "num_samples", "temperature", "top_p", "max_new_tokens", "engine")
    return {
        "model": {"path": benchmark.config.model.path, **{key: engine[key] for key in _WEIGHTS if key in engine}},
        "source": benchmark.settings.source,
        "prompts": fingerprint_file(benchmark.experiment.prompts_file),
        "asked_prompts": len(benchmark.read.prompts[:limit]),
        "repeated_prompts": benchmark.read.repeated,
        "trained_on_prompts": benchmark.read.trained_on,
        "sampling": {key: sample.config["sample"][key] for key in asked},
        "format": sample.config["format"],
        "seed": benchmark.config.seed,
        "scorers": {
            benchmark.settings.metric: score.fingerprints["scorer"],
            **{metric: scorer.fingerprint() for metric, scorer in benchmark.more.items()},
        },
        "versions": versions(),
    }


def _write_json(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
