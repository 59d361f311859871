"""Starts a ``vllm serve`` on this machine and stops it again, so that one GPU samples, scores and trains in turn.

In: the model and how to serve it. Out: a base URL for the HTTP engine while the ``with`` block runs; when it ends, for
whatever reason, the server is stopped and its GPU memory is free. The ``vllm`` command may live in another environment
(it must: vLLM pins other versions of torch and transformers). It speaks no HTTP but the health check.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bvpo.strict import UserError

logger = logging.getLogger(__name__)

_POLL_S = 0.2
# What the guard may take beyond the server's own time to stop.
_GUARD_MARGIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """What to serve and how. ``port`` 0 takes a free one; ``executable`` is a name on the PATH or a path.

    ``batch_invariant`` sets VLLM_BATCH_INVARIANT=1: a sample then does not depend on what else is being served (slower, and
    only on GPUs and models that vLLM supports this for). ``extra_args`` go to ``vllm serve`` as they are.
    """

    model: str
    log: Path
    revision: str | None = None
    tokenizer: str | None = None
    served_name: str = ""
    trust_remote_code: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    batch_invariant: bool = False
    extra_args: tuple[str, ...] = ()
    executable: str = "vllm"
    start_timeout_s: float = 1200.0
    stop_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(
                f"vllm serve: gpu_memory_utilization: got {self.gpu_memory_utilization}, expected a number in (0, 1]"
            )
        if self.tensor_parallel_size < 1:
            raise UserError(f"vllm serve: tensor_parallel_size: got {self.tensor_parallel_size}, expected at least 1")

    def command(self, program: str, port: int) -> list[str]:
        """The command line of the server."""
        line = [program, "serve", self.model, "--host", self.host, "--port", str(port)]
        line += ["--served-model-name", self.served_name or self.model, "--dtype", self.dtype]
        line += ["--tensor-parallel-size", str(self.tensor_parallel_size)]
        line += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        for flag, value in (
            ("--revision", self.revision),
            ("--tokenizer", self.tokenizer),
            ("--max-model-len", self.max_model_len),
        ):
            line += [] if value is None else [flag, str(value)]
        return line + (["--trust-remote-code"] if self.trust_remote_code else []) + list(self.extra_args)


@contextlib.contextmanager
def serving(server: VllmServer) -> Iterator[str]:
    """The base URL of a running server; the server is stopped when the block ends, also by ctrl-C or an error."""
    program = shutil.which(server.executable)
    if program is None:
        raise UserError(
            f"vllm serve: no program {server.executable!r}; install vLLM into an environment of its own and give the path "
            "of its vllm as executable"
        )
    port = server.port or _free_port(server.host)
    command = server.command(program, port)
    environment = os.environ | ({"VLLM_BATCH_INVARIANT": "1"} if server.batch_invariant else {})
    server.log.parent.mkdir(parents=True, exist_ok=True)
    guard = [sys.executable, "-m", "bvpo.engines.http.guard", str(server.stop_timeout_s)]
    with server.log.open("ab") as log:
        process = subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Out of the terminal's reach: ctrl-C ends the block, which ends the server.
            start_new_session=True,
        )
    try:
        logger.info("starting vllm serve on port %d, log in %s", port, server.log)
        _wait_until_healthy(server, process, port)
        yield f"http://{server.host}:{port}/v1"
    finally:
        _stop(server, process)


def _wait_until_healthy(server: VllmServer, process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + server.start_timeout_s
    while not _healthy(server.host, port):
        code = process.poll()
        if code is not None:
            raise UserError(f"vllm serve ended with exit code {code} before it was ready: {_last_line(server.log)}")
        if time.monotonic() > deadline:
            raise UserError(
                f"vllm serve was not ready after {server.start_timeout_s:g} s; its log ends: {_last_line(server.log)}"
            )
        time.sleep(_POLL_S)
    if process.poll() is not None:
        raise UserError(f"port {port} is answered by another server, and vllm serve ended: {_last_line(server.log)}")


def _healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(server: VllmServer, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # what the guard waits for
    try:
        process.wait(server.stop_timeout_s + _GUARD_MARGIN_S)
    except subprocess.TimeoutExpired:
        logger.warning("vllm serve does not stop; killing its guard (process %d)", process.pid)
        process.kill()
        process.wait()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:300]} (all of it in {log})" if lines else f"{log} is empty"
