"""Run by test_auto_alpha.py under ``torch.distributed.run``: training with ``alpha = "auto"`` through accelerate's DDP, then
one look at a model that FSDP2 has sharded. Writes what came out to FOLDER/results.pt.

python -m torch.distributed.run --nproc_per_node 2 tests/pipeline/telemetry_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, use_exact_norms

from bvpo.method import online_alpha
from bvpo.training.loading import end_process
from bvpo.training.probe import samples as looks
from bvpo.training.probe.sketching import BUCKETS

QUADS = random_quads(36, seed=7, ragged_views=True, tails=True)
WHOLE = random_quads(8, seed=8, ragged_views=False)
AUTO: dict[str, Any] = {"alpha_schedule": "auto", "alpha": 0.7, "alpha_every": 1}
PLAN = looks.Plan(views=("trace", "empty"), quads=(5, 0, 3, 7, 1, 2), quads_per_row=2)


def trained(folder: Path) -> Any:
    """Seven steps; the last ones use the estimate. A third of the quads has both views, so looks are small."""
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    trainer = make_trainer(
        folder / f"rank{os.environ.get('RANK', '0')}", model, QUADS, beta=0.3, learning_rate=1e-5, quads_per_step=12,
        output_dir=str(folder / "out"), logging_steps=1, max_steps=7, warmup_steps=0, **AUTO,
    )  # fmt: skip
    with mock.patch.object(online_alpha, "LEAST_QUADS", 8):
        trainer.train()
    return trainer


def sharded(folder: Path) -> Any:
    """One look after FSDP2 has sharded every layer; the policy is not its reference (a loss without one is used)."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    trainer = make_trainer(folder / f"fsdp{dist.get_rank()}", model, WHOLE, beta=0.3, loss="simpo", gamma=0.5)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "FSDP2 is not in use"
    assert looks.why_impossible(model, trainer._runner()) is None
    found = trainer.look(PLAN, (5, 6), BUCKETS)
    assert all(p.grad is None for p in model.parameters()), "a look left gradients behind"
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    trainer = trained(target)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel", type(trainer.model_wrapped)
    rows = sharded(target)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"state": trainer.model.state_dict(), "logs": logs, "rows": rows.sketches}, target / "results.pt")
    end_process()
