"""``bvpo sample`` killed with SIGKILL at random moments and run again: the samples of an uninterrupted run, each once.

The processes are forked from a server that has only imported what sampling needs, so that a run takes a second and several
can be killed. ``benchmarks/kill_test.py`` does the same to whole ``bvpo`` commands, 60 times.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from look_fixtures import Experiment, questions, save_talking_model

from bvpo.cli import main
from bvpo.experiment import RecordStore, read_manifest
from bvpo.records import Sample

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["bvpo.stages.sample", "bvpo.engines.local.engine", "transformers.models.qwen2.modeling_qwen2", "pyarrow.parquet"]
)
NUM = 16 * 2 * 3
TOML = "num_samples = 3\noptions.max_batch_rows = 3\noptions.min_batch_rows = 1\n"


def stored(folder: Path) -> int:
    return len(RecordStore(folder / "samples", Sample))


def killed_in_the_middle(experiment: Experiment, num_records: int, dice: random.Random) -> bool:
    """Starts sampling and kills it when it has stored so many records, or soon after; false if it was done by then."""
    samples = experiment.folder / "samples"
    before = set(samples.glob("*.jsonl"))
    child = SERVER.Process(target=main, args=(["sample", str(experiment.config)],))
    child.start()
    deadline = time.monotonic() + 60
    while child.is_alive() and time.monotonic() < deadline:
        lines = sum(path.read_bytes().count(b"\n") for path in set(samples.glob("*.jsonl")) - before)
        if lines >= num_records:
            break
        time.sleep(0.002)
    child.join(dice.uniform(0, 0.05))
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again(tmp_path: Path) -> None:
    """Mutations: samples kept in the process until it ends, progress kept anywhere but in the data, seeds that depend on
    what was drawn before, done samples drawn again, a torn line that stops the next run, or a stage that thinks it is
    finished."""
    model = save_talking_model(tmp_path / "model")
    whole, broken = (Experiment(tmp_path / name, questions(16), TOML) for name in _folders(tmp_path, model))
    assert whole.make("prompts").run("sample", "--sample.options.max_batch_rows", "64") == 0
    broken.make("prompts")
    dice = random.Random(5)
    counts = [0]
    for num_records in (0, 1, dice.randrange(2, 25), dice.randrange(2, 25)):
        assert killed_in_the_middle(broken, num_records, dice)
        counts.append(stored(broken.folder))
        assert counts[-2] + num_records <= counts[-1] < NUM
        entry = read_manifest(broken.folder).stage("sample")
        assert entry is None or entry.finished is None
    assert broken.run("sample") == 0
    store = RecordStore(broken.folder / "samples", Sample)
    assert (len(store), len(list(store)), store.stats().num_duplicates) == (NUM, NUM, 0)
    assert store.verify() == []
    for key, sample in whole.samples.items():
        other = store.get(key)
        assert other is not None
        assert (other.token_ids, other.text, other.finish) == (sample.token_ids, sample.text, sample.finish)
        assert other.logprobs == pytest.approx(sample.logprobs, abs=1e-4)
    entry = read_manifest(broken.folder).stage("sample")
    assert entry is not None and entry.finished is not None and entry.counts["samples"] == NUM


def _folders(root: Path, model: Path) -> list[str]:
    for name in ("whole", "broken"):
        (root / name).mkdir()
        (root / name / "model").symlink_to(model)
    return ["whole", "broken"]
