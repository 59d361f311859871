"""The ``bvpo`` command: finds the verb's module, runs it, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 2 the user's mistake (one line, no traceback unless ``--debug``), 130 interrupted. Verbs load on
use, so ``bvpo --help`` stays free of torch. A verb is a module with ``main(argv) -> int | None`` and one line in
``bvpo.verbs.VERBS``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, TextIO

from bvpo import __version__
from bvpo.strict import UserError, did_you_mean, visible
from bvpo.verbs import VERBS, run_words


def help_page() -> str:
    lines = ["usage: bvpo VERB [arguments]", "", "Align reasoning models with preferences (BVPO).", "", "verbs:"]
    lines += [f"  {name:<12} {line}" for name, (_, line) in VERBS.items()]
    lines += ["", "bvpo VERB --help describes one verb; bvpo --version prints the version."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if words and words[0] == "--debug":
        words = [*words[1:], "--debug"]  # bvpo --debug VERB is bvpo VERB --debug
    try:
        with redirect_stdout(_Stdout(sys.stdout)):  # type: ignore[type-var]
            return _run(words)
    except UserError as error:
        if debug:
            raise
        sys.stderr.write(_on_one_line(f"bvpo: error: {error}") + "\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("bvpo: interrupted; running the same command again resumes\n")
        return 130
    except BrokenPipeError:
        # the reader (such as `| head`) went away: point stdout elsewhere, or the exit itself would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help", "--debug"):
        sys.stdout.write(help_page())
        return 0
    verb, *rest = words
    if verb == "--version":
        sys.stdout.write(f"bvpo {__version__}\n")
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}")
    _log_to_stderr()
    return run_words(verb, rest)


_OWN_COLOR = re.compile(r"(\x1b\[[0-9;]*m)")


class _Stdout:
    """Writes a page of text out with nothing in it that moves the cursor or turns letters round, colours excepted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = _OWN_COLOR.split(text)
        self._stream.write("".join(part if i % 2 else visible(part) for i, part in enumerate(parts)))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Visible(logging.Formatter):
    """The message, with what names of prompts, servers and templates would do to a terminal written out."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever stderr is at the time, which others may redirect."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _log_to_stderr() -> None:
    """Progress for people goes to stderr; other libraries keep their own levels."""
    logger = logging.getLogger("bvpo")
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(Visible("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
