"""What a reasoning format is: how a model family opens, closes and empties its trace, as text.

In: the fields of :class:`ReasoningFormat` (plain strings) and response texts. Out: a response split into trace and
answer, or written back from them, exactly: ``join(split(text)) == text`` where the closing marker has one spelling.
Knows no tokenizer (see ``prompts`` and ``responses``) and never strips, trims or normalises what a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bvpo.records import View
from bvpo.strict import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A response taken apart. ``closed=False``: the trace never ended, so there is no answer (``answer is None``).

    ``trace is None`` in the empty view, where the trace was forced to be empty by the prompt.
    """

    trace: str | None
    answer: str | None
    closed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """How a tokenizer shows that it belongs to a format; everything must hold.

    A two-word conversation is rendered in each view with the format's own switches; the prompt must end with one of
    ``trace_ends`` and one of ``empty_ends``. Each of ``tokens`` must be one token; each of ``template_has`` must occur
    in the chat template's source, which tells families with equal endings apart.
    """

    trace_ends: tuple[str, ...]
    empty_ends: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    template_has: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """One family's markers and switches. All fields are literal text; whitespace counts.

    A trace-view prompt is the rendered conversation + ``open``; an empty-view prompt is the rendered conversation +
    ``empty_open`` + ``empty_close``, of which ``empty_close`` may be scored. A response in the trace view is
    trace + one of ``close`` (the first is the one that is written) + answer + ``answer_close`` + end of turn; in the
    empty view answer + ``answer_close`` + end of turn, without ``answer_close`` where nothing is forced.
    """

    name: str
    models: str = ""  # public checkpoints, for people
    verified: str = ""  # which facts were read, on which public template or parser
    lead: str = ""  # which facts come from elsewhere
    open: str
    close: tuple[str, ...]
    empty_open: str
    empty_close: str
    answer_close: str = ""
    turn_end: str = ""  # token that ends a finished response; "" = the tokenizer's end-of-sequence token
    trace_kwargs: dict[str, Any] = field(default_factory=dict)  # chat-template variables per view
    empty_kwargs: dict[str, Any] = field(default_factory=dict)
    trace_system: str = ""  # put before the system message per view
    empty_system: str = ""
    trace_user_suffix: str = ""  # appended to the last user message per view
    empty_user_suffix: str = ""
    template_tails: tuple[str, ...] = ()  # other endings by which the family's template itself empties the trace
    detect: Detection | None = None  # None: never detected, must be named

    def __post_init__(self) -> None:
        assert self.open.strip() and self.close and all(c.strip() for c in self.close), self.name

    def kwargs(self, view: View) -> dict[str, Any]:
        return self.trace_kwargs if view == "trace" else self.empty_kwargs

    def system(self, view: View) -> str:
        return self.trace_system if view == "trace" else self.empty_system

    def user_suffix(self, view: View) -> str:
        return self.trace_user_suffix if view == "trace" else self.empty_user_suffix

    def answer_end(self, view: View) -> str:
        """What wraps a finished answer up: nothing where no marker opened it."""
        return self.answer_close if view == "trace" or self.empty_close else ""

    def find_close(self, text: str) -> tuple[int, int] | None:
        """Character span of the first closing marker; of two that start together, the longer one."""
        found = [(start, start + len(c)) for c in self.close if (start := text.find(c)) >= 0]
        return min(found, key=lambda span: (span[0], -span[1])) if found else None

    def split(self, text: str, view: View) -> Split:
        """Takes apart what a model wrote after the view's prompt (``text`` without the end-of-sequence token).

        The first closing marker ends the trace; the answer may mention markers later. Nothing is stripped, except one
        ``answer_close`` at the very end.
        """
        if view == "empty":
            return Split(trace=None, answer=text.removesuffix(self.answer_end(view)), closed=True)
        span = self.find_close(text)
        if span is None:
            return Split(trace=text, answer=None, closed=False)
        return Split(trace=text[: span[0]], answer=text[span[1] :].removesuffix(self.answer_end(view)), closed=True)

    def pieces(self, view: View, trace: str | None, answer: str, finished: bool) -> tuple[str, ...]:
        """The texts that make up a response, in order; ``split`` of their concatenation gives trace and answer back.

        Refuses (:class:`UserError`) what would not come back: a trace that holds the closing marker, a trace in the
        empty view, no trace in the trace view.
        """
        end = (self.answer_end(view),) if finished else ()
        if view == "empty":
            if trace:
                raise UserError(f"the empty view has no trace, got one that starts {_head(trace)}")
            parts, expected = (answer, *end), Split(trace=None, answer=answer, closed=True)
        else:
            if trace is None:
                raise UserError("the trace view needs a trace (an empty one is the empty string), got null")
            parts, expected = (trace, self.close[0], answer, *end), Split(trace=trace, answer=answer, closed=True)
        if self.split("".join(parts), view) != expected:
            raise UserError(self._why_not(view, trace))
        return parts

    def join(self, view: View, trace: str | None, answer: str, finished: bool = True) -> str:
        """The text a model would have written after the view's prompt; the inverse of :meth:`split`."""
        return "".join(self.pieces(view, trace, answer, finished))

    def split_message(self, text: str, view: View) -> Split:
        """Takes apart a whole assistant message, as preference sets store it: with or without the opening marker.

        Trace view: the opening marker is dropped if present (the prompt carries it) and the rest is split. Empty view:
        a leading empty block, or a leading closing marker alone, is dropped; a non-empty trace is refused.
        """
        opened = _match_start(self.open, text)
        if view == "trace":
            return self.split(text if opened is None else text[opened:], "trace")
        blocks = (self.empty_open + self.empty_close, self.empty_close, *(self.open + c for c in self.close))
        starts = [end for block in blocks if block.strip() and (end := _match_start(block, text)) is not None]
        if starts:
            return self.split(text[max(starts) :], "empty")
        if opened is not None:
            raise UserError(f"the empty view has no trace, got a message that starts {_head(text)}")
        return self.split(text, "empty")

    def unopened(self, prompt: str, view: View) -> str:
        """A rendered prompt without the marker or empty block that the chat template itself put at its end."""
        # A family's leading whitespace (GLM: "\n<think>") belongs to the marker, no other whitespace before it does.
        lead = f"(?:{re.escape(self.open[: len(self.open) - len(self.open.lstrip())])})?"
        empties = [self.empty_open + self.empty_close, *self.template_tails, *(self.open + c for c in self.close)]
        emptied = re.search(rf"{lead}(?:{_any_of(empties)})\s*\Z", prompt)
        if emptied:
            if view == "trace":
                raise UserError(
                    f"format {self.name!r}: the chat template forces an empty trace although the trace view was asked "
                    f"for (the prompt ends with {prompt[-60:]!r}); choose another format with model.format"
                )
            return prompt[: emptied.start()]
        opened = re.search(rf"{lead}(?:{_any_of([self.open])})\s*\Z", prompt)
        return prompt[: opened.start()] if opened else prompt

    def _why_not(self, view: View, trace: str | None) -> str:
        for marker in self.close:
            if view == "trace" and trace is not None and marker in trace:
                return f"the trace contains the closing marker {marker!r} of format {self.name!r}, which would end it"
        return f"format {self.name!r} cannot write this response so that it reads back as the same trace and answer"


def _head(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of the texts with any amount of whitespace where they have some, or between markers."""
    patterns = [r"\s*".join(re.escape(part) for part in re.split(r"\s+|(?<=[>\]])(?=[<\[])", t) if part) for t in texts]
    return "|".join(p for p in patterns if p)


def _match_start(marker: str, text: str) -> int | None:
    """Where ``text`` goes on after ``marker`` at its start, or None.

    Whitespace inside and before the marker is free; after it, only as much is taken as the marker itself ends with.
    """
    match = re.match(rf"\s*(?:{_any_of([marker])})", text)
    if match is None:
        return None
    end = match.end()
    for char in marker[len(marker.rstrip()) :]:
        if not text.startswith(char, end):
            break
        end += 1
    return end
