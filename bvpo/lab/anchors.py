"""What a trace anchor does over a whole run: where the policy ends, and what the gradients are like there.

At the reference the KL anchor changes no gradient, and away from it the anchor is a bias: by the error of one gradient
(:mod:`bvpo.lab.tournament`) it can only lose. So this module trains, on worlds of which half the prompts have no pairs, and
looks at the end of the run: rewards, how far traces moved, on trained and on other prompts, and bias and variance of the
trace view there. In: a seed. Out: one table, with differences that are paired by world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bvpo.config import AnchorConfig
from bvpo.lab.catalog import DPO, world_of
from bvpo.lab.exact import views
from bvpo.lab.policies import EMPTY
from bvpo.lab.responses import State
from bvpo.lab.results import Findings, Table
from bvpo.lab.runs import Training, sgd
from bvpo.lab.worlds import World

LEARNING_RATE = 0.5
BASELINE = "joint, B = 8"


def methods() -> dict[str, Training]:
    """By name: alpha, anchor and batch."""

    def of(alpha: float, batch: int = 8, kind: str = "none", times: float = 0.0) -> Training:
        anchor = AnchorConfig(kind=kind, weight=times * DPO.beta)  # type: ignore[arg-type]
        return Training(loss=DPO, alpha=alpha, batch=batch, learning_rate=LEARNING_RATE, anchor=anchor)

    return {
        BASELINE: of(1.0),
        "joint, B = 12 (tokens of the mixture)": of(1.0, batch=12),
        "joint, B = 128 (little noise)": of(1.0, batch=128),
        "joint + 0.3 beta KL": of(1.0, kind="kl", times=0.3),
        "joint + 1 beta KL": of(1.0, kind="kl", times=1.0),
        "joint + 1 beta NLL": of(1.0, kind="nll", times=1.0),
        "mixed, alpha = 0.5": of(0.5),
        "mixed, alpha = 0.5, + 1 beta KL": of(0.5, kind="kl", times=1.0),
        "empty view": of(0.0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfRun:
    """``thinking`` and ``direct``: the teacher's mean reward of answers after a trace and after none, on trained prompts.
    ``trace_kl`` and ``other_kl``: KL(reference || policy) of the traces, on trained and on other prompts. ``bias`` =
    |b_t|^2 / |mu|^2 and ``variance`` = tr S_t / |mu|^2 of the joint estimator, without any anchor."""

    thinking: float
    direct: float
    loss: float
    trace_kl: float
    other_kl: float
    bias: float
    variance: float


COLUMNS = tuple(EndOfRun.__slots__)
_PAIRED = ("thinking", "direct", "trace_kl", "other_kl")


def look(world: World, theta: Tensor) -> EndOfRun:
    """Everything, exactly."""
    state, num = State(world=world, theta=theta), world.num_trained
    reference, probs = world.reference_probs, state.probs
    moved = (reference.traces.exp() * (reference.traces - probs.traces)).sum(1)
    found = views(state, DPO)
    return EndOfRun(
        thinking=float((probs.marginal.exp() * world.rewards)[:num].sum(1).mean()),
        direct=float((probs.answers[:, EMPTY].exp() * world.rewards)[:num].sum(1).mean()),
        loss=found.target.loss,
        trace_kl=float(moved[:num].mean()),
        other_kl=float(moved[num:].mean()),
        bias=found.moments.bias_trace_sq / found.target_sq,
        variance=found.moments.var_trace / found.target_sq,
    )


def run_anchors(seed: int, *, quick: bool) -> Findings:
    """Every method on the same worlds and quads' seeds."""
    num_worlds, steps = (2, 10) if quick else (8, 60)
    found: dict[str, list[EndOfRun]] = {"reference": []} | {name: [] for name in methods()}
    for number in range(num_worlds):
        world = replace(world_of("held-out transformer", seed + number), held_out=4)
        found["reference"].append(look(world, world.reference))
        for name, training in methods().items():
            end = sgd(world, world.reference, training, steps=steps, seed=seed + number)[-1]
            found[name].append(look(world, end))
    values = {name: torch.tensor([[getattr(e, c) for c in COLUMNS] for e in ends]) for name, ends in found.items()}
    return Findings(tables=(end_table(values, num_worlds, steps), paired_table(values, num_worlds)))


def end_table(values: dict[str, Tensor], num_worlds: int, steps: int) -> Table:
    return Table(
        title="What an anchor does over a run",
        note=f"{steps} SGD steps, of 8 quads where not said otherwise, at beta 0.1, T = 1; means over {num_worlds} random "
        "transformers, medians for the last two columns. Rewards are the teacher's, on prompts with pairs; other prompts "
        "have none. Bias and variance: of the joint estimator at the end of the run, over |mu|^2.",
        header=(
            "method", "Thinking reward", "NoThinking reward", "marginal loss", "trace KL", "trace KL, other prompts",
            "|b_t|^2", "tr S_t",
        ),
        rows=tuple(
            (name, *ends[:, :5].mean(0).tolist(), *ends[:, 5:].median(0).values.tolist())
            for name, ends in values.items()
        ),
    )  # fmt: skip


def paired_table(values: dict[str, Tensor], num_worlds: int) -> Table:
    places = [COLUMNS.index(name) for name in _PAIRED]
    rows = []
    for name, ends in values.items():
        if name in ("reference", BASELINE):
            continue
        gap = (ends - values[BASELINE])[:, places]
        error = gap.std(0) / num_worlds**0.5
        cells = (f"{m:+.3f} ± {e:.3f}" for m, e in zip(gap.mean(0).tolist(), error.tolist(), strict=True))
        rows.append((name, *cells))
    return Table(
        title=f"The same, minus {BASELINE} without an anchor",
        note="Paired by world; ± one standard error.",
        header=("method", "Thinking reward", "NoThinking reward", "trace KL", "trace KL, other prompts"),
        rows=tuple(rows),
    )
