"""FSDP2 as accelerate sets it up on GPUs, on two CPU processes: equal to one process, and log-prob sums never in bf16."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import make_trainer, step_gradients

from bvpo.training.callbacks import Bookkeeping
from bvpo.training.loading import keep_outputs_wide

WORKER = Path(__file__).with_name("fsdp2_worker.py")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fsdp2")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [sys.executable, *launcher, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("mode", ["exact", "kl"])
def test_accelerates_units_equal_one_process(sharded: dict[str, Any], mode: str, tmp_path: Path) -> None:
    """Final norm and head are one unit of accelerate's, whose head never runs its own forward. Mutations: the head read
    as a shard; the held reference left whole, or sharded with its head freed before it is read."""
    from tests.pipeline.fsdp2_worker import MODES, QUADS, model_of

    model = model_of(mode)
    loss, _ = step_gradients(make_trainer(tmp_path, model, QUADS, **MODES[mode]))
    torch.testing.assert_close(sharded[mode]["loss"], loss, rtol=1e-9, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            sharded[mode]["gradients"][name], parameter.grad, rtol=1e-8, atol=1e-10, msg=f"{mode} {name}"
        )


def test_sums_stay_in_float32_under_bf16(sharded: dict[str, Any]) -> None:
    """accelerate's policy casts module outputs to bf16, which rounds a log-prob sum of 1,000 to a multiple of 4.
    Mutation: `keep_outputs_wide` not called (the losses then refuse bf16 sums)."""
    exact, low = sharded["exact"], sharded["bf16"]
    assert low["statistics"].dtype == torch.float32
    assert abs(low["loss"] - exact["loss"]).item() < 0.05, "computation in bf16, sums in fp32"
    assert low["loss"].item() != exact["loss"].item(), "bf16 is not in use"
    assert all(gradient.dtype == torch.float32 for gradient in low["gradients"].values())


def test_policy_of_accelerate_is_widened() -> None:
    """Mutation: the compute precision widened too (FSDP2 in fp32 is several times slower)."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16, "accelerate changed: this may go"
    keep_outputs_wide(accelerator)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    keep_outputs_wide(types.SimpleNamespace(state=types.SimpleNamespace()))  # DDP, one device: nothing to do


def test_trainer_widens_its_own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the call left out of the trainer."""
    from training_fixtures import random_quads, tiny_causal_lm

    widened: list[Any] = []
    monkeypatch.setattr("bvpo.training.trainer.keep_outputs_wide", widened.append)
    trainer = make_trainer(tmp_path, tiny_causal_lm("qwen2", dtype=torch.float32), random_quads(2))
    assert widened == [trainer.accelerator]


def test_resumed_sharded_run_reads_its_reference_from_the_cache(tmp_path: Path) -> None:
    """Sharded models reach `on_train_begin` with trained weights when they resume. Mutations: refusing although the cache
    is complete; computing a reference from trained weights when it is not."""
    from training_fixtures import random_quads, tiny_causal_lm

    from bvpo.strict import UserError

    def trainer(cache: str) -> Any:
        model = tiny_causal_lm("qwen2", dtype=torch.float32)
        return make_trainer(tmp_path / "t", model, random_quads(3), reference_cache=str(tmp_path / cache))

    first = trainer("cache")
    first.fill_reference(first.model)
    resumed = trainer("cache")
    resumed.model_wrapped = None  # running it would fail
    resumed.state.global_step = 2
    Bookkeeping(resumed).on_train_begin(resumed.args, resumed.state, resumed.control)
    torch.testing.assert_close(resumed._train_steps.reference, first._train_steps.reference, equal_nan=True)
    lost = trainer("other")
    lost.state.global_step = 2
    with pytest.raises(UserError, match="cache is gone"):
        Bookkeeping(lost).on_train_begin(lost.args, lost.state, lost.control)
