"""Starting and stopping a local server: it is ready when it says so, and gone afterwards however the block ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from http_fixtures import by_key, requests
from models_fixtures import save_tiny_model

from bvpo.engines.http.engine import create
from bvpo.engines.http.serving import VllmServer, serving
from bvpo.engines.local import engine as embedded
from bvpo.strict import UserError

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Server settings with a stand-in for the vllm command, and what that command reported about itself."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m servers.fake_vllm "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("FAKE_VLLM_REPORT", str(tmp_path / "report.json"))

    def settings(name: str, model: str = "some/model", **options) -> VllmServer:
        fixed = {"executable": str(script), "log": tmp_path / "logs" / "vllm.log", "stop_timeout_s": 1.0}
        return VllmServer(model=model, served_name=name, **(fixed | options))

    return settings, lambda: json.loads((tmp_path / "report.json").read_text())


def alive(pid: int) -> bool:
    """Running, and not merely waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int, within: float = 8.0) -> bool:
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_served_model_samples_and_then_makes_room(fake, tmp_path: Path):
    """The whole way: start, preflight, sample, stop. Mutations: hand out the URL before the server is healthy; forget to
    stop it; pass another port to the server than to the caller."""
    settings, report = fake
    folder = save_tiny_model(tmp_path / "model")
    batch = requests(4, tokens=5)
    with serving(settings("real", model=str(folder))) as url:
        engine = create(endpoints=url, tokenizer=str(folder))
        found = by_key(list(engine.generate(batch)))
        engine.close()
        assert alive(report()["pid"])
    assert gone(report()["pid"], within=0)
    want = by_key(list(embedded.create(model=str(folder)).generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in want.items()}


def test_the_command_line_says_what_was_asked(fake):
    """Mutations: drop an option; forget the environment switch; add an option nobody set."""
    settings, report = fake
    with serving(
        settings("plain", max_model_len=4096, batch_invariant=True, extra_args=("--enforce-eager", "x"))
    ) as url:
        port = url.removeprefix("http://127.0.0.1:").removesuffix("/v1")
    expected = ["serve", "some/model", "--host", "127.0.0.1", "--port", port, "--served-model-name", "plain"]
    expected += ["--dtype", "auto", "--tensor-parallel-size", "1", "--gpu-memory-utilization", "0.9"]
    assert report()["arguments"] == [*expected, "--max-model-len", "4096", "--enforce-eager", "x"]
    assert report()["batch_invariant"] == "1"
    assert "loading the model" in settings("plain").log.read_text()


def test_a_server_that_fails_to_start_is_one_line(fake):
    """Mutations: wait for the timeout although it has ended; hide its last words; leave it running after the timeout."""
    settings, report = fake
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r"exit code 3 .*RuntimeError: no GPU .*vllm\.log"),
        serving(settings("crashes")),
    ):
        pass
    assert time.monotonic() - began < 10
    with (
        pytest.raises(UserError, match=r"not ready after 1\.5 s; its log ends: loading the model"),
        serving(settings("never-ready", start_timeout_s=1.5)),
    ):
        pass
    assert gone(report()["pid"], within=0)
    with pytest.raises(UserError, match="no program 'no-such-vllm'"), serving(settings("x", executable="no-such-vllm")):
        pass


def test_an_error_in_the_block_stops_even_a_stubborn_server(fake):
    """Mutations: stop only at a normal end; send SIGTERM only; leave the server's workers behind."""
    settings, report = fake
    with pytest.raises(RuntimeError, match="mine"), serving(settings("stubborn")):
        assert alive(report()["worker"])
        raise RuntimeError("mine")
    assert gone(report()["pid"], report()["worker"], within=1)


_STARTER = """
import time
from pathlib import Path
from bvpo.engines.http.serving import VllmServer, serving
with serving(VllmServer(model="m", served_name="plain", log=Path({log!r}), executable={executable!r}, stop_timeout_s=1.0)):
    print("serving", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_starter_however_that_dies(fake, tmp_path: Path, number: signal.Signals):
    """Mutations: start the server without the guard; let ctrl-C reach the server first."""
    settings, report = fake
    server = settings("plain")
    program = tmp_path / "start.py"
    program.write_text(_STARTER.format(log=str(server.log), executable=server.executable))
    starter = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert starter.stdout is not None and starter.stdout.readline() == "serving\n"
    starter.send_signal(number)
    starter.wait(10)
    assert gone(report()["pid"])
