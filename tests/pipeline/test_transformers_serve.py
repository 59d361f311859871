"""A real third-party server, `transformers serve`, as the case that the preflight must refuse.

It takes no token ids, returns none, ignores `n` and `logprobs` without a word, and (without sampling in the model's
generation config) answers greedily whatever the temperature. It needs the `serving` extra of transformers (fastapi,
uvicorn), here or in the environment whose interpreter `BVPO_SERVE_PYTHON` names; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from http_fixtures import QUICK, requests
from models_fixtures import tiny_model, tiny_tokenizer

from bvpo.engines.http.engine import create
from bvpo.strict import UserError

pytestmark = pytest.mark.slow


def serving_python() -> str:
    """An interpreter that can run `transformers serve`, or a skip with the reason."""
    named = os.environ.get("BVPO_SERVE_PYTHON")
    if named:
        return named
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers[serving] is not installed here (no {', '.join(missing)}); see BVPO_SERVE_PYTHON")
    return sys.executable


@pytest.fixture(scope="module", params=["greedy", "sampling"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A running server over a tiny model, whose generation config does or does not switch sampling on."""
    python = serving_python()
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model(layers=1)
    if request.param == "sampling":
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield request.param, f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve was not ready: {log.read_text()[-2000:]}")


def test_it_is_refused_because_it_returns_no_ids(served):
    """Mutation: take the text and call its tokens sampled."""
    _, url, folder = served
    engine = create(endpoints=url, model=folder, tokenizer=folder, **QUICK)
    with pytest.raises(UserError, match="token_ids: the server returns no token ids"):
        list(engine.generate(requests(1)))
    engine.close()


def test_what_it_ignores_is_found_even_if_text_would_do(served, caplog: pytest.LogCaptureFixture):
    """With `allow_retokenise` the next shortcomings show. Mutations: believe HTTP 200; send the BOS twice."""
    kind, url, folder = served
    engine = create(endpoints=url, model=folder, tokenizer=folder, allow_retokenise=True, **QUICK)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        engine.preflight()
    engine.close()
    print(kind, caught.value, caplog.text)
    refused = str(caught.value)
    greedily = "temperature: 4 seeds at temperature 1.5 gave 1 different sample" in refused
    assert greedily == (kind == "greedy")
    # Generation stops there, but the stop string is shown, which OpenAI's API does not do.
    assert "is left in the text" in refused
    assert "n: n = 3 gave 1 choice" in caplog.text
    assert "logprobs: " in caplog.text
