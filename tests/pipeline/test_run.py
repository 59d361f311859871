"""``bvpo run`` and ``bvpo report``: a comparison of real, small trainings, its resumption and its numbers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import browser
import pytest
from look_fixtures import SCORER, questions, save_talking_model

from bvpo.cli import main

CONFIG = """
name = "cmp"
root = "experiments"
[model]
path = "model"
[prompts]
sources = ["prompts.jsonl"]
near_duplicates = "none"
test_fraction = 0.4
[sample]
splits = ["train"]
num_samples = 3
max_new_tokens = 24
[score]
scorer = "function"
function.path = "scorer.py:score"
[data]
eval_fraction = 0.45
[train]
epochs = 2
quads_per_step = 4
learning_rate = 1e-3
save = "no"
logging_steps = 1
[evaluate]
folder = "eval_long"
max_new_tokens = 24
[evaluate.benchmarks.talk]
source = "split:test"
metric = "length"
unclosed.length = 0.0
[run]
seeds = [1, 2]
workers = 2
stages = ["prompts", "sample", "score", "pair", "analyze", "train", "evaluate"]
[run.declared.longer]
better = "mix"
than = "dpo"
on = "talk/thinking/length"
[run.methods.base.evaluate]
model = "base"
[run.methods.dpo]
data.views = ["trace"]
train.alpha.value = 1.0
[run.methods.mix]
train.alpha.value = 0.5
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, prompts, scorer and config, in which nothing has run."""
    folder = tmp_path_factory.mktemp("run")
    save_talking_model(folder / "model")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in questions(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scorer.py").write_text(SCORER)
    (folder / "cmp.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The experiment's folder after one run of the command, as a user gives it."""
    done = bvpo(home, "run", "cmp.toml")
    assert done.returncode == 0, done.stderr
    return home / "experiments" / "cmp"


def bvpo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bvpo", *words], cwd=folder, capture_output=True, text=True, timeout=300
    )


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_results_agree_with_the_samples(finished: Path) -> None:
    """Recomputed here from the sample stores with nothing but numpy, in a folder of evaluations with a name of its own.
    Mutation: a metric of the wrong mode, unclosed responses left out, seeds weighed by their prompts, a difference that is
    not paired, or `eval` written into any of run, report and gathering."""
    import numpy as np

    from bvpo.experiment import RecordStore
    from bvpo.records import Prompt, Sample
    from bvpo.strict import read_jsonl

    def rewards(seed: int, method: str, view: str) -> dict[str, float]:
        place = finished / f"seed-{seed}" / method / "eval_long" / "talk"
        prompts = [p.id for p in read_jsonl(place / "prompts.jsonl", Prompt)]
        found: dict[str, float] = {}
        for sample in RecordStore(place / "samples", Sample):
            if sample.view == view:
                answer = sample.answer.strip() if sample.answer is not None else ""
                if "!" not in answer:  # which the scorer cannot score: such a sample is left out, not 0
                    found[sample.prompt_id] = float(len(answer))
        assert 3 <= len(found) <= len(prompts)
        return found

    data = results(finished)
    for method in ("base", "dpo", "mix"):
        for mode, view in (("thinking", "trace"), ("nothinking", "empty")):
            by_seed = [rewards(seed, method, view) for seed in (1, 2)]
            expected = np.mean([np.mean(list(values.values())) for values in by_seed])
            (row,) = [r for r in data["scores"] if (r["method"], r["mode"], r["metric"]) == (method, mode, "length")]
            assert row["result"]["value"] == pytest.approx(expected, abs=1e-9)
            assert row["result"]["num_seeds"] == 2
            if method == "mix":
                theirs = [rewards(seed, "dpo", view) for seed in (1, 2)]
                gaps = [
                    np.mean([a[p] - b[p] for p in a.keys() & b.keys()]) for a, b in zip(by_seed, theirs, strict=True)
                ]
                (row,) = [
                    r for r in data["differences"] if (r["method"], r["mode"], r["metric"]) == (method, mode, "length")
                ]
                half = 12.706204736432095 * np.std(gaps, ddof=1) / np.sqrt(2)  # t quantile of one degree of freedom
                assert row["result"]["value"] == pytest.approx(np.mean(gaps), abs=1e-9)
                assert row["result"]["seed_high"] == pytest.approx(np.mean(gaps) + half, rel=1e-6, abs=1e-9)


