"""Where training quads come from: a ``quads.jsonl`` file, one TRL preference set per view, or objects in memory.

In: a :class:`~bvpo.config.DataConfig`, or what a user hands to the trainer. Out: :class:`QuadSource` streams of
:class:`~bvpo.records.Quad` with a fingerprint of their content. Two preference sets are joined by prompt; what has no
partner stays as a quad with one view, and all of it is counted. Every error names file, line, field, value and what was
expected. Nothing is judged here: pairs that cannot be trained on are dropped, with a reason, by
:mod:`bvpo.training.tokenizing`. The columns are specified in ``docs/data.md``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from bvpo.config import DataConfig, validate
from bvpo.data.preferences import JoinedSets, prompt_key
from bvpo.data.rows import DatasetRows, ListRows, Rows, is_dataset, load_rows
from bvpo.data.scores import answer_text
from bvpo.formats import ReasoningFormat, resolve_format
from bvpo.keys import hash_int
from bvpo.records import VIEWS, Quad, View
from bvpo.strict import FieldError, UserError, from_dict, show, to_dict, to_json
from bvpo.training.tokenizing import TokenSettings, prepare_tokens
from bvpo.training.tokens import TokenDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuadSource:
    """Quads that can be read any number of times, in a fixed order.

    ``fingerprint`` follows their content; ``counts`` says what a join matched (see ``JoinedSets``); ``read`` starts a
    new pass over them.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterable[Quad]] = field(repr=False)
    counts: Mapping[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Quad]:
        return iter(self.read())


@dataclass(frozen=True, slots=True, kw_only=True)
class QuadSets:
    """The training quads, and the held-out ones if there are any."""

    train: QuadSource
    eval: QuadSource | None


def load_quads(config: DataConfig, fmt: ReasoningFormat, *, seed: int = 0) -> QuadSets:
    """Open what the ``[data]`` section names.

    ``eval_fraction`` holds out whole prompts, chosen by a hash of prompt and ``seed``: the choice does not depend on
    the order or the number of quads. ``limit`` keeps the first quads of each set; one with several traces counts once.
    """
    try:
        validate(config)  # one that was built in Python
    except FieldError as error:
        raise UserError(f"data.{error.field}: {error.problem.partition(': ')[2]}") from None
    if config.quads:
        source = _quad_rows(load_rows(config.quads, field="data.quads"), config.quads)
    elif config.trace or config.empty:
        source = _load_preferences(config, fmt)
    else:
        raise UserError("data: nothing to train on; set data.quads, or data.trace and data.empty")
    held_out: QuadSource | None = None
    if config.eval_quads:
        held_out = _quad_rows(load_rows(config.eval_quads, field="data.eval_quads"), config.eval_quads)
    elif config.eval_fraction:
        source, held_out = split_quads(source, fraction=config.eval_fraction, seed=seed)
    if set(config.views) != set(VIEWS):
        source = _only(source, config.views)
        held_out = None if held_out is None else _only(held_out, config.views)
    if config.limit is not None:
        source = _first(source, config.limit)
        held_out = None if held_out is None else _first(held_out, config.limit)
    return QuadSets(train=source, eval=held_out)


def quads_from(value: Any, fmt: ReasoningFormat, name: str = "train_dataset") -> QuadSource:
    """A source from what a user hands to the trainer.

    Accepted: a :class:`QuadSource`; a path of a quads file; a list of ``Quad`` or of dictionaries with its fields; a
    ``datasets.Dataset`` with those columns; ``{"trace": rows, "empty": rows}`` where rows are a ``datasets.Dataset`` or
    a list of dictionaries in TRL's preference form.
    """
    if isinstance(value, QuadSource):
        return value
    if isinstance(value, str | os.PathLike):
        return _quad_rows(load_rows(os.fspath(value), field=name), os.fspath(value))
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in VIEWS]
        if unknown or not value:
            raise UserError(f"{name}: got the keys {', '.join(map(repr, value))}, expected 'trace', 'empty' or both")
        sets: dict[View, Rows] = {v: _rows(value[v], f"{name}[{v!r}]") for v in VIEWS if value.get(v) is not None}
        return _joined(sets, fmt, name)
    if isinstance(value, Sequence) and value and all(isinstance(quad, Quad) for quad in value):
        return _quad_list(value, name)
    rows = _rows(value, name)
    if len(rows) and "messages" not in rows[0] and "chosen" in rows[0]:
        raise UserError(
            f"{name}: got a preference set, expected quads; say which view it is: {{'trace': dataset}}, or"
            " {'trace': ..., 'empty': ...} for both"
        )
    return _quad_rows(rows, name)


