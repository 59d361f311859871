"""How good ``alpha = "auto"`` is where the best alpha is known: the exact worlds of ``bvpo lab``.

    python benchmarks/auto_alpha.py [--quick] [--no-save]

Three questions, each answered by the regret, the gradient's mean squared error over the smallest possible one: how many
looks it takes near the reference; how far from the reference the rule holds; and what sampling at other temperatures does
to it. Results go to benchmarks/results/auto-alpha-DATE.json; docs/auto-alpha.md quotes them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.lab.catalog import world_of
from bvpo.lab.exact import views
from bvpo.lab.online import estimated, log_ratio, population
from bvpo.lab.responses import State
from bvpo.lab.runs import Training, sgd
from bvpo.lab.worlds import Sampling, drifted
from bvpo.method import estimators
from bvpo.method.estimators import Moments
from bvpo.method.online_alpha import MOST_DRIFT, MOST_REWARD_DRIFT
from bvpo.training.probe.sketching import CountSketch

RESULTS = Path(__file__).resolve().parent / "results"
BATCHES = (32, 128, 512)
WORLDS = ("tabular", "transformer")
SIGMAS = {"tabular": (0.0, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5), "transformer": (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5)}
RATES = {("tabular", 0.1): 20.0, ("transformer", 0.1): 3.0, ("tabular", 1.0): 2.0, ("transformer", 1.0): 0.3}
SAMPLINGS = {
    "T = 1": Sampling(),
    "T = 0.8": Sampling(temperature=0.8),
    "T = 0.6": Sampling(temperature=0.6),
    "T = 1, top_p = 0.9": Sampling(top_p=0.9),
}


def summary(regrets: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(regrets)), 3), "max": round(float(np.max(regrets)), 3)}


def looks(seeds: int) -> list[dict[str, Any]]:
    """At the reference and after 10 steps of training: regret by the number of looks, beside fixed alphas."""
    rows = []
    for batch, look in ((32, 16), (128, 32)):
        counts, fixed = {4: [], 8: [], 16: [], 30: []}, {0.0: [], 0.5: [], 1.0: []}
        for name, seed, trained in itertools.product(WORLDS, range(seeds), (False, True)):
            state = start(name, seed, trained)
            moments = views(state, LossConfig(beta=0.1)).moments.at_batch(batch)
            for run in range(2):
                found = estimated(
                    state, LossConfig(beta=0.1), batch=batch, look=look, seed=100 * run + seed, compress=sketched
                )
                for number, online in enumerate(itertools.islice(found, max(counts)), start=1):
                    if number in counts:
                        counts[number].append(estimators.regret(moments, online.estimate or 0.0))
            for alpha, regrets in fixed.items():
                regrets.append(estimators.regret(moments, alpha))
        rows += [
            {"quads_per_step": batch, "rule": f"auto, {n} looks of {look} quads"} | summary(r)
            for n, r in counts.items()
        ]
        rows += [{"quads_per_step": batch, "rule": f"alpha {alpha:g}"} | summary(r) for alpha, r in fixed.items()]
    return rows


def start(name: str, seed: int, trained: bool) -> State:
    world = world_of(name, seed)
    if not trained:
        return State(world=world, theta=world.reference)
    rate = 5.0 if name == "tabular" else 0.5
    training = Training(loss=LossConfig(beta=0.1), alpha=0.5, batch=32, learning_rate=rate)
    return State(world=world, theta=sgd(world, world.reference, training, steps=10, seed=seed)[-1])


def sketched(number: int, gradients: Tensor) -> Tensor:
    sketch = CountSketch((7, number), torch.device("cpu"), torch.float64)
    return torch.stack([sketch([one]) for one in gradients])


def places(seeds: int) -> Iterator[tuple[State, float]]:
    """(state, beta): random drift of all sizes, and points of training runs."""
    for name, seed in itertools.product(WORLDS, range(seeds)):
        world = world_of(name, seed)
        for sigma in SIGMAS[name]:
            state = State(world=world, theta=drifted(world, sigma, seed + 50))
            yield from ((state, beta) for beta in (0.01, 0.1, 0.3, 1.0))
        for beta in (0.1, 1.0):
            training = Training(loss=LossConfig(beta=beta), alpha=0.5, batch=32, learning_rate=RATES[name, beta])
            points = sgd(world, world.reference, training, steps=80, seed=seed)
            yield from ((State(world=world, theta=points[k]), beta) for k in (5, 10, 20, 40, 80))


def neighbourhood(seeds: int) -> list[dict[str, Any]]:
    """The rule without noise against 0.5, in bands of drift."""
    found: list[tuple[float, float, Moments]] = []
    for state, beta in places(seeds):
        found.append((log_ratio(state), beta, views(state, LossConfig(beta=beta)).moments))
    bands = {
        "|log-ratio| <= 3 nats and beta |log-ratio| <= 0.1": lambda d, b: d <= MOST_DRIFT and b * d <= 0.1,
        "... <= 0.3 (the neighbourhood)": lambda d, b: d <= MOST_DRIFT and 0.1 < b * d <= MOST_REWARD_DRIFT,
        "... <= 0.6": lambda d, b: d <= MOST_DRIFT and MOST_REWARD_DRIFT < b * d <= 0.6,
        "further": lambda d, b: d > MOST_DRIFT or b * d > 0.6,
    }
    rows = []
    for name, inside in bands.items():
        those = [moments for drift, beta, moments in found if inside(drift, beta)]
        for batch in BATCHES:
            there = [moments.at_batch(batch) for moments in those]
            rows.append(
                {
                    "drift": name,
                    "states": len(those),
                    "quads_per_step": batch,
                    "auto": summary([estimators.regret(m, population(m)) for m in there]),
                    "half": summary([estimators.regret(m, 0.5) for m in there]),
                }
            )
    return rows


def temperatures(seeds: int) -> list[dict[str, Any]]:
    """At the reference, traces sampled in other ways; 128 quads a step."""
    rows = []
    for name, sampling in SAMPLINGS.items():
        bias, off, regrets = [], [], []
        for policy, seed in itertools.product(WORLDS, range(seeds)):
            world = world_of(policy, seed, sampling=sampling)
            found = views(State(world=world, theta=world.reference), LossConfig(beta=0.1))
            moments = found.moments.at_batch(128)
            bias.append(moments.bias_trace_sq / found.target_sq)
            off.append(population(moments) - estimators.alpha_star(moments))
            regrets.append(estimators.regret(moments, population(moments)))
        rows.append(
            {"sampling": name, "bias": round(float(np.mean(bias)), 3), "alpha_off": round(float(np.mean(off)), 3)}
            | summary(regrets)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed: checks that the script runs")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    seeds = 1 if options.quick else 4
    today = datetime.date.today().isoformat()
    record = {
        "command": "python benchmarks/auto_alpha.py",
        "date": today,
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "looks": looks(seeds),
        "neighbourhood": neighbourhood(min(seeds, 3)),
        "temperatures": temperatures(seeds),
    }
    print(json.dumps(record, indent=1))
    if not (options.no_save or options.quick):
        (RESULTS / f"auto-alpha-{today}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