def test_what_was_declared_is_told_with_whether_it_was_in_time(home: Path, finished: Path, tmp_path: Path) -> None:
    """Mutation: a comparison that counts as declared beforehand although it was entered, or changed, after the results."""
    (row,) = results(finished)["declared"]
    (same,) = [
        r
        for r in results(finished)["differences"]
        if (r["method"], r["mode"], r["metric"]) == ("mix", "thinking", "length")
    ]
    assert row["beforehand"] is True
    assert row["result"] == same["result"], "one declared comparison keeps the level of all"
    assert "Declared comparisons" in (finished / "report.html").read_text()
    late = CONFIG.replace('than = "dpo"', 'than = "base"').replace(
        "[run.methods.base",
        '[run.declared.also]\nbetter = "mix"\nthan = "dpo"\non = "talk/thinking/length"\n[run.methods.base',
        1,
    )
    copy = shutil.copytree(home, tmp_path / "copy")
    (copy / "late.toml").write_text(late)
    assert bvpo(copy, "run", "late.toml").returncode == 0
    rows = results(copy / "experiments" / "cmp")["declared"]
    assert [(r["name"], r["beforehand"]) for r in rows] == [("longer", False), ("also", False)]
    assert rows[1]["result"]["level"] == pytest.approx(0.975)
    assert bvpo(copy, "run", "cmp.toml").returncode == 0
    (row,) = results(copy / "experiments" / "cmp")["declared"]
    assert row["beforehand"] is True and row["result"]["level"] == pytest.approx(0.975), "both count"


def test_a_refused_run_changes_nothing(home: Path, finished: Path, tmp_path: Path) -> None:
    """Mutation: config.toml, the declarations or the tuned values rewritten by a run whose stages refuse its settings, or
    the advice to run the same command again."""
    copy = shutil.copytree(home, tmp_path / "copy")
    own = copy / "experiments" / "cmp"
    before = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file() and path.name != "manifest.json"}
    assert {"config.toml", "declared.json", "tuned.json"} <= set(before)
    refused = bvpo(copy, "run", "cmp.toml", "--train.learning_rate", "5e-4")
    assert refused.returncode == 2
    error = next(line for line in refused.stderr.splitlines() if line.startswith("bvpo: error:"))
    assert "other settings" in error and "resumes" not in error
    assert before == {name: (own / name).read_bytes() for name in before}


def test_a_copied_experiment_is_read_where_it_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: the folder that config.toml names read in place of the one that the user names; status of a comparison that
    says nothing was started."""
    copy = shutil.copytree(finished.parents[1], tmp_path / "copy")
    monkeypatch.chdir(copy)
    Path("experiments/cmp").rename("experiments/moved")
    shutil.rmtree("experiments/moved/seed-2")
    assert main(["report", "experiments/moved"]) == 0
    data = results(copy / "experiments" / "moved")
    assert data["experiment"] == "moved"
    assert {row["result"]["num_seeds"] for row in data["scores"]} == {1}
    capsys.readouterr()
    assert main(["status", "experiments/moved"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["data", "1", "1", "0", "0"] in lines and ["mix", "1", "0", "1", "1"] in lines
    one, other = (f"experiments/moved/seed-1/{name}" for name in ("mix", "dpo"))
    assert main(["compare", one, other]) == 0, "found where evaluate.folder put it"
    capsys.readouterr()
    assert main(["status", "experiments/moved/seed-1/mix"]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate")]
    assert line[1:4] == ["finished", "2", "results"]
    assert main(["status", "experiments/moved", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["methods"]] == ["data", "base", "dpo", "mix"]


def test_benchmarks_of_before_are_not_reported(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: a folder that an earlier config evaluated into, with other models' verdicts, among the results."""
    copy = shutil.copytree(finished.parents[1], tmp_path / "copy")
    monkeypatch.chdir(copy)
    place = copy / "experiments" / "cmp" / "seed-1" / "dpo" / "eval_long"
    shutil.copytree(place / "talk", place / "old")
    before = results(copy / "experiments" / "cmp")
    assert main(["report", "experiments/cmp"]) == 0
    assert results(copy / "experiments" / "cmp") == before