class TokenArguments(Protocol):
    """What tokenising reads of the trainer's arguments."""

    output_dir: str | None
    reasoning_format: str
    custom_format: Any
    max_length: int
    over_long: Any
    score_empty_block: bool
    trace_estimator: str


def token_dataset(value: Any, tokenizer: Any, vocab_size: int | None, args: TokenArguments, name: str) -> TokenDataset:
    """What a user hands to the trainer as ``{name}_dataset``, in tokens kept under ``output_dir/_tokens``."""
    fmt = resolve_format(tokenizer, args.reasoning_format, args.custom_format)
    quads = quads_from(value, fmt, f"{name}_dataset")
    settings = TokenSettings(
        max_length=args.max_length,
        over_long=args.over_long,
        score_empty_block=args.score_empty_block,
        vocab_size=vocab_size,
        keep_groups=args.trace_estimator == "traces",
        answer_only=args.trace_estimator != "joint",
    )
    target = Path(args.output_dir or ".") / "_tokens"  # transformers uploads nothing that starts so
    return prepare_tokens(quads, tokenizer, fmt, settings, target)


def split_quads(source: QuadSource, *, fraction: float, seed: int) -> tuple[QuadSource, QuadSource]:
    """(kept, held out): about ``fraction`` of the prompts are held out, the same ones whatever else is in the data."""

    def held_out(quad: Quad) -> bool:
        return hash_int(f"{seed}:{prompt_key(quad.messages)}", "eval-split") < fraction * 2.0**64

    note = f"{fraction!r}, {seed}"
    kept = _derived(source, f"train without {note}", lambda: (q for q in source if not held_out(q)))
    return kept, _derived(source, f"held out {note}", lambda: (q for q in source if held_out(q)))


def _only(source: QuadSource, views: Sequence[View]) -> QuadSource:
    """The pairs of some views; quads without any are not counted among the quads."""

    def read() -> Iterator[Quad]:
        for quad in source:
            kept = replace(quad, **{view: None for view in VIEWS if view not in views})
            if any(kept.pair(view) for view in VIEWS):
                yield kept

    return _derived(source, f"only {sorted(views)}", read)


def _first(source: QuadSource, limit: int) -> QuadSource:
    """The first quads, each with all its traces."""

    def read() -> Iterator[Quad]:
        num = 0
        for quad in source:
            num += quad.leads
            if num > limit:
                return
            yield quad

    return _derived(source, f"first {limit}", read)


def _derived(source: QuadSource, change: str, read: Callable[[], Iterable[Quad]]) -> QuadSource:
    text = f"{source.fingerprint}\n{change}"
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return QuadSource(name=source.name, fingerprint=fingerprint, read=read, counts=source.counts)


def _load_preferences(config: DataConfig, fmt: ReasoningFormat) -> QuadSource:
    sets: dict[View, Rows] = {}
    if config.trace:
        sets["trace"] = load_rows(config.trace, config.trace_split, "data.trace")
    if config.empty:
        sets["empty"] = load_rows(config.empty, config.empty_split, "data.empty")
    return _joined(sets, fmt, " + ".join(filter(None, (config.trace, config.empty))))


def _joined(sets: Mapping[View, Rows], fmt: ReasoningFormat, name: str) -> QuadSource:
    joined = JoinedSets(sets, fmt)
    counts = ", ".join(f"{label} {count}" for label, count in joined.counts.items())
    logger.info("%s joined by prompt: %s", name, counts)
    if len(sets) == 2 and not joined.counts["joined"]:
        logger.warning("%s: no prompt is in both preference sets; every quad has one view", name)
    # The format decides where a text is split into trace and answer.
    parts = [f"{view}:{rows.fingerprint}" for view, rows in sets.items()] + [repr(fmt)]
    fingerprint = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    return QuadSource(name=name, fingerprint=fingerprint, read=lambda: joined, counts=joined.counts)


