"""``bvpo inspect EXPERIMENT [PROMPT_ID]``: prompts with their samples, scores and chosen pairs, for people.

Reads the experiment's folder and changes nothing in it. Without a prompt it lists prompts; with one it shows everything
about it, trace and answer apart; with ``--html`` it writes a self-contained page with search and filters. It judges nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bvpo.command import ReaderParser, parse_reader, whole_number
from bvpo.data.overview import SCORE_COLUMNS, SORTS, PromptNote, Role, SampleNote, choose_within, last_scores
from bvpo.experiment import Experiment, RecordStore, write_atomically
from bvpo.records import VIEWS, Pair, Prompt, Quad, Sample, View
from bvpo.report.pages import clip, render_page
from bvpo.report.terminal import Terminal, head
from bvpo.strict import UserError, did_you_mean, read_jsonl

logger = logging.getLogger(__name__)

ABOUT = (
    "List an experiment's prompts, or show one with all its samples, scores and pairs; --html writes a page of them."
)
MOST_CHARS = 12_000  # of one trace or answer on a page; longer ones lose their middle
_CARD_BYTES = 1_500  # what a prompt costs on a page besides its texts
_ESCAPED = 1.1  # escaping makes texts longer


def main(argv: Sequence[str]) -> int | None:
    folder, options = parse_reader(_parser(), argv)
    experiment = open_experiment(Experiment(folder))
    terminal = Terminal.of(sys.stdout)
    if options.html:
        write_page(experiment, Path(options.html), budget=int(options.max_mb * 1e6), only=options.prompt)
    elif options.prompt is None:
        _print(list_lines(experiment, terminal, options.sort, options.limit))
    else:
        views: tuple[View, ...] = VIEWS if options.view == "both" else (options.view,)
        _print(prompt_lines(experiment, terminal, find_prompt(experiment, options.prompt), views))
    return None


def _parser() -> ReaderParser:
    parser = ReaderParser("inspect", ABOUT)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT_ID", help="a prompt's id, or the beginning of it")
    parser.add_argument("--view", choices=[*VIEWS, "both"], default="both", help="show the samples of this view only")
    parser.add_argument(
        "--sort", choices=["file", *SORTS], default="file", help="order of the list: worst margins, longest traces, ..."
    )
    parser.add_argument(
        "--limit", type=whole_number(1), default=20, metavar="N", help="prompts in the list (default 20)"
    )
    parser.add_argument("--html", metavar="OUT.html", help="write a page instead")
    parser.add_argument(
        "--max-mb",
        type=_megabytes,
        default=10.0,
        metavar="X",
        help="bound of the page's size; not all prompts may fit (10)",
    )
    return parser


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What there is, without the texts of samples. ``paired`` says whether pairs were chosen."""

    folder: Path
    prompts: dict[str, Prompt]
    notes: dict[str, PromptNote]
    samples: RecordStore[Sample]
    scorer: str | None
    paired: bool


def open_experiment(experiment: Experiment) -> Opened:
    """Everything but the texts; a folder without prompts has nothing to show."""
    prompts = {prompt.id: prompt for prompt in experiment.prompts(missing="there is nothing to inspect yet")}
    notes = {id: PromptNote(prompt_id=id, text=prompt.messages[-1].content) for id, prompt in prompts.items()}
    samples, scorer = experiment.samples(), experiment.scorer()
    scores = last_scores(experiment.scores().columns(*SCORE_COLUMNS), scorer)
    roles, paired = _pairs(experiment, notes)
    names = ("key", "prompt_id", "view", "index", "token_ids", "text", "finish", "answer", "error")
    for row in samples.columns(*names):
        note = notes.get(row["prompt_id"])
        if note is None or row["error"] is not None:
            continue
        note.samples.append(
            SampleNote(
                key=row["key"],
                view=row["view"],
                index=row["index"],
                num_tokens=len(row["token_ids"]),
                size=len(row["text"].encode("utf-8", "replace")),
                cut=row["finish"] == "length",
                has_answer=row["answer"] is not None and bool(row["answer"].strip()),
                score=scores.get(row["key"]),
                role=roles.get(row["key"]),
            )
        )
    return Opened(folder=experiment.folder, prompts=prompts, notes=notes, samples=samples, scorer=scorer, paired=paired)


def _pairs(experiment: Experiment, notes: dict[str, PromptNote]) -> tuple[dict[str, Role], bool]:
    """Sample key -> its part in a pair, and whether there are pairs at all; fills the notes' margins."""
    roles: dict[str, Role] = {}
    files = experiment.quads_files()
    for path in files:
        for quad in read_jsonl(path, Quad):
            # a prompt's second quad is named ID-2; its samples know their prompt anyway
            name = quad.group or quad.id
            note = notes.get(name) or notes.get(name.rpartition("-")[0])
            for pair in filter(None, (quad.trace, quad.empty)):
                _note_pair(pair, note, roles)
    return roles, bool(files)


