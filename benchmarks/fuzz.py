"""Damaged inputs of every kind, given to the real verbs and readers: each is taken, or refused in one line.

    python benchmarks/fuzz.py                          # 11,300 inputs; writes benchmarks/results/fuzz-<date>.json
    python benchmarks/fuzz.py --only configs --share 0.1 --no-file
    python benchmarks/fuzz.py --only models --input 17 # one input again, with what it said

One small comparison is made by ``bvpo run``; then its files are damaged one at a time, by a generator seeded with kind and
number. What was taken must read back equal (configs, quads, preferences, prompts) or be what was stored (shards). A
traceback is whatever escapes ``bvpo.cli.main`` or the reader but a ``UserError``, a refusal of more than one line, or the
death of the process; a hang is an input that takes longer than ``--limit`` seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import logging
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mutators import (
    Chance,
    damaged_bytes,
    damaged_json_file,
    damaged_json_lines,
    damaged_template,
    damaged_toml,
)
from bvpo.cli import main as bvpo
from bvpo.config import dump_toml, load_config
from bvpo.experiment import RecordStore, versions
from bvpo.records import Prompt, Quad, Sample
from bvpo.strict import UserError, read_jsonl, to_json, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = 10 << 30  # bytes of address space beyond which an input has failed
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
quads_per_step = 8
save = "no"
logging_steps = 1
[evaluate]
max_new_tokens = 24
[evaluate.benchmarks.talk]
source = "split:test"
metric = "length"
unclosed.length = 0.0
[run]
seeds = [1, 2]
workers = 1
stages = ["prompts", "sample", "score", "pair", "analyze", "train", "evaluate"]
[run.methods.base.evaluate]
model = "base"
[run.methods.mix]
train.alpha.value = 0.5
"""


class Different(Exception):
    """What was taken is not what was read back."""


class Hang(BaseException):
    """The time of one input is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``said`` is the refusal, or the last lines of the traceback."""

    verdict: str  # accepted, refused, traceback, hang, different
    said: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# the whole thing that gets damaged


def make_home(home: Path) -> Path:
    """Model, prompts, scorer, reward model, and a finished comparison of two methods over two seeds."""
    from look_fixtures import SCORER, questions, save_talking_model
    from scoring_fixtures import save_classifier

    save_talking_model(home / "model")
    save_classifier(home / "reward")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in questions(20)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "scorer.py").write_text(SCORER)
    (home / "cmp.toml").write_text(CONFIG)
    with working_in(home), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert bvpo(["run", "cmp.toml"]) == 0
    return home


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def damaged(home: Path, path: Path, data: bytes | None) -> Iterator[None]:
    """``path`` holds ``data``, or is missing; afterwards every file of the experiments is as it was."""
    if home not in _WHOLE:
        _WHOLE[home] = {file: file.read_bytes() for file in (home / "experiments").rglob("*") if file.is_file()}
    began = {file: file.stat().st_mtime_ns for file in _WHOLE[home]}
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    try:
        yield
    finally:
        for file in list((home / "experiments").rglob("*")):
            if file.is_file() and file not in _WHOLE[home]:
                file.unlink()
        for file, content in _WHOLE[home].items():
            if file == path or not file.is_file() or file.stat().st_mtime_ns != began[file]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)


_WHOLE: dict[Path, dict[Path, bytes]] = {}


