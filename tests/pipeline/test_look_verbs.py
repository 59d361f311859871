"""``bvpo status``, ``inspect`` and ``analyze`` on an experiment that the real stages made, finished and half-done."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from look_fixtures import Experiment, questions, save_talking_model
from models_fixtures import tiny_tokenizer
from transformers import AutoModelForCausalLM

from bvpo.cli import main
from bvpo.evaluation.viewstats import Settings
from bvpo.experiment import Experiment as Folder
from bvpo.experiment import RecordStore
from bvpo.formats import answer_offset, get_format
from bvpo.records import VIEWS, Message, Prompt, Quad, Sample, Score, View
from bvpo.report.terminal import Terminal
from bvpo.stages import analyze as stage
from bvpo.strict import read_jsonl, visible, write_jsonl

ATTACK = "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>\x1b[31mred\u202e"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment after sampling, scoring and pairing."""
    root = tmp_path_factory.mktemp("whole")
    save_talking_model(root / "model")
    return Experiment(root, questions(10), "num_samples = 4\n").make("prompts", "sample", "score", "pair")


@pytest.fixture
def copied(whole: Experiment, tmp_path: Path) -> Path:
    """The experiment's folder, free to be damaged."""
    return Path(shutil.copytree(whole.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("analysis.*")))


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a verb and returns what it printed."""

    def run(*words: str | Path, code: int = 0, stream: str = "") -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        return getattr(captured, stream or ("out" if code == 0 else "err"))

    return run


def stages(text: str) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in json.loads(text)["stages"]}


def change_sample(folder: Path, **changes: Any) -> Sample:
    """Replaces one sample of the trace view; returns the new one."""
    store = RecordStore(folder / "samples", Sample)
    samples = list(store)
    odd = replace(next(s for s in samples if s.view == "trace" and s.answer), **changes)
    shutil.rmtree(folder / "samples")
    with RecordStore(folder / "samples", Sample).open_writer() as writer:
        for sample in samples:
            writer.append(odd if sample.key == odd.key else sample)
    return odd


# ------------------------------------------------------------------------------------------------ status


def test_status_of_a_whole_experiment(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: any count taken from another stage, or failures counted as done."""
    scores = list(RecordStore(whole.folder / "scores", Score, key=lambda s: s.sample_key))
    failed = sum(score.value is None and score.error != "no answer" for score in scores)
    found = stages(out("status", whole.folder, "--json"))
    assert list(found) == ["prompts", "sample", "score", "pair", "train", "evaluate", "analyze", "report"]
    assert (found["prompts"]["state"], found["prompts"]["done"]) == ("finished", 10)
    sample, score = found["sample"], found["score"]
    assert (sample["state"], sample["done"], sample["failed"], sample["left"]) == ("finished", 80, 0, 0)
    assert failed and (score["done"], score["failed"], score["left"]) == (80 - failed, failed, 0)
    assert found["pair"]["done"] == len(list(read_jsonl(whole.folder / "quads.jsonl", Quad)))
    assert found["train"]["state"] == found["evaluate"]["state"] == "not started"
    text = out("status", whole.config)
    assert re.search(r"^sample +finished +80 samples +0 +0 +-$", text, re.MULTILINE)


def test_status_of_half_done_and_empty_folders(copied: Path, tmp_path: Path, out: Callable[..., str]) -> None:
    """Mutation: a missing file that raises, progress read from the manifest, or an empty folder called finished."""
    (tmp_path / "empty").mkdir()
    assert {stage["state"] for stage in stages(out("status", tmp_path / "empty", "--json")).values()} == {"not started"}
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in ("sample", "score"):
        manifest["stages"][name]["finished"] = None
    (copied / "manifest.json").write_text(json.dumps(manifest))
    samples = list(RecordStore(copied / "samples", Sample))
    shutil.rmtree(copied / "samples")
    with RecordStore(copied / "samples", Sample).open_writer() as writer:
        for sample in samples[:50]:
            writer.append(sample)
        running = stages(out("status", copied, "--json"))["sample"]
    assert (running["state"], running["done"], running["left"]) == ("running", 50, 30)
    assert running["rate"] > 0 and running["notes"] == ["at work now"]
    found = stages(out("status", copied, "--json"))
    assert (found["sample"]["state"], found["sample"]["rate"], found["sample"]["left"]) == ("unfinished", None, 30)
    assert found["score"]["left"] == 0
    for name in ("manifest.json", "prompts.jsonl"):
        (copied / name).unlink()
    bare = stages(out("status", copied, "--json"))
    assert (bare["prompts"]["state"], bare["sample"]["done"], bare["sample"]["left"]) == ("not started", 50, None)


