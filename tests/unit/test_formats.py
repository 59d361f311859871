"""Reasoning formats: prompts, splits, tokens and detection, on tiny tokenizers with the families' markers."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest

from bvpo.formats import (
    FORMATS,
    FormatSpec,
    ReasoningFormat,
    Split,
    answer_offset,
    completion_ids,
    decode_completion,
    define_format,
    detect_format,
    end_ids,
    get_format,
    render,
    resolve_format,
    view_prompt,
)
from bvpo.records import Message
from bvpo.strict import UserError
from tests.formats_doc import DOC, with_generated_parts
from tests.formats_fixtures import FAMILIES, build_tokenizer, format_of, tokenizer_of

HI = (Message(role="user", content="Hi"),)
ALL = sorted(FAMILIES)
SINGLE_TOKEN = [n for n in ALL if len(tokenizer_of(n).encode(format_of(n).close[0], add_special_tokens=False)) == 1]


def ids_of(name: str, text: str) -> list[int]:
    return tokenizer_of(name).encode(text, add_special_tokens=False)


# ---- the registry and its page ---------------------------------------------------------------------------------------


def test_every_format_has_a_fixture_and_every_name_is_its_key() -> None:
    """Mutation: a registry entry under another key, or a format nobody tests."""
    assert {family.format for family in FAMILIES.values()} == set(FORMATS)
    assert all(key == fmt.name for key, fmt in FORMATS.items())


def test_every_format_states_what_is_verified_or_a_lead() -> None:
    """Mutation: an entry that claims nothing about where its facts come from."""
    assert all(fmt.verified or fmt.lead for fmt in FORMATS.values())


def test_generated_documentation_is_current() -> None:
    """Mutation: any change of which tokens are scored. Rewrite with ``python -m tests.formats_doc`` after looking."""
    page = DOC.read_text(encoding="utf-8")
    assert page == with_generated_parts(page)


def test_documented_code_runs() -> None:
    """Mutation: a renamed function or field that the page still shows."""
    page = DOC.read_text(encoding="utf-8")
    tokenizer = tokenizer_of("r1-distill")
    names = {
        "tokenizer": tokenizer,
        "sampled_text": "so</think>Yes",
        "sampled_ids": ids_of("r1-distill", "so</think>Yes"),
    }
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)  # type: ignore[index]
    table = tomllib.loads(re.search(r"```toml\n(.*?)```", page, flags=re.DOTALL)[1])["model"]["custom_format"]  # type: ignore[index]
    assert define_format(table).open == "<think>\n"


def test_documented_fields_are_all_fields() -> None:
    """Mutation: a field of user-defined formats that the page does not explain."""
    page = DOC.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", page.split("## A format of your own")[1], flags=re.MULTILINE)
    assert {field for row in rows for field in re.findall(r"`(\w+)`", row)} == {
        f for f in FormatSpec.__dataclass_fields__ if f != "name"
    }


def test_importing_formats_loads_no_framework() -> None:
    """Mutation: importing transformers or jinja2 at module level."""
    code = "import sys, bvpo.formats; sys.exit(bool({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_r1_has_the_papers_forms() -> None:
    """Mutation: leaving the template's newline after <think>, or scoring from elsewhere than </think>."""
    tokenizer, fmt = tokenizer_of("r1-distill"), get_format("r1-distill")
    think, end_think = ids_of("r1-distill", "<think>")[0], ids_of("r1-distill", "</think>")[0]
    trace = view_prompt(tokenizer, fmt, HI, "trace")
    empty = view_prompt(tokenizer, fmt, HI, "empty")
    assert trace.prompt_ids[-1] == think and trace.completion_start == len(trace.prompt_ids)
    assert empty.prompt_ids == (*trace.prompt_ids, end_think)
    assert empty.completion_start == len(empty.prompt_ids) - 1  # </think> is scored
    unscored = view_prompt(tokenizer, fmt, HI, "empty", score_empty_block=False)
    assert unscored.prompt_ids == empty.prompt_ids and unscored.completion_start == len(empty.prompt_ids)


