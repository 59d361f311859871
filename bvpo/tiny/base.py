"""Makes a base: the trained model, its tokenizer, preference prompts and a benchmark, in one folder.

In: the settings and an empty folder. Out: a Hugging Face model folder with ``prompts.jsonl``, ``benchmark.jsonl`` and
``tiny.json`` in it. The same settings, code and libraries give the same bytes: no clock, no path, no host name goes in.
Where the folder lies, and whether it must be made at all, is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bvpo.config import TinyConfig
from bvpo.strict import UserError
from bvpo.tiny import sft
from bvpo.tiny.measure import measure_base
from bvpo.tiny.tasks import STYLES, TASKS, UNITS, Ask, draw_ask
from bvpo.tiny.vocabulary import make_tokenizer

DESCRIPTION = "tiny.json"
_MEASURED = 200  # prompts of each kind that the base is measured on
_SURE_TO_EXIST = 0.5  # most of all different prompts that may be asked for, so that drawing them ends soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The prompts to align on, others to tune on, and the benchmark problems; the latter are in no prompt and in no training
    example."""

    prompts: tuple[Ask, ...]
    tuning: tuple[Ask, ...]
    benchmark: tuple[Ask, ...]

    @property
    def held_out(self) -> frozenset[tuple[str, ...]]:
        return frozenset(ask.problem.words for ask in self.benchmark)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What training takes: parameters of the model, tokens of all steps."""

    parameters: int
    tokens: int


def draw_material(tiny: TinyConfig) -> Material:
    """All different: benchmark items by their problem, prompts by their text."""
    rng = random.Random(f"bvpo-tiny-material-{tiny.seed}")
    sizes, lengths = sft.sizes_of(tiny), (tiny.benchmark_min, tiny.benchmark_max)
    problems = sum(TASKS[task].count(n, sizes) for task in tiny.tasks for n in range(lengths[0], lengths[1] + 1))
    _require(tiny.num_benchmark, "num_benchmark", problems, "problems of these lengths")
    benchmark: dict[tuple[str, ...], Ask] = {}
    while len(benchmark) < tiny.num_benchmark:
        ask = draw_ask(rng, tiny.tasks, lengths, sizes, styled=False)
        benchmark.setdefault(ask.problem.words, ask)
    lengths = (tiny.chain_min, tiny.chain_max)
    problems = sum(TASKS[task].count(n, sizes) for task in tiny.tasks for n in range(lengths[0], lengths[1] + 1))
    texts = (problems - tiny.num_benchmark) * len(UNITS) * (1 + len(STYLES))
    wanted = tiny.num_prompts + tiny.num_tuning
    _require(wanted, "num_prompts and tiny.num_tuning", texts, "prompts of these lengths")
    prompts: dict[str, Ask] = {}
    while len(prompts) < wanted:
        ask = draw_ask(rng, tiny.tasks, lengths, sizes, styled=True)
        if ask.problem.words not in benchmark:
            prompts.setdefault(ask.text, ask)
    asks = tuple(prompts.values())
    return Material(
        prompts=asks[: tiny.num_prompts], tuning=asks[tiny.num_prompts :], benchmark=tuple(benchmark.values())
    )


def _require(wanted: int, name: str, there: int, what: str) -> None:
    most = int(_SURE_TO_EXIST * max(0, there))
    if wanted > most:
        raise UserError(f"tiny.{name}: got {wanted:,}, expected at most {most:,}, half of all different {what}")


def tokenizer_of(tiny: TinyConfig) -> Any:
    return make_tokenizer(tiny.modulus, tiny.cups, max(tiny.chain_max, tiny.sft_chain_max, tiny.benchmark_max))


def estimate(tiny: TinyConfig) -> Cost:
    """The cost of training, from a few hundred examples and a model without memory."""
    tokenizer = tokenizer_of(tiny)
    with torch.device("meta"):
        model = sft.new_model(tiny, tokenizer)
    rng = random.Random(tiny.seed)
    examples = itertools.islice(sft.draw_examples(tiny, tokenizer, rng, frozenset()), 500)
    mean = sum(len(example.ids) for example in examples) / 500
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()), tokens=round(mean * tiny.batch_size * tiny.steps)
    )


def make_base(folder: Path, tiny: TinyConfig, material: Material, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, writes all files into ``folder``, measures, and returns what ``tiny.json`` says."""
    tokenizer = tokenizer_of(tiny)
    model = sft.train(tiny, tokenizer, material.held_out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_rows(folder / "prompts.jsonl", _rows("prompt", material.prompts))
    _write_rows(folder / "tuning.jsonl", _rows("tuning", material.tuning))
    benchmark = zip(_rows("benchmark", material.benchmark), material.benchmark, strict=True)
    _write_rows(folder / "benchmark.jsonl", ({**row, "reference": ask.problem.result} for row, ask in benchmark))
    measured = measure_base(folder, material.prompts[:_MEASURED], material.benchmark[:_MEASURED])
    files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    parameters = sum(p.numel() for p in model.parameters())
    said = {**identity, "parameters": parameters, "measured": measured, "files": files}
    (folder / DESCRIPTION).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return said


def _rows(name: str, asks: Sequence[Ask]) -> Iterator[dict[str, Any]]:
    for number, ask in enumerate(asks):
        yield {"id": f"{name}-{number:05d}", "messages": [{"role": "user", "content": ask.text}]}


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
