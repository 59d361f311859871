"""Prompts as token ids: what an engine is sent in each view, and from which token on training scores.

In: a ``transformers`` tokenizer with a chat template, a format, a conversation that ends with a user turn, a view. Out:
:class:`ViewPrompt`. The chat template renders the conversation only; the opening marker and the empty block are put on
by the format, in pieces of their own, so that a closing marker always starts a token. Responses are never rendered by
a chat template (several delete traces). The clock is not read: templates that print today's date print ``today``,
so that the same conversation gives the same prompt, and the same sample key, on any day.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from types import FrameType
from typing import Any

from bvpo.formats.spec import ReasoningFormat
from bvpo.records import Message, View
from bvpo.strict import UserError

PROMPT_DATE = date(2025, 1, 1)
MAX_TEMPLATE_STEPS = 10_000_000  # lines of template code and calls; a long conversation takes some ten thousand
MAX_TEMPLATE_SECONDS = 10.0  # of the processor, for what takes its time inside of one line, such as 9 ** 9 ** 9
MAX_RENDERED = 10_000_000  # characters of a prompt beyond a hundred for each of the conversation's
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class EndlessTemplate(UserError):
    """A chat template that was stopped because it does not come to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPrompt:
    """``prompt_ids`` is what the engine is sent; training scores from ``completion_start`` on.

    Trace view: the end of the prompt. Empty view: the first token of the forced closing marker, or the end of the
    prompt when the forced block is not scored. ``prompt_ids[:completion_start]`` is the training prompt.
    """

    prompt_ids: tuple[int, ...]
    completion_start: int


def view_prompt(
    tokenizer: Any,
    fmt: ReasoningFormat,
    messages: Sequence[Message],
    view: View,
    score_empty_block: bool = True,
    today: date = PROMPT_DATE,
) -> ViewPrompt:
    """The prompt of one view (see :class:`ViewPrompt`)."""
    rendered = fmt.unopened(render(tokenizer, fmt, messages, view, today), view)
    opening, forced = (fmt.open, "") if view == "trace" else (fmt.empty_open, fmt.empty_close)
    training = _with_one_bos(tokenizer, encode(tokenizer, rendered + opening))
    prompt = training + encode(tokenizer, forced)
    return ViewPrompt(
        prompt_ids=tuple(prompt),
        completion_start=len(training) if score_empty_block else len(prompt),
    )


def render(
    tokenizer: Any, fmt: ReasoningFormat, messages: Sequence[Message], view: View, today: date = PROMPT_DATE
) -> str:
    """The conversation as the chat template writes it in this view, up to where the model's turn begins."""
    if not messages or messages[-1].role not in ("user", "tool"):
        last = repr(messages[-1].role) if messages else "no message"
        raise UserError(f"a conversation must end with a user turn, got {last}")
    turns = conversation(fmt, messages, view)
    source = _without_clock(template_source(tokenizer), today)
    try:
        with stopping_endless_templates():
            text = tokenizer.apply_chat_template(
                turns, chat_template=source, tokenize=False, add_generation_prompt=True, **fmt.kwargs(view)
            )
    except UserError:
        raise
    except Exception as error:  # a template is somebody else's program: whatever it raises is its own fault
        raise UserError(f"the chat template cannot render this conversation: {_first_line(error)}") from error
    if not isinstance(text, str) or not text:
        raise UserError("the chat template renders this conversation as nothing")
    if len(text) > MAX_RENDERED + 100 * sum(len(turn["content"]) for turn in turns):
        raise UserError(f"the chat template renders this conversation as {len(text):,} characters")
    return text


@contextmanager
def stopping_endless_templates() -> Iterator[None]:
    """Counts the lines of template code that run and every call, and stops at a limit: in any thread, whatever the
    machine's load. Jinja compiles a template to Python code of the file "<template>"; only its frames are traced line by
    line. A debugger or coverage tool does not see the rendering, and goes on after it.
    """
    steps = 0

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_TEMPLATE_STEPS:
            raise EndlessTemplate(
                f"the chat template does not come to an end: stopped after {MAX_TEMPLATE_STEPS} steps"
            )
        return count

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        count(frame, event, arg)
        return count if frame.f_code.co_filename == "<template>" else None

    outer = sys.gettrace()
    with _limited_processor_time():
        sys.settrace(enter)
        try:
            yield
        finally:
            sys.settrace(outer)


@contextmanager
def _limited_processor_time() -> Iterator[None]:
    """Only the main thread can be interrupted; in others the steps are counted alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise EndlessTemplate(
            f"the chat template does not come to an end: stopped after {MAX_TEMPLATE_SECONDS:g} s of processor time"
        )

    before = signal.signal(signal.SIGPROF, over)
    # again every second: Jinja takes whatever is raised while it folds a constant for "no constant", and goes on
    signal.setitimer(signal.ITIMER_PROF, MAX_TEMPLATE_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def template_source(tokenizer: Any) -> str:
    """The chat template's text."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # none, or several and none of them the default
        raise UserError(f"the tokenizer has no chat template to use: {_first_line(error)}") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one piece of text: markers become their tokens, nothing is added."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text holds {text[error.start]!r}, half a surrogate pair, which is not a character") from None
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def conversation(fmt: ReasoningFormat, messages: Sequence[Message], view: View) -> list[dict[str, str]]:
    """The conversation with the view's system text and user suffix, for families that switch by text."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    if suffix := fmt.user_suffix(view):
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is None:
            raise UserError(f"format {fmt.name!r} switches the trace in the user's turn, but there is none")
        turns[last]["content"] += suffix
    if system := fmt.system(view):
        if turns[0]["role"] == "system":
            turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
        else:
            turns.insert(0, {"role": "system", "content": system})
    return turns


def _without_clock(source: str, today: date) -> str:
    """The template with its calls for today's date replaced by the date (variables cannot override the function)."""
    try:
        source = _CLOCK_CALL.sub(lambda call: repr(today.strftime(call[2])), source)
    except ValueError as error:
        raise UserError(f"the chat template's date format cannot be written: {_first_line(error)}") from error
    if re.search(r"strftime_now\s*\(", source):
        raise UserError(
            "the chat template computes a date format and prints the clock's date, so prompts would change from day "
            "to day; write the date into the tokenizer's chat template"
        )
    return source


def _with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Exactly one leading beginning-of-sequence token if the template wrote one or the tokenizer adds one by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    wanted = start > 0 or tokenizer.encode("")[:1] == [bos]
    return [bos, *ids[start:]] if wanted else ids


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