@pytest.mark.parametrize("name", ALL)
def test_prompts_end_with_the_formats_own_markers(name: str) -> None:
    """Mutation: doubling the marker that the template already wrote, or losing it."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    trace = tokenizer.decode(view_prompt(tokenizer, fmt, HI, "trace").prompt_ids)
    empty = view_prompt(tokenizer, fmt, HI, "empty")
    text = tokenizer.decode(empty.prompt_ids)
    assert trace.endswith(fmt.open) and not trace.removesuffix(fmt.open).rstrip().endswith(fmt.open.strip())
    assert text.endswith(fmt.empty_open + fmt.empty_close)
    base = text.removesuffix(fmt.empty_open + fmt.empty_close).rstrip()
    assert not base.endswith((fmt.open.strip(), fmt.close[0].strip()))
    assert tokenizer.decode(empty.prompt_ids[empty.completion_start :]) == fmt.empty_close


@pytest.mark.parametrize("name", [n for n in ALL if not (format_of(n).empty_kwargs or format_of(n).empty_system)])
def test_training_prompts_without_a_switch_share_everything_but_the_block(name: str) -> None:
    """Mutation: encoding marker and conversation so that the views' tokens part before the opening marker."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    trace, empty = (view_prompt(tokenizer, fmt, HI, view) for view in ("trace", "empty"))
    parts = [p.prompt_ids[: p.completion_start] for p in (trace, empty)]
    shared = next((i for i, pair in enumerate(zip(*parts, strict=False)) if pair[0] != pair[1]), min(map(len, parts)))
    longest_block = max(len(ids_of(name, fmt.open)), len(ids_of(name, fmt.empty_open)))
    assert shared >= max(map(len, parts)) - longest_block
    if name.startswith("r1"):
        assert parts[0] == parts[1]


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "qwen3.5-nothink", "nemotron", "nemotron-v2", "nemotron-v1.5"])
def test_switched_prompts_share_everything_up_to_the_opening_marker(name: str) -> None:
    """Mutation: setting a family's switch in one view only, where its text stays in the prompt."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    texts = [tokenizer.decode(view_prompt(tokenizer, fmt, HI, v).prompt_ids) for v in ("trace", "empty")]
    assert len({text[: text.index("<think>")] for text in texts}) == 1


def test_switches_reach_the_prompt() -> None:
    """Mutation: dropping the view's template variables, system text or user suffix."""
    glm = tokenizer_of("glm-4.5")
    texts = [glm.decode(view_prompt(glm, FORMATS["glm-4.5"], HI, v).prompt_ids) for v in ("trace", "empty")]
    assert "Hi<|assistant|>" in texts[0] and "Hi/nothink<|assistant|>" in texts[1]
    llama = tokenizer_of("nemotron-v1")
    told = (Message(role="system", content="Be brief."), *HI)
    text = llama.decode(view_prompt(llama, FORMATS["nemotron-v1"], told, "empty").prompt_ids)
    assert "detailed thinking off\n\nBe brief.<|eot_id|>" in text
    suffixed = define_format({"base": "qwen3", "empty_user_suffix": " /no_think"})
    qwen = tokenizer_of("qwen3")
    assert "Hi /no_think<|im_end|>" in qwen.decode(view_prompt(qwen, suffixed, HI, "empty").prompt_ids)
    assert "Hi<|im_end|>" in qwen.decode(view_prompt(qwen, suffixed, HI, "trace").prompt_ids)


def test_half_an_empty_block_of_the_templates_is_taken_off() -> None:
    """Mutation: ignoring template_tails; Seed-OSS's own opening of the block would stand twice."""
    tokenizer = tokenizer_of("seed-oss")
    text = tokenizer.decode(view_prompt(tokenizer, FORMATS["seed-oss"], HI, "empty").prompt_ids)
    assert text.count("<seed:think>") == 1 and text.count("<seed:cot_budget_reflect>") == 1


def test_a_switch_in_the_users_turn_needs_one() -> None:
    """Mutation: an empty view that is not switched, silently."""
    suffixed = define_format({"base": "qwen3", "empty_user_suffix": " /no_think"})
    with pytest.raises(UserError, match="in the user's turn, but there is none"):
        view_prompt(tokenizer_of("qwen3"), suffixed, (Message(role="tool", content="7"),), "empty")


@pytest.mark.parametrize(
    ("template_bos", "adds_bos", "expected"), [(0, True, 1), (1, True, 1), (2, True, 1), (2, False, 1), (0, False, 0)]
)
def test_bos_comes_exactly_once(template_bos: int, adds_bos: bool, expected: int) -> None:
    """Mutation: encoding with add_special_tokens=True (two), or never adding a missing one."""
    family = FAMILIES["r1-distill"]
    body = family.template.removeprefix("{{ bos_token }}")
    family = replace(family, template="{{ bos_token }}" * template_bos + body, adds_bos=adds_bos)
    tokenizer = build_tokenizer(family)
    ids = view_prompt(tokenizer, get_format("r1-distill"), HI, "trace").prompt_ids
    assert ids.count(tokenizer.bos_token_id) == expected
    assert expected == 0 or ids[0] == tokenizer.bos_token_id


def test_families_that_begin_each_turn_with_bos_keep_it() -> None:
    """Mutation: removing every bos but the first."""
    tokenizer = tokenizer_of("seed-oss")
    assert view_prompt(tokenizer, FORMATS["seed-oss"], HI, "trace").prompt_ids.count(tokenizer.bos_token_id) == 2


