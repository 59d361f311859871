"""Interrupted at any moment of a save, with damage, on a full disk, twice at once: training ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from bvpo.files import folder_lock
from bvpo.strict import UserError
from bvpo.training import checkpoints
from bvpo.training.arguments import refuse_zero3
from bvpo.training.callbacks import Stopped
from tests.pipeline.test_training_loop import StopAt, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

# Saves fall between log entries; an epoch has 5 steps.
SETTINGS = {"save_steps": 2, "logging_steps": 3, "save_total_limit": 1, "max_steps": 7, "telemetry_steps": 4}
TIMES = ("runtime", "per_second")


class Kill(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"), **SETTINGS)
    return run, run.train()


def numbers(run):
    text = (Path(run.args.output_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in lines]


def resume(folder, **settings):
    run = trainer(folder, **(SETTINGS | settings))
    return run, run.train(resume_from_checkpoint=run.newest_checkpoint() or None)


def assert_same(one, other):
    for (name, a), b in zip(one[0].model.state_dict().items(), other[0].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert numbers(one[0]) == numbers(other[0])
    assert one[1].training_loss == other[1].training_loss


POINTS = [
    (Trainer, "_save_optimizer_and_scheduler"),
    (checkpoints, "seal"),
    (checkpoints, "rotate"),
    (checkpoints.shutil, "rmtree"),
]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_a_kill_within_a_save_changes_nothing(tmp_path, monkeypatch, whole, owner, name, number):
    """Weights, metrics.jsonl and train_loss are the uninterrupted run's. Mutations: the marker written first; older
    checkpoints deleted before the new one has its marker, or with theirs; sums between log entries not restored; a step
    too many from the last checkpoint within an epoch."""
    calls, before = [], getattr(owner, name)

    def killed(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Kill
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    try:
        trainer(tmp_path, **SETTINGS).train()
    except Kill:
        assert number == 1 or checkpoints.newest(tmp_path / "out"), "a finished one lies beside it"
    monkeypatch.undo()
    assert_same(whole, resume(tmp_path))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, name):
    """An older one gives the same run; named, it is refused. Mutation: only the marker's presence is looked at."""
    trainer(tmp_path, callbacks=[StopAt(6)], **(SETTINGS | {"save_total_limit": 3})).train()
    last = checkpoints.checkpoints(tmp_path / "out")[-1]
    path = last / name
    path.unlink() if name.endswith((".pt", ".pth")) else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{last.name}: {name}"):
        trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=str(last))
    assert_same(whole, resume(tmp_path))


def test_no_whole_checkpoint_is_refused_if_one_was_finished(tmp_path):
    """Mutation: hours of work start over in silence."""
    trainer(tmp_path, callbacks=[StopAt(2)], **SETTINGS).train()
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer.pt is missing, and no other checkpoint is whole"):
        resume(tmp_path)


def test_rotation_does_not_go_by_time(tmp_path, monkeypatch):
    """A clock set back makes each new folder the oldest. Mutation: transformers' rotation by modification time."""
    before = checkpoints.seal

    def sealed(folder, *args):
        before(folder, *args)
        moment = 2e9 - int(folder.name.rpartition("-")[2]) * 1e6
        os.utime(folder, (moment, moment))

    monkeypatch.setattr(checkpoints, "seal", sealed)
    trainer(tmp_path, **SETTINGS).train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "out")] == ["checkpoint-7"]


def test_asked_to_stop_it_saves_and_goes_on_equal(tmp_path, whole):
    """Mutations: no checkpoint of the step at work; the stop taken for the epoch's end."""
    run = trainer(tmp_path, **SETTINGS)
    before = run.training_step

    def asked(*args, **kwargs):
        run.stop_asked = run.state.global_step == 2
        return before(*args, **kwargs)

    run.training_step = asked
    with pytest.raises(Stopped):
        run.train()
    assert run.newest_checkpoint().endswith("checkpoint-3")
    assert_same(whole, resume(tmp_path))


def test_what_only_costs_memory_may_change(tmp_path, whole):
    """Mutation: a field of these in the identity."""
    trainer(tmp_path, callbacks=[StopAt(4)], **SETTINGS).train()
    run, _ = resume(tmp_path, tokens_per_micro_batch=90, reference="held")
    for (name, a), b in zip(whole[0].model.state_dict().items(), run.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), RuntimeError("[enforce fail at inline_container.cc:1] PytorchStreamWriter failed")],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path, monkeypatch, error):
    """Mutation: the writers' own errors pass through."""
    run = trainer(tmp_path, **SETTINGS)

    def full(folder):
        raise error

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full)
    with pytest.raises(UserError, match="no space left on the disk while saving a checkpoint"):
        run.train()
    assert not checkpoints.checkpoints(tmp_path / "out")


def test_the_second_in_a_folder_is_refused_and_a_fork_keeps_no_lock(tmp_path):
    """Mutations: waits for ever; a killed trainer's data-loader worker holds the lock."""
    (release, wait), (here, forked) = os.pipe(), os.pipe()
    with folder_lock(tmp_path, "train", refusal="busy"):
        with pytest.raises(UserError, match="busy"), folder_lock(tmp_path, "train", refusal="busy"):
            pass
        child = os.fork()
        if child == 0:
            os.close(wait)
            os.write(forked, b".")
            os.read(release, 1)  # lives until the parent closes its end
            os._exit(0)
        os.read(here, 1)
    with folder_lock(tmp_path, "train", refusal="the child holds it"):
        pass
    os.close(wait)
    os.waitpid(child, 0)


def test_zero_3_is_refused_early():
    """With a stand-in for accelerate's plugin. Mutation: the stage is not looked at."""
    refuse_zero3(None)
    refuse_zero3(SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match="ZeRO-3"):
        refuse_zero3(SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}}))
