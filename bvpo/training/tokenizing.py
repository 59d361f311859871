"""From quads to token ids: every pair is checked, every lost pair has a reason, and the result is stored once.

In: :class:`~bvpo.records.Quad` records, a tokenizer and a reasoning format. Out: one
:class:`~bvpo.training.tokens.TokenQuad` per quad, and a :class:`Drop` with its reason for every pair that cannot be
trained on; nothing is truncated and nothing disappears uncounted. Sampled token ids are used as they are; only what
exists as text alone is tokenised, by the format registry and never by a chat template. Knows no model and no loss.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import pyarrow as pa

from bvpo.formats import ReasoningFormat, answer_offset, completion_ids, view_prompt
from bvpo.records import VIEWS, Pair, Quad, Response, View
from bvpo.strict import UserError
from bvpo.training.tokens import SCHEMA_VERSION, Branch, Ids, TokenDataset, TokenQuad, TokenWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RULES = 3  # of which pairs are kept: part of the fingerprint, so that tokens made under others are made anew
OVER_LONG = "over_long"
IDENTICAL = "identical"
EMPTY_ANSWER = "empty_answer"
UNCLOSED_TRACE = "unclosed_trace"
TRACE_IN_EMPTY_VIEW = "trace_in_empty_view"
UNWRITABLE = "unwritable"
NO_PROMPT_TOKEN = "no_prompt_token"
NO_SHARED_PREFIX = "no_shared_prefix"
MISSING_VIEW = "missing_view"

DROP_REASONS: dict[str, str] = {
    OVER_LONG: "prompt plus response has more tokens than max_length in one of the two responses",
    IDENTICAL: "chosen and rejected are the same tokens",
    EMPTY_ANSWER: "the chosen response has no text or no token after its trace, or the rejected one no token to score",
    UNCLOSED_TRACE: "the chosen response never ends its trace, so it has no answer, or the rejected one is such a text",
    TRACE_IN_EMPTY_VIEW: "a text response of the empty view has a trace",
    UNWRITABLE: "a text response cannot be written as tokens that read back as the same trace and answer",
    NO_PROMPT_TOKEN: "the training prompt has no token, so nothing predicts the first scored token",
    NO_SHARED_PREFIX: "the prompts of the two views differ from their first token on",
    MISSING_VIEW: "the quad has no pair in this view (counted, not listed)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """What tokenising depends on besides the tokenizer and the format.

    ``vocab_size`` is the number of rows of the model's embedding; None leaves ids unchecked against it. ``keep_groups``:
    whether members of a group beyond the first are kept, for the trace estimator 'traces'. ``answer_only``: whether the
    trace view scores answers alone, so that a response without a token after its trace has nothing to score.
    """

    max_length: int
    over_long: Literal["drop", "refuse"] = "drop"
    score_empty_block: bool = True
    vocab_size: int | None = None
    keep_groups: bool = False
    answer_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A pair that is not trained on; ``reason`` is a key of ``DROP_REASONS``."""

    id: str
    view: View
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """What became of one quad: its tokens (None when no pair is left) and every pair it lost."""

    quad: TokenQuad | None
    drops: tuple[Drop, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rules:
    """What turns text into ids, and what is trained on."""

    tokenizer: PreTrainedTokenizerBase
    fmt: ReasoningFormat
    settings: TokenSettings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PairTokens:
    """A pair before the prefix is known: the whole training prompt, then two (scored ids, answer offset in them)."""

    prompt: Ids
    responses: tuple[tuple[Ids, int], tuple[Ids, int]]


def tokenize_quad(
    quad: Quad, tokenizer: PreTrainedTokenizerBase, fmt: ReasoningFormat, settings: TokenSettings
) -> TokenQuad | Drop:
    """The quad in tokens, or why no pair of it is left; :func:`tokenize_views` also tells of a single lost pair."""
    result = tokenize_views(quad, tokenizer, fmt, settings)
    return result.drops[0] if result.quad is None else result.quad


def tokenize_views(
    quad: Quad, tokenizer: PreTrainedTokenizerBase, fmt: ReasoningFormat, settings: TokenSettings
) -> Tokenized:
    """Tokenise both pairs of a quad; a pair that fails a check is dropped and the other one lives on."""
    rules = _Rules(tokenizer=tokenizer, fmt=fmt, settings=settings)
    pairs: dict[View, _PairTokens] = {}
    drops: list[Drop] = []
    for view in VIEWS:
        pair = quad.pair(view)
        if pair is not None:
            outcome = _tokenize_pair(quad, pair, view, rules)
            if isinstance(outcome, Drop):
                drops.append(outcome)
            else:
                pairs[view] = outcome
        elif quad.trace is None and quad.empty is None:
            drops.append(Drop(id=quad.id, view=view, reason=MISSING_VIEW, detail="the quad has no pair"))
    shared = _common_prefix([pair.prompt for pair in pairs.values()])
    if pairs and shared == 0:
        drops += [Drop(id=quad.id, view=v, reason=NO_SHARED_PREFIX, detail="no common first token") for v in pairs]
        pairs = {}
    if not pairs:
        return Tokenized(quad=None, drops=tuple(drops))
    prefix = next(iter(pairs.values())).prompt[:shared]
    trace, empty = (_branches(pairs.get(view), shared) for view in VIEWS)
    return Tokenized(quad=TokenQuad(id=quad.id, prefix_ids=prefix, branches=(*trace, *empty)), drops=tuple(drops))


def _tokenize_pair(quad: Quad, pair: Pair, view: View, rules: _Rules) -> _PairTokens | Drop:
    """Training prompt and scored tokens of both responses, or the first check that one of them fails."""
    where = f"quad {quad.id!r}, {view} view"
    sampled = _is_sampled(pair, view, where)

    def drop(reason: str, detail: str) -> Drop:
        return Drop(id=quad.id, view=view, reason=reason, detail=detail)

    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not sampled and view == "trace" and response.trace is None:
            return drop(UNCLOSED_TRACE, f"{side}: no closing marker in the text")
        if not sampled and view == "empty" and (response.trace or "").strip():
            return drop(TRACE_IN_EMPTY_VIEW, f"{side}: a trace of {len(response.trace or '')} characters")
    prompt_ids, start = _prompt(quad, pair, view, rules, where)
    if start == 0:
        return drop(NO_PROMPT_TOKEN, "the training prompt is empty")
    forced = prompt_ids[start:]  # the forced closing marker of the empty view, scored as paper C.3 does
    responses: list[tuple[Ids, int]] = []
    # Silence can be rejected where it has a token to score. It is what was sampled: an unclosed trace has neither closing
    # marker nor end-of-sequence token, and all of it is trace.
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        try:
            raw = _response_ids(response, view, rules)
        except UserError as error:
            return drop(UNWRITABLE, f"{side}: {error}")
        ids = _checked_ids(raw, rules, f"{where}, {side}")
        offset = answer_offset(rules.tokenizer, rules.fmt, view, raw)
        silent = offset is None or not response.answer.strip() or offset >= len(ids)
        num_answer = 0 if offset is None else len(ids) - offset
        num_scored = num_answer if view == "trace" and rules.settings.answer_only else len(forced) + len(ids)
        if silent and not (side == "rejected" and num_scored):
            if offset is None:
                return drop(UNCLOSED_TRACE, f"{side}: no closing marker in {len(ids)} tokens")
            return drop(EMPTY_ANSWER, f"{side}: nothing after the trace")
        responses.append((np.concatenate([forced, ids]), len(forced) + (len(ids) if offset is None else offset)))
    chosen, rejected = responses
    if np.array_equal(chosen[0], rejected[0]):
        return drop(IDENTICAL, f"{len(chosen[0])} equal tokens")
    longest = start + max(len(chosen[0]), len(rejected[0]))
    max_length = rules.settings.max_length
    if longest > max_length:
        if rules.settings.over_long == "refuse":
            raise UserError(f"{where}: {longest} tokens, expected at most max_length = {max_length}")
        return drop(OVER_LONG, f"{longest} tokens, max_length {max_length}")
    return _PairTokens(prompt=prompt_ids[:start], responses=(chosen, rejected))


def _is_sampled(pair: Pair, view: View, where: str) -> bool:
    """True if the pair carries token ids, False if it is text; anything between is refused."""
    if pair.view != view:
        raise UserError(f"{where}: field 'view': got {pair.view!r}, expected {view!r}")
    parts = {
        "prompt_ids": pair.prompt_ids,
        "completion_start": pair.completion_start,
        "chosen.token_ids": pair.chosen.token_ids,
        "rejected.token_ids": pair.rejected.token_ids,
    }
    absent = [name for name, value in parts.items() if value is None]
    if absent and len(absent) < len(parts):
        raise UserError(
            f"{where}: field {absent[0]!r}: got null, expected a value, because other token fields of the pair are set"
            " (sampled pairs carry all four, text pairs none)"
        )
    return not absent


def _prompt(quad: Quad, pair: Pair, view: View, rules: _Rules, where: str) -> tuple[Ids, int]:
    """The ids before the response and the index of the first scored one."""
    if pair.prompt_ids is None or pair.completion_start is None:
        scored = rules.settings.score_empty_block
        try:
            prompt = view_prompt(rules.tokenizer, rules.fmt, quad.messages, view, score_empty_block=scored)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return _checked_ids(prompt.prompt_ids, rules, where), prompt.completion_start
    ids = _checked_ids(pair.prompt_ids, rules, f"{where}, prompt_ids")
    start = pair.completion_start
    if not 0 <= start <= len(ids):
        raise UserError(f"{where}: field 'completion_start': got {start}, expected 0 to {len(ids)} (len of prompt_ids)")
    # Sampling records where the forced block starts; whether it is scored is a training decision.
    return ids, len(ids) if view == "empty" and not rules.settings.score_empty_block else start


def _response_ids(response: Response, view: View, rules: _Rules) -> tuple[int, ...]:
    """The sampled ids untouched, or the text as the model would have sampled it."""
    if response.token_ids is not None:
        return response.token_ids
    trace = response.trace if view == "trace" else None
    return completion_ids(rules.tokenizer, rules.fmt, view, trace, response.answer, response.finished)


def _checked_ids(ids: Sequence[int], rules: _Rules, where: str) -> Ids:
    """As int32, after the vocabulary check: an id without an embedding row is another model's data."""
    vocab_size = rules.settings.vocab_size
    limit = 2**31 if vocab_size is None else vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < limit:
        bad = next(token for token in ids if not 0 <= token < limit)
        size = f"the vocabulary size {limit}" if vocab_size is not None else "2**31"
        raise UserError(f"{where}: token id {bad}, expected 0 or more and less than {size} (data of another model?)")
    return np.array(ids, dtype=np.int32)


def _common_prefix(prompts: Sequence[Ids]) -> int:
    """Length of the longest prefix that all prompts share."""
    shortest = min((len(prompt) for prompt in prompts), default=0)
    for prompt in prompts[1:]:
        unequal = np.flatnonzero(prompt[:shortest] != prompts[0][:shortest])
        shortest = int(unequal[0]) if len(unequal) else shortest
    return shortest


def _branches(pair: _PairTokens | None, shared: int) -> tuple[Branch | None, Branch | None]:
    """Chosen and rejected branch: what the training prompt has beyond the prefix (unscored), then the scored tokens."""
    if pair is None:
        return None, None
    tail = pair.prompt[shared:]
    chosen, rejected = (
        Branch(ids=np.concatenate([tail, ids]), scored_from=len(tail), answer_from=len(tail) + offset)
        for ids, offset in pair.responses
    )
    return chosen, rejected


class QuadStream(Protocol):
    """Quads that can be read more than once, with a fingerprint of their content (see :mod:`bvpo.training.data`)."""

    @property
    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[Quad]: ...


def prepare_tokens(
    quads: QuadStream,
    tokenizer: PreTrainedTokenizerBase,
    fmt: ReasoningFormat,
    settings: TokenSettings,
    folder: str | os.PathLike[str],
    *,
    build: bool = True,
) -> TokenDataset:
    """The tokens of ``quads``: from ``folder`` when the same content was tokenised there before, else tokenised now.

    In a distributed run one rank calls this with ``build=True`` and the others, after a barrier, with ``build=False``;
    those only open what is there.
    """
    fingerprint = tokens_fingerprint(quads.fingerprint, tokenizer, fmt, settings)
    target = Path(folder) / f"tokens-{fingerprint}"
    dataset = _open_intact(target)
    if dataset is None and not build:
        raise FileNotFoundError(f"{target} is not there; the building rank must finish first")
    if dataset is None:
        _build(target, fingerprint, quads, _Rules(tokenizer=tokenizer, fmt=fmt, settings=settings))
        dataset = TokenDataset(target)
    if len(dataset) == 0:
        raise UserError(_nothing_left(dataset))
    lost = ", ".join(f"{count} {name}" for name, count in dataset.drops.most_common()) or "none"
    dropped = dataset.num_dropped_quads
    logger.info("%d quads to train on, %d dropped; pairs lost: %s (%s)", dataset.num_groups, dropped, lost, target)
    _say_traces(dataset, settings)
    return dataset


def _say_traces(dataset: TokenDataset, settings: TokenSettings) -> None:
    """What became of further traces, where there are any or should be."""
    if dataset.num_left_out:
        left_out = "%d further traces of quads with several are left out; train.trace_estimator 'traces' takes them"
        logger.info(left_out, dataset.num_left_out)
    elif settings.keep_groups:
        found = Counter(np.diff(dataset.group_starts).tolist())
        sizes = ", ".join(f"{count:,} quads with {size}" for size, count in sorted(found.items()))
        logger.info("traces per answer: %s", sizes)
        if not dataset.has_groups:
            logger.warning(
                "no quad has more than one trace per answer, so 'traces' is the same as 'joint'; see pair.traces"
            )


def _nothing_left(dataset: TokenDataset) -> str:
    """Why every quad was dropped, with one example."""
    if not dataset.num_dropped_quads:
        return "the data holds no quad"
    counts = ", ".join(f"{count} {name}" for name, count in dataset.drops.most_common())
    path = dataset.folder / "drops.jsonl"
    with path.open(encoding="utf-8") as file:
        first = json.loads(file.readline() or "{}")
    example = f"; quad {first['id']!r}: {first['detail']}" if first else ""
    return f"no quad is left to train on: {counts}{example} (all in {path})"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns text into ids: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        # Left behind by earlier calls with padding or truncation; neither changes how we tokenise.
        core.pop("truncation", None)
        core.pop("padding", None)
    else:
        core = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__qualname__}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = [core, special, getattr(tokenizer, "chat_template", None)]
    return _digest(json.dumps(parts, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def tokens_fingerprint(
    source: str, tokenizer: PreTrainedTokenizerBase, fmt: ReasoningFormat, settings: TokenSettings
) -> str:
    """Changes with the content of the data, the tokenizer, the format, the settings and the schema of the file."""
    chosen = asdict(settings)
    for name in ("keep_groups", "answer_only"):  # the same fingerprint as before there were these
        if not chosen[name]:
            del chosen[name]
    parts = [_RULES, SCHEMA_VERSION, source, tokenizer_fingerprint(tokenizer), asdict(fmt), chosen]
    return _digest(json.dumps(parts, sort_keys=True))


def _open_intact(target: Path) -> TokenDataset | None:
    if not target.exists():
        return None
    try:
        return TokenDataset(target)
    except (OSError, pa.ArrowInvalid, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s) and is built again", target, error)
        return None


def _build(target: Path, fingerprint: str, quads: Iterable[Quad], rules: _Rules) -> None:
    """Tokenise into a draft folder and rename it, so ``target`` is there completely or not at all."""
    draft = target.with_name(f".tmp-{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        summary = _tokenize_into(draft, quads, rules)
        text = json.dumps({"fingerprint": fingerprint, **summary}, indent=1, ensure_ascii=False)
        (draft / "summary.json").write_text(text + "\n", encoding="utf-8")
        _move_into_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_into_place(draft: Path, target: Path) -> None:
    """Rename the draft; an intact target means that another process was faster, and the same content is there."""
    try:
        draft.rename(target)
    except OSError:
        if _open_intact(target) is None:
            shutil.rmtree(target)
            draft.rename(target)


def _tokenize_into(folder: Path, quads: Iterable[Quad], rules: _Rules) -> dict[str, object]:
    """Write ``tokens.arrow`` and ``drops.jsonl``; returns the counts."""
    counts: Counter[str] = Counter()
    num_left_out = 0
    sizes: list[int] = []  # rows of each group that are left
    writer = TokenWriter(folder)
    with (folder / "drops.jsonl").open("w", encoding="utf-8") as listing:
        for quad in quads:
            if not (quad.leads or rules.settings.keep_groups):
                num_left_out += 1
                continue
            result = tokenize_views(quad, rules.tokenizer, rules.fmt, rules.settings)
            if quad.leads:
                sizes.append(0)
                counts.update(f"{view}/{MISSING_VIEW}" for view in VIEWS if quad.pair(view) is None)
            for drop in result.drops:
                if drop.reason != MISSING_VIEW:
                    counts[f"{drop.view}/{drop.reason}"] += 1
                    listing.write(json.dumps(asdict(drop)) + "\n")
            if result.quad is not None:
                writer.add(result.quad)
                sizes[-1] += 1
    size = writer.close()
    summary: dict[str, object] = {
        "num_quads": writer.num_quads,
        "num_dropped_quads": sizes.count(0),
        "drops": dict(counts),
        "bytes": size,
    }
    if any(num > 1 for num in sizes):
        summary["groups"] = [num for num in sizes if num]
    if num_left_out:
        summary["num_left_out"] = num_left_out
    return summary