def test_dates_in_templates_do_not_follow_the_clock() -> None:
    """Mutation: letting the template call strftime_now, which changes every sample key at midnight."""
    tokenizer, fmt = tokenizer_of("gpt-oss"), FORMATS["gpt-oss"]
    assert "Current date: 2025-01-01" in tokenizer.decode(view_prompt(tokenizer, fmt, HI, "trace").prompt_ids)
    later = view_prompt(tokenizer, fmt, HI, "trace", today=date(2031, 5, 6))
    assert "Current date: 2031-05-06" in tokenizer.decode(later.prompt_ids)
    computed = build_tokenizer(replace(FAMILIES["gpt-oss"], template="{% set f = '%Y' %}{{ strftime_now(f) }}"))
    with pytest.raises(UserError, match="the clock's date"):
        view_prompt(computed, fmt, HI, "trace")


def test_traces_of_earlier_turns_go_through_the_template() -> None:
    """Mutation: rendering history by hand; the template deletes old traces, and that is what the model sees."""
    tokenizer = tokenizer_of("r1-distill")
    talk = (*HI, Message(role="assistant", content="so</think>Yes"), *HI)
    text = tokenizer.decode(view_prompt(tokenizer, FORMATS["r1-distill"], talk, "trace").prompt_ids)
    assert "<｜Assistant｜>Yes<" in text and "so" not in text


@pytest.mark.parametrize(
    ("messages", "problem"),
    [((), "no message"), ((*HI, Message(role="assistant", content="Yes")), "'assistant'")],
)
def test_conversations_must_end_with_a_user_turn(messages: tuple[Message, ...], problem: str) -> None:
    """Mutation: opening the model's turn behind the model's own answer."""
    with pytest.raises(UserError, match=f"end with a user turn, got {problem}"):
        view_prompt(tokenizer_of("qwen3"), FORMATS["qwen3"], messages, "trace")


def test_a_template_that_refuses_or_is_missing_is_the_users_error() -> None:
    """Mutation: letting a Jinja or transformers traceback through."""
    refusing = build_tokenizer(replace(FAMILIES["qwen3"], template="{{ raise_exception('no system role') }}"))
    with pytest.raises(UserError, match="cannot render this conversation: no system role"):
        view_prompt(refusing, FORMATS["qwen3"], HI, "trace")
    refusing.chat_template = None
    with pytest.raises(UserError, match="no chat template to use"):
        view_prompt(refusing, FORMATS["qwen3"], HI, "trace")


def test_a_template_that_empties_the_trace_view_is_refused() -> None:
    """Mutation: silently reopening a trace that the template insists on emptying."""
    always = replace(FAMILIES["qwen3"], template="{{ messages[0].content + '<|im_end|><think>\n\n</think>\n\n' }}")
    with pytest.raises(UserError, match=r"forces an empty trace.*model\.format"):
        view_prompt(build_tokenizer(always), FORMATS["qwen3"], HI, "trace")
    assert view_prompt(build_tokenizer(always), FORMATS["qwen3"], HI, "empty").prompt_ids


def test_lone_surrogates_are_refused() -> None:
    """Mutation: a TypeError from inside the tokenizer for text that JSON can hold."""
    with pytest.raises(UserError, match="surrogate"):
        completion_ids(tokenizer_of("qwen3"), FORMATS["qwen3"], "empty", None, "a\ud800b", True)


KEEP_HISTORY = {"kimi-k2-thinking", "olmo-3-think", "smollm3", "phi-4-mini-reasoning"}


