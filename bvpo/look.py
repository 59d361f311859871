"""The command line of the verbs that look at an experiment: ``bvpo VERB EXPERIMENT [options]``.

In: the words after the verb. Out: the experiment's folder and the parsed options; a mistake is one line, as everywhere.
EXPERIMENT is the folder itself, or the config file that it was made with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from bvpo.config import load_config
from bvpo.strict import UserError


class PlainParser(argparse.ArgumentParser):
    """``argparse`` with our manners: errors are one line, abbreviations are refused."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(prog=f"bvpo {verb}", description=about, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


class LookParser(PlainParser):
    """The same for verbs that look at an experiment."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(verb, about)
        self.add_argument("experiment", metavar="EXPERIMENT", help="the experiment's folder, or its config file")


def parse_look(parser: LookParser, argv: Sequence[str]) -> tuple[Path, argparse.Namespace]:
    """The experiment's folder, which exists, and the options."""
    found = parser.parse_args(argv)
    return experiment_folder(found.experiment), found


def experiment_folder(text: str) -> Path:
    """The folder that ``text`` means: itself, or the one that a config file names."""
    path = Path(text)
    if path.is_file() and path.suffix == ".toml":
        config = load_config(path)
        path = Path(config.root) / config.name
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name an experiment's folder or its config file")
    return path


def whole_number(least: int) -> Callable[[str], int]:
    """A converter for options that count."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, {least} or more")
        return int(text)

    return convert
