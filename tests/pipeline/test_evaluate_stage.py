"""``bvpo evaluate`` and ``bvpo compare`` on a tiny model, through the command line: the numbers are those of the samples."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import judge_server
from look_fixtures import save_talking_model
from models_fixtures import tiny_tokenizer
from scipy import stats

from bvpo.cli import main
from bvpo.engines.local.engine import EmbeddedEngine
from bvpo.evaluation.metrics import Verdict
from bvpo.experiment import RecordStore
from bvpo.formats import FORMATS, answer_offset
from bvpo.records import Prompt, Sample, Score
from bvpo.scorers.function import FunctionScorer
from bvpo.strict import read_jsonl

FUNCTIONS = '''
"""A reward that some answers fail, and a grader that reads the reference."""


def reward(messages, answer):
    if "!" in answer:
        raise ValueError("no shouting")
    return len(answer) - 20.0


def correct(messages, answer, meta):
    return float(meta["reference"] in answer)
'''
CONFIG = """
name = "mine"
root = "{root}/experiments"
[model]
path = "{root}/model"
[score]
scorer = "function"
function.path = "{root}/functions.py:reward"
[evaluate]
model = "base"
max_new_tokens = 40
[evaluate.benchmarks.chat]
source = "{root}/prompts.jsonl"
metric = "reward"
more.correct = "{root}/functions.py:correct"
limit = 24
[evaluate.benchmarks.math]
source = "{root}/prompts.jsonl?id=name"
scorer = "function"
function = "{root}/functions.py:correct"
metric = "accuracy"
num_samples = 4
limit = 10
"""
FILES = ("verdicts.jsonl", "thinking.json", "nothinking.json")
VIEWS = {"thinking": "trace", "nothinking": "empty"}


class Lab:
    """A folder with a model, prompts, functions and a config; ``evaluate`` and ``compare`` run the verbs."""

    def __init__(self, root: Path) -> None:
        self.root, self.config, self.folder = root, root / "c.toml", root / "experiments" / "mine"
        root.mkdir(exist_ok=True)
        save_talking_model(root / "model")
        (root / "functions.py").write_text(FUNCTIONS)
        rows = [
            {
                "id": f"q{n}",
                "name": f"n{n}",
                "prompt": f"Question {n}: what is {n} plus {3 * n + 1}?",
                "reference": str(n % 7),
            }
            for n in range(30)
        ]
        (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config.write_text(CONFIG.format(root=root))

    def evaluate(self, *flags: str) -> int:
        return main(["evaluate", str(self.config), *flags])

    def result(self, benchmark: str, mode: str, folder: str = "eval") -> dict[str, Any]:
        return json.loads((self.folder / folder / benchmark / f"{mode}.json").read_text())

    def samples(self, benchmark: str, mode: str) -> list[Sample]:
        """In the order of prompts and indices."""
        place = self.folder / "eval" / benchmark
        order = {prompt.id: n for n, prompt in enumerate(read_jsonl(place / "prompts.jsonl", Prompt))}
        found = [s for s in RecordStore(place / "samples", Sample) if s.view == VIEWS[mode]]
        return sorted(found, key=lambda s: (order[s.prompt_id], s.index))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("whole"))
    assert lab.evaluate() == 0
    return lab


@pytest.fixture
def lab(whole: Lab, tmp_path: Path) -> Lab:
    """The evaluated folder, free to be changed."""
    copy = Lab.__new__(Lab)
    copy.root, copy.config, copy.folder = tmp_path, tmp_path / "c.toml", tmp_path / "experiments" / "mine"
    shutil.copytree(whole.root, tmp_path, dirs_exist_ok=True)
    copy.config.write_text(CONFIG.format(root=tmp_path))
    return copy


@pytest.fixture
def err(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line of an error."""

    def read() -> str:
        line = next(text for text in capsys.readouterr().err.splitlines() if text.startswith("bvpo: error: "))
        return line.removeprefix("bvpo: error: ")

    return read


