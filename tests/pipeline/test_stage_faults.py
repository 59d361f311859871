"""``bvpo sample`` and ``bvpo score`` when the disk is full or servers misbehave: one clear line, nothing lost, nothing made
up, and the same command afterwards ends with the records of a run that nothing disturbed."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_fixtures import QUICK
from look_fixtures import Experiment, questions, save_talking_model
from models_fixtures import tiny_tokenizer
from servers.completions_server import CompletionsServer, always, fault_at

from bvpo.cli import main
from bvpo.core.scores import score_key
from bvpo.engines import openai as openai_engine
from bvpo.engines.base import Generation
from bvpo.engines.embedded import create
from bvpo.engines.endpoints import RetryPolicy
from bvpo.records import Sample, Score
from bvpo.store import RecordStore, read_manifest

NUM = 8 * 2 * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The command line logs to the stderr of the test that ran first, which is closed by now: let it start anew."""
    logger = logging.getLogger("bvpo")
    before, logger.handlers = logger.handlers, []
    yield
    logger.handlers = before


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line that the last command ended with; no traceback, no second line."""

    def line() -> str:
        err = capsys.readouterr().err
        assert "Traceback" not in err
        (last,) = [line for line in err.splitlines() if line.startswith("bvpo: ")]
        assert err.endswith(f"{last}\n")
        return last

    return line


def experiment(root: Path, model: Path, toml: str = "") -> Experiment:
    root.mkdir(exist_ok=True)
    (root / "model").symlink_to(model)
    return Experiment(root, questions(8), f"num_samples = 3\n{toml}").make("prompts")


def failures(one: Experiment) -> list[Sample]:
    folder = one.folder / "samples" / "failed"
    return list(RecordStore(folder, Sample, key=lambda sample: (sample.key, sample.error or "")))


def scores(one: Experiment) -> dict[Any, Score]:
    return {score_key(score): score for score in RecordStore(one.folder / "scores", Score, key=score_key)}


def is_finished(one: Experiment, verb: str) -> bool:
    entry = read_manifest(one.folder).stage(verb)
    return entry is not None and entry.finished is not None


# ------------------------------------------------------------------------------------------------ a full disk


class Disk:
    """A place that is full after a few more records, until :meth:`free`."""

    def __init__(self, folder: Path, fill: Callable[[], None], free: Callable[[], None]) -> None:
        self.folder, self.fill, self.free = folder, fill, free


@pytest.fixture(params=["a small disk", "the operating system says so"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A file system of 2 MiB where one can be mounted; and the same error from ``write`` anywhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a small disk":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip("mounting a small disk needs root")
        filler = folder / "filler"

        def fill() -> None:
            free = shutil.disk_usage(folder).free
            filler.write_bytes(bytes(free - 24 * 1024))  # a few pages: the first records, and the notes of the stage

        yield Disk(folder, fill, filler.unlink)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    real, left = os.write, [10**9]

    def write(handle: int, data: Any) -> int:
        if b'"crc"' in bytes(data)[:8]:
            left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    yield Disk(folder, lambda: left.__setitem__(0, 5), lambda: left.__setitem__(0, 10**9))


def test_a_full_disk_stops_each_stage_with_one_line(
    disk: Disk, model: Path, tmp_path: Path, told: Callable[[], str]
) -> None:
    """Mutations: a traceback; a record that counts as stored although it is not; a store that the next run cannot open;
    failures recorded for what was never tried."""
    whole = experiment(tmp_path / "whole", model).make("sample", "score")
    poor = experiment(disk.folder / "poor", model)
    assert poor.run("sample", "--limit", "1") == 0
    disk.fill()
    assert poor.run("sample") == 2
    assert "no space left on the disk while" in (line := told()) and "run the same command again" in line
    assert 6 < len(poor.samples) < NUM and not failures(poor) and not is_finished(poor, "sample")
    disk.free()
    assert poor.run("sample") == 0
    assert {k: s.token_ids for k, s in poor.samples.items()} == {k: s.token_ids for k, s in whole.samples.items()}
    assert poor.run("score", "--limit", "1") == 0
    disk.fill()
    assert poor.run("score") == 2
    assert "no space left on the disk while" in told()
    assert 6 <= len(scores(poor)) < NUM and not is_finished(poor, "score")
    disk.free()
    assert poor.run("score") == 0
    assert {k: s.value for k, s in scores(poor).items()} == {k: s.value for k, s in scores(whole).items()}
    for folder, cls, key in (("samples", Sample, None), ("scores", Score, score_key)):
        store = RecordStore(poor.folder / folder, cls, key=key)
        assert (len(store), store.stats().num_duplicates, store.verify()) == (NUM, 0, [])


# ------------------------------------------------------------------------------------------------ servers

MEMORY: dict[Any, Generation] = {}
BASE = 26  # more requests than a preflight sends


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., CompletionsServer]]:
    """Starts test servers over the model; all stop at the end."""
    running: list[CompletionsServer] = []

    def start(*traits: str, **options: Any) -> CompletionsServer:
        engine = create(model=str(model))
        memory = None if traits else MEMORY
        running.append(CompletionsServer(engine, tiny_tokenizer(), traits=traits, memory=memory, **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def sample(one: Experiment, *servers: CompletionsServer, **options: Any) -> int:
    flags = [f"--sample.options.{name}={value}" for name, value in (QUICK | {"concurrency": 4} | options).items()]
    flags += ["--sample.engine", "openai", "--sample.endpoints", ",".join(server.url for server in servers)]
    return main(["sample", str(one.config), *flags])


@pytest.fixture
def undisturbed(
    model: Path, tmp_path: Path, serve: Callable[..., CompletionsServer]
) -> Callable[[], dict[str, tuple[int, ...]]]:
    """The samples of a run that nothing disturbs: token ids by key."""

    def run() -> dict[str, tuple[int, ...]]:
        one = experiment(tmp_path / "undisturbed", model)
        assert sample(one, serve()) == 0
        assert len(one.samples) == NUM
        return {key: found.token_ids for key, found in one.samples.items()}

    return run


def ids(one: Experiment) -> dict[str, tuple[int, ...]]:
    return {key: found.token_ids for key, found in one.samples.items()}


def after_preflight(server: CompletionsServer, script: Callable[[int], Callable[[int], str | None]]) -> None:
    """Misbehaves only once the stage samples: its requests ask for more tokens than the preflight's."""
    first: list[int] = []

    def act(number: int) -> str | None:
        if number < 0:
            return script(first[0])(number) if first else None
        if not first and server.seen[number]["max_tokens"] == 60:
            first.append(number)
        return script(first[0])(number) if first else None

    server.script = act


