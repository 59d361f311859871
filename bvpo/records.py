"""The records that travel between stages: prompts, samples, scores, pairs and quads.

Every stage reads and writes these as JSON lines; nothing else crosses a stage boundary. Records are frozen and
hold plain Python values only (no torch, no numpy), so any tool can read the files and importing this module is free.
Reading and writing lives in :mod:`bvpo.strict`; this module only says what the fields mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

View = Literal["trace", "empty"]
VIEWS: tuple[View, View] = ("trace", "empty")

Finish = Literal["stop", "length", "error"]

LEFT_OUT = {"left_out_when_none": True}  # of a field that came later: files without it stay what they were


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; ``content`` is plain text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation that ends with a user turn; ``id`` is a content hash unless the source names one."""

    id: str
    messages: tuple[Message, ...]
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled response.

    ``prompt_ids + token_ids`` is the exact token sequence the engine saw and produced. ``completion_start`` indexes
    that sequence: the first token that training scores (in the empty view it lies inside ``prompt_ids``, at the
    forced closing marker). ``answer is None`` means that the trace never closed: there is no answer to score.
    ``logprobs`` are per sampled token, natural log, of the untempered model distribution.
    """

    key: str
    prompt_id: str
    view: View
    index: int
    prompt_ids: tuple[int, ...]
    completion_start: int
    token_ids: tuple[int, ...]
    text: str
    trace: str | None
    answer: str | None
    finish: Finish
    logprobs: tuple[float, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one scorer said of one sample's final answer; a failure is ``value=None`` with its ``error``."""

    sample_key: str
    prompt_id: str
    view: View
    scorer: str
    value: float | None
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One side of a pair.

    Sampled responses carry ``token_ids`` (never re-tokenised; they end with the end-of-sequence token if and only if
    it was sampled). Responses that exist only as text (imported data) leave ``token_ids`` empty at ``None``; they are
    written into training tokens by the reasoning format, followed by the end-of-sequence token when ``finished``.
    """

    answer: str
    trace: str | None = None
    token_ids: tuple[int, ...] | None = None
    finished: bool = True
    score: float | None = None
    sample_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference between two responses to one prompt in one view.

    ``prompt_ids`` and ``completion_start`` come with sampled token ids (see :class:`Sample`); both are ``None`` for text.
    """

    view: View
    chosen: Response
    rejected: Response
    prompt_ids: tuple[int, ...] | None = None
    completion_start: int | None = None

    def swap(self) -> Pair:
        """The same pair with the opposite preference."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quad:
    """One prompt's trace pair and empty pair: the unit of training. Either may be missing, not both.

    A quad with several traces per answer is several records in a row: the ordinary one, then members that have only a
    trace pair, with other traces of the same two answers. ``group`` is the first one's id in all of them; a quad with one
    trace per answer has none.
    """

    id: str
    messages: tuple[Message, ...]
    trace: Pair | None = None
    empty: Pair | None = None
    group: str | None = field(default=None, metadata=LEFT_OUT)

    @property
    def leads(self) -> bool:
        """Whether this is a quad by itself or the first of its group."""
        return self.group is None or self.group == self.id

    def pair(self, view: View) -> Pair | None:
        return self.trace if view == "trace" else self.empty
