"""``bvpo compare`` on comparisons over seeds, through the command line: numbers, refusals, notes, and the page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser
import pytest

from bvpo.cli import main
from bvpo.evaluation.metrics import Verdict, summarize
from bvpo.evaluation.results import difference_rows
from bvpo.records import Message, Prompt
from bvpo.runs.gather import read_runs
from bvpo.strict import to_dict, write_jsonl

METHODS = {"base": 0.0, "dpo": 1.0, "mix": 3.0}
BENCHMARK = "chat<b>"
CONFIG = """
name = "{name}"
root = "somewhere/seed-{seed}"
seed = {seed}
[data]
quads = "{home}/seed-{seed}/data/quads.jsonl"
[train]
learning_rate = {rate}
reference_cache = "{home}/reference"
[train.loss]
beta = 0.1
[evaluate]
model = "{model}"
"""


def evaluate(folder: Path, seed: int, gain: float) -> None:
    """An evaluation of 12 prompts whose values are a fixed noise plus ``gain``."""
    place = folder / "eval" / BENCHMARK
    place.mkdir(parents=True)
    ids = [f"p{seed}-{n}" for n in range(11)] + ["shared"]
    write_jsonl(
        place / "prompts.jsonl",
        [Prompt(id=id, messages=(Message(role="user", content=f"Say {id}"),), split="test") for id in ids],
    )
    verdicts = [
        Verdict(
            prompt_id=id, mode=mode, index=0, values={"reward": gain * seed + (7 * n + len(folder.name) * n) % 5},
            tokens=20 + n, trace_tokens=10 + n if mode == "thinking" else 0, closed=True,
        )
        for n, id in enumerate(ids)
        for mode in ("thinking", "nothinking")
    ]  # fmt: skip
    write_jsonl(place / "verdicts.jsonl", verdicts)
    facts = {
        "sampling": {"views": ["trace", "empty"], "temperature": 0.6},
        "format": "r1-distill",
        "without_answer": {"reward": None},
        "scorers": {"reward": {"scorer": "function", "path": f"{folder}/f.py:reward", "source": "s"}},
        "versions": {"bvpo": "0.1.0"},
    }
    modes = {mode: {**to_dict(summarize(verdicts, mode, ["reward"])), **facts} for mode in ("thinking", "nothinking")}
    data = {"kind": "evaluation", "schema": 1, "benchmarks": {BENCHMARK: modes}}
    (folder / "eval" / "results.json").write_text(json.dumps(data))


def comparison(home: Path, seeds: tuple[int, ...] = (1, 2, 3), rate: float = 1e-3, gain: float = 0.0) -> Path:
    """A finished comparison of three methods, as ``bvpo run`` leaves it."""
    for name, own in METHODS.items():
        for seed in seeds:
            folder = home / f"seed-{seed}" / name
            evaluate(folder, seed, own + gain)
            model = "base" if name == "base" else ""
            text = CONFIG.format(name=name, seed=seed, home=home, rate=rate, model=model)
            (folder / "config.toml").write_text(text)
    data = {"schema": 1, "methods": [{"name": name} for name in METHODS], "seeds": seeds, "versions": {"bvpo": "0.1.0"}}
    (home / "results.json").write_text(json.dumps(data))
    return home


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    return comparison(root / "one"), comparison(root / "two", seeds=(2, 3, 4), rate=2e-3, gain=0.5)


@pytest.fixture
def sides(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, free to be changed."""
    one, two = (Path(shutil.copytree(path, tmp_path / path.name)) for path in made)
    return one, two


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the verb says when it works."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        assert main(["compare", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


def test_a_method_of_two_comparisons(made: tuple[Path, Path], say: Callable[..., str]) -> None:
    """dpo of the one gains 1 x seed, of the other 1.5 x seed; seeds 2 and 3 are common. Mutations: B - A; seeds that only
    one side has in the mean; the baseline of a comparison subtracted."""
    rows = json.loads(say(*made, "--method", "dpo", "--json"))["comparisons"]
    reward = next(row for row in rows if row["metric"] == "reward" and row["mode"] == "thinking")
    assert reward["difference"]["by_seed"] == pytest.approx({"2": -1.0, "3": -1.5})
    assert reward["difference"]["value"] == pytest.approx(-1.25)
    assert (reward["difference"]["num_values"], reward["difference"]["num_prompts"]) == (24, 23)
    assert {row["method_a"] for row in rows} == {row["method_b"] for row in rows} == {"dpo"}
    everything = json.loads(say(*made, "--json"))["comparisons"]
    assert [row for row in everything if row["method_a"] == "dpo"] == rows
    assert list(dict.fromkeys(row["method_a"] for row in everything)) == list(METHODS)


