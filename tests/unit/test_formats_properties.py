"""Round trips of every reasoning format on adversarial text: nothing is lost, moved, or silently corrupted."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bvpo.formats import (
    FORMATS,
    ReasoningFormat,
    Split,
    answer_offset,
    completion_ids,
    decode_completion,
    end_ids,
    view_prompt,
)
from bvpo.records import Message, View
from bvpo.strict import UserError
from tests.formats_fixtures import FAMILIES, build_tokenizer, format_of, tokenizer_of

ALL = sorted(FAMILIES)
PLAIN = settings(max_examples=100, deadline=None, derandomize=True)
FEW = settings(max_examples=40, deadline=None, derandomize=True)

_MARKERS = sorted({m for f in FORMATS.values() for m in (f.open, *f.close, f.empty_close, f.answer_close) if m})
_FRAGMENTS = st.sampled_from(
    [
        *_MARKERS,
        *(marker[:-1] for marker in _MARKERS),
        *(marker[1:] for marker in _MARKERS),
        "```xml\n</think>\n```",
        "<think><think></think></think>",
        "</Think>",
        "\u0338",  # composes with a preceding < or > under NFC
        "e\u0301",
        "日本語",
        "🙂\u200d🙂",
        "\u00a0\u2028",
        "\n\n",
        " ",
        "\t\r\n",
        "I think so.",
        "<|im_end|>",
    ]
)
TEXTS = st.lists(_FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6).map("".join)
QUIET = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]:"), max_size=30)  # spells no marker
VIEWS: st.SearchStrategy[View] = st.sampled_from(["trace", "empty"])


def holds_close(fmt: ReasoningFormat, text: str) -> bool:
    return any(marker in text for marker in fmt.close)


@pytest.mark.parametrize("name", sorted(FORMATS))
@PLAIN
@given(trace=TEXTS, answer=TEXTS)
def test_split_undoes_join_or_join_refuses(name: str, trace: str, answer: str) -> None:
    """Mutation: splitting at another marker than the first, or stripping, or joining a trace that would end early."""
    fmt = FORMATS[name]
    try:
        text = fmt.join("trace", trace, answer)
    except UserError:
        # the only reasons: the marker stands in the trace, or arises where the trace and the marker meet,
        # or a longer spelling of it arises with the answer
        whole = trace + fmt.close[0] + answer
        assert holds_close(fmt, trace) or fmt.find_close(whole) != (len(trace), len(trace + fmt.close[0]))
        return
    assert not holds_close(fmt, trace)
    assert fmt.split(text, "trace") == Split(trace=trace, answer=answer, closed=True)
    assert fmt.split(fmt.join("empty", None, answer), "empty") == Split(trace=None, answer=answer, closed=True)


@pytest.mark.parametrize("name", sorted(FORMATS))
@PLAIN
@given(text=TEXTS)
def test_split_loses_no_character(name: str, text: str) -> None:
    """Mutation: any normalisation of what a model wrote. Trace, marker and answer (and wrapper) are the text."""
    fmt = FORMATS[name]
    parts = fmt.split(text, "trace")
    if not parts.closed:
        assert parts == Split(trace=text, answer=None, closed=False) and not holds_close(fmt, text)
        return
    assert parts.trace is not None and parts.answer is not None and not holds_close(fmt, parts.trace)
    ends = ("", fmt.answer_close)
    assert any(text == parts.trace + close + parts.answer + end for close in fmt.close for end in ends)


@pytest.mark.parametrize("name", sorted(FORMATS))
@FEW
@given(trace=QUIET, answer=QUIET)
def test_whole_messages_split_like_what_follows_the_prompt(name: str, trace: str, answer: str) -> None:
    """Mutation: an imported message whose opening marker or empty block stays in, or takes text with it."""
    fmt = FORMATS[name]
    assume(not answer[:1].isspace() and not trace[:1].isspace())
    message = fmt.open + fmt.join("trace", trace, answer)
    assert fmt.split_message(message, "trace") == Split(trace=trace, answer=answer, closed=True)
    emptied = fmt.empty_open + fmt.empty_close + fmt.join("empty", None, answer)
    assert fmt.split_message(emptied, "empty") == Split(trace=None, answer=answer, closed=True)


@pytest.mark.parametrize("name", ALL)
@FEW
@given(trace=TEXTS, answer=TEXTS, finished=st.booleans(), view=VIEWS)
def test_completions_are_exact_or_refused(name: str, trace: str, answer: str, finished: bool, view: View) -> None:
    """The ids decode to trace + marker + answer, and the answer's index is the boundary; else a UserError with cause.

    Mutation: re-tokenising across a boundary, refusing without cause, or writing a trace that ends early.
    """
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    given_trace = trace if view == "trace" else None
    ends = end_ids(tokenizer, fmt)
    try:
        ids = completion_ids(tokenizer, fmt, view, given_trace, answer, finished)
    except UserError:
        whole = trace + fmt.close[0] + answer
        span = (len(trace), len(trace + fmt.close[0]))
        held = set(ends) & set(tokenizer.encode(trace + answer, add_special_tokens=False))
        cut = bool(fmt.answer_close) and answer.endswith(fmt.answer_close)
        assert held or cut or (view == "trace" and fmt.find_close(whole) != span)
        return
    # what the tokenizer's own normaliser makes of each piece; the identity for all fixtures but the NFC ones
    shown = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in (trace, answer)]
    if not FAMILIES[name].nfc:
        assert shown == [trace, answer]
    else:
        # a combining mark behind a marker's token stays apart from it, hence both sides
        nfc = [[unicodedata.normalize("NFC", text) for text in texts] for texts in (shown, (trace, answer))]
        assert nfc[0] == nfc[1]
    body = ids[:-1] if finished else ids
    assert (not finished or ids[-1] == ends[0]) and not set(ends) & set(body)
    written = shown[0] + fmt.close[0] + shown[1] if view == "trace" else shown[1]
    assert tokenizer.decode(body) == written + (fmt.answer_end(view) if finished else "")
    at = answer_offset(tokenizer, fmt, view, ids)
    assert at is not None
    assert tokenizer.decode(body[:at]) == (shown[0] + fmt.close[0] if view == "trace" else "")


@pytest.mark.parametrize("name", ALL)
@FEW
@given(data=st.data(), text=TEXTS)
def test_offsets_agree_with_the_text_whatever_was_sampled(name: str, data: st.DataObject, text: str) -> None:
    """Arbitrary ids (half characters, spelled markers, markers across tokens): the index is where the text says.

    Mutation: finding the marker by its id only, or an off-by-one where a token lies across the boundary.
    """
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    noise = st.lists(st.integers(0, len(tokenizer) - 1), max_size=5)
    ids = [*data.draw(noise), *tokenizer.encode(text, add_special_tokens=False), *data.draw(noise)]
    ids += [
        *tokenizer.encode(data.draw(st.sampled_from(["", *fmt.close])), add_special_tokens=False),
        *data.draw(noise),
    ]
    at = answer_offset(tokenizer, fmt, "trace", ids)
    decoded = tokenizer.decode(ids)
    span = fmt.find_close(decoded)
    assert (at is None) == (span is None)
    if at is None or span is None:
        return
    head = decoded[: span[1]]
    assert tokenizer.decode(ids[:at]).startswith(head) and not tokenizer.decode(ids[: at - 1]).startswith(head)
    parts = fmt.split(decode_completion(tokenizer, fmt, ids), "trace")
    assert parts.closed and parts.trace == decoded[: span[0]]


@pytest.mark.parametrize("name", ALL)
@FEW
@given(system=st.none() | TEXTS, user=TEXTS, today=st.dates())
def test_prompts_are_prefixes_and_only_the_forced_block_differs(
    name: str, system: str | None, user: str, today
) -> None:
    """For any conversation: whether the block is scored changes no id; the scored part is the closing marker alone.

    Mutation: a training prompt that is not a prefix of what was sampled from, or a marker merged with the prompt.
    """
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    first = () if system is None else (Message(role="system", content=system),)
    messages = (*first, Message(role="user", content=user))
    trace, empty, unscored = (
        view_prompt(tokenizer, fmt, messages, view, scored, today=today)
        for view, scored in (("trace", True), ("empty", True), ("empty", False))
    )
    assert trace.completion_start == len(trace.prompt_ids)
    assert unscored.prompt_ids == empty.prompt_ids and unscored.completion_start == len(empty.prompt_ids)
    forced = tokenizer.encode(fmt.empty_close, add_special_tokens=False)
    assert list(empty.prompt_ids[empty.completion_start :]) == forced
    assert tokenizer.decode(trace.prompt_ids).endswith(fmt.open)
    assert tokenizer.decode(empty.prompt_ids[: empty.completion_start]).endswith(fmt.empty_open)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template_bos", [0, 1, 2])
@FEW
@given(user=TEXTS, with_bos=st.booleans())
def test_bos_starts_a_prompt_at_most_once(adds_bos: bool, template_bos: int, user: str, with_bos: bool) -> None:
    """Missing, double, or pasted into the system message: never two at the start, and one where one is wanted.

    Mutation: encoding with add_special_tokens=True, or trusting the template.
    """
    family = FAMILIES["r1-distill"]
    template = "{{ bos_token }}" * template_bos + family.template.removeprefix("{{ bos_token }}")
    tokenizer = build_tokenizer(replace(family, template=template, adds_bos=adds_bos))
    pasted = (Message(role="system", content=str(family.bos)),) if with_bos else ()
    messages = (*pasted, Message(role="user", content=user))
    ids = view_prompt(tokenizer, FORMATS["r1-distill"], messages, "empty").prompt_ids
    wanted = adds_bos or template_bos > 0 or with_bos
    assert (ids[0] == tokenizer.bos_token_id) == wanted and ids[1] != tokenizer.bos_token_id
