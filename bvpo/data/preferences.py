"""TRL preference sets, one per view, read row by row and joined by prompt into quads.

In: :class:`~bvpo.data.rows.Rows` with ``prompt``/``chosen``/``rejected`` columns in TRL's standard or
conversational form. Out: :class:`~bvpo.records.Quad` records with text responses, and counts of what matched. The trace
comes from a message's ``reasoning_content`` or ``thinking`` field, or is split off the text by the reasoning format; it
never passes a chat template. Rows that cannot be understood are refused; rows that cannot be trained on are left to
tokenising.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bvpo.data.rows import Rows
from bvpo.formats import ReasoningFormat
from bvpo.keys import content_hash
from bvpo.records import VIEWS, Message, Pair, Quad, Response, View
from bvpo.strict import UserError, show

TRACE_FIELDS = ("reasoning_content", "thinking")
ID_DIGITS = 32  # of the prompt's SHA-256 in a joined quad's id


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One row of a preference set."""

    messages: tuple[Message, ...]
    chosen: Response
    rejected: Response


def prompt_key(messages: Sequence[Message]) -> str:
    """SHA-256 of a conversation; equal for texts that differ only in Unicode form, line ends or outer whitespace."""
    return content_hash([[m.role, _normal(m.content)] for m in messages])


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()


class JoinedSets:
    """Quads of up to two preference sets. The k-th row of a prompt in one set meets its k-th row in the other.

    Quads come in the order of the trace set, then the unmatched rows of the empty set. ``counts`` has ``trace_rows``,
    ``empty_rows``, ``joined``, ``trace_only``, ``empty_only`` and ``repeated_prompts`` (rows whose prompt came before).
    """

    def __init__(self, sets: Mapping[View, Rows], fmt: ReasoningFormat) -> None:
        self._sets = sets
        self._fmt = fmt
        self.counts: Counter[str] = Counter()
        self._plan = self._match({view: self._keys(view) for view in VIEWS})

    def __iter__(self) -> Iterator[Quad]:
        for name, rows in self._plan:
            pairs: dict[View, Pair] = {}
            messages: tuple[Message, ...] = ()
            for view, row in rows.items():
                preference = parse_preference(self._sets[view][row], view, self._fmt, self._sets[view].where(row))
                pairs[view] = Pair(view=view, chosen=preference.chosen, rejected=preference.rejected)
                messages = messages or preference.messages
            yield Quad(id=name, messages=messages, trace=pairs.get("trace"), empty=pairs.get("empty"))

    def _keys(self, view: View) -> list[str]:
        """The prompt key of every row; parses each row once, so a faulty one is reported before any work is done."""
        rows = self._sets.get(view)
        if rows is None:
            return []
        parsed = (parse_preference(rows[i], view, self._fmt, rows.where(i)) for i in range(len(rows)))
        return [prompt_key(preference.messages) for preference in parsed]

    def _match(self, keys: Mapping[View, list[str]]) -> list[tuple[str, dict[View, int]]]:
        """(quad id, row per view) of every quad."""
        waiting: defaultdict[str, deque[int]] = defaultdict(deque)
        for row, key in enumerate(keys["empty"]):
            waiting[key].append(row)
        plan: list[dict[View, int]] = []
        names: list[str] = []
        for row, key in enumerate(keys["trace"]):
            rows: dict[View, int] = {"trace": row}
            if waiting.get(key):
                rows["empty"] = waiting[key].popleft()
            plan.append(rows)
            names.append(key)
        joined = sum(len(rows) == 2 for rows in plan)
        alone = sorted(row for rows in waiting.values() for row in rows)
        unmatched: list[dict[View, int]] = [{"empty": row} for row in alone]
        plan += unmatched
        names += [keys["empty"][row] for row in alone]
        for view in VIEWS:
            self.counts[f"{view}_rows"] = len(keys[view])
            self.counts[f"{view}_only"] = len(keys[view]) - joined
            self.counts["repeated_prompts"] += len(keys[view]) - len(set(keys[view]))
        self.counts["joined"] = joined
        return list(zip(_unique_ids(names), plan, strict=True))


def _unique_ids(keys: Sequence[str]) -> list[str]:
    """The key's first digits; the n-th quad of one prompt ends in ``-n``."""
    seen: Counter[str] = Counter()
    ids: list[str] = []
    for key in keys:
        seen[key] += 1
        ids.append(key[:ID_DIGITS] + (f"-{seen[key]}" if seen[key] > 1 else ""))
    return ids


