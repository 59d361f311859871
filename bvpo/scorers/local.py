"""Reward models in this process: loading, tokenising with the model's own template, and batching by length.

In: the ``[score.reward_model]`` section and a :class:`RewardHead`, which says how one architecture is loaded and read. Out:
a :class:`RewardModelScorer`. A conversation that is too long, or that spells one of the model's control tokens, is a
failure of that answer; nothing is ever cut. Weights load from safetensors only, and a checkpoint that lacks any of them
is refused.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoConfig

from bvpo.config import RewardModelConfig
from bvpo.files import hash_folder
from bvpo.formats.prompts import EndlessTemplate, stopping_endless_templates
from bvpo.models import loading, read_tokenizer
from bvpo.scorers.base import Estimate, Needs, Outcome, ScoreItem, about_tokens
from bvpo.strict import UserError

logger = logging.getLogger(__name__)

FIELD = "score.reward_model"
LOOKAHEAD = 1024  # answers sorted by length at a time: batches hold equals, and results still stream


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPlan:
    """Everything decided before a weight is read."""

    section: RewardModelConfig
    config: Any
    device: torch.device
    dtype: torch.dtype
    identity: dict[str, Any]


class RewardHead(Protocol):
    """One architecture of reward models."""

    name: str

    def load(self, plan: RewardPlan, tokenizer: Any) -> Any:
        """The model on its device, in evaluation mode; :class:`UserError` where the checkpoint is not one of these."""
        ...

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why this conversation cannot be scored, or ``None``."""
        ...

    def scores(self, model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32[B]: the score of each token row; rows differ in length."""
        ...


def plan_reward_model(section: RewardModelConfig) -> RewardPlan:
    """Reads the configuration (no weights) and decides device and precision."""
    config = from_pretrained(AutoConfig, section)
    device = _device(section.device)
    wide = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(
        section.dtype, torch.bfloat16 if wide else torch.float32
    )
    return RewardPlan(section=section, config=config, device=device, dtype=dtype, identity=_identity(section, config))


def from_pretrained(auto_class: Any, section: RewardModelConfig, **options: Any) -> Any:
    options.setdefault("trust_remote_code", section.trust_remote_code)
    with loading(f"{FIELD}.model: cannot load {section.model!r} with {auto_class.__name__}"):
        return auto_class.from_pretrained(section.model, revision=section.revision, **options)


def load_checked(model_class: Any, plan: RewardPlan, *, strict: bool, **options: Any) -> Any:
    """A model whose every weight came from the checkpoint; with ``strict``, the checkpoint holds nothing else."""
    model, info = from_pretrained(
        model_class, plan.section, dtype=plan.dtype, use_safetensors=True, output_loading_info=True, **options
    )
    faults = [
        ("lacks", sorted(info["missing_keys"])),
        ("has other shapes for", sorted(map(str, info["mismatched_keys"]))),
    ]
    if strict:
        faults.append(("has, beyond a model of this kind,", sorted(info["unexpected_keys"])))
    for verb, names in faults:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{FIELD}.model: the checkpoint {plan.section.model!r} {verb} {', '.join(names[:3])}{more}, so its scores "
                f"would be random; it is no {model_class.__name__}"
            )
    return model.to(plan.device).eval()


class RewardModelScorer:
    """Scores with one reward model; weights are loaded when first needed."""

    def __init__(self, head: RewardHead, plan: RewardPlan) -> None:
        self._head, self._plan, self._longest = head, plan, _longest(plan)
        self._loaded: tuple[Any, Conversations] | None = None

    @property
    def needs(self) -> Needs:
        return Needs()

    def fingerprint(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "scorer": self._head.name,
            **plan.identity,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": plan.device.type,
            "max_length": plan.section.max_length,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def estimate(self, items: Iterable[ScoreItem]) -> Estimate:
        sizes = [about_tokens(item.answer) + sum(about_tokens(m.content) for m in item.messages) for item in items]
        return Estimate(num_calls=len(sizes), input_tokens=sum(sizes))

    def score(self, items: Iterable[ScoreItem]) -> Iterator[Outcome]:
        model, conversations = self._load()
        rest = iter(items)
        while window := list(itertools.islice(rest, LOOKAHEAD)):
            rows: list[tuple[str, list[int]]] = []
            for item in window:
                ids = conversations.encode(item)
                problem = ids if isinstance(ids, str) else self._head.problem(ids)
                if problem is not None:
                    yield Outcome.failed(item.key, problem)
                elif not isinstance(ids, str):
                    rows.append((item.key, ids))
            for batch in length_batches(rows, self._plan.section.batch_tokens):
                yield from self._score_batch(model, batch)

    def close(self) -> None:
        self._loaded = None

    def _load(self) -> tuple[Any, Conversations]:
        if self._loaded is None:
            plan = self._plan
            options = {"revision": plan.section.revision, "trust_remote_code": plan.section.trust_remote_code}
            failure = f"{FIELD}.model: cannot load the tokenizer of {plan.section.model!r}"
            tokenizer = read_tokenizer(failure, plan.section.model, **options)
            conversations = Conversations(tokenizer, self._longest)
            model = self._head.load(plan, tokenizer)
            self._check_batching(model)
            precision = str(plan.dtype).removeprefix("torch.")
            logger.info("loaded %s (%s on %s)", plan.section.model, precision, plan.device)
            self._loaded = model, conversations
        return self._loaded

    @torch.inference_mode()
    def _score_batch(self, model: Any, batch: Sequence[tuple[str, list[int]]]) -> Iterator[Outcome]:
        try:
            values = self._head.scores(model, [ids for _, ids in batch]).tolist()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                tokens = len(batch[0][1])
                raise UserError(
                    f"{FIELD}: {tokens:,} tokens do not fit on {self._plan.device}; set max_length"
                ) from None
            torch.cuda.empty_cache()
            values = None
        if values is None:  # outside the except block, which keeps the failed batch's memory alive
            middle = len(batch) // 2
            yield from self._score_batch(model, batch[:middle])
            yield from self._score_batch(model, batch[middle:])
            return
        for (key, _), value in zip(batch, values, strict=True):
            yield Outcome.of(key, value)

    @torch.inference_mode()
    def _check_batching(self, model: Any) -> None:
        """Refuses a model that padding changes: two rows of unequal length must score as they do alone."""
        rows = self._head_rows()
        alone = torch.cat([self._head.scores(model, [row]) for row in rows])
        together = self._head.scores(model, rows)
        worst = float((alone - together).abs().max())
        scale = max(1.0, float(alone.abs().max()))
        tolerance = 1e-3 if self._plan.dtype == torch.float32 else 0.1
        if self._plan.section.batch_tokens > 1 and not worst <= tolerance * scale:
            raise UserError(
                f"{FIELD}.model: {self._plan.section.model!r} scores other values in a padded batch than alone (off by "
                f"{worst:.3g}); set {FIELD}.batch_tokens to 1 to score one answer at a time"
            )

    def _head_rows(self) -> list[list[int]]:
        vocab = self._plan.config.get_text_config().vocab_size
        body = [[(7 * i + 3) % vocab for i in range(length)] for length in (5, 12)]
        pattern: Sequence[int] = getattr(self._head, "pattern", ())
        return [[*row, *pattern, *row] for row in body]


class Conversations:
    """Turns items into token ids by the model's own chat template."""

    def __init__(self, tokenizer: Any, longest: int | None) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{FIELD}.model: its tokenizer has no chat template, so a conversation cannot be written for it"
            )
        self._tokenizer, self._longest = tokenizer, longest
        control = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
        self._control = re.compile("|".join(map(re.escape, control))) if control else None

    def encode(self, item: ScoreItem) -> list[int] | str:
        """The conversation and the answer as one row of ids, or what is wrong with it."""
        for text in (item.answer, *(m.content for m in item.messages)):
            # text that spells a control token would become that token: an answer could end its own turn
            if self._control and (found := self._control.search(text)):
                return f"the text contains the reward model's control token {found.group()!r}"
        turns = [{"role": m.role, "content": m.content} for m in item.messages]
        turns.append({"role": "assistant", "content": item.answer})
        try:
            with stopping_endless_templates():
                ids = list(self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
        except EndlessTemplate as error:  # as it would be for every other conversation, each for as long
            raise UserError(f"{FIELD}.model: {error}") from None
        except Exception as error:  # templates raise errors of their own for roles that they do not know
            return f"the reward model's chat template refuses the conversation: {error}"
        if self._longest is not None and len(ids) > self._longest:
            return f"{len(ids):,} tokens with the prompt, more than the longest of {self._longest:,}"
        return ids


def length_batches(rows: Sequence[tuple[str, list[int]]], budget: int) -> Iterator[list[tuple[str, list[int]]]]:
    """Batches of rows of near length, longest first, each at most ``budget`` tokens with padding (or one row)."""
    batch: list[tuple[str, list[int]]] = []
    for row in sorted(rows, key=lambda r: (-len(r[1]), r[0])):
        longest = len(batch[0][1]) if batch else len(row[1])
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, int64[B, T], padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *([pad] * (width - len(row)))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _longest(plan: RewardPlan) -> int | None:
    own = getattr(plan.config.get_text_config(), "max_position_embeddings", None)
    asked = plan.section.max_length
    if asked is not None and own is not None and asked > own:
        raise UserError(f"{FIELD}.max_length: got {asked}, but {plan.section.model!r} reads at most {own} tokens")
    return own if asked is None else asked


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{FIELD}.device: got {name!r}, expected a device that is present (auto, cpu, cuda)") from error
    return device


def _identity(section: RewardModelConfig, config: Any) -> dict[str, Any]:
    """The Hub commit where there is one, else a hash of the folder's files."""
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return {"model": section.model, "revision": commit}
    return {"content": hash_folder(Path(section.model))}
