"""The command line that all experiment verbs share: ``bvpo VERB CONFIG.toml [--section.field value] [options]``.

In: the words after the verb; out: the resolved config and :class:`StageOptions`. Help is written from the config
classes themselves, so it cannot go stale. What a verb does is no concern of this module.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bvpo.config import ExperimentConfig, load_config
from bvpo.config.layers import COMMAND_LINE, Setting, section_docs, settings
from bvpo.strict import UserError

_OPTIONS = (
    ("--limit N", "work on the first N items only"),
    ("--dry-run", "check everything and estimate the cost, then stop before the work"),
    ("--debug", "show the traceback of an error"),
    ("--help", "show this page"),
)
_OWN_OPTIONS = {
    "sample": ("--retry-failed", "draw samples again that failed"),
    "score": ("--retry-failed", "score samples again that failed"),
    "evaluate": ("--rescore", "score the same samples anew, after the scorer was changed"),
    "run": ("--tune", "first find each method's best settings: the grid of [run.tune]"),
}
"""What one verb alone has; its stage takes it from the words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """How to run a stage this time; unlike the config, none of it belongs to the experiment."""

    limit: int | None = None
    dry_run: bool = False
    debug: bool = False


def parse_command(verb: str, argv: Sequence[str], about: str = "") -> tuple[ExperimentConfig, StageOptions]:
    """The config and options of one stage call. ``--help`` prints the page and exits with 0."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_page(verb, about))
        raise SystemExit(0)
    words, options = _take_options(argv)
    if not words or words[0].startswith("-"):
        raise UserError(f"bvpo {verb} needs CONFIG.toml before the --section.field settings; see bvpo {verb} --help")
    return load_config(words[0], words[1:]), options


def _take_options(argv: Sequence[str]) -> tuple[list[str], StageOptions]:
    rest: list[str] = []
    limit: int | None = None
    switches = {"--dry-run": False, "--debug": False}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in switches:
            switches[word] = True
        elif word == "--limit":
            limit = _limit(words.pop(0) if words else "")
        elif word.startswith("--limit="):
            limit = _limit(word.removeprefix("--limit="))
        else:
            rest.append(word)
    return rest, StageOptions(limit=limit, dry_run=switches["--dry-run"], debug=switches["--debug"])


def _limit(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{COMMAND_LINE}: --limit: got {text!r}, expected a whole number, 1 or more")
    return int(text)


def help_page(verb: str, about: str = "", width: int | None = None) -> str:
    """Usage, options, and every setting with type, default and documentation, grouped by section."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: bvpo {verb} CONFIG.toml [--section.field VALUE ...] [options]", ""]
    if about:
        lines += [*textwrap.wrap(about, width), ""]
    own = [_OWN_OPTIONS[verb]] if verb in _OWN_OPTIONS else []
    lines += ["options:", *(f"  {name:<14} {text}" for name, text in (*own, *_OPTIONS)), ""]
    lines += textwrap.wrap(
        "Settings, for the TOML file (section.field) or the command line, which wins. 'none' unsets a setting "
        "that allows it; lists are joined by commas.",
        width,
    )
    lines += _setting_lines(width)
    return "\n".join(lines) + "\n"


def _setting_lines(width: int) -> Iterator[str]:
    docs = section_docs(ExperimentConfig)
    section = None
    for setting in settings(ExperimentConfig):
        if setting.section != section:
            section = setting.section
            yield ""
            yield f"[{section}]" if section else "(top of the file)"
            yield from textwrap.wrap(docs[section], width, initial_indent="  ", subsequent_indent="  ")
        yield _heading(setting)
        yield from textwrap.wrap(setting.doc, width, initial_indent="      ", subsequent_indent="      ")


def _heading(setting: Setting) -> str:
    default = "required" if setting.default is None else f"default {setting.default}"
    return f"  --{setting.field} {setting.type}  ({default})"
