"""What noise telemetry and ``alpha = "auto"`` cost: ``train()`` with and without them, in turn, on one CPU thread.

    python benchmarks/telemetry.py [--pairs 5] [--quick] [--no-save]

One period of looks (25 optimizer steps, one look) on the model of benchmarks/trainer.py with 2 quads a step, where a look
takes all of them and costs most; and a whole short run of a tiny model, 32 steps of 16 quads with two looks. CPU seconds,
medians of the per-pair ratios. Results go to benchmarks/results/telemetry-DATE.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from peers import CONFIG_R, Ours, Shape, make_model, make_quads, scratch
from trainer import QUICK, RESULTS, interleaved

EVERY = 25
TINY = Shape(layers=2, hidden=64, inner=168, heads=4, vocab=64)
SIDES: dict[str, dict[str, Any]] = {
    "without": {"telemetry_steps": 0},
    "telemetry": {"telemetry_steps": EVERY},
    "auto": {"telemetry_steps": EVERY, "alpha_schedule": "auto"},
}


def compare(shape: Shape, pairs: int, *, batch: int, steps: int, **lengths: int) -> dict[str, Any]:
    model = make_model(shape)
    quads = make_quads(batch * 4, vocab=shape.vocab, seed=3, spread="uniform", **lengths)
    runs: dict[str, Callable[[], Any]] = {}
    for name, settings in SIDES.items():
        side = Ours(copy.deepcopy(model), quads, scratch(), quads_per_step=batch, max_steps=steps, **settings)
        runs[name] = side.prepare().train
    times = interleaved(runs, pairs)
    result: dict[str, Any] = {"quads_per_step": batch, "steps": steps, "looks": -(-steps // EVERY), "pairs": pairs}
    for name in ("telemetry", "auto"):
        ratios = sorted(a / b for a, b in zip(times[name], times["without"], strict=True))
        result[name] = {
            "median": round(statistics.median(ratios), 4),
            "range": [round(ratios[0], 4), round(ratios[-1], 4)],
        }
    return result | {"without_s": round(statistics.median(times["without"]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model: checks that the script runs")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    short = {"prompt": 10, "trace": 24, "empty": 7}
    results = {
        "one period, model of the trainer benchmark": compare(
            QUICK if options.quick else CONFIG_R, options.pairs, batch=2, steps=EVERY
        ),
        "a whole short run, tiny model": compare(TINY, options.pairs, batch=16, steps=32, **short),
    }
    today = datetime.date.today().isoformat()
    record = {
        "command": f"python benchmarks/telemetry.py --pairs {options.pairs}",
        "date": today,
        "machine": f"{platform.machine()}, 1 thread, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "results": results,
    }
    print(json.dumps(record, indent=1))
    if not (options.no_save or options.quick):
        (RESULTS / f"telemetry-{today}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
