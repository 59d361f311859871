"""A small experiment made by the real stages: a random model that ends its traces and answers, prompts, a scorer.

``save_talking_model`` writes the model; ``Experiment`` writes the config and runs verbs through the command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models_fixtures import tiny_model, tiny_tokenizer

from bvpo.cli import main
from bvpo.experiment import RecordStore
from bvpo.records import Prompt, Sample
from bvpo.strict import read_jsonl

SCORER = '''
"""Longer answers are better, and some cannot be scored."""


def score(messages, answer):
    return None if "!" in answer else float(len(answer))
'''
_CONSTANT = 6.0


def save_talking_model(
    folder: Path, *, seed: int = 0, close: float = 1.5, end: float = 1.2, plain: bool = True
) -> Path:
    """A random model whose responses end: ``close`` and ``end`` raise the logits of `</think>` and of the end of sequence.

    One hidden dimension is held constant, so that a row of the head can read a bias from it. ``plain`` keeps it to
    letters, digits and spaces.
    """
    model, tokenizer = tiny_model(seed=seed, layers=1, spread=0.1), tiny_tokenizer()
    marker = tokenizer.convert_tokens_to_ids("</think>")
    assert isinstance(marker, int) and marker != tokenizer.unk_token_id
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        # after the last norm the constant is about this large
        size = _CONSTANT / ((_CONSTANT**2 + 31) / 32) ** 0.5
        model.lm_head.weight[:, 0] = 0
        if plain:
            shown = torch.tensor([_is_plain(tokenizer.decode([i])) for i in range(len(tokenizer))])
            model.lm_head.weight[~shown, 0] = -12 / size
        model.lm_head.weight[marker, 0] = close / size
        model.lm_head.weight[tokenizer.eos_token_id, 0] = end / size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _is_plain(text: str) -> bool:
    return bool(text) and all(char.isascii() and (char.isalnum() or char in " !") for char in text)


class Experiment:
    """An experiment folder ``ROOT/experiments/mine`` and the config that makes it; :meth:`run` runs a verb on it."""

    def __init__(
        self, root: Path, prompts: Sequence[str | dict[str, Any]], toml: str = "", model: str = "model"
    ) -> None:
        self.root, self.folder = root, root / "experiments" / "mine"
        rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
        (root / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "scorer.py").write_text(SCORER)
        self.config = root / "mine.toml"
        self.config.write_text(
            f'name = "mine"\nroot = "{root}/experiments"\n'
            f'[model]\npath = "{root / model}"\n'
            f'[prompts]\nsources = ["{root}/raw.jsonl"]\nnear_duplicates = "none"\n'
            f'[score]\nscorer = "function"\nfunction.path = "{root}/scorer.py:score"\n'
            f"[sample]\nmax_new_tokens = 60\n{toml}"
        )

    def run(self, verb: str, *flags: str) -> int:
        return main([verb, str(self.config), *flags])

    def make(self, *verbs: str) -> Experiment:
        for verb in verbs:
            assert self.run(verb) == 0, verb
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return list(read_jsonl(self.folder / "prompts.jsonl", Prompt))

    @property
    def samples(self) -> dict[str, Sample]:
        return {sample.key: sample for sample in RecordStore(self.folder / "samples", Sample)}


def questions(count: int) -> list[str]:
    return [f"Question {n}: what is {n} plus {3 * n + 1}, in words?" for n in range(count)]
