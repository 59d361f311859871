"""Runs a server so that it cannot outlive its starter: ``python -m bvpo.engines.http.guard SECONDS COMMAND ...``.

In: a command, and an open pipe as standard input. Out: the command's exit code. When the pipe closes, because the starter
closed it or died in whatever way (even by SIGKILL), the command's whole process group is asked to end, and killed after
SECONDS. Ctrl-C at the terminal is left to the starter.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_LOOK_EVERY_S = 0.1


def main(arguments: Sequence[str]) -> int:
    """Run the command until it ends or standard input closes."""
    patience, command = float(arguments[0]), list(arguments[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    asked_to_stop = False

    def stop(*_: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    while child.poll() is None and not asked_to_stop:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_EVERY_S)
        asked_to_stop = asked_to_stop or (bool(readable) and not os.read(sys.stdin.fileno(), 1))
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    # Also the workers of a server that is gone: they would keep the GPU.
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
