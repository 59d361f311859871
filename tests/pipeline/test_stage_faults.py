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
from servers.completions_server import CompletionsServer

from bvpo.cli import main
from bvpo.data.scores import score_key
from bvpo.engines.base import Generation
from bvpo.engines.http import engine as openai_engine
from bvpo.engines.http.endpoints import RetryPolicy
from bvpo.engines.local.engine import create
from bvpo.experiment import RecordStore, read_manifest
from bvpo.records import Sample, Score

NUM = 8 * 2 * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What the runs have told people. With this handler in place the command line adds none of its own, which would write
    to the stderr of the test that ran first."""
    logger = logging.getLogger("bvpo")
    before, logger.handlers = logger.handlers, [caplog.handler]
    caplog.set_level(logging.INFO, "bvpo")
    yield lambda: caplog.text
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
    return Experiment(root, questions(8), f"num_samples = 6\n{toml}").make("prompts")


def failures(one: Experiment) -> list[Sample]:
    folder = one.folder / "samples" / "failed"
    return list(RecordStore(folder, Sample, key=lambda sample: (sample.key, sample.error or "")))


def scores(one: Experiment) -> dict[Any, Score]:
    return {score_key(score): score for score in RecordStore(one.folder / "scores", Score, key=score_key)}


def values(one: Experiment) -> dict[str, float | None]:
    return {score.sample_key: score.value for score in scores(one).values()}


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
            filler.write_bytes(bytes(free - 16 * 1024))  # a few pages: the first records, and the notes of the stage

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
    assert 12 < len(poor.samples) < NUM and not failures(poor) and not is_finished(poor, "sample")
    disk.free()
    assert poor.run("sample") == 0
    assert {k: s.token_ids for k, s in poor.samples.items()} == {k: s.token_ids for k, s in whole.samples.items()}
    assert poor.run("score", "--limit", "1") == 0
    disk.fill()
    assert poor.run("score") == 2
    assert "no space left on the disk while" in told()
    assert 12 < len(scores(poor)) < NUM and not is_finished(poor, "score")
    disk.free()
    assert poor.run("score") == 0
    assert values(poor) == values(whole)
    for folder, cls, key in (("samples", Sample, None), ("scores", Score, score_key)):
        store = RecordStore(poor.folder / folder, cls, key=key)
        assert (len(store), store.stats().num_duplicates, store.verify()) == (NUM, 0, [])


# ------------------------------------------------------------------------------------------------ servers

MEMORY: dict[Any, Generation] = {}


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., CompletionsServer]]:
    """Starts test servers over the model; all stop at the end."""
    running: list[CompletionsServer] = []

    def start(*traits: str, **options: Any) -> CompletionsServer:
        engine = create(model=str(model))
        running.append(CompletionsServer(engine, tiny_tokenizer(), traits=traits, memory=MEMORY, **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def sample(one: Experiment, *servers: CompletionsServer, retry: bool = False, **options: Any) -> int:
    flags = [f"--sample.options.{name}={value}" for name, value in (QUICK | {"concurrency": 4} | options).items()]
    flags += ["--sample.engine", "openai", "--sample.endpoints", ",".join(server.url for server in servers)]
    return main(["sample", str(one.config), *flags, *["--retry-failed"] * retry])


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


def once_sampling(server: CompletionsServer, act: Callable[[int], str | None], absolute: bool = False) -> None:
    """Misbehaves when the stage samples, not in the preflight; counts requests from its first one, or all (``absolute``)."""
    first: list[int] = []

    def script(number: int) -> str | None:
        if number >= 0 and not first and server.seen[number]["max_tokens"] == 60:
            first.append(number)
        if not first:
            return None
        return act(number if absolute or number < 0 else number - first[0])

    server.script = script


@pytest.mark.parametrize("fault", ["die", "hang", "429", "garbage", "half"])
def test_when_no_server_is_left_the_run_ends_and_goes_on_elsewhere(
    fault: str,
    model: Path,
    tmp_path: Path,
    serve: Callable[..., CompletionsServer],
    undisturbed: Callable[[], dict[str, tuple[int, ...]]],
    told: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that dies, hangs, is busy for ever, or answers rubbish or half a body. Mutations: every sample that no server
    has answered recorded as failed; a stage that counts as finished; samples that depend on where the rest was drawn."""
    # Only a hanging server is told by a clock; all others by what they do, however slow the machine is.
    limits = {"timeout_s": 2.0, "probe": 1.0} if fault == "hang" else {"timeout_s": 60.0, "probe": 60.0}
    quick = functools.partial(RetryPolicy, probe_timeout_s=limits["probe"], max_busy_rounds=3)
    monkeypatch.setattr(openai_engine, "RetryPolicy", quick)
    one, server = experiment(tmp_path / "one", model), serve()
    once_sampling(server, lambda number: fault if number >= 9 or (number < 0 and fault == "hang") else None)
    assert sample(one, server, timeout_s=limits["timeout_s"]) == 2
    line = told()
    verdict = {
        "die": "cannot connect",
        "hang": "no answer within 2 s, and its list of models does not answer either",
        "429": "HTTP 429",
        "garbage": "32 unusable answers in a row, the last: unusable answer: not JSON: b'<html>gateway</html>'",
        "half": "peer closed connection without sending complete message body",
    }[fault]
    assert server.url in line and verdict in line and "requests were not answered, run again to go on" in line
    assert 0 < len(one.samples) < NUM and not is_finished(one, "sample")
    # a few used up their attempts before the server was given up
    assert len(failures(one)) <= {"garbage": 6, "half": 6}.get(fault, 0)
    assert sample(one, serve(), retry=True) == 0
    assert ids(one) == undisturbed() and is_finished(one, "sample")


