"""Supervised training of the tiny model, from random weights, on a corpus that is drawn as it goes.

In: the settings, a tokenizer, the number of steps and the problems to leave out. Out: a trained ``Qwen2ForCausalLM``. The
seed is an argument and the only source of randomness: the same settings on the same number of threads give the same
weights. Nothing is read or written here.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from bvpo.config import TinyConfig
from bvpo.formats import get_format, view_prompt
from bvpo.records import VIEWS, Message, View
from bvpo.tiny.corpus import Noise, write_answer, write_trace
from bvpo.tiny.tasks import Ask, Sizes, draw_ask

logger = logging.getLogger(__name__)

FORMAT = "r1-distill"
CONTEXT = 1024  # positions; problems, traces and answers take a fraction
_ROPE_THETA = 1000.0
_INIT = 0.8  # weights of variance 0.64 / width; with Qwen2's 0.02 the steps of a trace are not learned in 1000 steps
_BETAS = (0.9, 0.98)
_CLIP = 1.0
_WARMUP = 0.1  # share of the steps
_BUCKET = 50  # batches whose examples are sorted by length together
_IGNORED = -100


def sizes_of(tiny: TinyConfig) -> Sizes:
    return Sizes(modulus=tiny.modulus, cups=tiny.cups)


def new_model(tiny: TinyConfig, tokenizer: Any) -> Qwen2ForCausalLM:
    """Random weights, decided by the seed; the global generator is left as it was."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden,
        intermediate_size=tiny.mlp,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=_INIT / math.sqrt(tiny.hidden),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.seed)
        return Qwen2ForCausalLM(config)


# ---------------------------------------------------------------------------------------------------------------------
# examples


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and its response; the tokens from ``start`` on are learned."""

    ids: tuple[int, ...]
    start: int


class Writer:
    """Writes prompts and responses as token ids, word by word; the frame around a prompt comes from the format."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocab: dict[str, int] = tokenizer.get_vocab()
        fmt, probe = get_format(FORMAT), "add"
        (inside,) = self._ids(probe)
        self._frames: dict[View, tuple[list[int], list[int]]] = {}
        for view in VIEWS:
            ids = list(view_prompt(tokenizer, fmt, [Message(role="user", content=probe)], view).prompt_ids)
            self._frames[view] = ids[: ids.index(inside)], ids[ids.index(inside) + 1 :]
        self._newline, self._close = self._ids("\n")[0], self._ids(fmt.close[0])

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, ask: Ask, view: View) -> list[int]:
        """The same as :func:`bvpo.formats.view_prompt` of the prompt, a hundred times faster."""
        before, after = self._frames[view]
        first, *rest = ask.text.split()
        return [*before, self._vocab[first], *self._words(rest), *after]

    def _words(self, words: Sequence[str]) -> Iterator[int]:
        return (self._vocab[f" {word}"] for word in words)

    def example(self, ask: Ask, trace: list[str] | None, answer: list[str], *, newline: bool = False) -> Example:
        """A response in the trace view, or without a ``trace`` in the empty view. ``newline``: the prompt ends as the chat
        template writes it, so that the model also works behind endpoints that use the template."""
        ids = self.prompt(ask, "empty" if trace is None else "trace")
        if newline:
            ids.append(self._newline)
        start = len(ids)
        if trace is not None:
            ids += [*self._words(trace), *self._close]
        ids += [*self._words(answer), self._tokenizer.eos_token_id]
        return Example(tuple(ids), start)


def draw_examples(
    tiny: TinyConfig, tokenizer: Any, rng: random.Random, without: frozenset[tuple[str, ...]]
) -> Iterator[Example]:
    """Examples without end: most with a trace, the rest with an empty one."""
    writer = Writer(tokenizer)
    noise = Noise(filler=tiny.filler, false_start=tiny.false_start, slip=tiny.slip, recheck=tiny.recheck)
    lengths, sizes = (tiny.chain_min, tiny.sft_chain_max), sizes_of(tiny)
    while True:
        ask = draw_ask(rng, tiny.tasks, lengths, sizes, styled=True)
        if ask.problem.words in without:
            continue
        if rng.random() < tiny.empty_fraction:
            yield writer.example(ask, None, write_answer(ask, ask.problem.result, rng))
        else:
            trace, value = write_trace(ask.problem, rng, noise)
            yield writer.example(ask, trace, write_answer(ask, value, rng), newline=rng.random() < 0.5)


def batches(examples: Iterator[Example], num: int, size: int, rng: random.Random) -> Iterator[list[Example]]:
    """``num`` batches of ``size`` examples of similar length, in random order within each bucket."""
    while num > 0:
        count = min(num, _BUCKET)
        num -= count
        bucket = sorted((next(examples) for _ in range(count * size)), key=lambda example: len(example.ids))
        starts = list(range(0, count * size, size))
        rng.shuffle(starts)
        yield from (bucket[start : start + size] for start in starts)


# ---------------------------------------------------------------------------------------------------------------------
# training


def train(tiny: TinyConfig, tokenizer: Any, without: frozenset[tuple[str, ...]]) -> Qwen2ForCausalLM:
    """The trained model, in evaluation mode on CPU."""
    steps, device = tiny.steps, torch.device(tiny.device)
    with _threads(tiny.threads):
        model: Any = new_model(tiny, tokenizer).to(device).train()  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=tiny.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        rng = random.Random(f"bvpo-tiny-corpus-{tiny.seed}")
        examples = draw_examples(tiny, tokenizer, rng, without)
        with tqdm(total=steps, desc="sft", unit="step", leave=False, mininterval=0.5) as bar:
            for batch in batches(examples, steps, tiny.batch_size, rng):
                loss = _loss(model, batch, tokenizer.pad_token_id, device)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        return model.cpu().eval()


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _loss(model: Any, batch: Sequence[Example], pad: int, device: torch.device) -> torch.Tensor:
    """Mean negative log-likelihood of the learned tokens. Padding is on the right, where causal attention never looks."""
    width = max(len(example.ids) for example in batch)
    ids_BT = torch.tensor([[*e.ids, *[pad] * (width - len(e.ids))] for e in batch], device=device)
    targets_BT = torch.tensor(
        [[_IGNORED] * e.start + [*e.ids[e.start :], *[_IGNORED] * (width - len(e.ids))] for e in batch], device=device
    )
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    learned = targets_BT[:, 1:] != _IGNORED
    return F.cross_entropy(model.lm_head(hidden_BTH[learned]), targets_BT[:, 1:][learned])


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
