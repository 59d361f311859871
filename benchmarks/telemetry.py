"""What noise telemetry (and with it ``alpha = "auto"``, whose looks are the same) costs, on one CPU thread.

    python benchmarks/telemetry.py [--pairs 7] [--quick] [--no-save]

A step with a look and a step without, in turn, on the model of benchmarks/trainer.py with 2 quads a step (where a look takes
all of them and costs most) and with 8, and on a tiny model with 16, whose short run of 32 steps is timed as a whole as well
(such a run's noise exceeds a look). CPU seconds, medians of the per-pair ratios. Results go to
benchmarks/results/telemetry-DATE.json.
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

from bvpo.training.arguments import BVPOConfig

EVERY = BVPOConfig.telemetry_steps
TINY = Shape(layers=2, hidden=64, inner=168, heads=4, vocab=64)


def one_step(shape: Shape, pairs: int, *, batch: int, **lengths: int) -> dict[str, Any]:
    """A look in steps, and what that is of a period of looks."""
    quads = make_quads(batch, vocab=shape.vocab, seed=3, spread="uniform", **lengths)
    side = Ours(make_model(shape), quads, scratch(), quads_per_step=batch, telemetry_steps=EVERY).prepare()

    def step(look: bool) -> Callable[[], Any]:
        def run() -> None:
            side.trainer.is_in_train = look  # looks belong to runs; step 0 is due for one
            side.step()
            assert bool(side.trainer.telemetry.report()) == look

        return run

    times = interleaved({"without": step(False), "with": step(True)}, pairs)
    looks = sorted(a / b - 1 for a, b in zip(times["with"], times["without"], strict=True))
    look = statistics.median(looks)
    return {
        "quads_per_step": batch,
        "pairs": pairs,
        "look_in_steps": round(look, 3),
        "range": [round(looks[0], 3), round(looks[-1], 3)],
        "every": EVERY,
        "amortised": round(look / EVERY, 4),
        "step_s": round(statistics.median(times["without"]), 3),
    }


def whole_run(shape: Shape, pairs: int, *, batch: int, steps: int, **lengths: int) -> dict[str, Any]:
    """``train()`` with and without looks."""
    model, runs = make_model(shape), {}
    quads = make_quads(batch * 4, vocab=shape.vocab, seed=3, spread="uniform", **lengths)
    for name, every in (("without", 0), ("with", EVERY)):
        settings = {"quads_per_step": batch, "max_steps": steps, "telemetry_steps": every}
        runs[name] = Ours(copy.deepcopy(model), quads, scratch(), **settings).prepare().train
    times = interleaved(runs, pairs)
    ratios = sorted(a / b for a, b in zip(times["with"], times["without"], strict=True))
    return {
        "quads_per_step": batch,
        "steps": steps,
        "looks": -(-steps // EVERY),
        "pairs": pairs,
        "with_over_without": round(statistics.median(ratios), 4),
        "range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "run_s": round(statistics.median(times["without"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small model: checks that the script runs")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = QUICK if options.quick else CONFIG_R
    short = {"prompt": 10, "trace": 24, "empty": 7}
    results = {
        "a step of 2 quads": one_step(shape, options.pairs, batch=2),
        "a step of 8 quads": one_step(shape, options.pairs, batch=8),
        "a step of 16 quads, tiny model": one_step(TINY, 8 * options.pairs, batch=16, **short),
        "a whole short run, tiny model": whole_run(TINY, options.pairs, batch=16, steps=32, **short),
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