def test_status_verifies_every_byte_and_repairs_on_request(copied: Path, out: Callable[..., str]) -> None:
    """Mutations: damage told and exit code 0; a repair nobody asked for; a shard that is gone and not missed; a status
    that says finished after records were lost."""
    assert "every checksum holds" in out("status", copied, "--verify")
    (shard,) = (copied / "samples").glob("*.parquet")
    with RecordStore(copied / "scores", Score, key=lambda s: s.sample_key).open_writer() as writer:
        writer.append(next(iter(RecordStore(copied / "scores", Score, key=lambda s: s.sample_key))))
    (live,) = (copied / "scores").glob("*.jsonl")
    live.write_bytes(live.read_bytes().replace(b'"record"', b'"recorf"'))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = sorted(copied.rglob("*"))
    found = out("status", copied, "--verify", code=1, stream="out")
    assert f"DAMAGED: {live}:1: damaged record" in found and f"DAMAGED: {shard}: rows 1-80" in found
    assert sorted(copied.rglob("*")) == before
    repaired = out("status", copied, "--repair", code=1, stream="out")  # the live line is not touched
    assert f"dropped: {shard}: rows 1-80" in repaired and "recorf" in live.read_text()
    stores = {
        one["store"]: one
        for one in json.loads(out("status", copied, "--verify", "--json", code=1, stream="out"))["stores"]
    }
    assert (stores["samples"]["num_records"], stores["samples"]["problems"]) == (0, [])
    sample = stages(out("status", copied, "--json"))["sample"]
    assert (sample["state"], sample["left"]) == ("unfinished", 80)
    for old in (copied / "scores").glob("*.parquet"):
        old.unlink()
    assert "missing; the manifest says" in out("status", copied, "--verify", code=1, stream="out")


@pytest.mark.parametrize("place", ["samples", "scores"])
def test_a_damaged_shard_stops_every_stage_before_it_works(
    whole: Experiment, copied: Path, out: Callable[..., str], place: str
) -> None:
    """Mutations: any of these stages that goes on, throws its work away or says that all is done; advice that does not
    help; damage that only a read of the column would find."""
    (shard,) = (copied / place).glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    here = ("--root", str(copied.parent), "--name", copied.name)
    for verb in ("sample", "score", "pair"):
        said = out(verb, whole.config, *here, code=2)
        assert said.startswith(f"bvpo: error: {shard}: damaged") and f"bvpo status {copied} --repair" in said
    assert "damaged" in out("analyze", copied, code=2)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    out("status", copied, "--repair")
    for verb in ("sample", "score", "pair"):
        out(verb, whole.config, *here)
    assert (copied / "quads.jsonl").read_bytes() == (whole.folder / "quads.jsonl").read_bytes()


def test_status_of_training(copied: Path, out: Callable[..., str]) -> None:
    """Mutation: the first metrics entry instead of the last, half a line that raises, or steps left without a checkpoint."""
    train = copied / "train"
    train.mkdir()
    (train / "metrics.jsonl").write_text('{"step": 1}\n{"step": 7, "tokens_per_second": 1234.5}\n{"step": 8, "lo')
    found = stages(out("status", copied, "--json"))["train"]
    assert (found["state"], found["done"], found["left"]) == ("unfinished", 7, None)
    assert found["notes"][0] == "1,234 tokens/s" and re.fullmatch(r"last entry \d+ s ago", found["notes"][1])
    (train / "checkpoint-5").mkdir()
    (train / "checkpoint-5" / "trainer_state.json").write_text('{"max_steps": 20}')
    assert stages(out("status", copied, "--json"))["train"]["left"] == 13