def call(*words: str | Path) -> Outcome:
    """One command; it must end with 0 or 1, or with 2 and one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = bvpo([str(word) for word in words])
    said = err.getvalue()
    if code in (0, 1):
        return Outcome(verdict="accepted")
    assert code == 2, f"exit code {code}"
    _, mark, line = said.rpartition("bvpo: error: ")
    assert mark and line.count("\n") == 1, f"not one line: {line[:500]!r}"
    return Outcome(verdict="refused", said=line.strip())


# ---------------------------------------------------------------------------------------------------------------------
# kinds


def configs(chance: Chance, home: Path) -> Outcome:
    """Files and flags; what is taken is written out and read again."""
    sources = sorted(
        [*ROOT.glob("experiments/*.toml"), *ROOT.glob("recipes/**/*.toml"), home / "cmp.toml", home / "full.toml"]
    )
    path = home / "damaged.toml"
    text = chance.choice(sources).read_text(encoding="utf-8")
    flags: list[str] = []
    if chance.random() < 0.2:
        path.write_text(text, encoding="utf-8")
        flags = [_flag(chance) for _ in range(chance.choice([1, 1, 2]))]
    else:
        path.write_bytes(damaged_toml(chance, text))
    config = load_config(path, flags)
    again = home / "again.toml"
    again.write_text(dump_toml(config), encoding="utf-8")
    if load_config(again) != config:
        raise Different(path.read_bytes()[:2000])
    return Outcome(verdict="accepted")


def _flag(chance: Chance) -> str:
    from benchmarks.mutators import RAW_TOML, TEXTS
    from bvpo.config import ExperimentConfig
    from bvpo.config.layers import settings

    names = [setting.field for setting in settings(ExperimentConfig)]
    name = chance.choice([*names, "evaluate.benchmarks.x.source", "score.judge.extra.a.b", "run.methods.a.b", "", "."])
    return f"--{name}={chance.choice([*RAW_TOML, *TEXTS])}"


def quads(chance: Chance, home: Path) -> Outcome:
    """Read for training, written, read again, and tokenised."""
    from bvpo.config import DataConfig

    whole = (home / "experiments" / "cmp" / "seed-1" / "data" / "quads.jsonl").read_bytes()
    path = home / "damaged.jsonl"
    path.write_bytes(damaged_json_lines(chance, _few_lines(chance, whole)))
    return _train_data(chance, home, DataConfig(quads=str(path)))


def _few_lines(chance: Chance, whole: bytes) -> bytes:
    lines = whole.splitlines(keepends=True)
    return b"".join(chance.sample(lines, min(2, len(lines))))


def _train_data(chance: Chance, home: Path, data: Any) -> Outcome:
    from bvpo.training.data import load_quads
    from bvpo.training.tokenizing import TokenSettings, prepare_tokens

    tokenizer, fmt = _tokenizer(home)
    source = load_quads(data, fmt).train
    found = list(source)
    copy = home / "copy.jsonl"
    write_jsonl(copy, found)
    if list(read_jsonl(copy, Quad)) != found:
        raise Different(to_json(found[0])[:2000])
    settings = TokenSettings(max_length=chance.choice([40, 4096]), vocab_size=len(tokenizer))
    tokens = home / "_tokens"
    shutil.rmtree(tokens, ignore_errors=True)
    prepare_tokens(source, tokenizer, fmt, settings, tokens)
    return Outcome(verdict="accepted")


_LOADED: dict[Path, tuple[Any, Any]] = {}


def _tokenizer(home: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from bvpo.formats import resolve_format

    if home not in _LOADED:
        tokenizer = AutoTokenizer.from_pretrained(home / "model")
        _LOADED[home] = tokenizer, resolve_format(tokenizer, "auto", None)
    return _LOADED[home]


def preferences(chance: Chance, home: Path) -> Outcome:
    """TRL's preference sets of one or both views, in its two forms, as JSON, JSON lines or Parquet."""
    from bvpo.config import DataConfig

    turn = {"role": "user", "content": "Why?"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Why?", "chosen": "<think>\nso\n</think>\n\nYes.", "rejected": "<think>\nno\n</think>\n\nNo."},
        {
            "prompt": [turn],
            "chosen": [{"role": "assistant", "content": "a", "reasoning_content": "t"}],
            "rejected": "b",
        },
        {
            "chosen": [turn, {"role": "assistant", "content": "a"}],
            "rejected": [turn, {"role": "assistant", "content": "b"}],
        },
    ]
    lines = "".join(json.dumps(row) + "\n" for row in chance.sample(rows, chance.choice([1, 2, 3]))).encode()
    named = {}
    for view in chance.choice([["trace"], ["empty"], ["trace", "empty"]]):
        suffix = chance.choice(
            [".jsonl", ".jsonl", ".json", ".parquet"] if chance.random() < 0.15 else [".jsonl", ".json"]
        )
        path = home / f"{view}{suffix}"
        path.write_bytes(_preference_bytes(chance, lines, suffix))
        named[view] = str(path)
    return _train_data(chance, home, DataConfig(**named))


def _preference_bytes(chance: Chance, lines: bytes, suffix: str) -> bytes:
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        odd = chance.choice([["x", "y"], [1, 2], [None, "a"], [["a"], []], [b"\xff", b""], [1.5, float("nan")]])
        columns = {name: chance.choice([odd, ["a", "b"]]) for name in ("prompt", "chosen", "rejected")}
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue() if chance.random() < 0.5 else damaged_bytes(chance, sink.getvalue())
    if suffix == ".json":
        array = b"[" + b",".join(lines.splitlines()) + b"]"
        return damaged_json_file(chance, array)
    return damaged_json_lines(chance, lines)


def prompts(chance: Chance, home: Path) -> Outcome:
    """``bvpo prompts`` on a damaged source; what it keeps is read again."""
    suffix = chance.choice([".jsonl", ".jsonl", ".json", ".csv", ".txt", ".toml"])
    rows = [{"prompt": "What is this?", "id": "a"}, {"prompt": [{"role": "user", "content": "And that?"}], "id": 7}]
    if suffix == ".csv":
        data = damaged_bytes(chance, b'prompt,id\n"What, this?",1\nAnd that?,2\n')
    elif suffix == ".json":
        data = damaged_json_file(chance, json.dumps(rows).encode())
    else:
        data = damaged_json_lines(chance, "".join(json.dumps(row) + "\n" for row in rows).encode())
    path = home / f"source{suffix}"
    path.write_bytes(data)
    shutil.rmtree(home / "experiments" / "fuzz", ignore_errors=True)
    flags = ["--prompts.id_column", "id"] if chance.random() < 0.3 else []
    flags += ["--prompts.max_tokens", "50"] if chance.random() < 0.1 else []
    outcome = call("prompts", "cmp.toml", "--name", "fuzz", "--prompts.sources", path, *flags)
    kept = home / "experiments" / "fuzz" / "prompts.jsonl"
    if outcome.verdict == "accepted":
        found = list(read_jsonl(kept, Prompt))
        write_jsonl(home / "copy.jsonl", found)
        if list(read_jsonl(home / "copy.jsonl", Prompt)) != found:
            raise Different(kept.read_bytes()[:2000])
    return outcome


def templates(chance: Chance, home: Path) -> Outcome:
    """Chat templates that fail, loop, recurse or eat memory, rendered in both views."""
    from bvpo.formats import prompts as rendering
    from bvpo.records import VIEWS, Message

    tokenizer, fmt = _tokenizer(home)
    whole = tokenizer.chat_template
    # the real limits take seconds for each template that loops: one in a hundred has them
    real = chance.random() < 0.01
    rendering.MAX_TEMPLATE_STEPS, rendering.MAX_TEMPLATE_SECONDS = (10_000_000, 10.0) if real else (100_000, 1.0)
    try:
        tokenizer.chat_template = damaged_template(chance, whole)
        turns = [Message(role="user", content=text) for text in ("Why?", "<think> and \x1b why?")]
        for view in VIEWS:
            rendering.view_prompt(tokenizer, fmt, turns[: chance.choice([1, 2])], view)
    finally:
        tokenizer.chat_template = whole
    return Outcome(verdict="accepted")


_BASE, _MIX, _DATA = (f"experiments/cmp/seed-1/{name}" for name in ("base", "mix", "data"))
_EVALUATED = ("eval/results.json", "eval/talk/verdicts.jsonl", "eval/talk/prompts.jsonl")
_RUN = ("manifest.json", "prompts.jsonl", "quads.jsonl", "config.toml")
_VERBS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("report", "experiments/cmp"), ("experiments/cmp/config.toml",)),
    (("report", "experiments/cmp"), tuple(f"{_BASE}/{name}" for name in (*_EVALUATED[1:], "manifest.json"))),
    (("report", "experiments/cmp"), tuple(f"{_DATA}/{name}.json" for name in ("manifest", "pairing", "analysis"))),
    (
        ("report", "experiments/cmp"),
        tuple(f"{_MIX}/train/{name}" for name in ("metrics.jsonl", "held_out.jsonl", "summary.json")),
    ),
    (("compare", "experiments/cmp", "--method", "base,mix"), ("experiments/cmp/results.json", f"{_MIX}/config.toml")),
    (("compare", "experiments/cmp", "--method", "base,mix"), tuple(f"{_BASE}/{name}" for name in _EVALUATED)),
    (("compare", _BASE, _MIX), tuple(f"{_BASE}/{name}" for name in _EVALUATED)),
    (("status", "experiments/cmp"), (f"{_DATA}/manifest.json",)),
    (("status", _DATA), tuple(f"{_DATA}/{name}" for name in _RUN[:3])),
    (("status", _DATA, "--json"), (f"{_DATA}/manifest.json",)),
    (("status", _MIX), (f"{_MIX}/manifest.json", f"{_MIX}/train/metrics.jsonl")),
    (("inspect", _DATA), tuple(f"{_DATA}/{name}" for name in _RUN[:3])),
    (("inspect", _DATA, "--html", "experiments/cmp/page.html"), tuple(f"{_DATA}/{name}" for name in _RUN[:3])),
    (("analyze", _DATA, "--resamples", "10"), (f"{_DATA}/manifest.json", f"{_DATA}/config.toml")),
    (("pair", f"{_DATA}/config.toml"), tuple(f"{_DATA}/{name}" for name in _RUN)),
    (("score", f"{_DATA}/config.toml"), tuple(f"{_DATA}/{name}" for name in (*_RUN[:2], "config.toml"))),
    (("evaluate", f"{_BASE}/config.toml"), tuple(f"{_BASE}/{name}" for name in (*_EVALUATED, "manifest.json"))),
    (("train", f"{_MIX}/config.toml"), (f"{_MIX}/train/summary.json", f"{_MIX}/manifest.json", f"{_DATA}/quads.jsonl")),
    (("run", "cmp.toml", "--dry-run"), ("experiments/cmp/manifest.json", "experiments/cmp/config.toml")),
]
"""A verb, and files that it reads."""


def results(chance: Chance, home: Path) -> Outcome:
    """One file of a finished experiment damaged, then looked at, or gone on with, by a verb."""
    verb, files = chance.choice(_VERBS)
    path = home / chance.choice(files)
    whole = path.read_bytes()
    data = damaged_toml(chance, whole.decode()) if path.suffix == ".toml" else damaged_json_file(chance, whole)
    with damaged(home, path, None if chance.random() < 0.02 else data):
        return call(*verb)


def shards(chance: Chance, home: Path) -> Outcome:
    """One file of a record store damaged: what is read is what was stored, or the damage is told."""
    folder = home / "experiments" / "cmp" / "seed-1" / "data"
    if chance.random() < 0.3:
        path = chance.choice(sorted((folder / chance.choice(["samples", "scores"])).glob("*.parquet")))
        with damaged(home, path, damaged_bytes(chance, path.read_bytes())):
            verb = chance.choice(
                [["status"], ["status", "--verify"], ["status", "--repair"], ["inspect"], ["analyze"], ["score"]]
            )
            target = folder / "config.toml" if verb[0] == "score" else folder
            return call(verb[0], target, *verb[1:])
    place = home / "store"
    shutil.rmtree(place, ignore_errors=True)
    stored = {sample.key: sample for sample in RecordStore(folder / "samples", Sample)}
    with RecordStore(place, Sample).open_writer() as writer:
        for sample in stored.values():
            writer.append(sample)
    if chance.random() < 0.5:
        RecordStore(place, Sample).seal()
    path = next(path for path in sorted(place.iterdir()) if path.suffix in (".jsonl", ".parquet"))
    path.write_bytes(damaged_bytes(chance, path.read_bytes()))
    store = RecordStore(place, Sample)
    found = {sample.key: sample for sample in store}
    list(store.columns("key", "text", "logprobs"))
    if any(stored.get(key) != sample for key, sample in found.items()) and not store.verify():
        raise Different("a record that nobody stored")
    lost = len(found) < len(stored)
    if (
        lost
        and not (store.verify() or store.stats().torn_bytes or path.stat().st_size == 0)
        and path.suffix == ".parquet"
    ):
        raise Different("records lost, and nothing told")
    store.repair(full=True)
    store.seal()
    left = list(RecordStore(place, Sample))
    if any(stored.get(sample.key) != sample for sample in left):
        raise Different("a record that nobody stored, after a repair")
    return Outcome(verdict="accepted")


def models(chance: Chance, home: Path) -> Outcome:
    """One file of a model folder damaged, then loaded by every verb that loads models."""
    verb = chance.choice(["sample", "sample", "train", "train", "score", "prompts", "gradients", "evaluate"])
    whole = home / ("reward" if verb == "score" else "model")
    folder = home / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = chance.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    path.unlink()
    if (how := chance.random()) < 0.05:
        path.mkdir()
    elif how < 0.08:
        path.symlink_to(path.name)
    elif how < 0.95:
        if path.suffix == ".jinja":
            path.write_text(damaged_template(chance, data.decode()), encoding="utf-8", errors="surrogatepass")
        elif path.suffix == ".json":
            path.write_bytes(damaged_json_file(chance, data))
        else:
            path.write_bytes(
                chance.choice([damaged_bytes(chance, data), data[: chance.randrange(len(data))], _header(chance, data)])
            )
    fuzz, data_folder = home / "experiments" / "fuzz", home / "experiments" / "cmp" / "seed-1" / "data"
    shutil.rmtree(fuzz, ignore_errors=True)
    fuzz.mkdir()
    if verb == "gradients":
        return call("analyze", "--gradients", folder, data_folder / "quads.jsonl", "--limit", "2", "--resamples", "10")
    flags = ["--name", "fuzz", "--model.path", folder]
    if verb == "score":
        shutil.copytree(data_folder / "samples", fuzz / "samples")
        flags = ["--name", "fuzz", "--score.scorer", "classifier", "--score.reward_model.model", folder]
    if verb == "prompts":
        flags += ["--prompts.max_tokens", "50"]
    elif verb != "evaluate":
        shutil.copy(data_folder / "prompts.jsonl", fuzz)
    else:
        rows = (data_folder / "prompts.jsonl").read_bytes().splitlines(keepends=True)
        (fuzz / "prompts.jsonl").write_bytes(b"".join([row for row in rows if b'"test"' in row][:1]))
        flags += ["--evaluate.model", "base"]
    if verb == "train":
        flags += ["--data.quads", str(data_folder / "quads.jsonl"), "--train.max_steps", "1"]
    return call(verb, "cmp.toml", *flags, *(["--limit", "2"] if verb in ("sample", "score", "train") else []))


def _header(chance: Chance, data: bytes) -> bytes:
    """A safetensors file with a damaged header of the right length."""
    size = int.from_bytes(data[:8], "little")
    header = damaged_json_file(chance, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@dataclass(frozen=True, slots=True)
class Kind:
    run: Callable[[Chance, Path], Outcome]
    num: int


KINDS = {
    "configs": Kind(configs, 4500),
    "quads": Kind(quads, 3000),
    "preferences": Kind(preferences, 1500),
    "prompts": Kind(prompts, 400),
    "templates": Kind(templates, 500),
    "results": Kind(results, 700),
    "shards": Kind(shards, 400),
    "models": Kind(models, 300),
}


# ---------------------------------------------------------------------------------------------------------------------
# the campaign


def one(kind: str, number: int, home: Path, seed: int = 0, limit: float = 120.0) -> Outcome:
    """The outcome of one input. Works in ``home``, and leaves it as it was."""

    def over(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with working_in(home):
            return KINDS[kind].run(random.Random(f"{seed}/{kind}/{number}"), home)
    except UserError as error:
        line = str(error)
        return Outcome(verdict="refused" if "\n" not in line else "traceback", said=line)
    except Different as error:
        return Outcome(verdict="different", said=str(error))
    except Hang:
        return Outcome(verdict="hang", said=traceback.format_exc()[-1500:])
    except BaseException:  # that is what is looked for
        return Outcome(verdict="traceback", said=traceback.format_exc()[-3000:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(kind: str, numbers: range, home: Path, log: Path, args: argparse.Namespace) -> None:
    """In a process of its own, which an input may kill."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    with log.open("a", encoding="utf-8") as stream, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        for number in numbers:
            outcome = one(kind, number, home, args.seed, args.limit)
            print(json.dumps([number, outcome.verdict, outcome.said]), file=stream, flush=True)


def campaign(kind: str, num: int, home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All inputs of one kind, begun anew behind each that kills its process."""
    log = home.parent / f"{kind}.log"
    started, done = time.perf_counter(), 0
    forks = multiprocessing.get_context("fork")
    outcomes: list[list[Any]] = []
    while done < num:
        process = forks.Process(target=work, args=(kind, range(done, num), home, log, args))
        process.start()
        seen, at = 0.0, -1
        while process.is_alive():
            process.join(1.0)
            now = log.stat().st_size if log.exists() else 0
            seen, at = (0.0, now) if now != at else (seen + 1, at)
            if seen > 3 * args.limit:
                process.kill()
        outcomes = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        done = len(outcomes)
        if done < num:
            verdict = "hang" if seen > 3 * args.limit else "traceback"
            with log.open("a", encoding="utf-8") as stream:
                print(json.dumps([done, verdict, f"the process ended with {process.exitcode}"]), file=stream)
            done += 1
    outcomes = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    counts = Counter(verdict for _, verdict, _ in outcomes)
    names = ("accepted", "refused", "traceback", "hang", "different")
    found: dict[str, Any] = {"inputs": len(outcomes), **{name: counts[name] for name in names}}
    found["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{kind:<12} " + "  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    found["faults"] = [
        {"input": number, "verdict": verdict, "said": said}
        for number, verdict, said in outcomes
        if verdict in names[2:]
    ]
    for fault in found["faults"][: args.show]:
        print(f"  {kind} {fault['input']}: {fault['verdict']}\n    " + fault["said"].strip().replace("\n", "\n    "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one input may take")
    parser.add_argument("--jobs", type=int, default=1, help="kinds at work at a time")
    parser.add_argument("--input", type=int, help="this input alone, in this process")
    parser.add_argument("--home", help="where the experiment is made, or lies already")
    parser.add_argument("--show", type=int, default=20, help="faults of each kind to print")
    parser.add_argument("--no-file", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(args.home).resolve() if args.home else Path(folder) / "home"
        if not (home / "experiments").is_dir():
            home.mkdir(parents=True, exist_ok=True)
            make_home(home)
        (home / "full.toml").write_text(dump_toml(load_config(home / "cmp.toml")), encoding="utf-8")
        if args.input is not None:
            print(one(args.only[0], args.input, home, args.seed, args.limit))
            return
        copies = {kind: Path(shutil.copytree(home, Path(folder) / kind / "home")) for kind in args.only}
        with ThreadPoolExecutor(args.jobs) as pool:
            waiting = {
                kind: pool.submit(campaign, kind, max(1, round(KINDS[kind].num * args.share)), copies[kind], args)
                for kind in sorted(args.only, key=list(KINDS).index, reverse=True)  # the slow ones first
            }
        kinds = {kind: waiting[kind].result() for kind in args.only}
    total = sum((Counter({k: v for k, v in one.items() if k != "faults"}) for one in kinds.values()), Counter())
    print("together     " + "  ".join(f"{name} {round(value, 1)}" for name, value in total.items()))
    if not args.no_file:
        save(args, kinds, dict(total))
    if total["traceback"] or total["hang"] or total["different"]:
        sys.exit("there are faults")


def save(args: argparse.Namespace, kinds: dict[str, Any], total: dict[str, Any]) -> None:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = {
        "date": date,
        "command": " ".join(["python benchmarks/fuzz.py", *sys.argv[1:]]),
        "seed": args.seed,
        "limit_s": args.limit,
        "together": total,
        "kinds": kinds,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "versions": versions(),
    }
    (RESULTS / f"fuzz-{date}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