ENDS = {
    "die": (fault_at, r"put aside|no endpoint|cannot connect|connection"),
    "hang": (always, "no answer|silent|timed out|did not answer"),
    "429": (always, "429"),
    "garbage": (always, "32 unusable answers in a row.*not JSON"),
    "half": (always, "unusable|broke|half|incomplete"),
}


@pytest.mark.parametrize("fault", ENDS)
def test_when_no_server_is_left_the_run_ends_and_goes_on_elsewhere(
    fault: str,
    model: Path,
    tmp_path: Path,
    serve: Callable[..., CompletionsServer],
    undisturbed: Callable[[], dict[str, tuple[int, ...]]],
    told: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that dies, hangs, is busy for ever, or answers rubbish or half a body. Mutations: samples recorded as failed that
    no server has answered; a stage that counts as finished; samples that depend on where the rest was drawn."""
    quick = functools.partial(RetryPolicy, probe_timeout_s=0.3, max_busy_rounds=3)
    monkeypatch.setattr(openai_engine, "RetryPolicy", quick)
    one, server = experiment(tmp_path / "one", model), serve()
    make, _ = ENDS[fault]
    if make is always:
        after_preflight(server, lambda start: lambda number: fault if number < 0 or number >= start + 9 else None)
    else:
        after_preflight(server, lambda start: fault_at(start + 9, fault=fault))
    assert sample(one, server, timeout_s=0.5) == 2
    line = told()
    print(line)
    assert server.url in line and "run again to go on" in line
    assert 0 < len(one.samples) < NUM and not failures(one) and not is_finished(one, "sample")
    assert sample(one, serve()) == 0
    assert ids(one) == undisturbed()
