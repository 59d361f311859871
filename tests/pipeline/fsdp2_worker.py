"""Run by test_fsdp2_units.py under ``torch.distributed.run``: optimizer steps on a model that accelerate's own
``fsdp2_prepare_model`` has sharded (its units are the layers, the embedding, final norm + head, and the rest).

accelerate uses that function on GPUs only, so it is called directly here, with the plugin of recipes/accelerate.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, use_exact_norms

from bvpo.training.loading import end_process, keep_outputs_wide, shard_frozen

QUADS = random_quads(10, seed=7, ragged_views=True, tails=True)
SIMPO: dict[str, Any] = {"loss": "simpo", "beta": 0.3, "gamma": 0.5}
MODES: dict[str, dict[str, Any]] = {
    "exact": SIMPO,
    "kl": SIMPO | {"anchor": "kl", "anchor_weight": 0.2},
    "bf16": SIMPO | {"precision": "bf16"},
}


def model_of(mode: str) -> Any:
    """The same weights in every mode; only ``bf16`` stays in float32, as the master weights of a GPU run are."""
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    return model.float() if mode == "bf16" else model


def accelerator_of(mode: str) -> Any:
    """What the two functions read of an ``Accelerator`` on GPUs."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    if mode == "bf16":
        plugin.set_mixed_precision("bf16")  # as AcceleratorState does
    return types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        device=torch.device("cpu"),
        mixed_precision="bf16" if mode == "bf16" else "no",
        is_main_process=dist.get_rank() == 0,
    )


def step(folder: Path, mode: str) -> dict[str, Any]:
    model = model_of(mode)
    trainer = make_trainer(folder / f"{mode}-{dist.get_rank()}", model, QUADS, **MODES[mode])
    accelerator = accelerator_of(mode)
    keep_outputs_wide(accelerator)
    fsdp2_prepare_model(accelerator, model)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "FSDP2 is not in use"
    if trainer.reference_model is not None:
        trainer.reference_model = shard_frozen(trainer.reference_model, accelerator)
        assert all(isinstance(p, DTensor) for p in trainer.reference_model.parameters())
    loss = trainer.training_step(model, trainer._train_steps[0])
    statistics = trainer._statistics.clone()
    for value in (loss, statistics):
        dist.all_reduce(value)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": loss / dist.get_world_size(), "statistics": statistics, "gradients": gradients}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {mode: step(Path(sys.argv[1]), mode) for mode in MODES}
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    end_process()
