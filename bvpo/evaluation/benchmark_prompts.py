"""The prompts of a benchmark: any source of prompts, or a split of the experiment's own, as :class:`~bvpo.records.Prompt`.

In: the text of a source. Out: prompts in its order, each with the other fields of its row as metadata, and how many rows
repeat an earlier prompt. Unlike training prompts, a benchmark's are never cleaned in silence: a row that is no prompt is an
error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo.data.cleaning import normal_conversation, parse_messages, prompt_id, structural_problem
from bvpo.data.sources import Source, SourceRow, fingerprint_source, parse_source, read_source
from bvpo.experiment import Experiment
from bvpo.records import Prompt
from bvpo.strict import FieldError, UserError, convert, did_you_mean, read_jsonl

logger = logging.getLogger(__name__)

OWN_SPLIT = "split:"
_WHOLE_ROWS = Source(path="", with_rest=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkPrompts:
    """``repeated`` counts rows with the conversation of an earlier one, which are left out; ``trained_on`` the prompts that
    are also in the split train of the experiment."""

    prompts: tuple[Prompt, ...]
    repeated: int = 0
    trained_on: int = 0


def read_prompts(text: str, experiment: Experiment, limit: int | None = None) -> BenchmarkPrompts:
    """The benchmark's prompts. ``experiment`` is the one whose splits 'split:NAME' means."""
    own = experiment.prompts_file
    mine = list(read_jsonl(own, Prompt)) if own.is_file() else []
    rows = _own_split(text.removeprefix(OWN_SPLIT), own, mine) if text.startswith(OWN_SPLIT) else _from_source(text)
    found: dict[str, Prompt] = {}
    ids: dict[str, str] = {}
    repeated = 0
    for where, prompt in rows:
        content = normal_conversation(prompt.messages)
        if content in found:
            repeated += 1
            continue
        if ids.setdefault(prompt.id, content) != content:
            raise UserError(f"{where}: id {prompt.id!r} already names another prompt of this benchmark")
        found[content] = prompt
        if len(found) == limit:
            break
    if not found:
        raise UserError(f"{text}: holds no prompts")
    trained = {normal_conversation(prompt.messages) for prompt in mine if prompt.split == "train"}
    return BenchmarkPrompts(
        prompts=tuple(found.values()), repeated=repeated, trained_on=sum(content in trained for content in found)
    )


def source_mark(text: str, experiment: Experiment) -> Any:
    """Changes with the prompts of a benchmark."""
    own = text.startswith(OWN_SPLIT)
    return experiment.marks("prompts") if own else fingerprint_source(parse_source(text, _WHOLE_ROWS))


def _own_split(split: str, path: Path, prompts: list[Prompt]) -> Iterator[tuple[str, Prompt]]:
    there = sorted({prompt.split for prompt in prompts})
    if not prompts:
        raise UserError(f"{path}: no such file; make the experiment's prompts first (bvpo prompts)")
    if split not in there:
        raise UserError(f"{path}: no prompt is in split {split!r}{did_you_mean(split, there)}")
    return ((f"{path}", prompt) for prompt in prompts if prompt.split == split)


def _from_source(text: str) -> Iterator[tuple[str, Prompt]]:
    source = parse_source(text, _WHOLE_ROWS)
    left_out: set[str] = set()
    for row in read_source(source):
        messages = parse_messages("" if row.value is None else row.value)
        if messages is None:
            raise UserError(f"{row.where}: expected a text or a list of messages, each with a role and text")
        if problem := structural_problem(messages):
            raise UserError(f"{row.where}: not a prompt: {problem[1]}")
        rest = dict(row.rest)
        id = row.id if row.id is not None else _own_id(rest.pop("id", None), row)
        meta = dict(_plain(rest, left_out))
        yield row.where, Prompt(id=id or prompt_id(messages), messages=messages, split="test", meta=meta)
    if left_out:
        logger.warning("%s: no JSON values, left out of the metadata: %s", text, ", ".join(sorted(left_out)))


def _own_id(value: Any, row: SourceRow) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{row.where}: field 'id': got {value!r}, expected a text or an integer")
    return str(value)


def _plain(fields: Mapping[str, Any], left_out: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        try:
            yield name, convert(Any, value)
        except FieldError:
            left_out.add(name)