def mean_and_interval(values: dict[str, list[float]]) -> tuple[float, float, float]:
    """By the book: prompts weigh alike, t interval over them."""
    means = [statistics.fmean(group) for group in values.values()]
    half = stats.t.ppf(0.975, len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
    return statistics.fmean(means), statistics.fmean(means) - half, statistics.fmean(means) + half


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("mode", ["thinking", "nothinking"])
def test_rewards_are_those_of_the_samples(whole: Lab, mode: str) -> None:
    """Silence is worth what the function says of the empty text. Mutation: a failed score taken for 0, silence left out or
    taken for 0, views exchanged, or the trace scored."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    missing: defaultdict[str, int] = defaultdict(int)
    silent = 0
    for sample in whole.samples("chat", mode):
        text = (sample.answer or "").strip()
        silent += not text
        if "!" in text:
            missing["failed to score: ValueError: no shouting"] += 1
        else:
            values[sample.prompt_id].append(len(text) - 20.0)
    found = whole.result("chat", mode)["metrics"]["reward"]
    estimate = found["estimate"]
    assert len(values) > 5 and found["missing"] == dict(missing) and not found["binary"]
    assert (estimate["value"], estimate["low"], estimate["high"]) == pytest.approx(mean_and_interval(values))
    assert (estimate["num_prompts"], found["num_samples"]) == (len(values), sum(map(len, values.values())))
    assert found["silent"] == silent
    assert mode == "nothinking" or silent > 0, "the fixture's model should leave traces open"


@pytest.mark.parametrize(("benchmark", "metric"), [("chat", "correct"), ("math", "accuracy")])
def test_unclosed_traces_are_wrong_answers(whole: Lab, benchmark: str, metric: str) -> None:
    """A grader's own metric and a further one. Mutation: samples without an answer left out of an accuracy, no reference
    passed on, or the benchmark's own number of samples ignored."""
    references = {
        p.id: p.meta["reference"] for p in read_jsonl(whole.folder / "eval" / benchmark / "prompts.jsonl", Prompt)
    }
    for mode in VIEWS:
        rights: defaultdict[str, list[float]] = defaultdict(list)
        samples = whole.samples(benchmark, mode)
        for sample in samples:
            rights[sample.prompt_id].append(float(references[sample.prompt_id] in (sample.answer or "").strip()))
        found = whole.result(benchmark, mode)
        assert found["metrics"][metric]["estimate"]["value"] == pytest.approx(
            statistics.fmean(statistics.fmean(group) for group in rights.values())
        )
        assert (
            found["metrics"][metric]["num_samples"]
            == len(samples)
            == len(references) * (4 if benchmark == "math" else 1)
        )
        assert found["metrics"][metric]["missing"] == {} and found["metrics"][metric]["binary"]
        assert found["unclosed"]["value"] == pytest.approx(statistics.fmean(s.answer is None for s in samples))
        if benchmark == "math":
            once = [1 - math.comb(4 - int(sum(g)), 2) / math.comb(4, 2) for g in rights.values()]
            assert found["metrics"][metric]["pass_at"]["2"]["value"] == pytest.approx(statistics.fmean(once))


def test_verdicts_are_one_line_per_sample(whole: Lab) -> None:
    """Mutation: lines in the order of sampling, or the tokens of the answer counted as the trace's."""
    tokenizer = tiny_tokenizer()
    lines = list(read_jsonl(whole.folder / "eval" / "math" / "verdicts.jsonl", Verdict))
    prompts = [prompt.id for prompt in read_jsonl(whole.folder / "eval" / "math" / "prompts.jsonl", Prompt)]
    assert prompts[:2] == ["n0", "n1"]
    expected = [(id, mode, index) for id in prompts for mode in VIEWS for index in range(4)]
    assert [(line.prompt_id, line.mode, line.index) for line in lines] == expected
    for mode in VIEWS:
        for line, sample in zip([v for v in lines if v.mode == mode], whole.samples("math", mode), strict=True):
            assert (line.tokens, line.closed) == (len(sample.token_ids), sample.answer is not None)
            at = answer_offset(tokenizer, FORMATS["r1-distill"], sample.view, sample.token_ids)
            assert line.trace_tokens == (len(sample.token_ids) if sample.answer is None else at)


def test_results_hold_everything_and_no_dates(whole: Lab) -> None:
    """Mutation: a time in the results, or a benchmark lost from the summary."""
    summary = json.loads((whole.folder / "eval" / "results.json").read_text())
    assert summary["kind"] == "evaluation"
    for benchmark in ("chat", "math"):
        for mode in VIEWS:
            one = whole.result(benchmark, mode)
            assert summary["benchmarks"][benchmark][mode] == one
            assert re.fullmatch("[0-9a-f]{64}", one["model"]["content"]) and one["seed"] == 42
            assert one["sampling"]["temperature"] == 0.6 and one["sampling"]["max_new_tokens"] == 40
    assert not re.search(r"20\d\d-\d\d-\d\d", (whole.folder / "eval" / "results.json").read_text())
    manifest = json.loads((whole.folder / "manifest.json").read_text())["stages"]["evaluate"]
    assert manifest["finished"] and manifest["counts"]["math"] == {"thinking": 40, "nothinking": 40}


# ------------------------------------------------------------------------------------------------ running it again


def test_interrupted_and_resumed_is_the_same(whole: Lab, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while sampling and again while scoring, then run through; another batch size besides. Mutation: seeds from the
    order of sampling, or samples drawn twice."""
    shutil.rmtree(lab.folder)
    generate, score = EmbeddedEngine.generate, FunctionScorer.score

    def stopping(through: Callable[..., Any], after: int) -> Callable[..., Any]:
        def run(self: Any, items: Any) -> Any:
            for number, item in enumerate(through(self, items)):
                if number == after:
                    raise KeyboardInterrupt
                yield item

        return run

    monkeypatch.setattr(EmbeddedEngine, "generate", stopping(generate, 17))
    assert lab.evaluate() == 130
    monkeypatch.setattr(EmbeddedEngine, "generate", generate)
    monkeypatch.setattr(FunctionScorer, "score", stopping(score, 9))
    assert lab.evaluate() == 130
    monkeypatch.setattr(FunctionScorer, "score", score)
    assert not (lab.folder / "eval" / "results.json").exists()
    assert lab.evaluate("--sample.options.max_batch_rows", "3") == 0
    for benchmark in ("chat", "math"):
        for name in FILES:
            one, other = (place.folder / "eval" / benchmark / name for place in (whole, lab))
            assert one.read_text().replace(str(whole.root), str(lab.root)) == other.read_text(), f"{benchmark}/{name}"


def test_run_again_it_changes_nothing_and_loads_no_model(whole: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: samples drawn anew, or results that depend on the time."""
    monkeypatch.setattr(EmbeddedEngine, "generate", None)
    places = [whole.folder / "eval" / "results.json"]
    places += [whole.folder / "eval" / benchmark / name for benchmark in ("chat", "math") for name in FILES]
    before = [path.read_bytes() for path in places]
    assert whole.evaluate() == 0
    assert before == [path.read_bytes() for path in places]


def test_growing_draws_only_what_is_new(lab: Lab, err: Callable[[], str]) -> None:
    """One mode and sample, then both and more. Mutation: a new start for a larger evaluation, results of a
    mode that is no longer asked for, or --limit taken for the whole."""
    flags = (
        "--evaluate.folder",
        "more",
        "--evaluate.benchmarks.chat.limit",
        "6",
        "--evaluate.benchmarks.math.limit",
        "6",
    )
    assert lab.evaluate(*flags, "--evaluate.modes", "nothinking", "--limit", "4") == 0
    place = lab.folder / "more"
    assert len(list(read_jsonl(place / "chat" / "verdicts.jsonl", Verdict))) == 4
    assert not (place / "chat" / "thinking.json").exists()
    stages = json.loads((lab.folder / "manifest.json").read_text())["stages"]
    assert stages["evaluate more"]["finished"] is None and stages["evaluate"]["finished"]
    before = {s.key: s for s in RecordStore(place / "chat" / "samples", Sample)}
    assert lab.evaluate(*flags, "--evaluate.benchmarks.chat.num_samples", "2") == 0
    after = {s.key: s for s in RecordStore(place / "chat" / "samples", Sample)}
    assert len(before) == 4 and len(after) == 6 * 2 * 2 and before.items() <= after.items()
    assert lab.result("chat", "thinking", "more")["metrics"]["reward"]["estimate"]["num_prompts"] > 0
    assert lab.evaluate(*flags, "--evaluate.modes", "thinking") == 2  # fewer than there are
    assert "sample.num_samples: 2 -> 1" in err()


def test_another_model_is_refused(lab: Lab, err: Callable[[], str]) -> None:
    """The model trained on under the same name. Mutation: samples of two models mixed, or the old results kept as new."""
    results = (lab.folder / "eval" / "results.json").read_text()
    save_talking_model(lab.root / "model", seed=1)
    assert lab.evaluate() == 2
    said = err()
    assert "engine.content" in said and "to evaluate anew, remove" in said and said.count("\n") == 0
    assert (lab.folder / "eval" / "results.json").read_text() == results
    assert lab.evaluate("--evaluate.folder", "eval-new") == 0
    assert (
        lab.result("chat", "thinking", "eval-new")["model"]
        != json.loads(results)["benchmarks"]["chat"]["thinking"]["model"]
    )


def test_a_grader_that_was_mended(lab: Lab, err: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are dear, scores of a function are not. Mutation: old scores under a new grader, or samples thrown away."""
    (lab.root / "functions.py").write_text(FUNCTIONS.replace("float(meta", "1.0 - float(meta"))
    assert lab.evaluate() == 2
    assert "--rescore scores the same samples" in err()
    monkeypatch.setattr(EmbeddedEngine, "generate", None)  # no model is needed
    before = lab.result("math", "nothinking")
    assert lab.evaluate("--rescore") == 0
    after = lab.result("math", "nothinking")
    closed = {s.key for s in lab.samples("math", "nothinking") if (s.answer or "").strip()}
    share = len(closed) / len(lab.samples("math", "nothinking"))
    old, new = (one["metrics"]["accuracy"]["estimate"]["value"] for one in (before, after))
    assert new == pytest.approx(share - old) and before["scorers"] != after["scorers"]


def test_what_counts_without_an_answer_can_be_set(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation: the setting not read, or a model that is silent rewarded without a word."""
    unclosed = sum(s.answer is None or not s.answer.strip() for s in lab.samples("chat", "thinking"))
    before = lab.result("chat", "thinking")["metrics"]
    with caplog.at_level(logging.WARNING):
        flags = [
            "--evaluate.benchmarks.chat.unclosed.reward",
            "1000",
            "--evaluate.benchmarks.chat.unclosed.correct",
            "none",
        ]
        assert lab.evaluate("--rescore", *flags) == 0
    assert "a response without an answer counts 1000" in caplog.text
    after = lab.result("chat", "thinking")["metrics"]
    assert (
        after["reward"]["num_samples"] == before["reward"]["num_samples"] and after["reward"]["silent"] == unclosed > 0
    )
    assert after["reward"]["estimate"]["value"] > before["reward"]["estimate"]["value"]
    assert after["correct"]["num_samples"] == before["correct"]["num_samples"] - unclosed
    assert sum(after["correct"]["missing"].values()) == unclosed
    caplog.set_level(logging.INFO)
    assert lab.evaluate("--evaluate.no_answer", "drop") == 0
    dropped = lab.result("chat", "thinking")["metrics"]["reward"]
    assert (
        dropped["num_samples"] == before["reward"]["num_samples"] - unclosed and f"({unclosed} dropped)" in caplog.text
    )


@pytest.mark.parametrize("says", ["[[3]]", "an answer is missing"], ids=["rated", "refused"])
def test_a_judge_that_rates_is_asked_about_silence_once_per_prompt(lab: Lab, says: str) -> None:
    """Mutation: the judge's rating of the empty text not used, asked again for each sample or run, or a reply without a
    rating taken for anything but the lowest rating."""
    (lab.root / "rubric.txt").write_text("{prompt}|{answer}|")

    def judge(text: str, number: int) -> str:
        return says if text.endswith("||") else "[[7]]"

    with judge_server(judge) as server:
        flags = ["--score.scorer", "judge", "--score.judge.model", "j", "--score.judge.base_url", server.url]
        flags += ["--score.judge.template", str(lab.root / "rubric.txt"), "--evaluate.folder", "judged"]
        flags += ["--evaluate.benchmarks.chat.num_samples", "3", "--evaluate.modes", "thinking"]
        lab.config.write_text(
            lab.config.read_text().replace(f'scorer = "function"\nfunction.path = "{lab.root}', '# "')
        )
        assert lab.evaluate(*flags) == 0
        place = lab.folder / "judged" / "chat"
        silent = [s for s in RecordStore(place / "samples", Sample) if not (s.answer or "").strip()]
        prompts = {s.prompt_id for s in silent}
        asked = [text for text in server.texts if text.endswith("||")]
        assert len(asked) == len(set(asked)) == len(prompts) < len(silent)
        files = [(place / name).read_bytes() for name in ("verdicts.jsonl", "thinking.json")]
        server.texts.clear()
        assert lab.evaluate(*flags) == 0
        assert [(place / name).read_bytes() for name in ("verdicts.jsonl", "thinking.json")] == files
        assert len(server.texts) == (0 if says == "[[3]]" else len(prompts)), "a rating is kept, and nothing else"
    values = {
        v.values["reward"] for v in read_jsonl(place / "verdicts.jsonl", Verdict) if not (v.closed and v.answered)
    }
    assert values == ({3.0} if says == "[[3]]" else {1.0})


def test_samples_that_could_not_be_drawn(lab: Lab) -> None:
    """A prompt longer than the model reads. Mutation: the failed sample not counted, or its tokens averaged."""
    prompts = (lab.root / "prompts.jsonl").read_text().splitlines()
    long = json.dumps({"id": "long", "name": "long", "prompt": "x " * 3000, "reference": "1"})
    (lab.root / "prompts.jsonl").write_text("\n".join([long, *prompts]) + "\n")
    assert lab.evaluate("--evaluate.folder", "long", "--evaluate.benchmarks.chat.limit", "5") == 0
    for mode in VIEWS:
        found = lab.result("chat", mode, "long")
        reasons = found["metrics"]["correct"]["missing"]
        assert sum(reasons.values()) == 1 and next(iter(reasons)).startswith("could not be drawn: ")
        assert found["tokens"]["num_prompts"] == 4 and found["num_prompts"] == 5


def test_an_adapter_is_merged(lab: Lab) -> None:
    """Mutation: the base evaluated in the adapter's place."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter, merged = lab.root / "adapter", lab.root / "whole"
    model = AutoModelForCausalLM.from_pretrained(lab.root / "model")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(str(adapter))
    tiny_tokenizer().save_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(lab.root / "model")
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    few = ("--evaluate.benchmarks.chat.limit", "5", "--evaluate.benchmarks.math.limit", "1")
    assert lab.evaluate("--evaluate.model", str(adapter), "--evaluate.folder", "a", *few) == 0
    assert lab.evaluate("--evaluate.model", str(merged), "--evaluate.folder", "b", *few) == 0
    weights = [(place / "model.safetensors").read_bytes() for place in (lab.folder / "a" / "merged-model", merged)]
    assert weights[0] == weights[1] != (lab.root / "model" / "model.safetensors").read_bytes()
    assert lab.evaluate("--evaluate.model", str(adapter), "--evaluate.folder", "a", *few) == 0  # merged once


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--evaluate.model", ""], "train/final: no trained model; train first, or name another with evaluate.model"),
        (["--evaluate.benchmarks.chat.source", "no.jsonl"], "evaluate.benchmarks.chat.source: no.jsonl: No such file"),
        (["--evaluate.benchmarks.chat.source", "split:test"], "make the experiment's prompts first"),
        (
            ["--evaluate.benchmarks.chat.more.x", "nowhere:f"],
            "evaluate.benchmarks.chat.more.x: cannot import 'nowhere'",
        ),
        (
            ["--evaluate.benchmarks.math.function", "math:foo"],
            "evaluate.benchmarks.math.function: 'math' has no function",
        ),
        (["--evaluate.benchmarks.math.limit", "9"], "prompts are others now, and samples of the old ones are there"),
        (["--evaluate.temperature", "1"], "sample.temperature: 0.6 -> 1.0; restore them"),
        (["--evaluate.benchmarks.chat.functoin", "x"], "did you mean 'function'?"),
    ],
)
def test_mistakes_are_one_line(whole: Lab, flags: list[str], said: str, err: Callable[[], str]) -> None:
    """Mutation: a mistake found after the first benchmark was sampled, or told without its place."""
    before = {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}
    assert whole.evaluate(*flags) == 2
    assert said in err()
    assert {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()} == before


def test_a_served_model_is_evaluated_the_same_way(lab: Lab) -> None:
    """The same model behind an OpenAI-compatible server, in a folder of its own. Mutation: the engine's settings lost on
    the way to sampling, or token counts and traces that only the engine of this process gives."""
    from http_fixtures import QUICK
    from servers.completions_server import CompletionsServer
    from transformers import AutoTokenizer

    from bvpo.engines.local.engine import create

    model = str(lab.root / "model")
    engine = create(model=model)
    served = CompletionsServer(engine, AutoTokenizer.from_pretrained(model))
    options = [f"--sample.options.{name}={value}" for name, value in QUICK.items()]
    try:
        flags = ["--evaluate.folder", "eval_served", "--sample.engine", "openai", "--sample.endpoints", served.url]
        assert lab.evaluate(*flags, *options, "--limit", "6") == 0
    finally:
        served.stop()
        engine.close()
    for benchmark, samples in (("chat", 1), ("math", 4)):
        for mode in VIEWS:
            ours, here = (lab.result(benchmark, mode, folder) for folder in ("eval_served", "eval"))
            assert (ours["num_prompts"], ours["num_samples"]) == (6, 6 * samples)
            assert ours["metrics"].keys() == here["metrics"].keys()
            assert ours["sampling"]["temperature"] == here["sampling"]["temperature"]
        place = lab.folder / "eval_served" / benchmark
        verdicts = list(read_jsonl(place / "verdicts.jsonl", Verdict))
        assert len(verdicts) == 12 * samples
        assert all(v.tokens is not None and 0 < v.tokens <= 40 for v in verdicts)
        assert all(v.trace_tokens == 0 for v in verdicts if v.mode == "nothinking")


def test_a_dry_run_writes_nothing(whole: Lab) -> None:
    """Mutation: the benchmark's folder made on a dry run."""
    before = sorted(whole.folder.rglob("*"))
    assert whole.evaluate("--dry-run") == 0 and whole.evaluate("--dry-run", "--evaluate.folder", "dry") == 0
    assert sorted(whole.folder.rglob("*")) == before


def test_nothing_to_evaluate_on(tmp_path: Path, err: Callable[[], str]) -> None:
    """Mutation: an empty evaluation called finished."""
    (tmp_path / "c.toml").write_text('name = "a"\n[model]\npath = "m"\n')
    assert main(["evaluate", str(tmp_path / "c.toml")]) == 2
    assert "[evaluate.benchmarks.NAME]" in err()


# ------------------------------------------------------------------------------------------------ what others see


def test_a_benchmark_is_an_experiment(whole: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: a config in the benchmark's folder that does not load, or evaluate missing from status."""
    place = whole.folder / "eval" / "chat"
    assert main(["status", str(whole.folder), "--json"]) == 0
    found = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}["evaluate"]
    assert (found["state"], found["done"], found["left"]) == ("finished", 4, 0)
    assert main(["status", str(place / "config.toml")]) == 0
    assert re.search(r"^sample +finished +48 samples +0 +0", capsys.readouterr().out, re.MULTILINE)
    assert main(["inspect", str(place), "q3"]) == 0
    assert "Question 3: what is 3 plus 10?" in capsys.readouterr().out


def test_status_of_a_half_done_evaluation(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: finished though a mode is missing, or a trained model newer than its evaluation not noticed."""
    manifest = json.loads((lab.folder / "manifest.json").read_text())
    manifest["stages"]["train"] = {**manifest["stages"]["evaluate"], "finished": "2999-01-01T00:00:00+00:00"}
    (lab.folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["status", str(lab.folder)]) == 0
    assert "older than the model: evaluate again" in capsys.readouterr().out
    manifest["stages"]["evaluate"]["finished"] = None
    (lab.folder / "manifest.json").write_text(json.dumps(manifest))
    (lab.folder / "eval" / "math" / "thinking.json").unlink()
    assert main(["status", str(lab.folder)]) == 0
    assert re.search(r"^evaluate +unfinished +3 results +- +1 ", capsys.readouterr().out, re.MULTILINE)


# ------------------------------------------------------------------------------------------------ compare


@pytest.fixture(scope="module")
def other(whole: Lab) -> Path:
    """Another model on the same benchmarks: one that ends its traces sooner."""
    save_talking_model(whole.root / "other", close=2.5)
    assert whole.evaluate("--evaluate.model", str(whole.root / "other"), "--evaluate.folder", "eval-other") == 0
    return whole.folder / "eval-other"


def test_differences_are_paired_by_prompt(whole: Lab, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against scipy, from the verdicts. Mutation: unpaired differences, b - a, samples in place of prompts, prompts with a
    value on one side only taken for a difference."""
    capsys.readouterr()
    assert main(["compare", str(whole.folder), str(other), "--json"]) == 0
    rows = {(r["benchmark"], r["mode"], r["metric"]): r for r in json.loads(capsys.readouterr().out)["comparisons"]}
    assert len(rows) == 2 * (2 + 3) + 2 * (1 + 3)
    for (benchmark, mode, metric), row in rows.items():
        sides: list[dict[str, float]] = []
        for folder in (whole.folder / "eval", other):
            groups: defaultdict[str, list[float]] = defaultdict(list)
            for one in read_jsonl(folder / benchmark / "verdicts.jsonl", Verdict):
                value = {
                    "(tokens)": one.tokens,
                    "(unclosed)": float(not one.closed),
                    "(no answer)": float(not one.answered),
                }.get(metric, one.values.get(metric))
                if one.mode == mode and value is not None:
                    groups[one.prompt_id].append(float(value))
            sides.append({id: statistics.fmean(group) for id, group in groups.items()})
        common = [id for id in sides[0] if id in sides[1]]
        paired = row["paired"]
        assert (paired["num_prompts"], paired["only_a"]) == (len(common), len(sides[0]) - len(common))
        pairs = [(sides[0][id], sides[1][id]) for id in common]
        if metric not in ("(tokens)", "reward"):
            pairs += [(1.0, 0.0), (0.0, 1.0)]  # the bound of 0/1 metrics
        limits = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
        assert (paired["difference"]["low"], paired["difference"]["high"]) == pytest.approx((limits.low, limits.high))
    assert rows["chat", "thinking", "(unclosed)"]["paired"]["difference"]["low"] > 0


def test_the_table(whole: Lab, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: what one side lacks not said."""
    capsys.readouterr()
    assert main(["compare", str(whole.config), str(other)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  chat +Thinking +\(unclosed\) .* \+0\.\d+ \[\+0\.", text, re.MULTILINE)
    assert re.search(r"chat Thinking reward: \d+ prompts have a value in A only, \d+ in B only", text)
    assert "95 % interval over the prompts that both have" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("none", "no evaluation in it; run bvpo evaluate first"),
        ("benchmarks", "no benchmark in common"),
        ("prompt", "prompt 'q2' is not the same in both"),
        ("ids", "have no prompt in common"),
        ("scorer", "were scored differently: source"),
        ("mode", "no mode and metric in common in chat"),
    ],
)
def test_what_cannot_be_compared(
    whole: Lab, other: Path, tmp_path: Path, change: str, said: str, err: Callable[[], str]
) -> None:
    """Mutation: a comparison of different prompts, scorers or benchmarks that looks like any other."""
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    results, prompts = copy / "results.json", copy / "chat" / "prompts.jsonl"
    data = json.loads(results.read_text())
    if change == "none":
        results.unlink()
    elif change == "benchmarks":
        data["benchmarks"] = {"elsewhere": data["benchmarks"]["chat"]}
    elif change == "prompt":
        prompts.write_text(prompts.read_text().replace("Question 2:", "Question two:"))
    elif change == "ids":
        prompts.write_text(prompts.read_text().replace('"id": "q', '"id": "z'))
    elif change == "scorer":
        data["benchmarks"]["chat"]["thinking"]["scorers"]["reward"]["source"] = "edited"
    elif change == "mode":
        data["benchmarks"] = {"chat": {}}
    if change != "none":
        results.write_text(json.dumps(data))
    assert main(["compare", str(whole.folder), str(copy)]) == 2
    assert said in err()


def test_how_they_differ_is_said(whole: Lab, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: two temperatures compared in silence."""
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    data = json.loads((copy / "results.json").read_text())
    data["benchmarks"]["chat"]["thinking"]["sampling"]["temperature"] = 1.0
    (copy / "results.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["compare", str(whole.folder), str(copy)]) == 0
    assert "chat Thinking: sampling.temperature: 1.0 -> 0.6 (B -> A)" in capsys.readouterr().out


def test_scores_stay_with_their_scorer(lab: Lab) -> None:
    """After --rescore the store holds both scorers, told apart. Mutation: the earlier scores deleted or renamed."""
    names = {
        s.scorer
        for s in RecordStore(lab.folder / "eval" / "math" / "scores", Score, key=lambda s: (s.sample_key, s.scorer))
    }
    assert lab.evaluate("--rescore") == 0
    after = {
        s.scorer
        for s in RecordStore(lab.folder / "eval" / "math" / "scores", Score, key=lambda s: (s.sample_key, s.scorer))
    }
    assert names < after and len(after) == 2