def test_one_of_two_servers_dies(
    model: Path,
    tmp_path: Path,
    serve: Callable[..., CompletionsServer],
    undisturbed: Callable[[], dict[str, tuple[int, ...]]],
    said: Callable[[], str],
) -> None:
    """And the other one is busy for a while. Mutation: its requests lost, doubled or failed."""
    one, dying, busy = experiment(tmp_path / "one", model), serve(), serve()
    once_sampling(dying, lambda number: "die" if number >= 3 else None)
    once_sampling(busy, lambda number: "429" if 3 <= number < 9 else None)
    assert sample(one, dying, busy) == 0
    assert f"{dying.url}: cannot connect" in said()
    assert ids(one) == undisturbed() and not failures(one)
    assert RecordStore(one.folder / "samples", Sample).stats().num_duplicates == 0


def test_a_lasting_fault_is_the_verdict_of_its_request_alone(
    model: Path,
    tmp_path: Path,
    serve: Callable[..., CompletionsServer],
    undisturbed: Callable[[], dict[str, tuple[int, ...]]],
    said: Callable[[], str],
) -> None:
    """Mutations: the run ended by one prompt that a server cannot bear; its failures among the samples, or drawn again
    unasked."""
    one, server = experiment(tmp_path / "one", model), serve()
    bad: list[list[int]] = []

    def act(number: int) -> str | None:
        bad[:] = bad or [server.seen[number]["prompt"]]
        return "500" if server.seen[number]["prompt"] == bad[0] else None

    once_sampling(server, act, absolute=True)
    assert sample(one, server) == 0
    assert "6 x 6 attempts, the last: HTTP 500: internal error" in said()
    assert {list(failed.prompt_ids) == bad[0] for failed in failures(one)} == {True}
    assert (len(failures(one)), len(one.samples)) == (6, NUM - 6)
    server.script = lambda number: None
    assert sample(one, server) == 0
    assert len(one.samples) == NUM - 6
    assert sample(one, server, retry=True) == 0
    assert ids(one) == undisturbed()


@pytest.mark.parametrize(
    ("trait", "line"),
    [
        ("ignores_seed", "same_seed: the same request twice gave different samples"),
        ("greedy", "temperature: 4 seeds at temperature 1.5 gave 1 different sample"),
        ("no_ids", "token_ids: the server returns no token ids"),
    ],
)
def test_a_server_that_cannot_is_refused_before_anything_is_drawn(
    trait: str, line: str, model: Path, tmp_path: Path, serve: Callable[..., CompletionsServer], told: Callable[[], str]
) -> None:
    """Other text for the same seed, the same text for every seed, no ids. Mutation: HTTP 200 taken for an answer."""
    one = experiment(tmp_path / "one", model)
    assert sample(one, serve(trait)) == 2
    assert line in told()
    assert not one.samples and not failures(one) and read_manifest(one.folder).stage("sample") is None


def test_a_server_that_ignores_n_is_told_and_used(
    model: Path,
    tmp_path: Path,
    serve: Callable[..., CompletionsServer],
    undisturbed: Callable[[], dict[str, tuple[int, ...]]],
    said: Callable[[], str],
) -> None:
    """Mutation: five samples asked for at once, one received."""
    one = experiment(tmp_path / "one", model)
    assert sample(one, serve("ignores_n")) == 0
    assert "n: n = 3 gave 1 choice" in said()
    assert ids(one) == undisturbed()


def test_other_weights_behind_the_same_name_are_refused(
    model: Path, tmp_path: Path, serve: Callable[..., CompletionsServer], told: Callable[[], str]
) -> None:
    """Mutation: a run that goes on with samples of another model because the server calls it the same."""
    one = experiment(tmp_path / "one", model)
    server = serve()
    once_sampling(server, lambda number: "die" if number >= 9 else None)
    assert sample(one, server) == 2
    told()
    before = ids(one)
    other = CompletionsServer(create(model=str(save_talking_model(tmp_path / "other", seed=1))), tiny_tokenizer())
    with other:
        assert sample(one, other) == 2
    assert "sample was started here with other settings" in (line := told()) and "drawn" in line
    assert ids(one) == before