def test_status_says_when_pairs_are_old(copied: Path, out: Callable[..., str]) -> None:
    """Mutation: the two times exchanged."""
    assert "pair again" not in out("status", copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["stages"]["pair"]["finished"] = "2020-01-01T00:00:00+00:00"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert "older than the scores: pair again" in out("status", copied)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "the following arguments are required: EXPERIMENT"),
        (["status", "nowhere"], "nowhere: no such folder"),
        (["status", "FOLDER", "--jsno"], "unrecognized arguments: --jsno"),
        (["inspect", "FOLDER", "--limit", "0"], "argument --limit: got '0', expected a whole number, 1 or more"),
        (["inspect", "FOLDER", "zzz"], "no prompt 'zzz'"),
        (["inspect", "FOLDER", "--html", "nowhere/o.html"], "nowhere: no such folder"),
        (["inspect", "FOLDER", "--html", "o.html", "--max-mb", "0.001"], "hold not even one of the prompts"),
        (
            ["inspect", "FOLDER", "--html", "o.html", "--max-mb", "nan"],
            "argument --max-mb: got 'nan', expected a number above 0",
        ),
        (["inspect", "FOLDER", "\x1b]0;own\x07\u202e\x9bzzz\n"], r"no prompt '\x1b]0;own\x07\u202e\x9bzzz\n'"),
        (["status", "no\x1b]0;own\x07\u202e\x9bwhere\n"], r"no\x1b]0;own\x07\u202e\x9bwhere\n: no such folder"),
        (["status", "FOLDER", "--\x1b]0;own\u202e"], r"unrecognized arguments: --\x1b]0;own\u202e"),
        (["analyze", "FOLDER", "--resamples", "x"], "argument --resamples: got 'x'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, whole: Experiment, out: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: argparse's usage dump, or a traceback."""
    monkeypatch.chdir(whole.root)
    error = out(*[str(whole.folder) if word == "FOLDER" else word for word in words], code=2)
    assert message in error and error.count("\n") == 1 and error.startswith("bvpo: error: ")


@pytest.mark.parametrize("verb", ["inspect", "analyze"])
def test_nothing_to_see(verb: str, tmp_path: Path, out: Callable[..., str]) -> None:
    """Mutation: an empty page or table."""
    assert re.search("nothing to inspect|no samples to analyze", out(verb, tmp_path, code=2))


# ------------------------------------------------------------------------------------------------ inspect, terminal


def test_nothing_of_an_experiment_acts_on_the_terminal(
    copied: Path, out: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt ids, roles and log messages with control and direction characters. Mutation: writing a page or a message
    as it is; cleaning away line breaks or our own colours."""
    evil = "\x1b]0;own\x07\u202e\x9b2J"
    prompts = list(read_jsonl(copied / "prompts.jsonl", Prompt))
    messages = (Message(role="user" + evil, content="Hi"),)
    write_jsonl(copied / "prompts.jsonl", [Prompt(id=evil, messages=messages, split="s" + evil), *prompts])
    text = out("inspect", copied, "--limit", "1") + out("inspect", copied, evil)
    assert text.count(r"\x1b]0;own\x07\u202e\x9b2J") >= 3 and text.count("\n") > 4
    assert not set("\x1b\x07\x9b\u202e") & set(text)
    logging.getLogger("bvpo.test").warning("the template says %s\nsecond line", evil)
    assert capsys.readouterr().err == "the template says \\x1b]0;own\\x07\\u202e\\x9b2J\nsecond line\n"


def test_inspect_lists_prompts(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: the limit ignored, or another order than asked for."""
    text = out("inspect", whole.folder, "--limit", "3")
    assert len(text.splitlines()) == 5 and "(7 more;" in text
    assert all(prompt.id in text for prompt in whole.prompts[:3])
    margins: dict[str, float] = {}
    for quad in read_jsonl(whole.folder / "quads.jsonl", Quad):
        for pair in filter(None, (quad.trace, quad.empty)):
            margin = (pair.chosen.score or 0) - (pair.rejected.score or 0)
            margins[quad.id] = min(margin, margins.get(quad.id, margin))
    listed = [line.split()[0] for line in out("inspect", whole.config, "--sort", "margin").splitlines()[1:11]]
    assert [margins[id] for id in listed if id in margins] == sorted(margins.values())


def test_inspect_shows_everything_of_a_prompt(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: a sample, score or role lost, trace and answer under each other's heading, or colour in a pipe."""
    quad = next(q for q in read_jsonl(whole.folder / "quads.jsonl", Quad) if q.trace and q.empty)
    assert quad.trace and quad.trace.chosen.score is not None and quad.trace.rejected.score is not None
    text = out("inspect", whole.folder, quad.id[:7])
    assert "\x1b" not in text
    assert "trace view: 4 samples" in text and "empty view: 4 samples" in text
    mine = [sample for sample in whole.samples.values() if sample.prompt_id == quad.id]
    roles = {quad.trace.chosen.sample_key: "CHOSEN  ", quad.trace.rejected.sample_key: "REJECTED  "}
    for sample in mine:
        assert f"{len(sample.token_ids):,} tokens  NLL {-statistics.fmean(sample.logprobs or ()):.3f} per token" in text
        if sample.key in roles:
            assert f"#{sample.index}  {roles[sample.key]}" in text
    chosen, rejected = (next(s for s in mine if s.key == key) for key in roles)
    margin = quad.trace.chosen.score - quad.trace.rejected.score
    assert f"#{chosen.index} chosen over #{rejected.index}, margin {margin:.4g}" in text
    shown = re.search(rf"#{chosen.index}  CHOSEN.*?\n  trace.*?\n(.*?)\n  answer\n(.*?)\n\n", text, re.DOTALL)
    assert shown is not None
    for block, bar, original in zip(shown.groups(), "┊┃", (chosen.trace, chosen.answer), strict=True):
        lines = block.split("\n")
        assert all(line.startswith(f"  {bar} ") for line in lines)
        assert "".join(line[4:] for line in lines) == (original or "").replace("\n", "")
    alone = out("inspect", whole.folder, quad.id, "--view", "empty")
    assert "trace view" not in alone and "empty view: 4 samples" in alone


def test_a_terminal_is_coloured_and_obeys_only_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: colour without a terminal or against NO_COLOR, or a model's escape sequences passed on."""

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Terminal.of(Tty()).color and not Terminal.of(io.StringIO()).color
    terminal = Terminal(color=True, columns=40)
    lines = list(terminal.block(f"{ATTACK}\n\nnext", "┃"))
    assert all(re.fullmatch(r"\x1b\[2m  ┃ \x1b\[0m[^\x1b]*", line) for line in lines)
    joined = "".join(line[len("\x1b[2m  ┃ \x1b[0m") :] for line in lines)
    assert "\\x1b[31mred\\u202e" in joined and "\u202e" not in joined
    assert len(lines) > 3 and max(map(len, lines)) < 60
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Terminal.of(Tty()).color


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain äöü 漢字 🙂\n\tx", None),
        ("a\x00b", "a\\x00b"),
        ("\ud800", "\\ud800"),
        ("\u202eabc", "\\u202eabc"),
        ("\r", "\\x0d"),
    ],
)
def test_visible(text: str, expected: str | None) -> None:
    """Mutation: a control, surrogate or direction character passed on, or ordinary text changed."""
    assert visible(text) == (text if expected is None else expected)


# ------------------------------------------------------------------------------------------------ inspect, page


class Page(HTMLParser):
    """Tags, attributes and the text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.by_class: defaultdict[str, list[str]] = defaultdict(list)
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input", "img"):
            self._open.append(dict(attrs).get("class") or tag)
            self.by_class[self._open[-1]].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open:
            self.by_class[self._open[-1]][-1] += data


def test_a_page_holds_everything_and_asks_for_nothing(
    whole: Experiment, tmp_path: Path, out: Callable[..., str]
) -> None:
    """Mutation: samples left out, a file fetched from elsewhere, or data for the filters of another prompt."""
    out("inspect", whole.folder, "--html", tmp_path / "o.html")
    text = (tmp_path / "o.html").read_text()
    page = Page(text)
    answers = [visible(s.answer) for s in whole.samples.values() if s.answer is not None]
    traces = [visible(s.trace) for s in whole.samples.values() if s.trace is not None]
    assert sorted(page.by_class["text answer"]) == sorted(answers)
    assert sorted(page.by_class["text trace"]) == sorted(traces)
    assert not [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "action")]
    assert "://" not in text.replace("http-equiv", "")
    cards = [attrs for tag, attrs in page.tags if tag == "details"]
    assert len(cards) == 10
    for card, prompt in zip(cards, whole.prompts, strict=True):
        mine = [s for s in whole.samples.values() if s.prompt_id == prompt.id]
        assert card["data-longest"] == str(max(len(s.token_ids) for s in mine if s.view == "trace"))
    quads = {quad.id: quad for quad in read_jsonl(whole.folder / "quads.jsonl", Quad)}
    lacking = [sum(quads[p.id].pair(view) is None for view in VIEWS) if p.id in quads else 2 for p in whole.prompts]
    assert [card["data-lacking"] for card in cards] == [str(number) for number in lacking]
    assert len(page.by_class["role chosen"]) == sum(2 - number for number in lacking)


def test_a_models_markup_is_inert(copied: Path, tmp_path: Path, out: Callable[..., str]) -> None:
    """Mutation: autoescaping off, or a page script that is not named by its hash in the policy."""
    change_sample(copied, trace=ATTACK, answer=f"</div></details>{ATTACK}", text=ATTACK)
    out("inspect", copied, "--html", tmp_path / "o.html")
    page = Page((tmp_path / "o.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert visible(ATTACK) in page.by_class["text trace"]
    assert f"</div></details>{visible(ATTACK)}" in page.by_class["text answer"]
    assert "\\x1b[31mred\\u202e" in "".join(page.texts) and "\u202e" not in "".join(page.texts)
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert policy and re.search(r"default-src 'none'.*script-src 'sha256-[A-Za-z0-9+/]{43}='", policy)
    assert "unsafe-inline'; img" in policy and "script-src 'unsafe-inline'" not in policy


def test_a_page_is_bounded_and_says_so(copied: Path, tmp_path: Path, out: Callable[..., str]) -> None:
    """A text that escaping makes five times longer, and room for some prompts only. Mutations: no bound or one on the
    estimate alone, the worst prompts cut first, or a page that hides that it is not complete."""
    change_sample(copied, answer='"' * 11_000, text='"' * 11_000)
    out("inspect", copied, "--html", tmp_path / "o.html", "--max-mb", "0.1")
    text = (tmp_path / "o.html").read_text()
    page = Page(text)
    cards = [attrs for tag, attrs in page.tags if tag == "details"]
    assert len(text.encode()) <= 100_000
    assert 1 <= len(cards) < 10
    assert f"{len(cards)} of 10 prompts" in text and "Not all prompts are here" in text
    out("inspect", copied, "--html", tmp_path / "all.html")
    everything = [attrs for tag, attrs in Page((tmp_path / "all.html").read_text()).tags if tag == "details"]
    smallest = [min(float(card["data-margin"] or "inf") for card in some) for some in (cards, everything)]
    assert smallest[0] == smallest[1]


def test_a_long_text_loses_its_middle(copied: Path, tmp_path: Path, out: Callable[..., str]) -> None:
    """Mutation: an unbounded text, a cut that is not shown, or one that takes the end."""
    text = "first" + "x" * 299_990 + "last!"
    odd = change_sample(copied, answer=text, text=text)
    out("inspect", copied, odd.prompt_id, "--html", tmp_path / "one.html")
    page = Page((tmp_path / "one.html").read_text())
    assert page.by_class["cut"] == ["288,000 characters left out"]
    (shown,) = [text for text in page.by_class["text answer"] if text.startswith("first")]
    assert shown.endswith("last!") and len(shown) == 12_000


# ------------------------------------------------------------------------------------------------ analyze


def recompute(samples: list[Sample]) -> dict[str, tuple[float, ...]]:
    """The point values in plain Python, from the definitions."""
    tokenizer, fmt = tiny_tokenizer(), get_format("r1-distill")
    groups: defaultdict[tuple[str, View], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.prompt_id, sample.view].append(sample)
    ids = sorted({id for id, _ in groups})

    def logp(sample: Sample) -> float:
        return sum(sample.logprobs or ())

    def within(value: Callable[[Sample], float], view: View) -> float:
        return statistics.fmean(statistics.variance([value(s) for s in groups[id, view]]) for id in ids)

    def pooled(view: View) -> float:
        mine = [s for s in samples if s.view == view]
        return -sum(map(logp, mine)) / sum(len(s.token_ids) for s in mine)

    def nll(sample: Sample) -> float:
        return -logp(sample) / len(sample.token_ids)

    def length(sample: Sample) -> float:
        """From the first token that training scores: with the closing marker, whether sampled or forced."""
        return len(sample.prompt_ids) + len(sample.token_ids) - sample.completion_start

    def averaged(value: Callable[[Sample], float], view: View) -> float:
        return statistics.fmean(statistics.fmean(map(value, groups[id, view])) for id in ids)

    parts, rates = [], defaultdict(list)
    for sample in samples:
        if sample.view == "trace" and sample.answer is not None:
            start = answer_offset(tokenizer, fmt, "trace", sample.token_ids)
            assert start is not None and sample.logprobs is not None
            one = (start, len(sample.token_ids), sum(sample.logprobs[:start]), sum(sample.logprobs[start:]))
            parts.append(one)
            rates[sample.prompt_id].append((start / one[1], -one[2] / start, -one[3] / (one[1] - start)))
    trace, total = sum(p[0] for p in parts), sum(p[1] for p in parts)
    trace_nll, answer_nll = -sum(p[2] for p in parts) / trace, -sum(p[3] for p in parts) / (total - trace)
    by_prompt = [[statistics.fmean(column) for column in zip(*some, strict=True)] for some in rates.values()]
    share, *nll_parts = (statistics.fmean(column) for column in zip(*by_prompt, strict=True))
    found = {
        "var_logp_within": (within(logp, "trace"), within(logp, "empty")),
        "var_length_within": (within(length, "trace"), within(length, "empty")),
        "var_logp_all": tuple(statistics.variance([logp(s) for s in samples if s.view == v]) for v in VIEWS),
        "length": (averaged(length, "trace"), averaged(length, "empty")),
        "nll": (averaged(nll, "trace"), averaged(nll, "empty")),
        "nll_pooled": (pooled("trace"), pooled("empty")),
        "nll_parts": tuple(nll_parts),
        "nll_parts_pooled": (trace_nll, answer_nll),
    }
    return {**found, "trace_share": (share,), "trace_share_pooled": (trace / total,)}


def test_analyze_equals_an_independent_recomputation(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: any definition changed, a failed or unclosed sample counted, or the two files saying different things."""
    text = out("analyze", whole.folder, "--resamples", "200")
    data = json.loads((whole.folder / "analysis.json").read_text())
    whole_digits = [asdict(one) for one in stage.analyze(Folder(whole.folder), Settings(num_resamples=200)).comparisons]
    assert data["comparisons"] == stage.rounded(whole_digits), "the file holds the same, in fewer digits"
    found = {one["name"]: one for one in whole_digits}
    for name, expected in recompute(list(whole.samples.values())).items():
        sides = [found[name]["first"], found[name]["second"]][: len(expected)]
        assert [side["value"] for side in sides] == pytest.approx(expected), name
        if len(expected) == 2:
            assert found[name]["ratio"]["value"] == pytest.approx(expected[0] / expected[1])
        assert all(side["low"] < side["value"] < side["high"] for side in sides)
        assert f"{found[name]['label']}" in text
    unclosed = sum(s.answer is None for s in whole.samples.values())
    assert unclosed and found["trace_share"]["dropped"] == {"samples without an end of the trace": unclosed}
    assert data["counts"]["trace"]["samples"] == data["counts"]["empty"]["samples"] == 40


def test_analyze_counts_the_forced_marker(copied: Path, whole: Experiment, out: Callable[..., str]) -> None:
    """Its log-probability is the model's, after the prompt alone. Mutation: the token after it, or of another prompt."""
    model = AutoModelForCausalLM.from_pretrained(whole.root / "model", dtype=torch.float32)
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for sample in whole.samples.values():
        if sample.view == "empty":
            *prompt, marker = sample.prompt_ids
            assert sample.completion_start == len(prompt) and sample.logprobs is not None
            with torch.no_grad():
                forced = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[marker].item()
            by_prompt[sample.prompt_id].append(-(forced + sum(sample.logprobs)) / (1 + len(sample.token_ids)))
    notes = out("analyze", copied, "--resamples", "50").count("forced closing marker counts")
    assert notes == 1 and "forced closing marker counts" not in out("analyze", copied, "--resamples", "50", "--marker")
    found = {one["name"]: one for one in json.loads((copied / "analysis.json").read_text())["comparisons"]}
    expected = statistics.fmean(statistics.fmean(values) for values in by_prompt.values())
    assert found["nll"]["second"]["value"] == pytest.approx(expected, rel=2e-4)  # four digits are kept


def test_analyze_is_reproducible(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: a clock, an unseeded generator or matplotlib's random ids in the files."""
    seen = []
    for _ in range(2):
        out("analyze", whole.folder, "--resamples", "50")
        seen.append(((whole.folder / "analysis.json").read_text(), (whole.folder / "analysis.html").read_text()))
    assert seen[0] == seen[1]
    out("analyze", whole.folder, "--resamples", "50", "--seed", "1")
    assert (whole.folder / "analysis.json").read_text() != seen[0][0]


def test_analysis_does_not_follow_the_last_bits_of_log_probs(whole: Experiment, tmp_path: Path) -> None:
    """Batches are others after a restart, which moves log-probs by some 1e-6. Mutation: more digits than are shown."""

    def analyzed(name: str, change: float) -> bytes:
        folder = shutil.copytree(whole.folder, tmp_path / name)
        samples = list(RecordStore(folder / "samples", Sample))
        shutil.rmtree(folder / "samples")
        with RecordStore(folder / "samples", Sample).open_writer() as writer:
            for number, sample in enumerate(samples):
                assert sample.logprobs
                moved = tuple(value + change * (-1) ** number for value in sample.logprobs)
                writer.append(replace(sample, logprobs=moved))
        assert main(["analyze", str(folder)]) == 0
        found = json.loads((folder / "analysis.json").read_bytes())
        return json.dumps({**found, "experiment": ""}).encode()

    assert analyzed("a", 0.0) == analyzed("b", 1e-6) != analyzed("c", 1e-2)


def test_the_analysis_page(whole: Experiment, out: Callable[..., str]) -> None:
    """Mutation: a plot without its numbers, a request to the network, or a fixed colour that a dark page swallows."""
    out("analyze", whole.folder, "--resamples", "50")
    text = (whole.folder / "analysis.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == tags.count("figure") == tags.count("figcaption") == 3
    assert [tag for tag in tags if tag in ("svg", "details")] == ["svg", "details"] * 3
    assert "script" not in tags and "script-src 'none'" in text
    links = re.findall(r'(?:href|src)="([^"]*)"', text)
    assert links and all(link.startswith("#") for link in links)
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) <= {
        "none", "var(--ink)", "var(--line)", *(f"var(--series-{n})" for n in range(4)),
    }  # fmt: skip
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    ratio = json.loads((whole.folder / "analysis.json").read_text())["comparisons"][0]["ratio"]["value"]
    assert f'<td class="number">{ratio:.4g}</td>' in text


def test_analyze_without_a_tokenizer_and_of_one_view(copied: Path, out: Callable[..., str]) -> None:
    """Mutation: a missing tokenizer that ends everything, or a table 5 made up without it."""
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(re.sub(r'(?m)^path = ".*model"', 'path = "gone"', config))
    samples = [s for s in RecordStore(copied / "samples", Sample) if s.view == "trace"]
    shutil.rmtree(copied / "samples")
    with RecordStore(copied / "samples", Sample).open_writer() as writer:
        for sample in samples:
            writer.append(sample)
    text = out("analyze", copied, "--resamples", "50")
    assert "Table 5 is left out: it needs the model's tokenizer" in text
    assert "no samples of the empty view" in text
    found = {one["name"]: one for one in json.loads((copied / "analysis.json").read_text())["comparisons"]}
    assert found["trace_share"]["first"]["value"] is None and found["length"]["ratio"]["value"] is None
    assert (copied / "analysis.html").is_file()


def test_analyze_of_some_prompts_writes_nothing(copied: Path, out: Callable[..., str]) -> None:
    """Mutation: a partial analysis that looks like the whole one."""
    text = out("analyze", copied, "--limit", "3", "--resamples", "50")
    assert "trace view: 3 prompts, 12 samples" in text
    assert not (copied / "analysis.json").exists()
