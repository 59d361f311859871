"""The tiny model's tokenizer, training examples and settings."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bvpo.config import TinyConfig, load_config, validate
from bvpo.formats import decode_completion, resolve_format, view_prompt
from bvpo.records import VIEWS, Message
from bvpo.strict import UserError
from bvpo.tiny import sft
from bvpo.tiny.base import draw_material, tokenizer_of
from bvpo.tiny.corpus import Noise, write, write_answer, write_trace
from bvpo.tiny.tasks import draw_ask

TINY = TinyConfig(num_prompts=300, num_tuning=100, num_benchmark=200)


def asks(num: int = 60):
    rng = random.Random(7)
    return [draw_ask(rng, TINY.tasks, (2, 5), sft.sizes_of(TINY), styled=True) for _ in range(num)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(TINY)


def test_format_is_detected(tokenizer) -> None:
    """Mutation: another chat template, or a marker that is not one token."""
    assert resolve_format(tokenizer, "auto").name == "r1-distill"
    for marker in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1


def test_round_trip_after_saving(tokenizer, tmp_path: Path) -> None:
    """Mutation: a decoder that puts spaces between tokens; a tokenizer that AutoTokenizer reads differently from disk
    beside a Qwen2 configuration."""
    sft.new_model(TINY, tokenizer).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    fmt = resolve_format(again, "auto")
    for ask, view in itertools.product(asks(), VIEWS):
        messages = [Message(role="user", content=ask.text)]
        ids = view_prompt(again, fmt, messages, view).prompt_ids
        assert ids == view_prompt(tokenizer, fmt, messages, view).prompt_ids
        text = again.decode(list(ids))
        assert ask.text in text and text.endswith("<think>" if view == "trace" else "<think></think>")
        # begin, user, assistant, think and one token per word
        assert len(ids) == len(ask.text.split()) + (4 if view == "trace" else 5)


def test_responses_read_back(tokenizer) -> None:
    """Mutation: a word that is missing from the vocabulary, so that text becomes something else."""
    fmt, rng = resolve_format(tokenizer, "auto"), random.Random(2)
    noise = Noise(filler=0.5, false_start=0.3, slip=0.1, recheck=0.5)
    for ask in asks():
        trace, value = write_trace(ask.problem, rng, noise)
        answer = write_answer(ask, value, rng)
        text = fmt.join("trace", write(trace), write(answer))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(trace) + len(answer) + 1  # one token per word, and the closing marker
        split = fmt.split(decode_completion(tokenizer, fmt, [*ids, tokenizer.eos_token_id]), "trace")
        assert (split.trace, split.answer) == (write(trace), write(answer))


def test_training_prompts_are_the_sampling_prompts(tokenizer) -> None:
    """Mutation: a frame that differs from what the stages sample from, by a token or a newline."""
    fmt, writer = resolve_format(tokenizer, "auto"), sft.Writer(tokenizer)
    for ask, view in itertools.product(asks(20), VIEWS):
        expected = view_prompt(tokenizer, fmt, [Message(role="user", content=ask.text)], view).prompt_ids
        assert tuple(writer.prompt(ask, view)) == expected


def test_only_responses_are_learned(tokenizer) -> None:
    """Mutation: learning the prompt, or the closing marker that the empty view forces."""
    close = tokenizer.encode("</think>", add_special_tokens=False)[0]
    examples = list(itertools.islice(sft.draw_examples(TINY, tokenizer, random.Random(0), frozenset()), 400))
    empty = [e for e in examples if e.ids[e.start - 1] == close]
    assert 0.3 < len(empty) / len(examples) < 0.5
    for example in examples:
        learned = example.ids[example.start :]
        assert learned[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in learned[:-1]
        assert learned.count(close) == (0 if example in empty else 1)


def test_benchmark_is_held_out(tokenizer) -> None:
    """Mutation: benchmark problems among the prompts or in the corpus; a prompt twice; tuning prompts among the others."""
    material = draw_material(TINY)
    problems = [ask.problem.words for ask in material.benchmark]
    assert len(set(problems)) == 200 and all(ask.style is None for ask in material.benchmark)
    texts = [ask.text for ask in (*material.prompts, *material.tuning)]
    assert len(set(texts)) == len(texts) == 400
    assert material.held_out.isdisjoint(ask.problem.words for ask in (*material.prompts, *material.tuning))
    # the corpus: of 49 sums of two numbers, those that are held out never come up
    short = TinyConfig(tasks=("add",), chain_min=2, sft_chain_max=2)
    held = frozenset(("add", "first", str(a), "second", str(b), "mod", "7") for a in range(7) for b in range(4))
    drawn = itertools.islice(sft.draw_examples(short, tokenizer, random.Random(0), held), 300)
    found = {tuple(tokenizer.decode(list(e.ids[2:9])).split()) for e in drawn}
    assert len(found) == 21 and found.isdisjoint(held)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("num_prompts = 10000000", "tiny.num_prompts and tiny.num_tuning: got 10,002,000, expected at most"),
        ("num_benchmark = 1000\ntasks = ['add']\nmodulus = 2", "tiny.num_benchmark: got 1,000, expected at most 24"),
    ],
)
def test_more_prompts_than_there_are(tmp_path: Path, settings: str, said: str) -> None:
    """Mutation: drawing for ever."""
    path = tmp_path / "c.toml"
    path.write_text(f'name = "a"\n[model]\npath = "m"\n[tiny]\n{settings}\n')
    with pytest.raises(UserError, match=re.escape(said)):
        draw_material(load_config(path).tiny)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chain_min": 3, "chain_max": 2}, "field 'chain_max': got 2, expected at least chain_min, which is 3"),
        ({"chain_min": 5, "chain_max": 5, "sft_chain_max": 4}, "field 'sft_chain_max'"),
        ({"benchmark_min": 6}, "field 'benchmark_max'"),
        ({"hidden": 60}, "expected a multiple of 2 * heads, which is 8"),
        ({"modulus": 1}, "field 'modulus'"),
        ({"tasks": ()}, "field 'tasks'"),
        ({"tasks": ("add", "add")}, "field 'tasks'"),
        ({"filler": 0.9}, "field 'filler'"),
        ({"steps": 0}, "field 'steps'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, said: str) -> None:
    """Mutation: a range or a contradiction that is not checked."""
    with pytest.raises(UserError, match=re.escape(said)):
        validate(TinyConfig(**settings))


def test_batches_hold_examples_of_similar_length(tokenizer) -> None:
    """Mutation: batches in the order of length (the model would learn short answers last), or padded to the longest."""
    rng = random.Random(0)
    examples = sft.draw_examples(TINY, tokenizer, rng, frozenset())
    found = list(sft.batches(examples, 60, 8, rng))
    assert len(found) == 60 and all(len(batch) == 8 for batch in found)
    means = [sum(len(e.ids) for e in batch) / 8 for batch in found[:50]]
    assert means != sorted(means) and sorted(means) != sorted(means, reverse=True)
    spread = [max(len(e.ids) for e in batch) - min(len(e.ids) for e in batch) for batch in found[:50]]
    assert sum(spread) / 50 < 3
