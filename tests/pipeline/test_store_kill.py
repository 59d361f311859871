"""The store against real processes and real disks: killed at every step, several at once, no space, no permission.

A child is forked for each case and killed with SIGKILL, so nothing of it runs afterwards: no ``finally``, no ``atexit``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import fill, live_files, make_sample, shards

from bvpo.experiment import RecordStore
from bvpo.records import Sample
from bvpo.strict import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


def run_killed(work: Callable[[], Any], *, after: float | None = None) -> int:
    """Runs ``work`` in a forked child, killed after some seconds if it still runs; the exit code (-9 when killed)."""
    child = FORK.Process(target=work)
    child.start()
    child.join(after)
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode is not None
    return child.exitcode


def append_range(folder: Path, numbers: range, *, pause: float = 0.0, seal: bool = False) -> None:
    """What a stage does when it runs (again): skip what is stored, append the rest."""
    store = RecordStore(folder, Sample)
    with store.open_writer(sync_records=20) as writer:
        for number in numbers:
            if make_sample(number).key not in store:
                writer.append(make_sample(number))
                time.sleep(pause)
    if seal:
        store.seal()


def check_complete(folder: Path, num: int) -> RecordStore[Sample]:
    """Each of the first ``num`` samples is there once and equal to what was appended."""
    store = RecordStore(folder, Sample)
    found = {sample.key: sample for sample in store}
    assert len(list(store)) == len(found) == len(store) == num
    assert found == {make_sample(n).key: make_sample(n) for n in range(num)}
    assert not store.stats().damaged
    return store


# ------------------------------------------------------------------------------------------------ killed


def test_killed_at_random_times_and_run_again(tmp_path: Path) -> None:
    """Mutation: progress kept anywhere but in the data, torn lines not cut, or lines written in several steps."""
    dice = random.Random(7)
    killed = 0
    for _ in range(15):
        num_before = len(RecordStore(tmp_path, Sample))
        code = run_killed(
            lambda: append_range(tmp_path, range(400), pause=0.0005, seal=True), after=dice.uniform(0.01, 0.08)
        )
        killed += code == -signal.SIGKILL
        assert len(RecordStore(tmp_path, Sample)) >= num_before
    assert killed >= 5
    append_range(tmp_path, range(400), seal=True)
    store = check_complete(tmp_path, 400)
    assert store.stats().num_live == 0
    assert store.verify() == []


def test_synced_records_survive_the_kill_of_their_writer(tmp_path: Path) -> None:
    """Mutation: lines kept in the process until it closes the file."""

    def work() -> None:
        writer = RecordStore(tmp_path, Sample).open_writer(sync_records=10)
        for number in range(57):
            writer.append(make_sample(number))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_killed(work) == -signal.SIGKILL
    check_complete(tmp_path, 57)


STEPS = ("fsync", "replace", "unlink", "open", "ftruncate", "write")


def die_at(step: int) -> None:
    """From here on, the process kills itself at its ``step``-th system call that changes files (before it happens)."""
    left = [step]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.parametrize("shard_records", [1000, 25])
def test_killed_at_every_step_of_sealing(shard_records: int, tmp_path: Path) -> None:
    """Mutation: removing the live file before the shard has its name, or shards that count twice after a kill."""
    template = tmp_path / "template"
    fill(template, range(60))
    fill(template, range(40, 100))
    step, killed = 0, True
    while killed:
        step += 1
        folder = tmp_path / f"step{step}"
        shutil.copytree(template, folder)

        def work(folder: Path = folder, step: int = step) -> None:
            store = RecordStore(folder, Sample)
            die_at(step)
            store.seal(shard_records=shard_records)

        killed = run_killed(work) == -signal.SIGKILL
        check_complete(folder, 100)
        RecordStore(folder, Sample).seal(shard_records=shard_records)
        store = check_complete(folder, 100)
        assert store.stats().num_live == 0
        assert store.verify() == []
        assert not list(folder.glob("*.draft"))
        shutil.rmtree(folder)
    assert step > 10  # every fsync, rename and unlink was a place to die


def test_killed_at_every_step_of_writing(tmp_path: Path) -> None:
    """Mutation: an order of steps in opening, appending or changing files that a kill can catch half-way."""
    step, killed = 0, True
    while killed:
        step += 1
        folder = tmp_path / f"step{step}"

        def work(folder: Path = folder, step: int = step) -> None:
            store = RecordStore(folder, Sample)
            die_at(step)
            with store.open_writer(sync_records=3, sync_seconds=60, max_bytes=2000) as writer:
                for number in range(12):
                    writer.append(make_sample(number))

        killed = run_killed(work) == -signal.SIGKILL
        append_range(folder, range(12), seal=True)
        check_complete(folder, 12)
        shutil.rmtree(folder)
    assert step > 20


# ------------------------------------------------------------------------------------------------ several at once


def test_several_processes_write_at_once_while_others_seal(tmp_path: Path) -> None:
    """Mutation: one file for all, sealing a file in use, or two sealing processes at once."""
    workers = [
        FORK.Process(target=append_range, args=(tmp_path, range(start, 300, 3)), kwargs={"seal": True})
        for start in range(3)
    ]
    # this one repeats what all others do
    workers.append(FORK.Process(target=append_range, args=(tmp_path, range(300)), kwargs={"seal": True}))
    for worker in workers:
        worker.start()
    for _ in range(5):
        RecordStore(tmp_path, Sample).seal()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    RecordStore(tmp_path, Sample).seal()
    assert check_complete(tmp_path, 300).stats().num_live == 0


def test_a_dead_writer_is_told_from_a_working_one(tmp_path: Path) -> None:
    """Mutation: a lock that outlives its process, or none."""

    def work() -> None:
        writer = RecordStore(tmp_path, Sample).open_writer()
        writer.append(make_sample(0))
        (tmp_path / "ready").touch()
        time.sleep(60)

    child = FORK.Process(target=work)
    child.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert child.pid is not None
    store = RecordStore(tmp_path, Sample)
    assert (store.stats().num_active, store.seal().num_busy) == (1, 1)
    os.kill(child.pid, signal.SIGSTOP)  # stopped is not dead
    assert store.stats().num_active == 1
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert store.stats().num_active == 0
    assert store.seal().num_records == 1


# ------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_store_goes_on(small_disk: Path) -> None:
    """Mutation: a bare OSError, half a record kept, or a store that cannot be read or sealed afterwards."""
    store = RecordStore(small_disk / "samples", Sample)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(500_000))
    stored = 0
    with (
        pytest.raises(UserError, match="no space left on the disk while storing a record; free some") as caught,
        store.open_writer() as writer,
    ):
        for stored in range(10_000):
            writer.append(make_sample(stored, num_tokens=200))
    assert "\n" not in str(caught.value)
    store.refresh()
    assert len(store) == stored > 100
    assert store.stats().torn_bytes == 0
    with pytest.raises(UserError, match=r"no space left on the disk while (sealing|taking)"):
        store.seal()
    assert len(RecordStore(small_disk / "samples", Sample)) == stored
    filler.unlink()
    with store.open_writer() as writer:
        writer.append(make_sample(stored, num_tokens=200))
    store.seal()
    assert len(list(store)) == stored + 1
    assert not live_files(small_disk / "samples")
    assert store.verify() == []


def test_a_file_size_limit_is_one_line(tmp_path: Path) -> None:
    """Mutation: half a record kept when the limit cuts a write short (works without root, unlike a small disk)."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(UserError, match="file-size limit reached while storing a record"):
            append_range(tmp_path, range(200))

    assert run_killed(work) == 0
    store = RecordStore(tmp_path, Sample)
    assert len(store) > 10
    assert store.stats().torn_bytes == 0
    append_range(tmp_path, range(200), seal=True)
    check_complete(tmp_path, 200)