@pytest.mark.parametrize(
    "name", ["deepseek-v3.1", "glm-4.7", "lfm2.5", "gemma-4", "exaone-deep", *sorted(KEEP_HISTORY)]
)
@pytest.mark.parametrize("view", ["trace", "empty"])
def test_each_familys_template_decides_on_earlier_traces(name: str, view: str) -> None:
    """Mutation: taking the templates' word for the history by hand, or a second opening marker in the prompt's end."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    talk = (*HI, Message(role="assistant", content=f"{fmt.open}OLD{fmt.close[0]}Yes"), *HI)
    text = tokenizer.decode(view_prompt(tokenizer, fmt, talk, view).prompt_ids)  # type: ignore[arg-type]
    assert ("OLD" in text) == (name in KEEP_HISTORY) and "Yes" in text
    end = fmt.open if view == "trace" else fmt.empty_open + fmt.empty_close
    assert text.endswith(end) and not text.removesuffix(end).endswith((fmt.open, *fmt.close))


# ---- splitting text --------------------------------------------------------------------------------------------------

R1 = FORMATS["r1-distill"]


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("so\n</think>\n\nYes", Split(trace="so\n", answer="\n\nYes", closed=True)),
        ("so</think>", Split(trace="so", answer="", closed=True)),
        ("</think>Yes", Split(trace="", answer="Yes", closed=True)),
        ("so, Yes", Split(trace="so, Yes", answer=None, closed=False)),
        ("", Split(trace="", answer=None, closed=False)),
        ("a</think>b</think>c", Split(trace="a", answer="b</think>c", closed=True)),
        ("a<think>b</think>c", Split(trace="a<think>b", answer="c", closed=True)),
        ("```\n</think>\n```", Split(trace="```\n", answer="\n```", closed=True)),
        (" \n</think>\t", Split(trace=" \n", answer="\t", closed=True)),
        ("a</think", Split(trace="a</think", answer=None, closed=False)),
    ],
)
def test_the_first_closing_marker_ends_the_trace(text: str, split: Split) -> None:
    """Mutation: splitting at the last marker, stripping whitespace, or calling an unclosed trace an answer."""
    assert R1.split(text, "trace") == split


def test_the_empty_view_has_only_an_answer() -> None:
    """Mutation: looking for a marker in the empty view, where an answer may mention it."""
    assert R1.split("Write </think> to stop.", "empty") == Split(
        trace=None, answer="Write </think> to stop.", closed=True
    )


def test_markers_of_several_tokens_and_wrapped_answers() -> None:
    """Mutation: reading one spelling only, or leaving the wrapper in the answer that is scored."""
    granite, hunyuan = FORMATS["granite"], FORMATS["hunyuan"]
    for marker in ("Here is my response:", "Here's my response:"):
        assert granite.split(f" so {marker} Yes", "trace") == Split(trace=" so ", answer=" Yes", closed=True)
    whole = "so\n</think>\n<answer>\nYes\n</answer>"
    assert hunyuan.split(whole, "trace") == Split(trace="so\n", answer="Yes\n", closed=True)
    assert hunyuan.split("so</think>Yes", "trace") == Split(trace="so", answer="Yes", closed=True)
    assert hunyuan.split("Yes</answer>", "empty").answer == "Yes"
    assert FORMATS["granite-3.3"].split("Yes</response>", "empty").answer == "Yes</response>"  # nothing opened it
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert FORMATS["gpt-oss"].split(f"so{final}Yes", "trace") == Split(trace="so", answer="Yes", closed=True)


@pytest.mark.parametrize(
    ("name", "view", "text", "split"),
    [
        ("r1-distill", "trace", "<think>\nso</think>Yes", ("\nso", "Yes")),
        ("qwen3", "trace", "<think>\nso\n</think>\n\nYes", ("so\n", "\n\nYes")),
        ("qwen3", "trace", "<think>so</think>Yes", ("so", "Yes")),
        ("qwen3", "trace", "so</think>Yes", ("so", "Yes")),
        ("glm-4.5", "trace", "<think>so</think>\nYes", ("so", "\nYes")),
        ("r1-distill", "empty", "</think>\n\nYes", (None, "\n\nYes")),
        ("r1-distill", "empty", "<think>\n\n</think>\n\nYes", (None, "\n\nYes")),
        ("r1-distill", "empty", "Yes", (None, "Yes")),
        ("qwen3", "empty", "<think>\n\n</think>\n\nYes", (None, "Yes")),
        ("qwen3", "empty", "<think></think>Yes", (None, "Yes")),
        ("magistral", "empty", "[THINK][/THINK]Yes", (None, "Yes")),
        ("gpt-oss", "empty", "<|channel|>final<|message|>Yes", (None, "Yes")),
    ],
)
def test_whole_messages_lose_what_the_prompt_carries(
    name: str, view: str, text: str, split: tuple[str | None, str]
) -> None:
    """Mutation: keeping the opening marker (it would stand twice) or eating whitespace the prompt does not hold."""
    assert FORMATS[name].split_message(text, view) == Split(trace=split[0], answer=split[1], closed=True)  # type: ignore[arg-type]


def test_a_message_with_a_trace_does_not_belong_in_the_empty_view() -> None:
    """Mutation: importing a trace as part of the answer."""
    with pytest.raises(UserError, match="empty view has no trace"):
        R1.split_message("<think>so</think>Yes", "empty")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("finished", [True, False])
def test_completions_read_back_and_end_only_when_finished(name: str, finished: bool) -> None:
    """Mutation: an end token on a truncated response, none on a finished one, or a marker in the wrong place."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    for view, trace in (("trace", "I think so.\n"), ("empty", None)):
        ids = completion_ids(tokenizer, fmt, view, trace, "\n\nYes.", finished)
        assert (ids[-1] in end_ids(tokenizer, fmt)) == finished
        text = decode_completion(tokenizer, fmt, ids)
        assert fmt.split(text, view) == Split(trace=trace, answer="\n\nYes.", closed=True)
        at = answer_offset(tokenizer, fmt, view, ids)
        assert at is not None and tokenizer.decode(ids[at:]).startswith("\n\nYes.")


