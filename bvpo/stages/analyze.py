"""``bvpo analyze EXPERIMENT``: how the two views differ on an experiment's samples (the paper's Tables 3, 4 and 5).

Reads ``samples/`` and ``config.toml``, prints a table, and writes ``analysis.json`` and ``analysis.html`` into the folder of
the experiment. Every number has an interval that resamples prompts, how many prompts and samples it rests on, and what was
left out. It changes no sample and needs only the model's tokenizer; ``--marker`` runs the model once per prompt.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bvpo.command import PlainParser, ReaderParser, parse_reader, whole_number
from bvpo.config import ExperimentConfig, load_config
from bvpo.evaluation.viewstats import Columns, Comparison, Measures, Settings, compare_views
from bvpo.experiment import Experiment, RecordStore, write_atomically
from bvpo.formats import ReasoningFormat, answer_offset, resolve_format
from bvpo.records import VIEWS, Sample, View
from bvpo.report.charts import Chart, Curve, Point, curve_chart, dot_chart
from bvpo.report.pages import render_page
from bvpo.stats import Interval
from bvpo.strict import UserError

logger = logging.getLogger(__name__)

ABOUT = (
    "Measure how the two views differ: variances, lengths, likelihoods, with intervals. Writes analysis.json and .html."
)
GRADIENTS = (
    "Measure the noise of both views' gradients of a model on a sample of quads, with intervals, and say whether mixing the "
    "views would help it and with which alpha. Writes nothing."
)
PAPER = {
    "var_logp_within": "up to 10.17",
    "var_length_within": "up to 2.91",
    "length": "up to 3.17",
    "nll": "up to 1.215",
    "trace_share": "0.55 to 0.64",
    "nll_parts": "1.15 to 1.73",
}
"""The ratios (or the share) that the paper's tables give over its models. Which of our two variances the paper takes is not
known; its ranges stand beside the one within prompts. It averages each question's statistics: the pooled ones have none."""
_TITLES = {
    3: "Table 3: variance of log-probability and length",
    4: "Table 4: length and likelihood",
    5: "Table 5: trace and answer, in the trace view",
}
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CURVE_POINTS = 160