def parse_preference(row: Mapping[str, Any], view: View, fmt: ReasoningFormat, where: str) -> Preference:
    """One TRL row. The prompt is a string (one user turn), a list of messages, or the start of both conversations."""
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str | list):
            raise _wrong(where, name, row.get(name), f"a string or a list of messages (columns here: {', '.join(row)})")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list) and _is_implicit(prompt, chosen, rejected):
        shared = _shared_messages(chosen, rejected)
        if shared == 0:
            raise _wrong(where, "chosen", chosen, "both conversations to start with the same messages, or a 'prompt'")
        messages = _messages(chosen[:shared], where, "chosen")
        if isinstance(prompt, str) and all(_normal(m.content) != _normal(prompt) for m in messages):
            raise _wrong(where, "prompt", prompt, "the text of a message that both conversations start with")
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        messages = _prompt_messages(prompt, fmt, where)
    if messages[-1].role not in ("user", "tool"):
        raise _wrong(where, "prompt", messages[-1].role, "a conversation that ends with a user turn")
    return Preference(
        messages=messages,
        chosen=_response(chosen, view, fmt, where, "chosen"),
        rejected=_response(rejected, view, fmt, where, "rejected"),
    )


def _is_implicit(prompt: Any, chosen: list[Any], rejected: list[Any]) -> bool:
    """No prompt, or (as in ultrafeedback_binarized) a prompt that repeats a turn of the two whole conversations."""
    return prompt is None or (isinstance(prompt, str) and len(chosen) > 1 and len(rejected) > 1)


def _shared_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """How many leading messages are equal, leaving at least one to each side."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))


def _prompt_messages(prompt: Any, fmt: ReasoningFormat, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        if prompt.rstrip().endswith(fmt.open.strip()):
            raise _wrong(
                where, "prompt", prompt[-40:], f"the user's text, without chat template and {fmt.open.strip()!r}"
            )
        return (Message(role="user", content=prompt),)
    if isinstance(prompt, list) and prompt:
        return _messages(prompt, where, "prompt")
    raise _wrong(where, "prompt", prompt, "a string or a list of messages")


def _messages(values: Sequence[Any], where: str, field: str) -> tuple[Message, ...]:
    """Role and content of each turn. Traces of earlier turns are left out, as every family's chat template does."""
    messages: list[Message] = []
    for i, value in enumerate(values):
        role, content = _turn(value, where, f"{field}[{i}]")
        messages.append(Message(role=role, content=content))
    return tuple(messages)


def _turn(value: Any, where: str, field: str) -> tuple[str, str]:
    if not isinstance(value, Mapping):
        raise _wrong(where, field, value, "a message with 'role' and 'content'")
    for name in ("role", "content"):
        if not isinstance(value.get(name), str):
            raise _wrong(where, f"{field}.{name}", value.get(name), "a string")
    if value.get("tool_calls"):
        raise _wrong(where, f"{field}.tool_calls", value["tool_calls"], "none: tool calls are not supported")
    return value["role"], value["content"]


def _response(value: Any, view: View, fmt: ReasoningFormat, where: str, field: str) -> Response:
    """A response from a string or from exactly one assistant message."""
    if isinstance(value, str):
        return _from_text(value, view, fmt)
    if len(value) != 1:
        raise _wrong(where, field, f"{len(value)} messages after the prompt", "exactly one assistant message")
    role, content = _turn(value[0], where, f"{field}[0]")
    if role != "assistant":
        raise _wrong(where, f"{field}[0].role", role, "'assistant'")
    traces = {name: value[0][name] for name in TRACE_FIELDS if value[0].get(name) is not None}
    if not traces:
        return _from_text(content, view, fmt)
    for name, trace in traces.items():
        if not isinstance(trace, str):
            raise _wrong(where, f"{field}[0].{name}", trace, "a string")
    if len(set(traces.values())) > 1:
        raise _wrong(where, f"{field}[0].thinking", traces["thinking"], "the same text as 'reasoning_content', or null")
    trace = next(iter(traces.values()))
    return Response(trace=trace if view == "trace" or trace.strip() else None, answer=content)


def _from_text(text: str, view: View, fmt: ReasoningFormat) -> Response:
    """Trace and answer of a whole message; ``trace=None`` in the trace view says that the trace never closed."""
    try:
        split = fmt.split_message(text, view)
    except UserError:  # a trace where the view has none: kept, so that tokenising can drop and count it
        split = fmt.split_message(text, "trace")
    if split.answer is None:
        return Response(trace=None if view == "trace" else text, answer=text)
    return Response(trace=split.trace, answer=split.answer)


def _wrong(where: str, field: str, value: Any, expected: str) -> UserError:
    return UserError(f"{where}: field {field!r}: got {show(value)}, expected {expected}")