def _rows(value: Any, name: str) -> Rows:
    if is_dataset(value):
        return DatasetRows(value, name)
    if isinstance(value, Sequence) and all(isinstance(row, dict) for row in value):
        return ListRows(value, name)
    raise UserError(f"{name}: got {type(value).__name__}, expected a datasets.Dataset, a list or a path")


def _quad_rows(rows: Rows, name: str) -> QuadSource:
    def read() -> Iterator[Quad]:
        leader: Quad | None = None
        for i in range(len(rows)):
            where = rows.where(i)
            quad = checked_quad(from_dict(Quad, rows[i], where), where)
            leader = _group_leader(quad, leader, where)
            yield quad

    return QuadSource(name=name, fingerprint=rows.fingerprint, read=read)


def _quad_list(quads: Sequence[Quad], name: str) -> QuadSource:
    digest = hashlib.blake2b(digest_size=16)
    leader: Quad | None = None
    for i, quad in enumerate(quads):
        leader = _group_leader(checked_quad(quad, f"{name}[{i}]"), leader, f"{name}[{i}]")
        digest.update(to_json(quad).encode() + b"\n")
    return QuadSource(name=name, fingerprint=digest.hexdigest(), read=lambda: quads)


def checked_quad(quad: Quad, where: str) -> Quad:
    """The quad itself, after the checks that its types do not make."""
    if not quad.id:
        raise UserError(f"{where}: field 'id': got {show(quad.id)}, expected a name")
    if not quad.messages:
        raise UserError(f"{where}: field 'messages': got an empty list, expected at least one message")
    if quad.messages[-1].role not in ("user", "tool"):
        last = quad.messages[-1].role
        raise UserError(f"{where}: field 'messages[{len(quad.messages) - 1}].role': got {show(last)}, expected 'user'")
    if quad.trace is None and quad.empty is None:
        raise UserError(f"{where}: fields 'trace' and 'empty': got neither, expected at least one pair")
    for view in VIEWS:
        pair = quad.pair(view)
        if pair is not None and pair.view != view:
            raise UserError(f"{where}: field '{view}.view': got {show(pair.view)}, expected {view!r}")
    if not quad.leads and (quad.trace is None or quad.empty is not None):
        raise UserError(
            f"{where}: field 'group': got {show(quad.group)}, whose members have a trace pair and nothing else"
        )
    return quad


def _group_leader(quad: Quad, leader: Quad | None, where: str) -> Quad:
    """The first quad of ``quad``'s group; ``leader`` is that of the quad before.

    A member follows its group and has the leader's messages, else a split by prompt tears the group apart; its traces are
    of the leader's two answers, equal up to outer whitespace as in pairing.
    """
    if quad.leads:
        return quad
    if leader is None or quad.group != leader.group:
        before = show(None if leader is None else leader.group)
        raise UserError(
            f"{where}: field 'group': got {show(quad.group)}, expected {before} as in the quad before it: the quads of a"
            " group follow one another"
        )
    first = f"of quad {leader.id!r}, the first of its group"
    if quad.messages != leader.messages:
        got = show(to_dict(quad)["messages"])
        raise UserError(f"{where}: field 'messages': got {got}, expected the messages {first}")
    if quad.trace is None or leader.trace is None:
        raise UserError(f"{where}: field 'group': got {show(quad.group)}, whose first quad has no trace pair")
    for side, own, other in (
        ("chosen", quad.trace.chosen, leader.trace.chosen),
        ("rejected", quad.trace.rejected, leader.trace.rejected),
    ):
        if answer_text(own.answer) != answer_text(other.answer):
            got, expected = show(own.answer), show(other.answer)
            raise UserError(f"{where}: field 'trace.{side}.answer': got {got}, expected {expected}, the answer {first}")
    return leader