def main(argv: Sequence[str]) -> int | None:
    if "--gradients" in argv:
        return _gradients([word for word in argv if word != "--gradients"])
    parser = ReaderParser("analyze", ABOUT)
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="instead: would mixing the views help a model? 'bvpo analyze --gradients MODEL QUADS'; --help there says more",
    )
    count = whole_number(1)
    parser.add_argument(
        "--limit", type=count, metavar="N", help="look at the first N prompts only; then nothing is written"
    )
    parser.add_argument("--resamples", type=count, default=2000, metavar="N", help="bootstrap resamples (default 2000)")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed of the bootstrap (default 0)"
    )
    parser.add_argument(
        "--marker",
        action="store_true",
        help="count the log-probability of the empty view's forced closing marker, too: runs the model once per prompt",
    )
    folder, options = parse_reader(parser, argv)
    experiment = Experiment(folder)
    settings = Settings(num_resamples=options.resamples, seed=options.seed)
    analysis = analyze(experiment, settings, options.limit, with_marker=options.marker)
    sys.stdout.write(text_table(analysis))
    if options.limit is None:
        write(experiment, analysis)
        logger.info("written to %s and %s", experiment.analysis, experiment.analysis_page.name)
    return None


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The samples."""
    return Experiment.of(config).marks("samples")


def _gradients(argv: Sequence[str]) -> None:
    """``bvpo analyze --gradients MODEL QUADS``; everything heavy is imported here."""
    count = whole_number(1)
    parser = PlainParser("analyze --gradients", GRADIENTS)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of the model")
    parser.add_argument("quads", metavar="QUADS", help="quads file, such as an experiment's quads.jsonl")
    parser.add_argument("--reference", metavar="MODEL", help="the model before training (default: MODEL itself)")
    parser.add_argument("--limit", type=count, default=256, metavar="N", help="quads to look at (default 256)")
    parser.add_argument("--beta", type=_positive, default=0.1, metavar="B", help="beta of the DPO loss (default 0.1)")
    parser.add_argument("--batch", type=count, default=128, metavar="N", help="quads per optimizer step (default 128)")
    parser.add_argument("--format", default="auto", metavar="NAME", help="reasoning format (default auto)")
    parser.add_argument("--max-length", type=count, default=4096, metavar="N", help="longest response (default 4096)")
    parser.add_argument("--resamples", type=count, default=2000, metavar="N", help="bootstrap resamples (default 2000)")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="which quads (default 0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = vars(parser.parse_args(argv))
    from bvpo.training.probe.analysis import Request, report

    as_json, _ = options.pop("json"), options.pop("debug")
    sampled = Experiment(Path(options["quads"]).parent).stage("sample")
    request = Request(
        num_resamples=options.pop("resamples"), sampling=sampled.section("sample") if sampled else {}, **options
    )
    found = report(request, show_progress=sys.stderr.isatty())
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else "\n".join(found.lines())
    sys.stdout.write(text + "\n")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


@dataclass(slots=True, kw_only=True)
class Analysis:
    """Everything that is printed and written."""

    experiment: str
    settings: Settings
    comparisons: list[Comparison]
    counts: dict[View, dict[str, int]]
    lengths: dict[View, np.ndarray]
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyze(
    experiment: Experiment, settings: Settings, limit: int | None = None, *, with_marker: bool = False
) -> Analysis:
    """The measurements of one experiment."""
    experiment.require_whole()
    store = experiment.samples()
    if not len(store):
        raise UserError(f"{store.folder}: no samples to analyze; sample first")
    notes: list[str] = []
    tools = _tools(experiment, notes)
    columns = measure(store, tools, _first_prompts(experiment, limit), Marker(experiment) if with_marker else None)
    if not len(columns.prompt):
        which = "the prompts" if limit is None else f"the first {limit} prompts"
        raise UserError(f"{store.folder}: no sample belongs to {which}")
    for view in VIEWS:
        if not columns.of(view).any():
            notes.append(f"There are no samples of the {view} view, so nothing is compared with it.")
    if not columns.has_forced:
        notes.append(
            "The empty view's forced closing marker counts in lengths, and not in log p and NLL: nobody sampled it, so its "
            "log-probability is not stored. With --marker it counts everywhere, as in training."
        )
    counts: dict[View, dict[str, int]] = {view: _counts(columns, view) for view in VIEWS}
    if cut := sum(count["cut at the length limit"] for count in counts.values()):
        notes.append(
            f"{cut:,} of the responses {'was' if cut == 1 else 'were'} cut at the length limit, where length and negative "
            "log-probability are lower bounds of what the model would have written."
        )
    return Analysis(
        experiment=experiment.folder.resolve().name,
        settings=settings,
        comparisons=compare_views(columns, settings),
        counts=counts,
        lengths={view: np.sort((columns.tokens + columns.forced_tokens)[columns.of(view)]) for view in VIEWS},
        facts=_facts(experiment, counts),
        notes=notes,
    )


def _tools(experiment: Experiment, notes: list[str]) -> tuple[Any, ReasoningFormat] | None:
    """Tokenizer and format, to find where answers begin; without them, Table 5 is left out and a note says so."""
    from bvpo.models import load_tokenizer

    try:
        model = load_config(experiment.config_file).model
        tokenizer = load_tokenizer(model)
        return tokenizer, resolve_format(tokenizer, model.format, model.custom_format)
    except UserError as error:
        notes.append(f"Table 5 is left out: it needs the model's tokenizer, which cannot be loaded ({error}).")
        return None


def _first_prompts(experiment: Experiment, limit: int | None) -> set[str] | None:
    return None if limit is None else {prompt.id for prompt in experiment.prompts(limit)}


def measure(
    store: RecordStore[Sample],
    tools: tuple[Any, ReasoningFormat] | None,
    only: set[str] | None = None,
    marker: Marker | None = None,
) -> Columns:
    """The samples as numbers; texts and tokens are not kept."""
    measures = Measures()
    names = (
        "prompt_id",
        "view",
        "token_ids",
        "logprobs",
        "finish",
        "answer",
        "error",
        "prompt_ids",
        "completion_start",
    )
    for row in _with_bar(store.columns(*names), len(store)):
        if row["error"] is not None or (only is not None and row["prompt_id"] not in only):
            continue
        closed, ids = row["answer"] is not None, row["token_ids"]
        start = None
        if closed and tools is not None and row["view"] == "trace":
            tokenizer, fmt = tools
            start = answer_offset(tokenizer, fmt, "trace", ids)
        measures.add(
            prompt_id=row["prompt_id"],
            view=row["view"],
            logprobs=row["logprobs"],
            num_tokens=len(ids),
            answer_from=start,
            cut=row["finish"] == "length",
            closed=closed,
            forced_tokens=len(row["prompt_ids"]) - row["completion_start"],
            forced_logp=None if marker is None else marker.logp(row["prompt_ids"], row["completion_start"]),
        )
    return measures.columns()


class Marker:
    """Log-probability of the tokens that end a prompt and that training scores: the empty view's forced closing marker."""

    def __init__(self, experiment: Experiment) -> None:
        from bvpo.models import ModelSource, load_model, plan_model

        config = load_config(experiment.config_file).model
        names = ("path", "revision", "tokenizer", "trust_remote_code")
        self._model, _ = load_model(plan_model(ModelSource(**{name: getattr(config, name) for name in names})))
        self._known: dict[tuple[int, ...], float] = {}

    def logp(self, ids: Sequence[int], start: int) -> float:
        """Of ``ids[start:]`` after ``ids[:start]``; the samples of a prompt share it."""
        key = tuple(ids)
        if start == len(ids):
            return 0.0
        if key not in self._known:
            import torch

            tokens = torch.tensor([key], device=self._model.device)
            with torch.no_grad():
                logps = self._model(tokens).logits[0].float().log_softmax(-1)
            rows = torch.arange(start, len(key), device=tokens.device)
            self._known[key] = float(logps[rows - 1, tokens[0, rows]].sum())
        return self._known[key]


