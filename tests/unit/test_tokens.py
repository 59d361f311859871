"""Tokenised quads: the right ids are scored, sampled ids stay as they were, and every lost pair is accounted for."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.formats import completion_ids, view_prompt
from bvpo.records import Message, Pair, Quad, Response, View
from bvpo.strict import UserError
from bvpo.training import tokenizing, tokens
from bvpo.training.tokenizing import (
    DROP_REASONS,
    Drop,
    TokenSettings,
    prepare_tokens,
    tokenize_quad,
    tokenize_views,
    tokenizer_fingerprint,
)
from bvpo.training.tokens import TokenDataset, TokenQuad
from tests.formats_fixtures import FAMILIES, build_tokenizer, format_of, tokenizer_of

TOKENIZER = tokenizer_of("r1-distill")
FMT = format_of("r1-distill")
SETTINGS = TokenSettings(max_length=500, vocab_size=len(TOKENIZER))
ASK = (Message(role="user", content="Is it so?"),)


def text_quad(**changes: Any) -> Quad:
    trace = Pair(
        view="trace",
        chosen=Response(trace="\nI think so.\n", answer="\n\nYes."),
        rejected=Response(trace="\nHm", answer="No.", finished=False),
    )
    empty = Pair(view="empty", chosen=Response(answer="\n\nYes."), rejected=Response(answer="\n\nNo."))
    return Quad(**({"id": "q", "messages": ASK, "trace": trace, "empty": empty} | changes))


def sampled_pair(
    view: View, chosen: list[int], rejected: list[int], prompt: list[int] | None = None, **kw: Any
) -> Pair:
    made = view_prompt(TOKENIZER, FMT, ASK, view)
    return Pair(
        view=view,
        chosen=Response(answer="Yes.", token_ids=tuple(chosen)),
        rejected=Response(answer="No.", token_ids=tuple(rejected)),
        prompt_ids=made.prompt_ids if prompt is None else tuple(prompt),
        completion_start=kw.get("start", made.completion_start),
    )


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


CLOSE = ids_of("</think>")
EOS = TOKENIZER.eos_token_id


def tokenized(quad: Quad, **changes: Any) -> TokenQuad:
    result = tokenize_quad(quad, TOKENIZER, FMT, replace(SETTINGS, **changes))
    assert isinstance(result, TokenQuad), result
    return result


def test_each_view_scores_what_the_paper_scores():
    """Guards: scoring the opening marker, leaving the forced `</think>` unscored, EOS after an unfinished response."""
    quad = tokenized(text_quad())
    chosen, rejected, empty, _ = quad.branches
    assert chosen is not None and rejected is not None and empty is not None
    assert TOKENIZER.decode(quad.prefix_ids) == "<｜begin▁of▁sentence｜><｜User｜>Is it so?<｜Assistant｜><think>"
    assert [b.scored_from for b in quad.branches if b] == [0, 0, 0, 0]
    assert TOKENIZER.decode(chosen.ids) == "\nI think so.\n</think>\n\nYes.<｜end▁of▁sentence｜>"
    assert TOKENIZER.decode(chosen.ids[chosen.answer_from :]) == "\n\nYes.<｜end▁of▁sentence｜>"
    assert TOKENIZER.decode(rejected.ids) == "\nHm</think>No."
    assert TOKENIZER.decode(empty.ids) == "</think>\n\nYes.<｜end▁of▁sentence｜>"
    assert TOKENIZER.decode(empty.ids[empty.answer_from :]) == "\n\nYes.<｜end▁of▁sentence｜>"
    assert quad.num_tokens == len(quad.prefix_ids) + sum(len(b.ids) for b in quad.branches if b)


def test_an_unscored_empty_block_becomes_prompt_tail():
    """Guards: dropping the forced block from the input when it is not scored (the model would see another prompt)."""
    scored, unscored = tokenized(text_quad()), tokenized(text_quad(), score_empty_block=False)
    for with_block, without in zip(scored.branches[2:], unscored.branches[2:], strict=True):
        assert with_block is not None and without is not None
        np.testing.assert_array_equal(without.ids, with_block.ids)
        assert (with_block.scored_from, without.scored_from, without.answer_from) == (0, 1, 1)
    np.testing.assert_array_equal(scored.prefix_ids, unscored.prefix_ids)
    np.testing.assert_array_equal(scored.branches[0].ids, unscored.branches[0].ids)
    # The same decision holds for sampled ids, whose record says where the forced block starts.
    quad = text_quad(trace=None, empty=sampled_pair("empty", ids_of("Yes."), ids_of("No.")))
    assert [tokenized(quad, score_empty_block=s).branches[2].ids[0] == CLOSE[0] for s in (True, False)] == [True, False]


def test_sampled_ids_are_never_tokenised_again():
    """Guards: decoding and encoding sampled ids, and adding or removing an end-of-sequence token."""
    spelled = [*(i for char in "think" for i in ids_of(char)), *CLOSE, *ids_of("Y"), *ids_of("e"), *ids_of("s")]
    assert ids_of(TOKENIZER.decode(spelled)) != spelled, "the example must not be canonical"
    quad = text_quad(trace=sampled_pair("trace", [*spelled, EOS], spelled), empty=None)
    chosen, rejected, *_ = tokenized(quad).branches
    assert chosen is not None and rejected is not None
    assert chosen.ids.tolist() == [*spelled, EOS] and rejected.ids.tolist() == spelled
    assert chosen.answer_from == rejected.answer_from == spelled.index(CLOSE[0]) + 1


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_prefix_and_branches_rebuild_the_sequences(data):
    """Guards: a prefix longer than the prompts (overlapping scored tokens) or shorter than it could be."""
    word = st.integers(0, 2).map(lambda i: ids_of("abc"[i])[0])
    pairs: dict[str, Pair] = {}
    for view in data.draw(st.sampled_from([("trace",), ("empty",), ("trace", "empty")])):
        prompt = ids_of("x") + data.draw(st.lists(word, max_size=5))
        start = data.draw(st.integers(1, len(prompt)))
        answers = [data.draw(st.lists(word, min_size=1, max_size=4)) for _ in range(2)]
        heads = [data.draw(st.lists(word, max_size=3)) + CLOSE if view == "trace" else [] for _ in range(2)]
        chosen, rejected = (head + answer for head, answer in zip(heads, answers, strict=True))
        if chosen != rejected:
            pairs[view] = sampled_pair(view, chosen, rejected, prompt, start=start)
    if not pairs:
        return
    quad = tokenized(Quad(id="q", messages=ASK, **pairs))
    prefix = quad.prefix_ids.tolist()
    training_prompts = [pair.prompt_ids[: pair.completion_start] for pair in pairs.values()]
    common = 0
    while all(len(p) > common for p in training_prompts) and len({p[common] for p in training_prompts}) == 1:
        common += 1
    assert len(prefix) == common >= 1
    for view, first in (("trace", 0), ("empty", 2)):
        pair = pairs.get(view)
        for branch, side in zip(quad.branches[first : first + 2], ("chosen", "rejected"), strict=True):
            if pair is None:
                assert branch is None
                continue
            sampled = getattr(pair, side).token_ids
            full = [*pair.prompt_ids, *sampled]
            assert branch is not None and prefix + branch.ids.tolist() == full
            assert common + branch.scored_from == pair.completion_start
            answer_at = sampled.index(CLOSE[0]) + 1 if view == "trace" else 0
            assert common + branch.answer_from == len(pair.prompt_ids) + answer_at
            assert branch.scored_from <= branch.answer_from < len(branch.ids)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_writes_the_prompt_and_the_completion_that_its_format_says(name):
    """Guards: a prefix that is not the format's prompt, in any family (GLM's prompts differ between the views)."""
    tokenizer, fmt, family = tokenizer_of(name), format_of(name), FAMILIES[name]
    pairs: dict[str, Pair] = {}
    for view, trace, answer in (("trace", family.trace, family.answer), ("empty", None, family.empty_answer)):
        good, bad = Response(trace=trace, answer=answer), Response(trace=trace, answer=answer + "!")
        pairs[view] = Pair(view=view, chosen=good, rejected=bad)
    quad = tokenize_quad(Quad(id="q", messages=ASK, **pairs), tokenizer, fmt, replace(SETTINGS, vocab_size=None))
    assert isinstance(quad, TokenQuad), quad
    for view, branch in (("trace", quad.branches[0]), ("empty", quad.branches[2])):
        prompt, response = view_prompt(tokenizer, fmt, ASK, view), pairs[view].chosen
        sampled = completion_ids(tokenizer, fmt, view, response.trace, response.answer, True)
        assert branch is not None
        assert quad.prefix_ids.tolist() + branch.ids.tolist() == [*prompt.prompt_ids, *sampled]
        assert len(quad.prefix_ids) + branch.scored_from == prompt.completion_start
        answer_ids = branch.ids[branch.answer_from :].tolist()
        assert tokenizer.decode(answer_ids).startswith(response.answer)


def swap(quad: Quad, view: View, **changes: Any) -> Quad:
    pair = quad.pair(view)
    assert pair is not None
    return replace(quad, **{view: replace(pair, **changes)})


YES = Response(trace="so", answer="Yes.")
DROPPED: dict[str, tuple[Quad, View]] = {
    tokenizing.OVER_LONG: (swap(text_quad(), "trace", rejected=Response(trace="so " * 600, answer="No.")), "trace"),
    tokenizing.IDENTICAL: (swap(text_quad(), "trace", chosen=YES, rejected=replace(YES, score=1.0)), "trace"),
    tokenizing.EMPTY_ANSWER: (swap(text_quad(), "empty", chosen=Response(answer=" \n")), "empty"),
    tokenizing.UNCLOSED_TRACE: (swap(text_quad(), "trace", rejected=Response(answer="Hm")), "trace"),
    tokenizing.TRACE_IN_EMPTY_VIEW: (swap(text_quad(), "empty", chosen=YES), "empty"),
    tokenizing.UNWRITABLE: (swap(text_quad(), "trace", chosen=replace(YES, trace="a</think>b")), "trace"),
    tokenizing.NO_PROMPT_TOKEN: (
        text_quad(trace=sampled_pair("trace", [*CLOSE, 1], [*CLOSE, 2], [], start=0)),
        "trace",
    ),
}


@pytest.mark.parametrize("reason", DROPPED)
def test_a_pair_is_dropped_for_its_reason_and_the_other_view_lives(reason):
    """Guards: removing the check, or dropping the whole quad with the pair."""
    quad, view = DROPPED[reason]
    result = tokenize_views(quad, TOKENIZER, FMT, SETTINGS)
    assert [(d.id, d.view, d.reason) for d in result.drops] == [("q", view, reason)]
    assert result.drops[0].detail
    assert result.quad is not None and result.quad.has_view == (view != "trace", view != "empty")
    alone = replace(quad, **{"empty" if view == "trace" else "trace": None})
    assert tokenize_quad(alone, TOKENIZER, FMT, SETTINGS) == result.drops[0]


def test_silence_can_be_rejected_as_it_was_sampled_and_never_chosen():
    """Mutation: a closing marker or end of sequence added to an unclosed trace, or such a pair kept where the trace view
    scores answers alone, of which it has no token, or lost where its end of sequence is one."""
    answer, thought = [*ids_of("Hm"), *CLOSE, *ids_of("No."), EOS], ids_of("Hm so")
    forced = text_quad(trace=None, empty=None)
    pairs = {
        "unclosed": sampled_pair("trace", answer, thought),
        "closed, cut there": sampled_pair("trace", answer, [*thought, *CLOSE]),
        "closed, ended there": sampled_pair("trace", answer, [*thought, *CLOSE, EOS]),
        "forced marker alone": sampled_pair("empty", ids_of("Yes."), []),
        "empty": sampled_pair("empty", ids_of("Yes."), [EOS]),
    }
    for name, pair in pairs.items():
        pair = replace(pair, rejected=replace(pair.rejected, answer=""))
        quad = tokenized(replace(forced, **{pair.view: pair}))
        branch = quad.branches[3 if pair.view == "empty" else 1]
        assert branch is not None and pair.prompt_ids is not None and pair.rejected.token_ids is not None, name
        assert [*quad.prefix_ids, *branch.ids] == [*pair.prompt_ids, *pair.rejected.token_ids], name
        answer_tokens = len(branch.ids) - branch.answer_from
        assert answer_tokens == (1 if name in ("empty", "closed, ended there") else 0), name
        alone = replace(SETTINGS, answer_only=True)
        kept = tokenize_quad(replace(forced, **{pair.view: pair}), TOKENIZER, FMT, alone)
        assert isinstance(kept, Drop) == (name in ("unclosed", "closed, cut there")), name
        lost = tokenize_quad(replace(forced, **{pair.view: pair.swap()}), TOKENIZER, FMT, SETTINGS)
        assert isinstance(lost, Drop) and lost.reason in (tokenizing.UNCLOSED_TRACE, tokenizing.EMPTY_ANSWER), name


def test_sampled_pairs_meet_the_same_checks():
    """Guards: trusting sampled ids blindly."""
    cut = sampled_pair("trace", ids_of("Hm so"), [*CLOSE, *ids_of("No.")])
    bare = sampled_pair("trace", [*ids_of("Hm"), *CLOSE], [*CLOSE, *ids_of("No.")])
    same = sampled_pair("empty", ids_of("Yes."), ids_of("Yes."))
    for pair, reason in ((cut, "unclosed_trace"), (bare, "empty_answer"), (same, "identical")):
        quad = Quad(id="q", messages=ASK, **{pair.view: pair})
        drop = tokenize_quad(quad, TOKENIZER, FMT, SETTINGS)
        assert isinstance(drop, Drop) and drop.reason == reason


def test_views_without_a_common_first_token_cannot_share_a_row():
    """Guards: a prefix of zero tokens, after which nothing predicts the first scored token."""
    trace = sampled_pair("trace", [*CLOSE, 5], [*CLOSE, 6], [11, 12], start=2)
    empty = sampled_pair("empty", [5], [6], [13, *CLOSE], start=1)
    result = tokenize_views(Quad(id="q", messages=ASK, trace=trace, empty=empty), TOKENIZER, FMT, SETTINGS)
    assert result.quad is None
    assert [(d.view, d.reason) for d in result.drops] == [("trace", "no_shared_prefix"), ("empty", "no_shared_prefix")]


def test_every_reason_is_reachable():
    """Guards: a reason in the table that no code gives."""
    missing = tokenize_quad(Quad(id="q", messages=ASK), TOKENIZER, FMT, SETTINGS)
    assert isinstance(missing, Drop)
    assert {*DROPPED, missing.reason, "no_shared_prefix"} == set(DROP_REASONS)


def test_the_length_limit_counts_prompt_and_response():
    """Guards: comparing the response alone, and `>=` for `>`."""
    quad = tokenized(text_quad(empty=None))
    longest = len(quad.prefix_ids) + max(len(b.ids) for b in quad.branches if b)
    assert tokenized(text_quad(empty=None), max_length=longest)
    drop = tokenize_quad(text_quad(empty=None), TOKENIZER, FMT, replace(SETTINGS, max_length=longest - 1))
    assert isinstance(drop, Drop) and drop.reason == "over_long" and str(longest) in drop.detail
    with pytest.raises(UserError, match=f"'q', trace view: {longest} tokens.*max_length = {longest - 1}"):
        tokenized(text_quad(empty=None), max_length=longest - 1, over_long="refuse")


HALF = replace(sampled_pair("trace", [*CLOSE, 5], [*CLOSE, 6]), rejected=Response(answer="No."))


@pytest.mark.parametrize(
    ("quad", "words"),
    [
        (text_quad(trace=sampled_pair("trace", [*CLOSE, 5], [*CLOSE, 99999])), "token id 99999.*vocabulary size"),
        (text_quad(trace=sampled_pair("trace", [*CLOSE, -1], [*CLOSE, 5])), "token id -1"),
        (
            text_quad(trace=sampled_pair("trace", [*CLOSE, 5], [*CLOSE, 6], [7, 10**6], start=2)),
            "prompt_ids: token id 10",
        ),
        (text_quad(trace=sampled_pair("trace", [*CLOSE, 5], [*CLOSE, 6], start=10**4)), "completion_start.*10000"),
        (text_quad(trace=HALF), "rejected.token_ids.*null"),
        (text_quad(trace=replace(HALF, prompt_ids=None)), "prompt_ids.*null"),
        (text_quad(trace=replace(text_quad().trace, view="empty")), "'view': got 'empty'"),
        (text_quad(messages=(Message(role="assistant", content="I"),)), "trace view: a conversation must end"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(quad, words):
    """Guards: ids of another model reaching the embedding, and half-sampled pairs being tokenised from text."""
    with pytest.raises(UserError, match=words) as error:
        tokenize_quad(quad, TOKENIZER, FMT, SETTINGS)
    assert "quad 'q', trace view" in str(error.value)


def test_the_vocabulary_is_checked_only_where_it_is_known():
    """Guards: `len(tokenizer)` taken for the size of the embedding (they differ in most models)."""
    quad = text_quad(trace=sampled_pair("trace", [*CLOSE, 9000], [*CLOSE, 5]), empty=None)
    assert tokenized(quad, vocab_size=9001).branches[0].ids[-1] == 9000
    with pytest.raises(UserError, match="9000"):
        tokenized(quad, vocab_size=9000)
    with pytest.raises(UserError, match=r"2\*\*31"):
        tokenized(text_quad(trace=sampled_pair("trace", [*CLOSE, 2**31], [5, *CLOSE])), vocab_size=None)


# ---- the dataset on disk ---------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """Quads that count how often they were read, or fail part of the way."""

    quads: list[Quad]
    fingerprint: str = "source"
    passes: int = 0
    fail_at: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Quad]:
        self.passes += 1
        for i, quad in enumerate(self.quads):
            if i == self.fail_at:
                raise KeyboardInterrupt
            yield quad


def some_quads() -> list[Quad]:
    quads = [
        replace(text_quad(), id=f"q{i}", messages=(Message(role="user", content="so " * i + "?"),)) for i in range(7)
    ]
    quads[1] = replace(quads[1], empty=None)
    quads[2] = replace(quads[2], trace=None)
    quads[3] = replace(DROPPED["identical"][0], id="half")
    quads[4] = replace(DROPPED["unclosed_trace"][0], id="gone", empty=None)
    return quads


def prepare(folder, stream: Stream, **changes: Any) -> TokenDataset:
    kw = {"tokenizer": TOKENIZER, "fmt": FMT, "settings": SETTINGS} | changes
    build = kw.pop("build", True)
    return prepare_tokens(stream, kw["tokenizer"], kw["fmt"], kw["settings"], folder, build=build)


def same(a: TokenQuad, b: TokenQuad) -> bool:
    def plain(quad: TokenQuad) -> Any:
        branches = [b and (b.ids.tolist(), b.scored_from, b.answer_from) for b in quad.branches]
        return quad.id, quad.prefix_ids.tolist(), branches

    return plain(a) == plain(b)


def test_a_dataset_returns_what_was_tokenised(tmp_path, monkeypatch):
    """Guards: row arithmetic across record batches, and branches put back in another order."""
    monkeypatch.setattr(tokens, "_BATCH_QUADS", 2)
    dataset = prepare(tmp_path, Stream(some_quads()))
    expected = [tokenize_views(q, TOKENIZER, FMT, SETTINGS).quad for q in some_quads()]
    expected = [quad for quad in expected if quad is not None]
    assert len(dataset) == len(expected) == 6
    for order in (range(6), reversed(range(6))):
        assert all(same(dataset[i], expected[i]) for i in order)
    assert all(same(a, b) for a, b in zip(dataset, expected, strict=True))
    assert same(dataset[-1], expected[5]) and dataset[0].prefix_ids.dtype == np.int32
    assert dataset.num_tokens.tolist() == [quad.num_tokens for quad in expected]
    assert dataset.has_view.tolist() == [list(quad.has_view) for quad in expected]
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]
    again = pickle.loads(pickle.dumps(dataset))
    assert same(again[3], expected[3]) and again.fingerprint == dataset.fingerprint


def test_losses_are_counted_by_view_and_reason_and_listed(tmp_path, caplog):
    """Guards: counting quads for pairs, losing the list, listing every missing view, silence when tokens are reused."""
    prepare(tmp_path, Stream(some_quads()))
    with caplog.at_level(logging.INFO):
        dataset = prepare(tmp_path, Stream(some_quads()))
    assert "6 quads to train on, 1 dropped; pairs lost: 2 empty/missing_view, 1 trace" in caplog.text
    assert dataset.drops == {
        "empty/missing_view": 2,
        "trace/missing_view": 1,
        "trace/identical": 1,
        "trace/unclosed_trace": 1,
    }
    assert dataset.num_dropped_quads == 1
    listed = [json.loads(line) for line in (dataset.folder / "drops.jsonl").read_text().splitlines()]
    assert [(d["id"], d["view"], d["reason"]) for d in listed] == [
        ("half", "trace", "identical"),
        ("gone", "trace", "unclosed_trace"),
    ]


def test_the_same_content_is_tokenised_once_and_other_content_again(tmp_path):
    """Guards: a fingerprint that forgets the data, the tokenizer, the format or a setting."""
    stream = Stream(some_quads())
    first = prepare(tmp_path, stream)
    second = prepare(tmp_path, stream)
    assert stream.passes == 1 and second.fingerprint == first.fingerprint and second.drops == first.drops
    other_tokenizer = build_tokenizer(FAMILIES["r1-distill"])
    other_tokenizer.chat_template = other_tokenizer.chat_template.replace("User", "Human")
    changes: list[dict[str, Any]] = [
        {"settings": replace(SETTINGS, max_length=499)},
        {"settings": replace(SETTINGS, over_long="refuse")},
        {"settings": replace(SETTINGS, score_empty_block=False)},
        {"settings": replace(SETTINGS, vocab_size=None)},
        {"tokenizer": other_tokenizer},
        {"fmt": replace(FMT, empty_close="</think>\n\n")},
    ]
    prints = {first.fingerprint, *(prepare(tmp_path, stream, **change).fingerprint for change in changes)}
    prints.add(prepare(tmp_path, Stream(some_quads(), fingerprint="another source")).fingerprint)
    assert len(prints) == len(changes) + 2


def test_tokenizer_fingerprint_ignores_state_and_sees_content():
    """Guards: a rebuild after every call with padding, and missing an added token."""
    tokenizer = build_tokenizer(FAMILIES["r1-distill"])
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(build_tokenizer(FAMILIES["r1-distill"])) == before
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == padded
    tokenizer.add_tokens(["<new>"])
    assert len({before, padded, tokenizer_fingerprint(tokenizer)}) == 3


def test_an_interrupted_build_leaves_nothing_and_a_damaged_one_is_repeated(tmp_path, caplog):
    """Guards: building in place, and trusting a file that was cut or belongs to other data."""
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, Stream(some_quads(), fail_at=5))
    assert list(tmp_path.iterdir()) == []
    dataset = prepare(tmp_path, Stream(some_quads()))
    expected = [quad.num_tokens for quad in dataset]
    foreign = prepare(tmp_path, Stream(some_quads()[:2], fingerprint="less")).folder / "tokens.arrow"
    for name, content in (
        ("tokens.arrow", lambda body: body[:-100]),
        ("tokens.arrow", lambda body: foreign.read_bytes()),
        ("summary.json", lambda body: body[:-10]),
    ):
        path = dataset.folder / name
        path.write_bytes(content(path.read_bytes()))
        repaired = prepare(tmp_path, Stream(some_quads()))
        assert repaired.num_tokens.tolist() == expected and "damaged" in caplog.text
        caplog.clear()


def test_two_builders_at_once_end_with_one_dataset(tmp_path, monkeypatch):
    """Guards: removing a dataset that another process has just finished and is reading."""
    finished = prepare(tmp_path, Stream(some_quads()))
    inode = finished.folder.stat().st_ino
    real, calls = tokenizing._open_intact, []

    def late(target):
        calls.append(target)
        return None if len(calls) == 1 else real(target)  # this process looked before the other one was done

    monkeypatch.setattr(tokenizing, "_open_intact", late)
    assert len(prepare(tmp_path, Stream(some_quads()))) == len(finished)
    assert finished.folder.stat().st_ino == inode and [p.name for p in tmp_path.iterdir()] == [finished.folder.name]


def test_only_the_building_rank_builds(tmp_path):
    """Guards: every rank of a run tokenising the data."""
    stream = Stream(some_quads())
    with pytest.raises(FileNotFoundError, match="building rank"):
        prepare(tmp_path, stream, build=False)
    assert stream.passes == 0
    built = prepare(tmp_path, stream)
    assert prepare(tmp_path, stream, build=False).fingerprint == built.fingerprint


def test_nothing_left_is_an_error_with_its_reasons(tmp_path):
    """Guards: training on zero quads."""
    with pytest.raises(UserError, match="1 empty/missing_view, 1 trace/unclosed_trace; quad 'gone'"):
        prepare(tmp_path, Stream([some_quads()[4]]))
    with pytest.raises(UserError, match=r"on: 1 trace/missing_view, 1 empty/missing_view \(all in"):
        prepare(tmp_path, Stream([Quad(id="none", messages=ASK)], fingerprint="no pair"))
    with pytest.raises(UserError, match="holds no quad"):
        prepare(tmp_path, Stream([], fingerprint="nothing"))