def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    """Mutation: a traceback; or reading that needs write access. Root is dropped first, since it may write anywhere."""
    folder = tmp_path / "samples"
    fill(folder, range(5), seal=True)
    fill(folder, range(5, 8))
    before = sorted(os.listdir(folder))
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and "pytest" in str(parent):
            parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        store = RecordStore(folder, Sample)
        assert len(list(store)) == 8
        assert store.stats().num_live == 1
        for attempt in (store.open_writer, store.seal):
            with pytest.raises(UserError, match=r"not writable while .* \(Permission denied\)") as caught:
                attempt()
            assert "\n" not in str(caught.value)

    assert run_killed(work) == 0
    folder.chmod(0o755)
    assert sorted(os.listdir(folder)) == before


# ------------------------------------------------------------------------------------------------ the benchmark


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Mutation: a benchmark that no longer fits the store's interface."""
    command = [sys.executable, "benchmarks/store.py", "--records", "3000", "--folder", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "records/s" in done.stdout
    (result,) = (tmp_path / "out").glob("store-*.json")
    assert '"num_records": 3000' in result.read_text()
    assert not (tmp_path / "data").exists()


def test_shards_exist_after_sealing(tmp_path: Path) -> None:
    """Mutation: a fixture that makes the tests above check nothing."""
    fill(tmp_path, range(5), seal=True)
    assert len(shards(tmp_path)) == 1
    assert not live_files(tmp_path)