def _with_bar(rows: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    slow = total >= 20_000
    return iter(tqdm(rows, total=total, unit=" samples", desc="analyze", disable=not slow, mininterval=1.0))


def _counts(columns: Columns, view: View) -> dict[str, int]:
    mask = columns.of(view)
    return {
        "prompts": len(np.unique(columns.prompt[mask])),
        "samples": int(mask.sum()),
        "without an end of the trace": int((mask & ~columns.closed).sum()),
        "cut at the length limit": int((mask & columns.cut).sum()),
    }


def _facts(experiment: Experiment, counts: dict[View, dict[str, int]]) -> list[tuple[str, str]]:
    facts = [(f"{view} view", ", ".join(f"{num:,} {name}" for name, num in counts[view].items())) for view in VIEWS]
    entry = experiment.stage("sample")
    if entry is not None:
        sample, engine = entry.section("sample"), entry.fingerprints.get("engine", {})
        asked = ("temperature", "top_p", "top_k", "max_new_tokens")
        facts.append(("sampled with", ", ".join(f"{name} {sample[name]:g}" for name in asked if name in sample)))
        named = ("engine", "model", "revision", "content", "dtype")
        # a content hash tells models apart by its first digits
        facts.append(("engine", ", ".join(f"{name} {str(engine[name])[:40]}" for name in named if engine.get(name))))
        facts.append(("format", str(entry.config.get("format", "unknown"))))
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# in words and numbers


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def shown(interval: Interval | None) -> str:
    """``value [low, high]``."""
    if interval is None or interval.value is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{number(interval.value)} [too few prompts]"
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}]"


def _header(rows: Sequence[Comparison]) -> tuple[str, ...]:
    sides = rows[0].sides if len({row.sides for row in rows}) == 1 else ("first", "second")
    return ("", *sides, "ratio", "paper", "prompts", "samples")


def _row(one: Comparison) -> tuple[str, ...]:
    label = f"{one.label} ({one.unit})" if one.unit else one.label
    counts = (f"{one.num_prompts:,}", f"{one.num_samples:,}")
    return (label, shown(one.first), shown(one.second), shown(one.ratio), PAPER.get(one.name, "-"), *counts)


def _tables(analysis: Analysis) -> list[dict[str, Any]]:
    """One per table of the paper: title, header, rows, and lines about what was left out."""
    tables = []
    for table, title in _TITLES.items():
        # the trace's share has one side only and stands under the same header
        rows = [one for one in analysis.comparisons if one.table == table]
        header = ("", "trace", "answer", *_header(rows)[3:]) if table == 5 else _header(rows)
        dropped = [
            f"{one.label}: left out {', '.join(f'{num:,} {reason}' for reason, num in one.dropped.items())}."
            for one in rows
            if one.dropped
        ]
        tables.append({"title": title, "header": header, "rows": [_row(one) for one in rows], "dropped": dropped})
    return tables


