"""The two sides of the trainer benchmark, on the same weights, tokens and threads: ours, and TRL's ``DPOTrainer``.

Both get a Qwen2 model with random weights and token ids that were drawn here. TRL pays its language-model head only where
it would on a GPU (response rows; its CPU fallback scores every position), which favours TRL.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bvpo.training.arguments import BVPOConfig
from bvpo.training.refcache import quad_key
from bvpo.training.tokens import Branch, TokenDataset, TokenQuad, TokenWriter
from bvpo.training.trainer import BVPOTrainer

BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's size."""

    layers: int = 8
    hidden: int = 256
    inner: int = 1024
    heads: int = 4
    vocab: int = 4096


# Config R: 8 layers and a vocabulary of 4k give the head about the share of the FLOPs that it has at 1.5B to 8B.
CONFIG_R = Shape()


def make_model(shape: Shape, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.use_cache = False
    return Qwen2ForCausalLM(config)


def make_quads(
    num: int, *, vocab: int, seed: int, spread: str, prompt: int = 67, trace: int = 400, empty: int = 150
) -> list[TokenQuad]:
    """Quads whose mean lengths are the arguments; ``uniform``: +-25 %, ``lognormal``: sigma 0.8, at least 8 tokens."""
    generator = np.random.default_rng(seed)

    def ids(mean: int, tailed: bool) -> np.ndarray:
        if spread == "fixed":
            length = mean
        elif tailed:
            length = int(mean * generator.lognormal(-0.32, 0.8))  # exp(-sigma^2 / 2) keeps the mean
        else:
            length = int(mean * generator.uniform(0.75, 1.25))
        return generator.integers(3, vocab, max(8, length)).astype(np.int32)

    quads = []
    for i in range(num):
        branches = []
        for mean in (trace, trace, empty, empty):
            tokens = ids(mean, spread == "lognormal")
            branches.append(Branch(ids=tokens, scored_from=0, answer_from=len(tokens) * 2 // 3))
        quads.append(TokenQuad(id=str(i), prefix_ids=ids(prompt, False), branches=tuple(branches)))  # type: ignore[arg-type]
    return quads


def write_tokens(folder: Path, quads: Iterable[TokenQuad]) -> TokenDataset:
    """The quads as the dataset on disk that the trainer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenWriter(folder)
    digest = hashlib.sha256()
    for quad in quads:
        writer.add(quad)
        digest.update(quad_key(quad))
    size = writer.close()
    fingerprint = digest.hexdigest()[:16]
    summary = {"fingerprint": fingerprint, "drops": {}, "num_dropped_quads": 0, "bytes": size}
    (folder / "summary.json").write_text(json.dumps(summary))
    return TokenDataset(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4, "c": 5}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


class Ours:
    """Our side: ``BVPOTrainer`` on the quads, one optimizer step over all of them unless ``quads_per_step`` says else."""

    def __init__(self, model: Any, quads: Sequence[TokenQuad], folder: Path, **settings: Any) -> None:
        self._start(model, write_tokens(folder / "tokens", quads), folder, {"quads_per_step": len(quads)} | settings)

    @classmethod
    def on_disk(cls, model: Any, folder: Path, **settings: Any) -> Ours:
        """The same on tokens that lie in ``folder/tokens`` already."""
        side = cls.__new__(cls)
        side._start(model, TokenDataset(folder / "tokens"), folder, settings)
        return side

    def _start(self, model: Any, tokens: TokenDataset, folder: Path, settings: dict[str, Any]) -> None:
        defaults = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        # Runs here have a few steps, and a look in the first would be a large part of them; benchmarks/telemetry.py has it.
        own = {"use_cpu": True, "beta": BETA, "bf16": False, "telemetry_steps": 0}
        args = BVPOConfig(**(defaults | own | settings))
        self.trainer = BVPOTrainer(model, args, tokens, processing_class=tokenizer())

    def prepare(self) -> Ours:
        self.trainer.fill_reference(self.trainer.model)
        return self

    def fake_reference(self) -> None:
        """Fills the cache without a forward pass (random values), where only its size matters."""
        reference_pass = self.trainer._reference_pass()
        tokens = self.trainer._train_steps.tokens
        keys = [quad_key(tokens[i]) for i in range(len(tokens))]
        reference_pass._cache.add(keys, np.random.default_rng(0).normal(-100, 10, (len(keys), 4, 2)))
        reference_pass._cache.flush()

    def step(self, index: int = 0, *, keep_gradients: bool = False) -> float:
        if not keep_gradients:
            self.trainer.model.zero_grad(set_to_none=True)
        return self.trainer.training_step(self.trainer.model, self.trainer._train_steps[index]).item()

    def all_steps(self) -> None:
        """Forward and backward of every step of the epoch."""
        for index in range(len(self.trainer._train_steps)):
            self.step(index)

    def train(self) -> None:
        self.trainer.train()


class Theirs:
    """The same step with TRL: one padded batch of the trace pairs, one of the empty pairs, half the loss each."""

    def __init__(
        self,
        model: Any,
        quads: Sequence[TokenQuad],
        folder: Path,
        *,
        rows_at_once: int | None = None,
        use_cpu: bool = True,
        bf16: bool = False,
    ) -> None:
        import trl
        from datasets import Dataset
        from trl.trainer import utils

        if use_cpu:
            utils._use_triton = lambda device: True  # score response rows only, as on a GPU
        args = trl.DPOConfig(
            output_dir=str(folder), use_cpu=use_cpu, report_to=[], bf16=bf16, gradient_checkpointing=False, beta=BETA,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        dummy = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
        self.trainer = trl.DPOTrainer(
            model, ref_model=copy.deepcopy(model), args=args, train_dataset=dummy, processing_class=tokenizer()
        )
        self.use(quads)
        self.rows_at_once = rows_at_once or len(quads)

    def use(self, quads: Sequence[TokenQuad]) -> None:
        """Sets the quads of the next step."""
        self.views = [rows_of(quads, view) for view in (0, 1)]

    def prepare(self) -> Theirs:
        return self

    def step(self, *, keep_gradients: bool = False) -> float:
        model = self.trainer.model
        if not keep_gradients:
            model.zero_grad(set_to_none=True)
        model.train()
        total = 0.0
        for rows in self.views:
            for start in range(0, len(rows), self.rows_at_once):
                part = rows[start : start + self.rows_at_once]
                batch = self.trainer._prepare_inputs(self.trainer.data_collator(part))
                with self.trainer.accelerator.autocast():  # the model is not prepared, so autocast is ours to enter
                    loss = self.trainer.compute_loss(model, batch)
                loss = loss * (0.5 * len(part) / len(rows))
                loss.backward()
                total += loss.item()
        return total

    def steps_of(self, quads: Sequence[TokenQuad], batch: int) -> None:
        """One step after the other over ``quads``."""
        self.rows_at_once = batch
        for start in range(0, len(quads), batch):
            self.use(quads[start : start + batch])
            self.step()


class TheirTraining:
    """TRL's own ``train()``: a step is one batch of trace pairs and one of empty pairs (two accumulated batches)."""

    def __init__(self, model: Any, quads: Sequence[TokenQuad], batch: int, folder: Path) -> None:
        import trl
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from trl.trainer import utils

        utils._use_triton = lambda device: True

        class ReadyTokens(trl.DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset

            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(self.train_dataset)

        rows = []
        for start in range(0, len(quads), batch):
            rows += rows_of(quads[start : start + batch], 0) + rows_of(quads[start : start + batch], 1)
        args = trl.DPOConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False, beta=BETA,
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
            num_train_epochs=1, learning_rate=7e-7,
        )  # fmt: skip
        self.trainer = ReadyTokens(
            model, ref_model=copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )  # fmt: skip

    def train(self) -> None:
        self.trainer.train()


def rows_of(quads: Sequence[TokenQuad], view: int) -> list[dict[str, list[int]]]:
    """The pairs of one view (0 trace, 1 empty) in the columns that TRL's collator takes."""
    rows = []
    for quad in quads:
        chosen, rejected = quad.branches[2 * view], quad.branches[2 * view + 1]
        assert chosen is not None and rejected is not None
        rows.append(
            {
                "prompt_ids": quad.prefix_ids.tolist(),
                "chosen_ids": chosen.ids.tolist(),
                "rejected_ids": rejected.ids.tolist(),
            }
        )
    return rows


def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="bvpo-bench-"))