def test_glm_ends_a_turn_with_the_next_turns_token() -> None:
    """Mutation: ending with the tokenizer's eos, which GLM never samples; engines must stop at both."""
    tokenizer = tokenizer_of("glm-4.5")
    ends = end_ids(tokenizer, FORMATS["glm-4.5"])
    assert tokenizer.convert_ids_to_tokens(list(ends)) == ["<|user|>", "<|endoftext|>"]
    assert completion_ids(tokenizer, FORMATS["glm-4.5"], "empty", None, "Yes", True)[-1] == ends[0]


def test_missing_end_tokens_are_the_users_error() -> None:
    """Mutation: writing an ordinary token where the end token is missing."""
    with pytest.raises(UserError, match="which this tokenizer lacks"):
        end_ids(tokenizer_of("qwen3"), FORMATS["glm-4.5"])
    endless = build_tokenizer(FAMILIES["qwen3"])
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        end_ids(endless, FORMATS["qwen3"])


@pytest.mark.parametrize(
    ("name", "view", "trace", "answer", "problem"),
    [
        ("r1-distill", "trace", "a</think>b", "Yes", "closing marker '</think>'"),
        ("granite", "trace", "Here's my response: b", "Yes", "closing marker"),
        ("r1-distill", "trace", None, "Yes", "needs a trace"),
        ("r1-distill", "empty", "so", "Yes", "empty view has no trace"),
        ("qwen3", "trace", "so", "Yes<|im_end|>No", "end-of-turn token"),
        ("qwen3", "trace", "so<|im_end|>", "Yes", "end-of-turn token"),
        ("glm-4.5", "empty", None, "Yes<|user|>", "end-of-turn token"),
    ],
)
def test_what_would_be_corrupted_is_refused(name: str, view: str, trace: str | None, answer: str, problem: str) -> None:
    """Mutation: writing it anyway; it would be read back as another trace and answer."""
    with pytest.raises(UserError, match=problem):
        completion_ids(tokenizer_of(name), FORMATS[name], view, trace, answer, True)  # type: ignore[arg-type]


def test_an_unfinished_answer_that_looks_finished_is_refused() -> None:
    """Mutation: losing Hunyuan's </answer> from an answer that was cut right behind it."""
    with pytest.raises(UserError, match="cannot write"):
        FORMATS["hunyuan"].join("trace", "so", "Yes</answer>", finished=False)