def text_table(analysis: Analysis) -> str:
    """All tables as plain text."""
    lines = [f"{name}: {value}" for name, value in analysis.facts]
    lines += [f"note: {note}" for note in analysis.notes]
    for table in _tables(analysis):
        rows = [table["header"], *table["rows"]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(table["header"]))]
        lines += ["", table["title"]]
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  {line}" for line in table["dropped"]]
    level = f"{100 * analysis.settings.level:g}"
    lines += ["", f"[low, high]: {level} % interval over {analysis.settings.num_resamples:,} resamples of prompts"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# files


def rounded(value: Any) -> Any:
    """Numbers to the four digits that are shown: further ones move with the batches that samples were drawn in, which a
    killed run changes."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def write(experiment: Experiment, analysis: Analysis) -> None:
    data = {
        "experiment": analysis.experiment,
        "settings": asdict(analysis.settings),
        "counts": analysis.counts,
        "facts": dict(analysis.facts),
        "notes": analysis.notes,
        "paper": PAPER,
        "comparisons": rounded([asdict(one) for one in analysis.comparisons]),
    }
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(experiment.analysis, text + "\n")
    page = render_page(
        "analysis.html",
        experiment=analysis.experiment,
        settings=analysis.settings,
        facts=analysis.facts,
        notes=analysis.notes,
        tables=_tables(analysis),
        charts=list(_charts(analysis)),
        definitions=_DEFINITIONS,
    )
    write_atomically(experiment.analysis_page, page)


_DEFINITIONS = (
    "The log-probability of a response is the sum over its tokens, end of sequence included, under the model without "
    "temperature or truncation, whatever the samples were drawn with. The forced closing marker of the empty view counts in "
    "lengths; in log-probabilities it counts where they are known (--marker). Within a prompt it is a constant.",
    "“Within prompts” is the unbiased variance over the samples of one prompt, averaged over the prompts that have at "
    "least two samples in each view: what sampling alone contributes. “All samples” is the variance over all samples of "
    "all prompts.",
    "Negative log-likelihood (NLL) per token is that of each response, averaged over the responses of a prompt, then over "
    "prompts; so is the share of the trace. “Tokens pooled”: the sum over all tokens over their number, where long "
    "responses weigh more. The trace ends with its closing marker; the answer includes the end of sequence. Ratios are "
    "trace view over empty view; in Table 5, trace over answer; of averages, not averages of ratios.",
    "Intervals are bootstrap percentile intervals over prompts, widened to the t distribution. Samples of one prompt are "
    "never counted as independent.",
)


def _charts(analysis: Analysis) -> Iterator[Chart]:
    by_name = {one.name: one for one in analysis.comparisons}
    compared = [one for one in analysis.comparisons if one.table in (3, 4)]
    ratios = [point for one in compared if (point := _point(one.label, one.ratio, positive=True))]
    if ratios:
        yield Chart(
            title="Trace view over empty view",
            caption="Ratios with their intervals, on a logarithmic scale; the line marks 1, where the views do not differ.",
            svg=dot_chart(ratios, x_label="ratio, trace view / empty view", log=True, reference=1.0, salt="ratios"),
            header=("", "ratio", "low", "high"),
            rows=tuple(_point_row(point) for point in ratios),
        )
    curves = [
        Curve(label=f"{view} view", **_ecdf(analysis.lengths[view])) for view in VIEWS if len(analysis.lengths[view])
    ]
    if curves:
        yield Chart(
            title="Lengths of responses",
            caption="The share of responses that have at most so many tokens.",
            svg=curve_chart(curves, x_label="tokens", y_label="share of responses", log=True, salt="lengths"),
            header=("", "mean", *(f"{100 * q:g} %" for q in _QUANTILES)),
            rows=tuple(_quantile_row(view, analysis.lengths[view]) for view in VIEWS if len(analysis.lengths[view])),
        )
    nll, parts = by_name["nll"], by_name["nll_parts"]
    sides = [
        _point("empty view", nll.second, group=0),
        _point("trace view", nll.first, group=1),
        _point("trace view: trace", parts.first, group=2),
        _point("trace view: answer", parts.second, group=3),
    ]
    points = [point for point in sides if point]
    if points:
        yield Chart(
            title="Negative log-likelihood per token",
            caption="How surprising the model's own tokens are to it, in nats: lower is more certain.",
            svg=dot_chart(points, x_label="nats per token", salt="nll"),
            header=("", "NLL per token", "low", "high"),
            rows=tuple(_point_row(point) for point in points),
        )


def _point(label: str, interval: Interval | None, *, group: int = 0, positive: bool = False) -> Point | None:
    """A dot; ``None`` where there is no value, or none that a logarithmic axis can show."""
    if interval is None or interval.value is None or (positive and interval.value <= 0):
        return None
    has_interval = interval.low is not None and (not positive or interval.low > 0)
    low, high = (interval.low, interval.high) if has_interval else (None, None)
    return Point(label=label, value=interval.value, low=low, high=high, group=group)


def _point_row(point: Point) -> tuple[str, ...]:
    return (point.label, number(point.value), number(point.low), number(point.high))


def _ecdf(ordered: np.ndarray) -> dict[str, Any]:
    """A step curve of at most so many points through sorted values."""
    shares = np.linspace(0, 1, min(_CURVE_POINTS, len(ordered) + 1))
    values = np.quantile(ordered, shares, method="inverted_cdf")
    return {"x": [max(1.0, float(v)) for v in values], "y": [float(s) for s in shares]}


def _quantile_row(view: View, ordered: np.ndarray) -> tuple[str, ...]:
    values = np.quantile(ordered, _QUANTILES, method="inverted_cdf")
    return (f"{view} view", number(float(ordered.mean())), *(number(float(v)) for v in values))