def test_budgets_and_drops_are_counted(finished: Path) -> None:
    """Mutation: the empty view's pairs counted for a method that never sees them."""
    rows = {row["name"]: row for row in results(finished)["methods"]}
    assert rows["base"]["trained"] is False
    assert rows["dpo"]["empty_pairs"] == 0 < rows["mix"]["empty_pairs"]
    assert rows["dpo"]["tokens"] < rows["mix"]["tokens"]


def test_reliability_is_of_the_held_out_pairs(finished: Path) -> None:
    """Recomputed here from what training left. Mutations: training pairs among them; a method's views mixed up; the share
    right of pairs that are stated below 0.5; one seed only."""
    import numpy as np

    def margins(method: str, view: str) -> list[np.ndarray]:
        files = [finished / f"seed-{seed}" / method / "train" / "held_out.jsonl" for seed in (1, 2)]
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [np.array([one["margin"] for one in found if one["view"] == view]) for found in lines]

    rows = {(row["method"], row["view"]): row for row in results(finished)["calibration"]}
    assert set(rows) == {("dpo", "trace"), ("mix", "trace"), ("mix", "empty")}
    for (method, view), row in rows.items():
        found = margins(method, view)
        assert row["num_pairs"] == sum(map(len, found)) == sum(one["num_pairs"] for one in row["bins"])
        means = {
            "accuracy": [np.mean((m > 0) + 0.5 * (m == 0)) for m in found],
            "brier": [np.mean((1 - 1 / (1 + np.exp(-m))) ** 2) for m in found],
            "log_loss": [np.mean(np.log1p(np.exp(-m))) for m in found],
        }
        for name, values in means.items():
            assert row[name]["value"] == pytest.approx(np.mean(values), abs=1e-9), name
    page = (finished / "report.html").read_text()
    assert "Reliability of the stated preferences" in page and "share right, empty view" in page


def test_the_page_is_whole(finished: Path) -> None:
    """Mutation: a page that loads something, or that leaves a method out."""
    page = (finished / "report.html").read_text()
    for word in ("dpo", "mix", "Thinking", "NoThinking", "What was found", "bvpo run experiments/cmp/config.toml"):
        assert word in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.replace(
        "https://www.w3.org", ""
    )


def test_a_second_run_finds_everything_done(finished: Path, home: Path) -> None:
    """Mutation: a stage that is run again, or results that change from run to run."""
    before = (finished / "results.json").read_bytes(), (finished / "report.html").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("verdicts.jsonl")}
    done = bvpo(home, "run", "cmp.toml")
    assert done.returncode == 0, done.stderr
    assert "0 stages in" in done.stderr
    assert before == ((finished / "results.json").read_bytes(), (finished / "report.html").read_bytes())
    assert times == {path: path.stat().st_mtime_ns for path in finished.rglob("verdicts.jsonl")}


