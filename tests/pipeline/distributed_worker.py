"""Run by tests under ``torch.distributed.run``: trains or takes one gradient, and writes what came out to a file.

python -m torch.distributed.run --nproc_per_node 2 tests/pipeline/distributed_worker.py MODE FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, use_exact_norms, write_tokens

from bvpo.training.loading import end_process

QUADS = random_quads(10, seed=7, ragged_views=True, tails=True)


def train(folder: Path) -> None:
    """Three optimizer steps through the real loop, then the margins of five quads; under torchrun accelerate wraps the model
    in DDP."""
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    trainer = make_trainer(
        folder / f"rank{os.environ.get('RANK', '0')}", model, QUADS, beta=0.3, learning_rate=1e-3,
        quads_per_step=4, output_dir=str(folder / "out"), logging_steps=1, lr_scheduler_type="constant", warmup_steps=0,
        eval_dataset=write_tokens(folder / f"eval{os.environ.get('RANK', '0')}", QUADS[:5]),
    )  # fmt: skip
    trainer.train()
    margins = trainer.held_out_margins()
    if dist.is_initialized():
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel", type(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"state": trainer.model.state_dict(), "logs": logs, "margins": margins}, folder / "result.pt")


def fsdp2(folder: Path) -> None:
    """One step's gradient with every layer sharded by FSDP2; parameters must be DTensors."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    trainer = make_trainer(folder / f"rank{dist.get_rank()}", model, QUADS, beta=0.3, loss="simpo", gamma=0.5)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "FSDP2 is not in use"
    loss = trainer.training_step(model, trainer._train_steps[0])
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    if dist.get_rank() == 0:
        torch.save({"loss": loss / dist.get_world_size(), "gradients": gradients}, folder / "result.pt")


class Teardown:
    """Aborts as a thread of gloo may when the interpreter goes down."""

    def __del__(self) -> None:
        os.abort()


if __name__ == "__main__":
    {"train": train, "fsdp2": fsdp2}[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        last = Teardown()
        end_process()
