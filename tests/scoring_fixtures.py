"""Tiny reward models on disk, experiment folders with samples, and other ground of the scoring and pairing tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from formats_fixtures import tokenizer_of
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from bvpo.experiment import RecordStore
from bvpo.records import Finish, Message, Prompt, Sample, View
from bvpo.scorers.base import ScoreItem
from bvpo.strict import write_jsonl

LLAMA3 = "nemotron-v1.5"  # the fixture family with Llama 3's control tokens and turns


def llama_config(**more: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        vocab_size=len(tokenizer_of(LLAMA3)),
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=None,
        **sizes,
        **more,
    )


def save_classifier(folder: Path, *, num_labels: int = 1, seed: int = 0, **more: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=num_labels, **more)).eval()
    model.save_pretrained(folder)
    tokenizer_of(LLAMA3).save_pretrained(folder)
    return model


def save_armorm(folder: Path, *, num_objectives: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint with the published one's tensor names, written without bvpo's class; returns its tensors."""
    torch.manual_seed(seed)
    config = llama_config(
        architectures=["LlamaForRewardModelWithGating"],
        num_objectives=num_objectives,
        gating_temperature=10,
        gating_hidden_dim=16,
        gating_n_hidden=3,
        id2label={i: f"objective-{i}" for i in range(num_objectives)},
    )
    tensors = {f"model.{name}": value.clone() for name, value in LlamaModel(config).state_dict().items()}
    tensors["regression_layer.weight"] = torch.randn(num_objectives, config.hidden_size)
    tensors["reward_transform_matrix"] = torch.eye(num_objectives) + 0.3 * torch.randn(num_objectives, num_objectives)
    tensors["gating.logit_scale"] = torch.tensor([1.5])
    width = config.hidden_size
    for layer in range(4):
        out = num_objectives if layer == 3 else 16
        tensors[f"gating.layers.{layer}.weight"] = torch.randn(out, width)
        tensors[f"gating.layers.{layer}.bias"] = torch.randn(out)
        width = out
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(LLAMA3).save_pretrained(folder)
    return tensors


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def item(answer: str, prompt: str = "Why?", key: str = "", rivals: Sequence[str] = (), **meta: Any) -> ScoreItem:
    return ScoreItem(key=key or answer, messages=user(prompt), answer=answer, rivals=tuple(rivals), meta=meta)


def make_sample(
    prompt_id: str,
    view: View,
    index: int,
    answer: str | None,
    *,
    trace: str = "thinking",
    finish: Finish = "stop",
    error: str | None = None,
    prompt_ids: tuple[int, ...] = (1, 2, 3, 4),
) -> Sample:
    """A sample whose ids are made up but consistent; ``answer=None`` is a trace that never closed."""
    key = hashlib.sha256(f"{prompt_id}/{view}/{index}".encode()).hexdigest()
    text = answer or ""
    return Sample(
        key=key,
        prompt_id=prompt_id,
        view=view,
        index=index,
        prompt_ids=prompt_ids,
        completion_start=4 if view == "trace" else 3,
        token_ids=tuple(10 + ord(c) % 50 for c in text) + ((9,) if finish == "stop" else ()),
        text=text,
        trace=trace if view == "trace" else None,
        answer=answer,
        finish=finish,
        logprobs=tuple(-0.5 for _ in text),
        error=error,
    )


def make_experiment(root: Path, prompts: Iterable[Prompt], samples: Iterable[Sample], *, seal: bool = False) -> Path:
    """``root/experiment`` with prompts and samples."""
    folder = root / "experiment"
    write_jsonl(folder / "prompts.jsonl", prompts)
    store = RecordStore(folder / "samples", Sample)
    with store.open_writer() as writer:
        for sample in samples:
            writer.append(sample)
    if seal:
        store.seal()
    return folder


def make_prompts(count: int, split: str = "train") -> list[Prompt]:
    return [Prompt(id=f"p{i}", messages=user(f"Question {i}?"), split=split, meta={"n": i}) for i in range(count)]


def write_config(root: Path, text: str) -> str:
    """A config file for ``root/experiment``."""
    path = root / "config.toml"
    path.write_text(f'name = "experiment"\nroot = {json.dumps(str(root))}\n[model]\npath = "base"\n{text}')
    return str(path)
