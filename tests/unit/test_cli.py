"""The command: its help, its exit codes, and the command line that all experiment verbs share."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bvpo import __version__, cli
from bvpo.command import StageOptions, help_page, parse_command, section_page
from bvpo.config import ExperimentConfig
from bvpo.config.layers import settings
from bvpo.strict import UserError

CONFIG = 'name = "a"\n[model]\npath = "m"\n'


ORDER = (
    "run",
    "prompts",
    "sample",
    "score",
    "pair",
    "train",
    "evaluate",
    "analyze",
    "report",
    "status",
    "inspect",
    "compare",
    "tiny",
    "lab",
    "sweep",
    "feedback",
    "annotate",
    "preregister",
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A verb `spy` that records its arguments and fails the way its first argument says."""
    calls: list[list[str]] = []
    module = ModuleType("bvpo_spy")

    def main(argv: list[str]) -> int | None:
        calls.append(argv)
        if "user" in argv:
            raise UserError("c.toml:3: field 'x': got 1, expected 2")
        if "interrupt" in argv:
            raise KeyboardInterrupt
        if "bug" in argv:
            raise KeyError("bug")
        return 3 if "three" in argv else None

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bvpo_spy", module)
    monkeypatch.setitem(cli.VERBS, "spy", ("bvpo_spy", "records its arguments"))
    return calls


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    return str(path)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_once_in_order(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    """Mutation: sorting the verbs, or printing help to stderr."""
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z]+) {2,}\S", out, re.MULTILINE)
    assert listed == list(cli.VERBS)


def test_verbs_follow_the_order_of_the_work() -> None:
    """Mutation: appending a new verb at the end of VERBS instead of where it belongs."""
    assert list(cli.VERBS) == [name for name in ORDER if name in cli.VERBS]
    assert all(line and "\n" not in line for _, line in cli.VERBS.values())


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_verbs_exist(name: str) -> None:
    """Mutation: a verb in the list whose module is not there (found without importing it: some load torch)."""
    found = importlib.util.find_spec(cli.VERBS[name][0])
    assert found is not None and found.origin is not None
    assert "def main(" in Path(found.origin).read_text(encoding="utf-8")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a version written in two places."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bvpo {__version__}\n"


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: exit code 1, or no suggestion."""
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "bvpo: error: unknown verb 'trian'; did you mean 'train'?\n"


def test_arguments_and_exit_code_pass_through(verb: list[list[str]]) -> None:
    """Mutation: returning 0 whatever the verb said; swallowing --debug before the verb."""
    assert cli.main(["spy", "a", "--b", "c"]) == 0
    assert cli.main(["spy", "three"]) == 3
    assert cli.main(["--debug", "spy", "a"]) == 0
    assert verb == [["a", "--b", "c"], ["three"], ["a", "--debug"]]


def test_user_errors_are_one_line(verb: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: printing the traceback, or exit code 1."""
    assert cli.main(["spy", "user"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "bvpo: error: c.toml:3: field 'x': got 1, expected 2\n" and not captured.out


def test_debug_shows_the_traceback(verb: list[list[str]]) -> None:
    """Mutation: --debug ignored."""
    with pytest.raises(UserError):
        cli.main(["spy", "user", "--debug"])


def test_bugs_keep_their_traceback(verb: list[list[str]]) -> None:
    """Mutation: `except Exception`: a bug of ours would look like the user's mistake."""
    with pytest.raises(KeyError):
        cli.main(["spy", "bug"])


def test_interrupt_says_that_it_resumes(verb: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: KeyboardInterrupt as a traceback."""
    assert cli.main(["spy", "interrupt"]) == 130
    assert "same command again resumes" in capsys.readouterr().err


def test_closed_pipe_is_quiet() -> None:
    """Mutation: dropping the BrokenPipeError branch: `bvpo --help | true` would end in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "bvpo", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == ""


def test_stage_command_line(config: str) -> None:
    """Mutation: passing --limit on as a config flag, or ignoring a switch that follows the settings."""
    parsed, options = parse_command("train", [config, "--limit", "5", "--seed", "7", "--dry-run", "--debug"])
    assert parsed.seed == 7 and parsed.name == "a"
    assert options == StageOptions(limit=5, dry_run=True, debug=True)
    assert parse_command("train", ["--limit=2", config])[1] == StageOptions(limit=2)
    assert parse_command("train", [config])[1] == StageOptions()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "bvpo train needs CONFIG.toml"),
        (["--seed", "1"], "bvpo train needs CONFIG.toml"),
        (["no.toml"], "no.toml: No such file"),
        (["CONFIG", "--limit", "0"], "--limit: got '0', expected a whole number"),
        (["CONFIG", "--limit"], "--limit: got ''"),
        (["CONFIG", "--limti", "3"], "unknown flag '--limti'"),
    ],
)
def test_stage_command_line_mistakes(config: str, argv: list[str], said: str) -> None:
    """Mutation: argparse-like usage dumps, or `int()` errors let through."""
    with pytest.raises(UserError, match=re.escape(said)):
        parse_command("train", [config if word == "CONFIG" else word for word in argv])


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_command("train", words, about="Trains.")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_stage_help_is_short_and_of_its_own_sections(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: the settings of every section on every verb's page; or one of its own left out."""
    out = helped(capsys, "--help")
    assert out.startswith("usage: bvpo train CONFIG.toml") and len(out.splitlines()) < 120
    assert out.index("[train]") < out.index("[data]") < out.index("[model]") and "[tiny]" not in out
    for setting in settings(ExperimentConfig):
        assert (f"  --{setting.field} " in out) == (setting.section.split(".")[0] in ("train", "data", "model", "")), (
            setting
        )
    assert re.search(r"--model.path +required", out) and re.search(r"--train.loss.beta +0.1 ", out)
    assert "--help SECTION" in out and "tiny" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("topic", "sections"), [("all", None), ("train.loss", {"train.loss"}), ("run", {"run", "run.tune"})]
)
def test_help_of_a_section_explains_it(
    capsys: pytest.CaptureFixture[str], topic: str, sections: set[str] | None
) -> None:
    """Mutation: help written by hand, or a section left out."""
    out = helped(capsys, "--help", topic)
    words: Any = " ".join(out.split())
    for setting in settings(ExperimentConfig):
        there = sections is None or setting.section in sections
        assert (f"--{setting.field} {setting.type}" in out) == there
        assert not there or setting.doc in words


def test_help_of_no_section_is_a_mistake() -> None:
    """Mutation: an empty page."""
    with pytest.raises(UserError, match="no section 'trian'; did you mean 'train'"):
        parse_command("train", ["--help", "trian"])


def test_help_fits_its_width() -> None:
    """Mutation: docs not wrapped."""
    page = section_page("all", width=80)
    assert max(len(line) for line in page.splitlines() if line.startswith("      ")) <= 80


@pytest.mark.parametrize(
    ("verb", "option"),
    [("run", "--tune"), ("evaluate", "--rescore"), ("sample", "--retry-failed"), ("score", "--retry-failed")],
)
def test_help_names_the_verbs_own_option(verb: str, option: str) -> None:
    """Mutation: an option that a stage takes and its help does not list."""
    listed = {name: help_page(name).partition("options:")[2].partition("Settings,")[0] for name in (verb, "pair")}
    assert f"  {option} " in listed[verb]
    assert option not in listed["pair"]
