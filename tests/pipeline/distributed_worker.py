"""Run by tests under ``torch.distributed.run``: trains or takes one gradient, and writes what came out to a file.

python -m torch.distributed.run --nproc_per_node 2 tests/pipeline/distributed_worker.py MODE FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, use_exact_norms, write_tokens

from bvpo.training.loading import end_process

QUADS = random_quads(10, seed=7, ragged_views=True, tails=True)


def train(folder: Path, wrapper: str = "DistributedDataParallel", dtype: Any = torch.float64, **settings: Any) -> None:
    """Three optimizer steps through the real loop, then the margins of five quads; under torchrun accelerate wraps the model
    in DDP."""
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2, dtype=dtype))
    trainer = make_trainer(
        folder / f"rank{os.environ.get('RANK', '0')}", model, QUADS, beta=0.3, learning_rate=1e-3,
        quads_per_step=4, output_dir=str(folder / "out"), logging_steps=1, lr_scheduler_type="constant", warmup_steps=0,
        eval_dataset=write_tokens(folder / f"eval{os.environ.get('RANK', '0')}", QUADS[:5]), **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() or None)
    margins = trainer.held_out_margins()
    if dist.is_initialized():
        assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"state": trainer.model.state_dict(), "logs": logs, "margins": margins}, folder / "result.pt")


def zero2(folder: Path) -> None:
    """The same under DeepSpeed's ZeRO-2, which knows no float64; in a single process without DeepSpeed. Steps are cut, so
    that gradients add up over several backward passes of a rank. Run again, it resumes."""
    stage = {"stage": 2, "overlap_comm": False}
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": stage}
    config["zero_allow_untested_optimizer"] = True
    plugin = {"deepspeed": config} if "RANK" in os.environ else {}
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train(folder, "DeepSpeedEngine", torch.float32, tokens_per_micro_batch=90, **saves, **plugin)


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
    {"train": train, "zero2": zero2, "fsdp2": fsdp2}[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        last = Teardown()
        end_process()