def _note_pair(pair: Pair, note: PromptNote | None, roles: dict[str, Role]) -> None:
    if pair.chosen.sample_key is not None:
        roles.setdefault(pair.chosen.sample_key, "chosen")
    if pair.rejected.sample_key is not None:
        roles.setdefault(pair.rejected.sample_key, "rejected")
    if note is not None and pair.chosen.score is not None and pair.rejected.score is not None:
        margin = pair.chosen.score - pair.rejected.score
        note.margins[pair.view] = min(margin, note.margins.get(pair.view, margin))


def find_prompt(experiment: Opened, text: str) -> PromptNote:
    """The prompt of this id, or the only one whose id begins so."""
    if text in experiment.notes:
        return experiment.notes[text]
    found = [id for id in experiment.notes if id.startswith(text)]
    if len(found) > 1:
        raise UserError(f"prompt {text!r}: {len(found)} ids begin so, such as {found[0]!r} and {found[1]!r}")
    if not found:
        raise UserError(f"no prompt {text!r} in {experiment.folder}{_suggest(text, experiment)}")
    return experiment.notes[found[0]]


def _suggest(text: str, experiment: Opened) -> str:
    ids = list(experiment.notes)
    return did_you_mean(text, ids) if len(ids) <= 20 else "; bvpo inspect without an id lists them"


def read_samples(experiment: Opened, notes: Sequence[PromptNote]) -> dict[str, Sample]:
    keys = [sample.key for note in notes for sample in note.samples]
    return {sample.key: sample for sample in experiment.samples.iter(only=keys)}


# ---------------------------------------------------------------------------------------------------------------------
# in the terminal


def list_lines(experiment: Opened, terminal: Terminal, sort: str, limit: int) -> Iterator[str]:
    """One line per prompt."""
    notes = list(experiment.notes.values())
    if sort != "file":
        notes.sort(key=SORTS[sort])
    shown = notes[:limit]
    width = max([len(note.prompt_id) for note in shown] + [6])
    names = ("samples", "longest", "unscored", "margin trace", "margin empty")
    yield terminal.paint("  ".join(["prompt".ljust(width), *names, "text"]), "bold")
    for note in shown:
        counts = "+".join(str(len(note.of(view))) for view in VIEWS)
        cells = [counts, str(note.longest or "-"), str(note.num_unscorable or "-")]
        cells += [_margin(note.margins.get(view)) for view in VIEWS]
        row = [note.prompt_id.ljust(width), *(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True))]
        line = "  ".join(row)
        yield f"{line}  {head(note.text, max(20, terminal.columns - len(line) - 2))}"
    if len(notes) > len(shown):
        yield terminal.paint(f"({len(notes) - len(shown):,} more; --limit, --sort and --html show others)", "dim")


def prompt_lines(experiment: Opened, terminal: Terminal, note: PromptNote, views: Sequence[View]) -> Iterator[str]:
    """A prompt, its samples view by view, trace and answer apart."""
    prompt = experiment.prompts[note.prompt_id]
    samples = read_samples(experiment, [note])
    yield terminal.heading(f"prompt {note.prompt_id} ({prompt.split})")
    for message in prompt.messages:
        yield terminal.paint(message.role, "bold")
        yield from terminal.block(message.content, "│")
    for view in views:
        drawn = [sample for sample in note.of(view) if sample.key in samples]
        yield ""
        yield terminal.heading(f"{view} view: {len(drawn)} samples{_pair_text(experiment, note, view)}")
        for sample in drawn:
            yield from _sample_lines(terminal, sample, samples[sample.key])


def _sample_lines(terminal: Terminal, note: SampleNote, sample: Sample) -> Iterator[str]:
    tone: Any = {"chosen": "good", "rejected": "bad"}.get(note.role or "", "bold")
    yield ""
    yield terminal.paint(f"#{note.index}  " + "  ".join(facts(note, sample)), tone)
    if sample.trace is not None:
        yield terminal.paint(
            f"  trace{'' if sample.answer is not None else ' (never ends)'}{_blank(sample.trace)}", "dim"
        )
        yield from terminal.block(sample.trace, "┊", "dim")
    if sample.answer is not None:
        yield terminal.paint(f"  answer{_blank(sample.answer)}", "bold")
        yield from terminal.block(sample.answer, "┃")