def test_what_was_edited_is_not_skipped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same settings, other files. Mutations: a scorer file, a source of prompts, a chat template, the quads or the model's
    folder not asked for; a stage that runs although nothing changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(home / "model", copy / "model")
    for name in ("prompts.jsonl", "scorer.py"):
        shutil.copyfile(home / name, copy / name)
    text = CONFIG.partition("[run]")[0].replace("num_samples = 3", "num_samples = 2")
    (copy / "cmp.toml").write_text(text + '[run]\nstages = ["prompts", "sample", "score", "pair"]\n')
    monkeypatch.chdir(copy)
    own = copy / "experiments" / "cmp"

    def run() -> tuple[int, int]:
        capsys.readouterr()
        code = main(["run", "cmp.toml"])
        return code, capsys.readouterr().err.count("done before")

    assert run() == (0, 0)
    assert run() == (0, 4)
    whole = (own / "quads.jsonl").read_text()
    (own / "quads.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert run() == (0, 3) and (own / "quads.jsonl").read_text() == whole
    for file, old, new, done in (
        (copy / "scorer.py", "float(len(answer))", "-float(len(answer))", 2),
        (copy / "prompts.jsonl", "Question 1:", "Question 1, please:", 0),
        (copy / "model" / "chat_template.jinja", "{", "{# other #}{", 0),
    ):
        before = file.read_text()
        file.write_text(before.replace(old, new, 1))
        assert before != file.read_text()
        assert run() == (2, done), file
        file.write_text(before)
        assert run()[0] == 0 and run() == (0, 4), file


def test_killed_runs_end_the_same(finished: Path, home: Path, tmp_path: Path) -> None:
    """``kill -9`` of the command at random moments. Mutation: workers that live on, half-written results that count."""
    again = tmp_path / "again"
    again.mkdir()
    for name in ("model", "prompts.jsonl", "scorer.py", "cmp.toml"):
        (again / name).symlink_to(home / name)
    moments = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "bvpo", "run", "cmp.toml"], cwd=again, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(timeout=moments.uniform(3.0, 9.0))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
            process.wait()
            assert _all_gone(process.pid), "workers outlived the run"
    done = bvpo(again, "run", "cmp.toml")
    assert done.returncode == 0, done.stderr
    assert results(again / "experiments" / "cmp") == results(finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_its_workers(home: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C, which a terminal sends to all processes, and SIGTERM to the command alone, while both workers are at work: one
    line, and the end of stderr says that nobody is left who holds it. Mutations: SIGTERM without a handler; workers that
    live on; tqdm's semaphore left to Python's resource tracker, which complains."""
    for name in ("model", "prompts.jsonl", "cmp.toml"):
        (tmp_path / name).symlink_to(home / name)
    for name in ("here", "never"):
        os.mkfifo(tmp_path / name)
    wait = f"open({str(tmp_path / 'here')!r}, 'w').write('x')\nopen({str(tmp_path / 'never')!r}).read()\n"
    (tmp_path / "scorer.py").write_text(wait + SCORER)
    process = subprocess.Popen(
        [sys.executable, "-m", "bvpo", "run", "cmp.toml"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert (tmp_path / "here").read_text()  # a worker scores, and waits for what never comes
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    lines = said.splitlines()
    assert len(lines) == 2 and lines[1].endswith("running the same command again resumes"), said


def _all_gone(group: int) -> bool:
    for _ in range(100):
        if not subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split():
            return True
        time.sleep(0.1)
    return False


def test_a_failing_method_is_named(home: Path, tmp_path: Path) -> None:
    """Mutation: a run that goes on silently without the failed experiment, or that hides where its log is."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("model", "prompts.jsonl"):
        (folder / name).symlink_to(home / name)
    (folder / "scorer.py").write_text("def score(messages, answer):\n    raise ValueError('no')\n")
    (folder / "cmp.toml").write_text(CONFIG.replace("seeds = [1, 2]", "seeds = [1]"))
    done = bvpo(folder, "run", "cmp.toml")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bvpo: error: seed-1/data: ") and "ValueError: no" in last
    assert "Traceback" not in done.stderr


def test_dry_run_does_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: folders made by a rehearsal."""
    monkeypatch.chdir(home)
    assert main(["run", "cmp.toml", "--dry-run", "--root", str(tmp_path / "x")]) == 0
    assert not (tmp_path / "x").exists()


def test_report_of_nothing(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: an empty page instead of one line."""
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.toml").write_text(
        (home / "cmp.toml").read_text().replace('"experiments"', f'"{tmp_path}"')
    )
    assert main(["report", str(tmp_path / "e")]) == 2
    assert "nothing was evaluated yet" in capsys.readouterr().err


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium to look at the page with")
def test_the_page_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """Desktop, phone, dark and paper. Mutation: a script that fails, a font from a server, a table that is too wide,
    dark text on dark ground."""
    page = finished / "report.html"
    with browser.chromium(tmp_path / "profile") as tab:
        for size, scheme in ((browser.DESKTOP, "light"), (browser.PHONE, "light"), (browser.DESKTOP, "dark")):
            tab.open(page, size, scheme)
            assert not tab.problems
            assert tab.requests == [page.resolve().as_uri()]
            assert tab.too_wide() == []
            assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
            ink, paper = (tab.ask(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
            assert (_brightness(ink) > _brightness(paper)) == (scheme == "dark")
            assert abs(_brightness(ink) - _brightness(paper)) > 120
        tab.open(page)
        charts = tab.ask("document.querySelectorAll('figure svg').length")
        assert charts == tab.ask("document.querySelectorAll('figure details table').length") > 3
        assert tab.pdf().startswith(b"%PDF")


def _brightness(color: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue
