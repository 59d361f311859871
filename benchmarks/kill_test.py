"""``bvpo sample`` and ``bvpo score`` killed with SIGKILL at random moments and run again until done: is anything changed?

    python benchmarks/kill_test.py --times 60     # writes benchmarks/results/kill-<date>.json

Four campaigns, 60 kills each, on a small random model of a real class: sampling with the embedded engine and from two HTTP
servers (the test server, over the same model), scoring with a reward model in the process and with a judge behind HTTP. One
run is left alone. Others, each in a fresh experiment folder, are killed up to ten times: at any moment of the command, while
records arrive (after a random number of them), or when the last one is there (sealing). Then they run to their end, and
every record is compared with the run that was left alone: keys, token ids, texts, traces, answers and errors exactly,
log-probabilities and scores to 1e-4 (batches differ after a kill, and so may the rounding).

A fifth campaign kills ``bvpo train``, at any moment and while a checkpoint or the model is written. Weights, metrics.jsonl
with train_loss (times apart) and held_out.jsonl must be the bytes of the run that was left alone.

Each command is a process of its own, forked from a server that has only imported what commands import, which makes a start
take a second instead of seven. A process is killed, not the machine: nothing here says what a power failure does.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bvpo.experiment import RecordStore, read_manifest, versions
from bvpo.records import Sample, Score

if TYPE_CHECKING:
    from look_fixtures import Experiment

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES_PER_VIEW = 3
MOST_KILLS_PER_ROUND = 10
TOLERANCE = 1e-4
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [
    *(
        "bvpo.stages.prompts",
        "bvpo.stages.sample",
        "bvpo.stages.score",
        "bvpo.engines.local.engine",
        "bvpo.engines.http.engine",
    ),
    *("bvpo.scorers.classifier", "bvpo.scorers.judge", "openai", "pyarrow.parquet", "tqdm.contrib.logging"),
    *("bvpo.stages.train", "bvpo.training.trainer", "bvpo.training.estimate", "bvpo.training.data", "datasets"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What is killed: a verb under some settings, and the records it makes."""

    verb: str
    folder: str
    cls: type
    toml: Callable[[Servers], str]
    exact: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Addresses of the two completion servers and of the judge, and the folder of the models."""

    endpoints: tuple[str, str]
    judge: str
    models: Path


_SAMPLE_EXACT = ("prompt_id", "view", "index", "prompt_ids", "token_ids", "text", "trace", "answer", "finish", "error")
_BATCHES = "options.max_batch_rows = 4\noptions.min_batch_rows = 1\n"
CAMPAIGNS = {
    "sample, embedded engine": Campaign(
        verb="sample", folder="samples", cls=Sample, exact=_SAMPLE_EXACT, toml=lambda servers: _BATCHES
    ),
    "sample, two HTTP servers": Campaign(
        verb="sample",
        folder="samples",
        cls=Sample,
        exact=_SAMPLE_EXACT,
        toml=lambda servers: f'engine = "openai"\nendpoints = {list(servers.endpoints)}\noptions.concurrency = 4\n',
    ),
    "score, reward model": Campaign(
        verb="score",
        folder="scores",
        cls=Score,
        exact=("prompt_id", "view", "scorer", "error"),
        toml=lambda servers: (
            f'[score]\nscorer = "classifier"\nreward_model.model = "{servers.models / "reward"}"\n'
            "reward_model.batch_tokens = 64\n"
        ),
    ),
    "score, judge over HTTP": Campaign(
        verb="score",
        folder="scores",
        cls=Score,
        exact=("prompt_id", "view", "scorer", "error"),
        toml=lambda servers: (
            f'[score]\nscorer = "judge"\njudge.model = "judge"\njudge.base_url = "{servers.judge}"\n'
            "judge.concurrency = 4\n"
        ),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# processes


def _command(words: list[str], log: str) -> None:
    from bvpo.cli import main

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(main(words))


def start(experiment: Experiment, verb: str) -> Any:
    process = FORKS.Process(target=_command, args=([verb, str(experiment.config)], str(experiment.root / "log")))
    process.start()
    return process


def finish(experiment: Experiment, verb: str) -> None:
    process = start(experiment, verb)
    process.join()
    if process.exitcode != 0:
        told = (experiment.root / "log").read_text()[-2000:]
        raise SystemExit(f"bvpo {verb} ended with {process.exitcode}: {told}")


def _serve(model: str, addresses: Any) -> None:
    from judge_server import judge_server
    from models_fixtures import tiny_tokenizer
    from servers.completions_server import CompletionsServer

    from bvpo.engines.local.engine import create

    def rating(text: str, number: int) -> str:
        return f"Rating: [[{1 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10}]]"

    two = [CompletionsServer(create(model=model), tiny_tokenizer(), most_requests=10**9) for _ in range(2)]
    with judge_server(rating, delay=0.005) as judge:
        addresses.send(((two[0].url, two[1].url), judge.url))
        addresses.recv()  # until the end


@contextmanager
def serving(models: Path) -> Iterator[Servers]:
    """Both completion servers and the judge, in a process of their own that lives as long as the block."""
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=_serve, args=(str(models / "model"), there), daemon=True)
    process.start()
    endpoints, judge = here.recv()
    try:
        yield Servers(endpoints=endpoints, judge=judge, models=models)
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------------------------------
# one campaign


def new_experiment(root: Path, name: str, num_prompts: int, toml: str, like: Experiment | None = None) -> Experiment:
    """An experiment with its prompts (and samples, if ``like`` has them), ready for the verb that is killed."""
    from look_fixtures import Experiment, questions

    (root / name).mkdir(parents=True)
    (root / name / "model").symlink_to(root.parent / "models" / "model")
    experiment = Experiment(root / name, questions(num_prompts), f"num_samples = {SAMPLES_PER_VIEW}\n")
    text = experiment.config.read_text()
    if "[score]" in toml:
        text = text[: text.index("[score]")] + text[text.index("[sample]") :]
    experiment.config.write_text(text + toml)
    if like is None:
        finish(experiment, "prompts")
    else:
        for name in ("prompts.jsonl", "manifest.json", "samples"):
            source = like.folder / name
            if source.is_file():
                experiment.folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, experiment.folder / name)
            elif source.is_dir():
                shutil.copytree(source, experiment.folder / name)
    return experiment


def open_store(experiment: Experiment, campaign: Campaign) -> RecordStore[Any]:
    from bvpo.data.scores import score_key

    key = score_key if campaign.cls is Score else None
    return RecordStore(experiment.folder / campaign.folder, campaign.cls, key=key)


def identity(record: Any) -> Any:
    return record.key if isinstance(record, Sample) else (record.sample_key, record.scorer)


def num_new_lines(folder: Path, before: set[Path]) -> int:
    try:
        return sum(path.read_bytes().count(b"\n") for path in set(folder.glob("*.jsonl")) - before)
    except FileNotFoundError:
        return 0  # sealed between listing and reading


def kill_once(
    experiment: Experiment, campaign: Campaign, num: int, kind: str, seconds: float, dice: random.Random
) -> dict[str, Any]:
    """Starts the command and kills it; what was there before and after."""
    folder = experiment.folder / campaign.folder
    before, stored_before = set(folder.glob("*.jsonl")), len(open_store(experiment, campaign))
    left = num - stored_before
    wanted = {"working": dice.randrange(1, max(2, left // 4)), "last": left}.get(kind)
    moment = dice.uniform(0, 0.9 * seconds)
    process = start(experiment, campaign.verb)
    began = time.monotonic()
    while process.is_alive():
        reached = num_new_lines(folder, before) >= wanted if wanted else time.monotonic() - began >= moment
        if reached:
            break
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.02))
    process.kill()
    process.join()
    store = open_store(experiment, campaign)
    return {
        "kind": kind,
        "killed": process.exitcode == -signal.SIGKILL,
        "before": stored_before,
        "after": len(store),
        "torn_bytes": store.stats().torn_bytes,
    }


def largest_difference(record: Any, expected: Any) -> float:
    """Of log-probabilities, or of the score; infinite where one is missing."""
    if isinstance(record, Score):
        if record.value is None or expected.value is None:
            return 0.0 if record.value is expected.value else float("inf")
        return abs(record.value - expected.value)
    if len(record.logprobs or ()) != len(expected.logprobs or ()):
        return float("inf")
    pairs = zip(record.logprobs or (), expected.logprobs or (), strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


def compare(experiment: Experiment, campaign: Campaign, reference: dict[Any, Any]) -> dict[str, Any]:
    """What differs from the run that was left alone."""
    store = open_store(experiment, campaign)
    found = {identity(record): record for record in store}
    both = [(record, reference[key]) for key, record in found.items() if key in reference]
    changed = sum(any(getattr(a, name) != getattr(b, name) for name in campaign.exact) for a, b in both)
    entry = read_manifest(experiment.folder).stage(campaign.verb)
    return {
        "records": len(found),
        "lost": len(reference.keys() - found.keys()),
        "invented": len(found.keys() - reference.keys()),
        "changed": changed,
        "duplicates_on_disk": store.stats().num_duplicates,
        "damaged": len(store.verify()),
        "largest_difference": max((largest_difference(a, b) for a, b in both), default=0.0),
        "finished": entry is not None and entry.finished is not None,
    }


def run(root: Path, campaign: Campaign, servers: Servers, times: int, num_prompts: int, seed: int) -> dict[str, Any]:
    """Kills one kind of command ``times`` times, in as many rounds as it takes."""
    toml = campaign.toml(servers)
    template = new_experiment(root, "template", num_prompts, "" if campaign.verb == "score" else toml)
    if campaign.verb == "score":
        finish(template, "sample")
    whole = new_experiment(root, "whole", num_prompts, toml, like=template)
    began = time.monotonic()
    finish(whole, campaign.verb)
    seconds = time.monotonic() - began
    reference = {identity(record): record for record in open_store(whole, campaign)}
    num = num_prompts * 2 * SAMPLES_PER_VIEW
    assert len(reference) == num, f"the uninterrupted run has {len(reference)} records, expected {num}"
    print(f"uninterrupted: {num} records in {seconds:.1f} s")
    dice = random.Random(seed)
    kills: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    while len(kills) < times:
        experiment = new_experiment(root, f"round{len(rounds)}", num_prompts, toml, like=template)
        mine: list[dict[str, Any]] = []
        while len(mine) < min(MOST_KILLS_PER_ROUND, times - len(kills)):
            kind = dice.choices(("working", "any", "last"), (12, 6, 1))[0]
            outcome = kill_once(experiment, campaign, num, kind, seconds, dice)
            assert outcome["after"] >= outcome["before"], outcome
            if not outcome["killed"]:
                break  # it was done first
            mine.append(outcome)
        finish(experiment, campaign.verb)
        kills += mine
        rounds.append({"kills": len(mine), **compare(experiment, campaign, reference)})
        shutil.rmtree(experiment.root)
        print(f"round {len(rounds)}: {rounds[-1]}", flush=True)
    return summary(kills, rounds, num, seconds)


def summary(kills: list[dict[str, Any]], rounds: list[dict[str, Any]], num: int, seconds: float) -> dict[str, Any]:
    when = Counter(
        "before the first record of that run"
        if kill["after"] == kill["before"]
        else "with all records stored"
        if kill["after"] == num
        else "with some records stored"
        for kill in kills
    )
    names = ("lost", "invented", "changed", "duplicates_on_disk", "damaged")
    totals = {name: sum(one[name] for one in rounds) for name in names}
    worst = max(one["largest_difference"] for one in rounds)
    whole = all(one["finished"] and one["records"] == num for one in rounds)
    return {
        "kills": len(kills),
        "when": dict(when),
        "kills_that_left_a_torn_line": sum(kill["torn_bytes"] > 0 for kill in kills),
        "rounds": len(rounds),
        "records_per_round": num,
        **totals,
        "largest_difference": worst,
        "seconds_uninterrupted": round(seconds, 2),
        "passed": whole and not any(totals.values()) and worst <= TOLERANCE,
    }


# ---------------------------------------------------------------------------------------------------------------------
# training

TRAIN = "train"
TRAIN_FLAGS = {
    "save": "steps",
    "save_steps": "2",
    "logging_steps": "3",
    "save_total_limit": "2",
    "telemetry_steps": "5",
}


def run_train(root: Path, times: int, seed: int) -> dict[str, Any]:
    """Kills ``bvpo train`` ``times`` times on the material of docs/examples/first_run.py."""
    examples = Path(__file__).resolve().parents[1] / "docs" / "examples"
    root.mkdir(parents=True)
    subprocess.run([sys.executable, str(examples / "first_run.py")], cwd=root, check=True, stdout=subprocess.DEVNULL)
    material = root / "experiments" / "first"

    def begin(place: Path) -> Any:
        if not place.is_dir():
            (place / "first").mkdir(parents=True)
            shutil.copy(material / "quads.jsonl", place / "first" / "quads.jsonl")
        for folder in _half_written(place / "first" / TRAIN):
            (folder / LEFT).touch()
        words = [TRAIN, str(examples / "first.toml"), "--root", str(place), "--model.path", str(material / "model")]
        words += [word for name, value in TRAIN_FLAGS.items() for word in (f"--train.{name}", value)]
        process = FORKS.Process(target=_command, args=(words, str(place / "log")))
        process.start()
        return process

    begin(root / "warm").join()
    began = time.monotonic()
    begin(root / "whole").join()
    seconds = time.monotonic() - began
    expected = _trained(root / "whole" / "first" / TRAIN)
    assert len(expected) == 3, (root / "whole" / "log").read_text()[-2000:]
    print(f"uninterrupted: {seconds:.1f} s", flush=True)
    dice, kills, rounds = random.Random(seed), [], []
    while len(kills) < times:
        place, mine = root / f"round{len(rounds)}", 0
        while mine < min(MOST_KILLS_PER_ROUND, times - len(kills)):
            outcome = _kill_training(begin(place), place / "first" / TRAIN, seconds, dice)
            if outcome is None:
                break  # it was done first
            kills.append(outcome)
            mine += 1
        process = begin(place)
        process.join()
        found = _trained(place / "first" / TRAIN)
        differ = [name for name, value in expected.items() if found.get(name) != value]
        rounds.append({"kills": mine, "refused": process.exitcode != 0, "differ": differ})
        if process.exitcode or differ:
            print((place / "log").read_text()[-2000:], differ)
        shutil.rmtree(place)
        print(f"round {len(rounds)}: {rounds[-1]}", flush=True)
    refusals, changed = sum(one["refused"] for one in rounds), sum(bool(one["differ"]) for one in rounds)
    return {
        "kills": len(kills),
        "when": dict(Counter(kills)),
        "rounds": len(rounds),
        "refusals": refusals,
        "rounds_that_differ": changed,
        "compared": sorted(expected),
        "seconds_uninterrupted": round(seconds, 2),
        "passed": not refusals and not changed,
    }


LEFT = "left-by-an-earlier-kill"
"""Marks a half-written folder that was there before the start; training deletes such a folder before it writes it anew."""


def _half_written(folder: Path) -> list[Path]:
    """Checkpoints and the final model that this process has begun and not finished."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if not (path / "bvpo_run.json").exists()]
    final = [path for path in [folder / "_final"] if path.exists()]
    return [path for path in [*checkpoints, *final] if not (path / LEFT).exists()]


def _kill_training(process: Any, folder: Path, seconds: float, dice: random.Random) -> str | None:
    """Kills at a random moment, or when a save has begun; what it left, or None if it ended by itself."""
    kind, moment = dice.choice(("any", "saving", "saving")), dice.uniform(0, 0.9 * seconds)
    skip, began = dice.randrange(3), time.monotonic()
    is_in_save = False
    while process.is_alive():
        saves = bool(_half_written(folder))
        skip -= saves and not is_in_save
        is_in_save = saves
        if skip < 0 if kind == "saving" else time.monotonic() - began >= moment:
            break
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.03))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return None
    half_written = _half_written(folder)
    if folder / "_final" in half_written:
        return "while the final model was written"
    if half_written:
        return "within a save or a rotation"
    return "between saves" if any(folder.glob("checkpoint-*")) else "before the first save"


def _trained(folder: Path) -> dict[str, Any]:
    """What a run leaves, times apart."""
    found: dict[str, Any] = {}
    weights, metrics, held_out = (
        folder / name for name in ("final/model.safetensors", "metrics.jsonl", "held_out.jsonl")
    )
    if weights.is_file():
        found["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        timed = ("runtime", "per_second")
        found["metrics"] = [{k: v for k, v in e.items() if not any(word in k for word in timed)} for e in lines]
    if held_out.is_file():
        found["held_out"] = held_out.read_text()
    return found


def main() -> int:
    from look_fixtures import save_talking_model
    from scoring_fixtures import save_classifier

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=60, help="kills per campaign (default 60)")
    parser.add_argument("--only", nargs="+", choices=[*CAMPAIGNS, TRAIN], default=[*CAMPAIGNS, TRAIN])
    parser.add_argument("--prompts", type=int, default=40, help="six records each (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    FORKS.set_forkserver_preload(PRELOAD)
    root = Path(tempfile.mkdtemp(prefix="bvpo-kill-"))
    found: dict[str, Any] = {}
    try:
        (root / "models").mkdir()
        save_talking_model(root / "models" / "model")
        save_classifier(root / "models" / "reward")
        if TRAIN in args.only:
            print(f"{TRAIN}:", flush=True)
            found[TRAIN] = run_train(root / TRAIN, args.times, args.seed)
        others = [name for name in args.only if name != TRAIN]
        with serving(root / "models") if others else nullcontext() as servers:
            for number, name in enumerate(others):
                assert servers is not None
                print(f"{name}:", flush=True)
                place = root / f"campaign{number}"
                found[name] = run(place, CAMPAIGNS[name], servers, args.times, args.prompts, args.seed)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    today = datetime.date.today().isoformat()
    passed = all(one["passed"] for one in found.values())
    result = {
        "benchmark": "kill",
        "date": today,
        "command": " ".join(["python", "benchmarks/kill_test.py", *sys.argv[1:]]),
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "tolerance": TOLERANCE,
        "campaigns": found,
        "passed": passed,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    kind = "kill" if set(CAMPAIGNS) <= set(args.only) else "kill-part"  # the page quotes the newest whole one
    path = args.results / f"{kind}-{today}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    print(f"written to {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
