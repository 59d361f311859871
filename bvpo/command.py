"""The command lines of all verbs: ``bvpo VERB CONFIG.toml [--section.field value] [options]`` for the stages,
``bvpo VERB EXPERIMENT [options]`` for what reads an experiment. In: the words after the verb; out: config or folder, and
options. Help is written from the config classes, so that it cannot go stale."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bvpo.config import ExperimentConfig, load_config
from bvpo.config.layers import COMMAND_LINE, Setting, section_docs, settings
from bvpo.strict import UserError, did_you_mean

_SWITCHES = {
    "--retry-failed": {
        "sample": "draw samples again that failed",
        "score": "score samples again that failed",
    },
    "--rescore": {"evaluate": "score the same samples anew, after the scorer was changed"},
    "--tune": {"run": "first find each method's best settings: the grid of [run.tune]"},
    "--dry-run": {"": "check everything and estimate the cost, then stop before the work"},
    "--debug": {"": "show the traceback of an error"},
}
"""Switch -> what it does, by verb; under the empty name for every verb. Each is a field of :class:`StageOptions`."""
_SECTIONS = {
    "run": ("run", "", "model"),
    "prompts": ("prompts", "", "model"),
    "sample": ("sample", "model", ""),
    "score": ("score", ""),
    "pair": ("pair", ""),
    "train": ("train", "data", "model", ""),
    "evaluate": ("evaluate", "model", ""),
    "tiny": ("tiny", ""),
}
"""Verb -> the sections it reads that its help shows, the most used first; a section brings those below it."""
_ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """How to run a stage this time; unlike the config, none of it belongs to the experiment."""

    limit: int | None = None
    dry_run: bool = False
    debug: bool = False
    retry_failed: bool = False
    rescore: bool = False
    tune: bool = False


def parse_command(verb: str, argv: Sequence[str], about: str = "") -> tuple[ExperimentConfig, StageOptions]:
    """The config and options of one stage call. ``--help`` prints the page and exits with 0."""
    for word in ("--help", "-h"):
        if word in argv:
            topic = next((w for w in argv[argv.index(word) + 1 :] if not w.startswith("-")), None)
            sys.stdout.write(help_page(verb, about) if topic is None else section_page(topic))
            raise SystemExit(0)
    words, options = _take_options(verb, argv)
    if not words or words[0].startswith("-"):
        raise UserError(f"bvpo {verb} needs CONFIG.toml before the --section.field settings; see bvpo {verb} --help")
    return load_config(words[0], words[1:]), options


def _take_options(verb: str, argv: Sequence[str]) -> tuple[list[str], StageOptions]:
    rest: list[str] = []
    limit: int | None = None
    given: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in _SWITCHES and ("" in _SWITCHES[word] or verb in _SWITCHES[word]):
            given.add(word.removeprefix("--").replace("-", "_"))
        elif word == "--limit":
            limit = _limit(words.pop(0) if words else "")
        elif word.startswith("--limit="):
            limit = _limit(word.removeprefix("--limit="))
        else:
            rest.append(word)
    return rest, StageOptions(limit=limit, **dict.fromkeys(given, True))


def _limit(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{COMMAND_LINE}: --limit: got {text!r}, expected a whole number, 1 or more")
    return int(text)


# --- help ------------------------------------------------------------------------------------------------------------


def help_page(verb: str, about: str = "", width: int | None = None) -> str:
    """Usage, options, and a line for each setting of the sections that the verb reads."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: bvpo {verb} CONFIG.toml [--section.field VALUE ...] [options]", ""]
    if about:
        lines += [*textwrap.wrap(about, width), ""]
    own = [(name, texts.get(verb) or texts.get("")) for name, texts in _SWITCHES.items()]
    options = [
        ("--limit N", "work on the first N items only"),
        *((name, text) for name, text in own if text),
        ("--help", "show this page; --help SECTION explains a section's settings, --help all those of every section"),
    ]
    lines += ["options:", *(f"  {name:<14} {text}" for name, text in options), ""]
    lines += textwrap.wrap(
        "Settings, for the TOML file (section.field) or the command line, which wins; the value is the default. 'none' "
        "unsets a setting that allows it; lists are joined by commas.",
        width,
    )
    shown: list[str] = []
    for section in _SECTIONS.get(verb, _sections()):
        shown += [name for name in _sections() if name == section or (name.startswith(f"{section}.") and section)]
    for section in shown:
        lines += ["", *_summary(section, width)]
    others = [name for name in _sections() if name and "." not in name and name not in shown]
    if others:
        lines += ["", f"Other sections of the file, for --help SECTION: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


def section_page(topic: str, width: int | None = None) -> str:
    """A section and those below it with every type, default and documentation; ``all`` takes every section."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    wanted = [name for name in _sections() if topic in (_ALL, name) or name.startswith(f"{topic}.")]
    if not wanted:
        raise UserError(f"--help: no section {topic!r}{did_you_mean(topic, [*filter(None, _sections()), _ALL])}")
    return "\n".join(line for section in wanted for line in (*_explanation(section, width), "")).strip() + "\n"


def _sections() -> list[str]:
    return list(dict.fromkeys(setting.section for setting in settings(ExperimentConfig)))


def _of(section: str) -> list[Setting]:
    return [setting for setting in settings(ExperimentConfig) if setting.section == section]


def _title(section: str) -> str:
    return f"[{section}]" if section else "(top of the file)"


def _summary(section: str, width: int) -> Iterator[str]:
    """A line for each setting: its flag, its default, and as much of its documentation as fits."""
    yield _title(section)
    rows = [(f"--{s.field}", "required" if s.default is None else s.default, s) for s in _of(section)]
    left = min(36, max(len(name) for name, _, _ in rows))
    for name, default, setting in rows:
        head = f"  {name:<{left}} {_cut(default, 14):<14} "
        yield head + _cut(setting.doc, max(20, width - len(head)))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def _explanation(section: str, width: int) -> Iterator[str]:
    yield _title(section)
    yield from textwrap.wrap(
        section_docs(ExperimentConfig)[section], width, initial_indent="  ", subsequent_indent="  "
    )
    for setting in _of(section):
        default = "required" if setting.default is None else f"default {setting.default}"
        yield f"  --{setting.field} {setting.type}  ({default})"
        yield from textwrap.wrap(setting.doc, width, initial_indent="      ", subsequent_indent="      ")


# --- verbs that read an experiment -----------------------------------------------------------------------------------


class PlainParser(argparse.ArgumentParser):
    """``argparse`` with our manners: errors are one line, abbreviations are refused."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(prog=f"bvpo {verb}", description=about, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


class ReaderParser(PlainParser):
    """The same for verbs that read an experiment."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(verb, about)
        self.add_argument("experiment", metavar="EXPERIMENT", help="the experiment's folder, or its config file")


def parse_reader(parser: ReaderParser, argv: Sequence[str]) -> tuple[Path, argparse.Namespace]:
    """The experiment's folder, which exists, and the options."""
    found = parser.parse_args(argv)
    return experiment_folder(found.experiment), found


def experiment_folder(text: str) -> Path:
    """The folder that ``text`` means: itself, or the one that a config file names."""
    path = Path(text)
    if path.is_file() and path.suffix == ".toml":
        path = load_config(path).folder
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
