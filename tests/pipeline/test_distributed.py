"""Two processes equal one: DDP through accelerate, and FSDP2 through fully_shard (accelerate ignores its FSDP2 plugin on
CPU and runs DDP, so sharding is tested directly). Every run asserts that the wrapper it means to test is in use."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_fixtures import make_trainer, step_gradients, tiny_causal_lm, use_exact_norms

from bvpo.training.checkpoints import damage

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(mode: str, folder: Path, processes: int) -> dict:
    folder.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), mode, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


def test_two_ddp_processes_equal_one(tmp_path):
    """Weights after three steps, the logged numbers, and the margins of held-out quads. Mutations: the loss divided by the
    number of ranks; pair counts taken per rank (views are ragged); a filler micro-batch that counts; margins of one rank."""
    one, two = run("train", tmp_path / "one", 1), run("train", tmp_path / "two", 2)
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-9, atol=1e-10, msg=name)
    assert len(one["logs"]) == len(two["logs"]) == 3
    for a, b in zip(one["logs"], two["logs"], strict=True):
        for name in ("loss", "trace/loss", "empty/rewards/margins", "trace/pairs", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert len(one["margins"]) == 5
    for a, b in zip(one["margins"], two["margins"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


def test_two_fsdp2_processes_equal_one(tmp_path):
    """Mutation: the head reads a sharded weight outside of the root's forward; world size applied twice."""
    from tests.pipeline.distributed_worker import QUADS

    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    trainer = make_trainer(tmp_path / "single", model, QUADS, beta=0.3, loss="simpo", gamma=0.5)
    loss, _ = step_gradients(trainer)
    sharded = run("fsdp2", tmp_path / "two", 2)
    torch.testing.assert_close(sharded["loss"], loss, rtol=1e-9, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["gradients"][name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@needs_deepspeed
def test_two_zero2_processes_equal_one_without_deepspeed(tmp_path):
    """Weights, logged numbers, margins; resumed from the second step, too. ZeRO-2 adds up float32 in another order.
    Mutations: gradients of all but the last micro-batch lost; DeepSpeed's step taken at every backward pass; the loss
    divided by the number of ranks; a checkpoint without the optimizer's shards taken for whole."""
    one, two = run("zero2", tmp_path / "one", 1), run("zero2", tmp_path / "two", 2)
    checkpoint = tmp_path / "two" / "out" / "checkpoint-3"
    shards = sorted(path.name for path in checkpoint.rglob("*optim_states.pt"))
    assert [name.partition("_mp")[0] for name in shards] == ["zero_pp_rank_0", "zero_pp_rank_1"]
    next(checkpoint.rglob("zero_pp_rank_1*")).unlink()
    assert "optim_states.pt is missing" in damage(checkpoint)
    for found in (two, run("zero2", tmp_path / "two", 2)):
        for name, value in one["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=2e-5, msg=name)
        assert len(one["logs"]) == len(found["logs"]) == 3
        for a, b in zip(one["logs"], found["logs"], strict=True):
            for name in ("loss", "trace/loss", "empty/rewards/margins", "trace/pairs", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
        for a, b in zip(one["margins"], found["margins"], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("how", ["a setting", "accelerate launch"])
def test_zero_3_is_refused_by_the_command(tmp_path, monkeypatch, capsys, how):
    """With accelerate's own plugin, before any work. Mutation: only what [train.hf] says is looked at."""
    from bvpo.cli import main

    stage = {"deepspeed": str(tmp_path / "zero3.json")} if how == "a setting" else {}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    if not stage:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    flags = {"use_cpu": "true", **stage}
    (tmp_path / "quads.jsonl").write_text("")
    (tmp_path / "some.toml").write_text('name = "some"\n[model]\npath = "none"\n[data]\nquads = "quads.jsonl"\n')
    words = [word for name, value in flags.items() for word in (f"--train.hf.{name}", value)]
    assert main(["train", str(tmp_path / "some.toml"), "--root", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "ZeRO-3 is not supported" in said[0]


def test_the_command_ends_past_the_interpreters_teardown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gloo's threads abort now and then; the workers above show the end itself, each with an object that aborts in a
    teardown. Mutation: the call left out of the stage, or `os._exit` out of `end_process`."""
    from bvpo.stages import train

    ended: list[str] = []
    monkeypatch.setattr(train, "parse_command", lambda *_: (None, None))
    monkeypatch.setattr(train, "run", lambda *_: ended.append("run"))
    monkeypatch.setattr("bvpo.training.loading.end_process", lambda: ended.append("end"))
    assert train.main([]) is None
    assert ended == ["run", "end"]