def test_two_methods_of_one_comparison(made: tuple[Path, Path], say: Callable[..., str]) -> None:
    """The numbers are those of results.json; the folder may be said once or twice. Mutation: the pair turned round."""
    folders = {name: {str(seed): made[0] / f"seed-{seed}" / name for seed in (1, 2, 3)} for name in ("mix", "dpo")}
    expected = difference_rows("mix", read_runs(folders["mix"]), "dpo", read_runs(folders["dpo"]))
    once = json.loads(say(made[0], "--method", "mix,dpo", "--json"))
    found = {(row["benchmark"], row["mode"], row["metric"]): row["difference"] for row in once["comparisons"]}
    for row in expected:
        if (row.benchmark, row.mode, row.metric) in found:
            assert found[row.benchmark, row.mode, row.metric] == to_dict(row.result)
    assert found[BENCHMARK, "thinking", "reward"]["value"] == pytest.approx(4.0, abs=2.0)
    assert say(made[0], made[0], "--method", "mix,dpo", "--json") == json.dumps(once, indent=1) + "\n"


def test_the_table(made: tuple[Path, Path], say: Callable[..., str]) -> None:
    """Mutation: which methods, which interval is which, or what was left out, not said."""
    text = say(*made)
    assert re.search(r"^  dpo +chat<b> +Thinking +reward .* -1.25 +\[-4.427, \+1.927\] +\[", text, re.MULTILINE)
    assert "seeds in A only, left out: 1" in text and "seeds in B only, left out: 4" in text
    assert "over seeds: what other seeds would give" in text
    text = say(made[0], "--method", "mix,dpo")
    assert f"A  {made[0]}, method mix\nB  {made[0]}, method dpo\n" in text


def test_what_differs_is_said(sides: tuple[Path, Path], say: Callable[..., str]) -> None:
    """Settings that decide a model, and sampling; not where things lie, and no training of what is not trained. Mutation:
    any of these said or not said otherwise."""
    path = sides[1] / "seed-3" / "mix" / "eval" / "results.json"
    path.write_text(path.read_text().replace('"temperature": 0.6', '"temperature": 1.0', 1))
    notes = json.loads(say(*sides, "--json"))["notes"]
    assert "dpo, mix: train.learning_rate: 0.002 -> 0.001 (B -> A)" in notes
    assert f"mix: {BENCHMARK} Thinking: sampling.temperature: 1.0 -> 0.6 (B -> A)" in notes
    assert len(notes) == 4  # and the two about seeds
    notes = json.loads(say(sides[0], "--method", "mix,base", "--json"))["notes"]
    assert notes == ['evaluate.model: "base" -> "" (B -> A)']