def test_a_marker_made_by_the_tokenizers_normaliser_is_refused() -> None:
    """Mutation: checking the text only; NFKC turns full-width text into the marker's own token."""
    from tokenizers import normalizers

    tokenizer = build_tokenizer(FAMILIES["qwen3"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(UserError, match="as tokens, the trace contains the closing marker"):
        completion_ids(tokenizer, FORMATS["qwen3"], "trace", "a＜/think＞b", "Yes", True)


def test_tokenizers_that_insert_spaces_between_pieces_are_refused() -> None:
    """Mutation: joining pieces of a leading-space tokenizer, which puts a space behind every marker."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer = build_tokenizer(FAMILIES["qwen3"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(UserError, match="leading-space tokenizer"):
        completion_ids(tokenizer, FORMATS["qwen3"], "trace", "so", "Yes", True)


# ---- where the answer begins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE_TOKEN)
@pytest.mark.parametrize(
    ("trace", "answer"), [("so", "Yes"), ("", ""), ("so <think> é", "a </think> b"), ("\n", "\n\n"), ("日本", "🙂")]
)
def test_offsets_agree_between_one_token_and_spelled_markers(name: str, trace: str, answer: str) -> None:
    """The same text with the marker as one token and as ordinary tokens gives the same answer.

    Mutation: an off-by-one in either way of finding the marker, or counting characters as tokens.
    """
    fmt, single = format_of(name), tokenizer_of(name)
    spelled = build_tokenizer(replace(FAMILIES[name], plain=(), special=FAMILIES[name].special[:3]))
    marker = fmt.close[0]
    answer = answer.replace("</think>", marker)
    starts = []
    for tokenizer in (single, spelled):
        before, close, after = (tokenizer.encode(t, add_special_tokens=False) for t in (trace, marker, answer))
        assert (len(close) == 1) == (tokenizer is single)
        ids = [*before, *close, *after]
        at = answer_offset(tokenizer, fmt, "trace", ids)
        assert at == len(before) + len(close)
        starts.append(tokenizer.decode(ids[at:]))
    assert starts[0] == starts[1] == answer


@pytest.mark.parametrize("name", ALL)
def test_no_marker_means_no_answer(name: str) -> None:
    """Mutation: returning the end of the response instead of None."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    cut = ids_of(name, "I think so" + fmt.close[-1])[:-1]
    assert answer_offset(tokenizer, fmt, "trace", cut) is None
    assert answer_offset(tokenizer, fmt, "trace", []) is None
    assert answer_offset(tokenizer, fmt, "empty", cut) == 0


def test_a_token_across_the_boundary_counts_as_marker() -> None:
    """Mutation: starting the answer inside a token, or one token late when there is none across."""
    tokenizer, fmt = tokenizer_of("granite"), FORMATS["granite"]
    joint = ids_of("granite", " so Here is my response:\n\nYes")
    at = answer_offset(tokenizer, fmt, "trace", joint)
    assert at is not None and tokenizer.decode(joint[at:]) == "Yes" and tokenizer.decode([joint[at - 1]]) == ":\n\n"
    apart = ids_of("granite", " so Here is my response: Yes")
    at = answer_offset(tokenizer, fmt, "trace", apart)
    assert at is not None and tokenizer.decode(apart[at:]) == " Yes"


def test_a_spelled_marker_before_the_token_ends_the_trace() -> None:
    """Mutation: trusting the marker's token id alone; the text, and so the scored answer, would disagree."""
    tokenizer = tokenizer_of("r1-distill")
    spelled = [i for part in ("<", "/think", ">") for i in ids_of("r1-distill", part)]
    ids = ids_of("r1-distill", "so") + spelled + ids_of("r1-distill", "Yes</think>No")
    at = answer_offset(tokenizer, R1, "trace", ids)
    assert at is not None and tokenizer.decode(ids[at:]) == "Yes</think>No"


def test_of_two_markers_that_start_together_the_longer_one_counts() -> None:
    """Mutation: stopping at the marker that is one token without looking at what follows."""
    fmt = define_format({"open": "<think>", "close": ["</think>", "</think>\n<answer>"]})
    ids = ids_of("qwen3", "so</think>\n<answer>Yes")
    at = answer_offset(tokenizer_of("qwen3"), fmt, "trace", ids)
    assert at is not None and tokenizer_of("qwen3").decode(ids[at:]) == "Yes"
    assert fmt.split("so</think>\n<answer>Yes", "trace").answer == "Yes"


def test_half_a_character_before_the_marker_moves_nothing() -> None:
    """Mutation: measuring prefixes in characters; an incomplete byte decodes to a replacement character."""
    name = "nemotron-v1"
    byte = ids_of(name, "é")[0]  # the first of two bytes
    ids = [byte, *ids_of(name, "</think>"), byte, *ids_of(name, "Yes")]
    at = answer_offset(tokenizer_of(name), FORMATS[name], "trace", ids)
    assert at == 1 + len(ids_of(name, "</think>"))


# ---- choosing a format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if format_of(n).detect is not None])
def test_detection_finds_each_family(name: str) -> None:
    """Mutation: any condition of Detection left out makes two families fit; any wrong one makes none fit."""
    assert detect_format(tokenizer_of(name)) is format_of(name)
    assert resolve_format(tokenizer_of(name)) is format_of(name)


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (FAMILIES["nemotron-v1"].template, "<|end_header_id|>"),
        ("{{ '<|im_start|>assistant\n' }}", "assistant"),  # an instruct model without thinking
        ("{{ raise_exception('roles') }}", "roles"),
        (None, "no chat template to use"),
    ],
)
def test_detection_refuses_loudly(template: str | None, seen: str) -> None:
    """Mutation: falling back to a default format."""
    tokenizer = build_tokenizer(FAMILIES["qwen3"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=re.escape(seen)) as error:
        detect_format(tokenizer)
    assert "model.format" in str(error.value) and "r1-distill, " in str(error.value)


def test_detection_needs_the_markers_in_the_vocabulary() -> None:
    """Mutation: believing the template of a model whose tokenizer lacks the family's tokens."""
    with pytest.raises(UserError, match="cannot tell"):
        detect_format(build_tokenizer(replace(FAMILIES["qwen3"], plain=())))


_STRANGE_VOCABULARY = (*FAMILIES["gpt-oss"].special, "<|im_start|>", "<|im_end|>", "<|im_middle|>", "<|im_assistant|>")
_CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' }}"
_HARMONY_LIKE = "{% for m in messages %}<|start|>user<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"


@pytest.mark.parametrize(
    ("base", "template"),
    [
        ("gpt-oss", _CHATML),  # merely has <|return|> and the rest
        ("gpt-oss", _HARMONY_LIKE),  # a family with these turns and no channels
        ("gpt-oss", _CHATML + "{# preserve_thinking <think> #}"),
        ("kimi-k2-thinking", "{{ messages[0].content }}<|im_assistant|>assistant<|im_middle|>"),  # the Instruct models
        ("kimi-k2-thinking", "<think></think>{{ messages[0].content }}<|im_assistant|>assistant<|im_middle|><think>"),
        ("phi-4-mini-reasoning", "{{ messages[0].content }}<|end|><|assistant|>"),
        ("lfm2.5", "{{ bos_token }}" + _CHATML),
        ("gemma-4", "{{ messages[0].content + '<turn|>\n<|turn>model\n' }}"),
        ("glm-4.7", "{{ messages[0].content }}<|assistant|><think>"),
        ("deepseek-v3.1", "{{ messages[0].content }}<｜Assistant｜></think>"),
    ],
)
def test_neighbours_are_not_taken_for_a_family(base: str, template: str) -> None:
    """Every token of the family in the vocabulary, and another model's template.

    Mutation: any ``template_has`` or ending left out of the families' conditions.
    """
    family = FAMILIES[base]
    special = tuple(dict.fromkeys((*family.special, *_STRANGE_VOCABULARY)))
    with pytest.raises(UserError, match=r"\Acannot tell the reasoning format.*none fits[^\n]*\Z"):
        detect_format(build_tokenizer(replace(family, template=template, special=special)))


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "olmo-3-think", "gpt-oss", "glm-4.7", "deepseek-v3.1"])
def test_foreign_tokens_do_not_change_the_family(name: str) -> None:
    """Mutation: detection by the vocabulary alone; every other family's tokens are there, too."""
    others = [t for family in FAMILIES.values() for t in (*family.special, *family.plain)]
    family = FAMILIES[name]
    crowded = replace(family, special=tuple(dict.fromkeys((*family.special, *others))), plain=())
    assert detect_format(build_tokenizer(crowded)) is format_of(name)


_ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ messages[9].content.split('x') }}", "no element 9"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ ''.nothing() }}", "nothing"),
        ("{% for m in messages %}", "[Uu]nexpected end"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles"),
        ("{% if false %}x{% endif %}", "as nothing"),
        (_ENDLESS, "does not come to an end"),
    ],
)
def test_broken_templates_end_in_one_line(template: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the main thread and in a worker. Mutation: catching Jinja's own errors only, or no limit on a loop."""
    monkeypatch.setattr("bvpo.formats.prompts.MAX_TEMPLATE_STEPS", 20_000)
    tokenizer = build_tokenizer(replace(FAMILIES["qwen3"], template=template))
    with ThreadPoolExecutor(1) as pool:
        for ask in (lambda f: f(), lambda f: pool.submit(f).result()):
            for call in (
                lambda: detect_format(tokenizer),
                lambda: view_prompt(tokenizer, FORMATS["qwen3"], HI, "trace"),
            ):
                with pytest.raises(UserError, match=rf"\A[^\n]*{cause}[^\n]*\Z"):
                    ask(call)


@pytest.mark.parametrize("template", ["{% set x = 7 ** (7 ** 12) %}", "{{ lipsum(n=100000000) }}"])
def test_what_takes_for_ever_without_a_line_of_its_own(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power that Jinja folds when it compiles, and a loop in a library. Mutation: only lines of the template counted, or
    one alarm alone, which the folding swallows."""
    monkeypatch.setattr("bvpo.formats.prompts.MAX_TEMPLATE_STEPS", 20_000)
    monkeypatch.setattr("bvpo.formats.prompts.MAX_TEMPLATE_SECONDS", 0.5)
    with pytest.raises(UserError, match="does not come to an end"):
        detect_format(build_tokenizer(replace(FAMILIES["qwen3"], template=template)))


def test_rendering_gives_the_tracer_back() -> None:
    """Mutation: a debugger or coverage tool that is lost after the first prompt."""
    outer = sys.gettrace()
    mine = lambda frame, event, arg: None  # noqa: E731
    try:
        sys.settrace(mine)
        view_prompt(tokenizer_of("qwen3"), FORMATS["qwen3"], HI, "trace")
        assert sys.gettrace() is mine
    finally:
        sys.settrace(outer)


def test_detection_names_the_candidates_when_several_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: taking the first of several fits."""
    monkeypatch.setitem(FORMATS, "twin", replace(FORMATS["qwen3"], name="twin"))
    with pytest.raises(UserError, match=r"several formats fit.*one of: qwen3, twin;"):
        detect_format(tokenizer_of("qwen3"))


def test_names_are_strict() -> None:
    """Mutation: a silent default for a misspelt name."""
    assert get_format("qwen3") is FORMATS["qwen3"]
    with pytest.raises(UserError, match=r"model\.format: unknown reasoning format 'qwen_3'; did you mean 'qwen3'"):
        get_format("qwen_3")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"open": "<t>"}, "missing field 'close'"),
        ({"close": ["</t>"]}, "missing field 'open'"),
        ({"opening": "<t>"}, "unknown field 'opening'; did you mean 'open'"),
        ({"open": 3, "close": ["</t>"]}, "field 'open'"),
        ({"open": "<t>", "close": "</t>"}, "field 'close'"),
        ({"open": " \n", "close": ["</t>"]}, "field 'open'.*visible"),
        ({"open": "<t>", "close": []}, "field 'close'.*visible"),
        ({"open": "<t>", "close": ["</t>", " "]}, "field 'close'.*visible"),
        ({"base": "r2-distill"}, "unknown format 'r2-distill'; did you mean 'r1-distill'"),
        ({"base": "qwen3", "name": "qwen3"}, "registered format"),
        ({"base": "qwen3", "open": "<t>"}, "'empty_open' and 'empty_close' too"),
    ],
)
def test_own_formats_are_strict(data: dict[str, object], problem: str) -> None:
    """Mutation: any of these mistakes accepted; each would train on other tokens than meant."""
    with pytest.raises(UserError, match=rf"^model\.custom_format: .*{problem}"):
        define_format(data)