def _blank(text: str) -> str:
    return "" if text.strip() else " (blank)"


def facts(note: SampleNote, sample: Sample) -> list[str]:
    """What is known of a sample, shortest first."""
    found = [note.role.upper()] if note.role else []
    found.append(_score_text(note))
    found.append(f"{note.num_tokens:,} tokens")
    if sample.logprobs:
        found.append(f"NLL {-sum(sample.logprobs) / len(sample.logprobs):.3f} per token")
    if note.cut:
        found.append("cut at the length limit")
    return found


def _score_text(note: SampleNote) -> str:
    if not note.has_answer:
        return "no answer"
    if note.score is None:
        return "not scored"
    return f"score {note.score.value:.4g}" if note.score.value is not None else f"no score: {note.score.error}"


def _margin(margin: float | None) -> str:
    return "-" if margin is None else f"{margin:.4g}"


def _pair_text(experiment: Opened, note: PromptNote, view: View) -> str:
    if not experiment.paired:
        return ""
    chosen = [f"#{sample.index}" for sample in note.of(view) if sample.role == "chosen"]
    rejected = [f"#{sample.index}" for sample in note.of(view) if sample.role == "rejected"]
    if not chosen:
        return ", no pair"
    return f", {', '.join(chosen)} chosen over {', '.join(rejected)}, margin {_margin(note.margins.get(view))}"


# ---------------------------------------------------------------------------------------------------------------------
# as a page


def write_page(experiment: Opened, target: Path, *, budget: int, only: str | None = None) -> None:
    """A page of all prompts that fit, or of one."""
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    notes = list(experiment.notes.values()) if only is None else [find_prompt(experiment, only)]
    planned = budget
    while True:
        chosen = choose_within(notes, planned, _cost, experiment.paired)
        if not chosen:
            raise UserError(f"--max-mb: {budget / 1e6:g} MB hold not even one of the prompts")
        page = _page(experiment, notes, chosen)
        size = len(page.encode())
        if size <= budget:
            break
        planned = min(planned * 9 // 10, planned * budget // size)  # escaping made the texts longer than expected
    write_atomically(target, page)
    logger.info("%s: %s prompts, %.1f MB", target, f"{len(chosen):,}", size / 1e6)
    if left_out := len(notes) - len(chosen):
        logger.info("%s prompts did not fit; --max-mb %g is the bound", f"{left_out:,}", budget / 1e6)


def _page(experiment: Opened, notes: Sequence[PromptNote], chosen: Sequence[PromptNote]) -> str:
    samples = read_samples(experiment, chosen)
    return render_page(
        "inspect.html",
        experiment=experiment.folder.resolve().name,
        scorer=experiment.scorer,
        paired=experiment.paired,
        num_prompts=len(notes),
        most_chars=MOST_CHARS,
        cards=[_card(experiment, note, samples) for note in chosen],
    )


def _cost(note: PromptNote) -> int:
    """Bytes on a page, about: exact enough to choose by, and checked afterwards."""
    texts = sum(min(sample.size, 6 * MOST_CHARS) + 700 for sample in note.samples)
    return int(_ESCAPED * (texts + min(len(note.text.encode("utf-8", "replace")), 3 * MOST_CHARS))) + _CARD_BYTES


def _card(experiment: Opened, note: PromptNote, samples: dict[str, Sample]) -> dict[str, Any]:
    """One prompt as the template takes it."""
    prompt = experiment.prompts[note.prompt_id]
    views = []
    for view in VIEWS:
        drawn = [_shown(sample, samples[sample.key]) for sample in note.of(view) if sample.key in samples]
        views.append({"name": view, "pair": _pair_text(experiment, note, view).lstrip(", "), "samples": drawn})
    return {
        "id": note.prompt_id,
        "split": prompt.split,
        "text": head(note.text, 160),
        "messages": [{"role": message.role, "text": clip(message.content, MOST_CHARS)} for message in prompt.messages],
        "views": views,
        "margin": note.margin,
        "longest": note.longest,
        "unscorable": note.num_unscorable,
        "lacking": note.lacking(experiment.paired),
    }


def _shown(note: SampleNote, sample: Sample) -> dict[str, Any]:
    parts: list[tuple[Literal["trace", "answer"], Any]] = []
    if sample.trace is not None:
        parts.append(("trace", clip(sample.trace, MOST_CHARS)))
    if sample.answer is not None:
        parts.append(("answer", clip(sample.answer, MOST_CHARS)))
    plain = replace(note, role=None)
    return {
        "index": note.index,
        "role": note.role,
        "facts": facts(plain, sample),
        "parts": parts,
        "closed": sample.answer is not None,
    }
