"""Quads written as TRL preference sets, one per view: the inverse of :mod:`bvpo.data.preferences`.

In: quads. Out: rows in TRL's conversational form with an explicit prompt, as JSON lines and as a folder that
``datasets.load_from_disk`` reads, with a card. Traces stand in ``reasoning_content``, verbatim; token ids, scores of other
responses and the missing end-of-sequence token of a cut response have no place in this form and are left out.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from bvpo.records import Quad, Response, View
from bvpo.strict import read_jsonl


def preference_row(quad: Quad, view: View) -> dict[str, Any] | None:
    """One TRL row, or ``None`` where the quad lacks the view, or rejects a trace that never closed: the form has no way to
    say that, and reading it back would close the trace."""
    pair = quad.pair(view)
    if pair is None or (view == "trace" and not pair.rejected.answer.strip()):
        return None
    return {
        "id": quad.id,
        "prompt": [{"role": m.role, "content": m.content} for m in quad.messages],
        "chosen": [_message(pair.chosen, view)],
        "rejected": [_message(pair.rejected, view)],
        "score_chosen": pair.chosen.score,
        "score_rejected": pair.rejected.score,
    }


def _message(response: Response, view: View) -> dict[str, Any]:
    message = {"role": "assistant", "content": response.answer}
    return message if view == "empty" else {**message, "reasoning_content": response.trace}


def write_preference_jsonl(quads_file: Path, targets: Mapping[View, Path]) -> dict[View, int]:
    """The views of a quads file as JSON lines, each file whole or not at all; returns the rows of each view.

    A view without a row gets no file. Of a group with several traces the first quad is written.
    """
    drafts: dict[View, Path] = {
        view: target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp") for view, target in targets.items()
    }
    counts: dict[View, int] = dict.fromkeys(targets, 0)
    with ExitStack() as stack:
        for draft in drafts.values():
            stack.callback(draft.unlink, missing_ok=True)
        streams: dict[View, IO[str]] = {
            view: stack.enter_context(draft.open("w", encoding="utf-8", newline="\n")) for view, draft in drafts.items()
        }
        for quad in read_jsonl(quads_file, Quad):
            if not quad.leads:
                continue  # more traces of the same answers would be more weight for their prompt
            for view, stream in streams.items():
                row = preference_row(quad, view)
                if row is not None:
                    stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                    counts[view] += 1
        for view, stream in streams.items():
            stream.close()
            if counts[view]:
                drafts[view].replace(targets[view])
    return counts


def rows_of(jsonl_file: str) -> Iterator[dict[str, Any]]:
    """The rows of one JSON-lines file. Module-level, with a plain argument: ``datasets`` runs it by itself."""
    with open(jsonl_file, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield json.loads(line)


def write_preference_folder(jsonl_files: Mapping[str, Path], view: View, target: Path, card: str) -> None:
    """A ``DatasetDict`` folder with one split per JSON-lines file, and its card as ``README.md``.

    The new folder replaces an old one when it is complete.
    """
    from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    had_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        splits: dict[Any, Any] = {
            split: Dataset.from_generator(
                rows_of,
                features=features(view),
                gen_kwargs={"jsonl_file": str(path)},
                cache_dir=str(draft / "cache"),
            )
            for split, path in jsonl_files.items()
        }
        DatasetDict(splits).save_to_disk(str(draft / "set"))
        (draft / "set" / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        (draft / "set").replace(target)
    finally:
        if had_bars:
            enable_progress_bars()
        shutil.rmtree(draft, ignore_errors=True)


def features(view: View) -> Any:
    """The columns of one view's set."""
    from datasets import Features, List, Value

    turn = {"role": Value("string"), "content": Value("string")}
    answer = turn if view == "empty" else {**turn, "reasoning_content": Value("string")}
    return Features(
        {
            "id": Value("string"),
            "prompt": List(turn),
            "chosen": List(answer),
            "rejected": List(answer),
            "score_chosen": Value("float64"),
            "score_rejected": Value("float64"),
        }
    )


def preference_card(view: View, rows: Mapping[str, int], facts: Mapping[str, str]) -> str:
    """The card of one view's set. ``facts`` are further lines of its table, such as the model and the scorer."""
    what = {
        "trace": "Each response has a trace, in\n`reasoning_content`, and a final answer, in `content`.",
        "empty": "The responses\nwere sampled with the trace forced to be empty; they are final answers only.",
    }[view]
    splits = ", ".join(f"{split} {num:,}" for split, num in rows.items()) or "none"
    table = "\n".join(f"| {name} | {value} |" for name, value in {"rows": splits, **facts}.items())
    warning = {
        "trace": "Many chat templates delete the trace of an assistant message, whichever field holds it. Look at one\n"
        "tokenised example before training on this set with anything that renders messages through a template.",
        "empty": "A chat template that opens a trace by itself renders these answers as if they were traces.",
    }[view]
    return f"""---
tags:
- preference
- trl
- bvpo
---

# Preference pairs, {view} view

Pairs of model responses to one prompt, in TRL's conversational preference format with an explicit prompt. {what}
Written by bvpo (Bias-Variance Optimized Preference Optimization, arXiv 2510.05095). All responses, and the choice between
them, come from models; nobody has read them.

| | |
|---|---|
{table}

Columns: `id` (of the prompt; a further pair of one prompt ends in `-2`, `-3`, ...), `prompt`, `chosen`, `rejected`,
`score_chosen` and `score_rejected` (the scorer's value of the final answer).

    from datasets import load_from_disk
    pairs = load_from_disk("path/of/this/folder")["train"]

{warning}
A response that was cut at its longest length looks like any other here; `quads.jsonl` of the experiment tells them apart.
"""
