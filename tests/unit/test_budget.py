"""What the token budget and the memory estimate count: the tokens that run, the state that the optimizer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import random_quads, tiny_causal_lm, with_traces, write_tokens

from bvpo.training.arguments import BVPOConfig
from bvpo.training.estimate import _optimizer_bytes
from bvpo.training.steps import StepDataset


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("grouped", [False, True])
def test_no_micro_batch_runs_more_than_its_budget(tmp_path: Path, layout: str, grouped: bool) -> None:
    """Mutations: tree tokens counted whatever the layout; padded rows as wide as each quad's own longest."""
    groups = [1, 2, 1, 3, 1, 1, 2, 1] if grouped else None
    quads = with_traces(groups) if groups else random_quads(24)
    tokens = write_tokens(tmp_path, quads, groups)
    alone, _ = tokens.run_tokens(layout)
    budget = int(alone.max()) + 40
    steps = StepDataset(
        tokens, layout=layout, quads_per_step=tokens.num_groups, tokens_per_micro_batch=budget, world_size=1, rank=0,
        seed=0, last_step="keep",
    )  # fmt: skip
    shares = steps[0]["step"].micro_batches
    assert max(share.layout.num_tokens for share in shares) <= budget
    assert sum(len(share.quads) for share in shares) == len(quads) and len(shares) < tokens.num_groups


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_optimizer_state_is_what_the_optimizer_keeps(tmp_path: Path, name: str) -> None:
    """Counted on the optimizer that transformers makes. Mutation: AdamW's two numbers a weight for all."""
    from transformers import Trainer

    args: Any = BVPOConfig(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    model = tiny_causal_lm("qwen2", dtype=torch.float32)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = kind(model.parameters(), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [v for kept in optimizer.state.values() for v in kept.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert _optimizer_bytes(model, args, None, 4) == sum(v.numel() * v.element_size() for v in state)