def forget(path: Path, *keys: str) -> None:
    """Takes one field out of a JSON file."""
    data = json.loads(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    path.write_text(json.dumps(data))


def test_what_no_result_is_about_is_not_compared(sides: tuple[Path, Path], say: Callable[..., str]) -> None:
    """A benchmark and a mode that B's results no longer have; their files are still there, with other prompts. Mutation:
    verdicts taken from folders whose prompts and scorers nobody compared."""
    for seed in (2, 3):
        forget(sides[1] / f"seed-{seed}" / "dpo" / "eval" / "results.json", "benchmarks", BENCHMARK)
        forget(sides[1] / f"seed-{seed}" / "mix" / "eval" / "results.json", "benchmarks", BENCHMARK, "nothinking")
        path = sides[1] / f"seed-{seed}" / "dpo" / "eval" / BENCHMARK / "prompts.jsonl"
        path.write_text(path.read_text().replace("Say ", "Tell "))
    found = json.loads(say(*sides, "--json"))
    assert {(row["method_a"], row["mode"]) for row in found["comparisons"]} == {
        ("base", "thinking"), ("base", "nothinking"), ("mix", "thinking"),
    }  # fmt: skip
    assert f"dpo: benchmarks in A only, left out: {BENCHMARK}" in found["notes"]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("seed-2/dpo/eval/results.json", ("benchmarks",), "no field 'benchmarks'; the verb that made"),
        (
            "seed-2/dpo/eval/results.json",
            ("benchmarks", BENCHMARK, "thinking", "scorers"),
            "chat<b> Thinking: no field 'scorers'",
        ),
        ("results.json", ("seeds",), "no field 'seeds'"),
        ("seed-2/dpo/config.toml", (), "No such file or directory; it says how this method was made"),
        ("seed-2/dpo/config.toml", ("=",), "not valid TOML"),
        ("seed-2/dpo/eval/results.json", ("",), "not valid JSON"),
    ],
)
def test_damaged_files_are_named(
    sides: tuple[Path, Path], name: str, keys: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: an exception of Python's own for a file that is missing, or has lost a field."""
    path = sides[1] / name
    if not keys:
        path.unlink()
    elif len(keys[0]) < 2:
        path.write_text(keys[0])
    else:
        forget(path, *keys)
    assert main(["compare", *map(str, sides)]) == 2
    assert re.search(f"bvpo: error: {re.escape(str(path))}(:1)?: .*{said}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ("seeds", "A B", "no seed in common, so nothing can be paired: .*one has base on 1, 2, .*two has base on 4"),
        (
            "ids",
            "A B",
            "one/seed-2/dpo and .*two/seed-2/dpo have no prompt in common in chat<b>, nor on other seeds",
        ),
        ("prompt", "A B", "prompt 'p3-2' is not the same in both"),
        ("scorer", "A B", "chat<b>, reward: .* were scored differently: source"),
        ("report", "A B", "a comparison without results.json; bvpo report .*two writes it"),
        (
            "none",
            "A B/seed-2/dpo",
            "one is a comparison of methods and .*eval one evaluation; name one of the methods' fol",
        ),
        ("none", "A/seed-2/dpo B/seed-2/dpo --method dpo", "these are single evaluations"),
        ("none", "A/seed-2/dpo", "is one evaluation; name another one"),
        ("none", "A", "are the same comparison: name two of its methods"),
        (
            "none",
            "A B --html nowhere/page.html",
            "--html: nowhere/page.html: expected a file in a folder that is there",
        ),
    ],
)
def test_what_cannot_be_compared(
    sides: tuple[Path, Path], change: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: a difference of other prompts, other scorers or other seeds that looks like any other."""
    one, two = sides
    if change == "seeds":
        shutil.rmtree(one / "seed-3")
        for seed in (2, 3):
            shutil.rmtree(two / f"seed-{seed}")
    for path in two.glob("seed-*/dpo/eval/*/prompts.jsonl"):
        if change == "prompt":
            path.write_text(path.read_text().replace("Say p3-2", "Tell p3-2"))
        elif change == "ids":
            path.write_text(re.sub(r'"id": ?"', '"id": "z', path.read_text()))
    if change == "scorer":
        path = two / "seed-3" / "mix" / "eval" / "results.json"
        path.write_text(path.read_text().replace('"source": "s"', '"source": "t"'))
    if change == "report":
        (two / "results.json").unlink()
    places = [re.sub(r"^[AB](?=/|$)", lambda m: str(one if m[0] == "A" else two), word) for word in words.split()]
    assert main(["compare", *places]) == 2
    error = capsys.readouterr().err
    assert re.search(f"bvpo: error: .*{said}", error), error
    assert error.count("\n") == 1


def test_the_page_is_whole(made: tuple[Path, Path], tmp_path: Path, say: Callable[..., str]) -> None:
    """Mutations: a number in a picture only; a benchmark's name that is read as a tag; a page that loads something; no line
    at zero; numbers of different units in one plot."""
    page = tmp_path / "page.html"
    text = say(*made, "--method", "dpo", "--html", page)
    html = page.read_text()
    assert "chat&lt;b&gt;" in html and "chat<b>" not in html
    assert html.count("<svg") == 3  # reward, tokens, tokens of traces: plots do not mix units
    assert len(re.findall(r"var\(--line\); stroke-width: 1.2", html)) == 3  # a line at zero in each
    assert "default-src 'none'" in html and not re.search(r"<(script|link|img|iframe)", html)
    for number in re.findall(r"[+-]?\d+\.\d+", text.split("over prompts")[1].split("seeds in")[0]):
        assert number in html
    assert "seeds in A only, left out: 1" in html and "bvpo 0.1.0" in html
    assert f"bvpo compare {made[0]} {made[1]} --method dpo --html {page}" in html


def test_the_page_of_two_evaluations(made: tuple[Path, Path], tmp_path: Path, say: Callable[..., str]) -> None:
    """Mutation: --html for comparisons over seeds only; the table no longer printed; the default name."""
    folders = [made[0] / "seed-2" / name for name in ("dpo", "mix")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert "interval over the prompts that both have" in say(*folders, "--html")
    html = (tmp_path / "compare.html").read_text()
    assert "interval over the prompts that both have" in html and html.count("<svg") == 4


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium to look at the page with")
def test_the_page_in_a_browser(made: tuple[Path, Path], tmp_path: Path, say: Callable[..., str]) -> None:
    """Mutations: a table wider than a phone without its scrolling box; a request to anywhere; an error in the console;
    the difference where a reader has to scroll to it."""
    page = tmp_path / "page.html"
    say(*made, "--html", page)
    with browser.chromium(tmp_path / "profile") as tab:
        for size, scheme in ((browser.DESKTOP, "light"), (browser.PHONE, "dark")):
            tab.open(page, size, scheme)
            assert tab.problems == [] and tab.requests == [page.resolve().as_uri()]
            assert tab.too_wide() == []
            assert tab.ask("document.documentElement.scrollWidth") <= size[0]
            assert tab.ask("document.querySelector('th:nth-child(2)').textContent") == "A - B"
            assert tab.ask("document.querySelector('td:nth-child(2)').getBoundingClientRect().right") < size[0] / 1.5
        assert tab.pdf().startswith(b"%PDF")