def test_own_formats_do_what_they_say() -> None:
    """Mutation: a field that is read and then ignored."""
    tokenizer = tokenizer_of("r1-distill")
    newline = resolve_format(tokenizer, "auto", {"base": "r1-distill", "name": "r1-newline", "open": "<think>\n"})
    ids = view_prompt(tokenizer, newline, HI, "trace").prompt_ids
    assert tokenizer.decode(ids).endswith("<think>\n") and newline.empty_open == "<think>"
    own = define_format({"open": "<t>", "close": ["</t>", "<end>"], "turn_end": "<|im_end|>"})
    assert own == ReasoningFormat(
        name="custom", open="<t>", close=("</t>", "<end>"), empty_open="<t>", empty_close="</t>", turn_end="<|im_end|>"
    )
    qwen = tokenizer_of("qwen3")
    assert qwen.decode(view_prompt(qwen, own, HI, "empty").prompt_ids).endswith("assistant\n<t></t>")
    with pytest.raises(UserError, match="leave it at 'auto'"):
        resolve_format(tokenizer, "qwen3", {"base": "r1-distill"})


@pytest.mark.parametrize(
    "name", ["deepseek-v3.1", "glm-4.7", "olmo-3-think", "smollm3", "gemma-4-large", "exaone-deep", "qwen3", "nemotron"]
)
def test_prompts_are_the_templates_own_where_it_writes_the_block(name: str) -> None:
    """Mutation: whitespace or a marker in an entry of a family whose template is not installed for the tests."""
    tokenizer, fmt = tokenizer_of(name), format_of(name)
    for view, block in (("trace", fmt.open), ("empty", fmt.empty_open + fmt.empty_close)):
        theirs = render(tokenizer, fmt, HI, view)  # type: ignore[arg-type]
        ours = tokenizer.decode(view_prompt(tokenizer, fmt, HI, view).prompt_ids)  # type: ignore[arg-type]
        switched = view == "trace" or bool(fmt.empty_kwargs)
        assert ours in ((theirs, theirs + block) if switched else (theirs.removesuffix(fmt.open) + block,))


# ---- the families' real templates, as TRL ships them -----------------------------------------------------------------

TRL_TEMPLATES = {
    "deepseek_r1_distill": "r1-distill",
    "qwen3": "qwen3",
    "qwen3_5_think": "qwen3.5",
    "qwen3_5_nothink": "qwen3.5",
    "qwen3_6": "qwen3.5",
    "qwen3_8": "qwen3.5",
    "glm4moe": "glm-4.5",
    "nemotron_3_nano": "nemotron",
    "nemotron_3_super": "nemotron",
    "nemotron_3_ultra": "nemotron",
    "nemotron_3_5_lightning": "nemotron",
    "gptoss": "gpt-oss",
    "lfm2_2_5": "lfm2.5",
    "lfm2_2_5_v2": "lfm2.5",
    "gemma4": "gemma-4",
    "gemma4_v2": "gemma-4",
    "gemma4_v3": "gemma-4",
    "gemma4_v4": "gemma-4",
    "gemma4_v5": "gemma-4",
}


@pytest.mark.parametrize("template", sorted(TRL_TEMPLATES))
def test_real_templates_behave_as_registered(template: str) -> None:
    """The public templates are detected, and their own endings are the format's (whitespace after R1's marker apart).

    Mutation: any whitespace or marker in a verified registry entry.
    """
    spec = find_spec("trl")
    path = Path((spec.origin or "") if spec else "").parent / "chat_templates" / f"{template}.jinja"
    if not path.is_file():
        pytest.skip(f"TRL's {template}.jinja is not installed")
    fmt = FORMATS[TRL_TEMPLATES[template]]
    tokenizer = build_tokenizer(replace(FAMILIES[fmt.name], template=path.read_text(encoding="utf-8")))
    assert detect_format(tokenizer) is fmt
    for view, block in (("trace", fmt.open), ("empty", fmt.empty_open + fmt.empty_close)):
        ours = tokenizer.decode(view_prompt(tokenizer, fmt, HI, view).prompt_ids)  # type: ignore[arg-type]
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}],
            tokenize=False,
            add_generation_prompt=True,
            **fmt.kwargs(view),  # type: ignore[arg-type]
        )
        assert isinstance(theirs, str) and ours.endswith(block)
        if fmt.name in ("r1-distill", "gpt-oss"):
            continue  # R1: the paper's form, not the template's; gpt-oss: no switch, and theirs holds today's date
        assert ours == theirs or ours == theirs + block
