"""``bvpo train`` as real processes: signals, two at once, a finished run again, a disk that is really full.

Processes are forked from a server that has only imported what training needs. One that must be met in the middle says so
at a step and waits there, so that nothing depends on time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from bvpo.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["bvpo.stages.train", "bvpo.training.trainer", "bvpo.training.estimate", "bvpo.training.data", "datasets"]
)
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FLAGS = {"save": "steps", "save_steps": "2", "logging_steps": "1", "max_steps": "5", "save_total_limit": "1"}
NUMBERS = itertools.count()
TIMES = ("runtime", "per_second")


def _command(words: list[str], log: str, meet: int, pipe: Connection) -> None:
    """The command, its messages in a file; at the step ``meet`` it says so and waits for an answer."""
    from bvpo.training.trainer import BVPOTrainer

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    step = BVPOTrainer.training_step

    def met(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == meet:
            pipe.send("here")
            pipe.recv()
        return step(self, *args, **kwargs)

    BVPOTrainer.training_step = met  # type: ignore[method-assign]
    sys.exit(main(words))


class Command:
    """``bvpo train`` in a process of its own, in the experiment ``place``/first."""

    def __init__(self, material: Path, place: Path, meet: int = 0) -> None:
        if not (place / "first").is_dir():
            (place / "first").mkdir(parents=True)
            (place / "first" / "quads.jsonl").write_bytes((material / "quads.jsonl").read_bytes())
        words = ["train", str(EXAMPLES / "first.toml"), "--root", str(place), "--model.path", str(material / "model")]
        words += [word for name, value in FLAGS.items() for word in (f"--train.{name}", value)]
        self.log = material / f"{next(NUMBERS)}.log"
        self.pipe, other = SERVER.Pipe()
        self.process = SERVER.Process(target=_command, args=(words, str(self.log), meet, other))
        self.process.start()
        other.close()

    def wait_until_met(self) -> None:
        try:
            assert self.pipe.recv() == "here"
        except EOFError:
            pytest.fail(self.log.read_text())

    def go_on(self) -> None:
        self.pipe.send("go on")

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and the lines that it said, bars apart."""
        self.process.join()
        assert self.process.exitcode is not None
        lines = [line.rpartition("\r")[2] for line in self.log.read_text().split("\n")]
        assert "Traceback" not in self.log.read_text()
        return self.process.exitcode, [line for line in lines if line]


def outcome(place: Path) -> dict[str, Any]:
    """What a run leaves, times apart."""
    train = place / "first" / "train"
    entries = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in e.items() if not any(word in k for word in TIMES)} for e in entries]
    steps = [entry["step"] for entry in numbers if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5], "each step once"
    files = {name: (train / name).read_bytes() for name in ("final/model.safetensors", "held_out.jsonl")}
    return {"metrics": numbers, **files}


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run's model and quads."""
    folder = tmp_path_factory.mktemp("material")
    with contextlib.chdir(folder):
        runpy.run_path(str(EXAMPLES / "first_run.py"), run_name="__main__")
    return folder / "experiments" / "first"


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    place = tmp_path_factory.mktemp("whole")
    code, lines = Command(material, place).end()
    assert code == 0, lines
    return place


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_behind_a_checkpoint(
    material: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Mutations: no handler; a checkpoint of the step before; exit code 0 or 1; a message that is missing or said twice."""
    command = Command(material, tmp_path, meet=3)
    command.wait_until_met()
    assert command.process.pid is not None
    os.kill(command.process.pid, number)
    command.go_on()
    found, lines = command.end()
    assert found == code, lines
    assert sum("checkpoint saved at step 3 of 5" in line for line in lines) == 1, lines
    assert sum("running the same command again resumes" in line for line in lines) == 1, lines
    train = tmp_path / "first" / "train"
    assert [path.name for path in train.glob("checkpoint-*")] == ["checkpoint-3"] and not (train / "final").exists()
    found, lines = Command(material, tmp_path).end()
    assert found == 0 and any("resuming from" in line and "checkpoint-3" in line for line in lines), lines
    assert outcome(tmp_path) == outcome(whole)


def test_the_second_in_a_folder_is_refused(material: Path, whole: Path, tmp_path: Path) -> None:
    """Mutations: no lock, so that metrics.jsonl has steps twice; the second waits, or ends what the first wrote."""
    first = Command(material, tmp_path, meet=2)
    first.wait_until_met()
    before = tree(tmp_path)
    code, lines = Command(material, tmp_path).end()
    assert code == 2 and len(lines) == 1 and "another bvpo train is at work in this folder" in lines[0], lines
    assert tree(tmp_path) == before
    first.go_on()
    first.process.join()
    assert first.process.exitcode == 0
    assert outcome(tmp_path) == outcome(whole)


def test_a_finished_run_again_changes_nothing(material: Path, whole: Path) -> None:
    """Mutations: an entry appended to metrics.jsonl; summary.json, config.toml or the manifest written again."""
    before = tree(whole)
    code, lines = Command(material, whole).end()
    assert code == 0 and "nothing is changed" in lines[-1], lines
    assert tree(whole) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room_left", [100_000, 700_000], ids=["not for the weights", "not for the optimizer"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_after(
    material: Path, whole: Path, small_disk: Path, room_left: int
) -> None:
    """It fills up within the second checkpoint. Mutations: torch's or safetensors' own error passes through; the unfinished
    checkpoint stays and blocks."""
    command = Command(material, small_disk, meet=3)
    command.wait_until_met()
    room = os.statvfs(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (room.f_bavail * room.f_frsize - room_left))
    command.go_on()
    code, lines = command.end()
    errors = [line for line in lines if "error" in line.lower()]
    assert code == 2 and len(errors) == 1 and "no space left on the disk while saving" in errors[0], lines
    train = small_disk / "first" / "train"
    assert [path.name for path in train.glob("checkpoint-*")] == ["checkpoint-2"]
    ballast.unlink()
    code, lines = Command(material, small_disk).end()
    assert code == 0 and any("resuming from" in line for line in lines), lines
    assert outcome(small_disk) == outcome(whole)
