"""Estimators of the trace view against one another, at equal tokens: alone, and mixed with the empty view at its best alpha.

In: a seed. Out: tables of the error of each estimator's gradient against mu, raw and after the best rescaling (which a tuned
learning rate, or Adam, does by itself), with its bias and variance. Everything is enumerated. What an anchor does over a
whole run is :mod:`bvpo.lab.anchors`' question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bvpo.config import LossConfig
from bvpo.lab.catalog import DPO, world_of
from bvpo.lab.exact import Estimate, estimate, moments
from bvpo.lab.responses import (
    Responses,
    State,
    answer,
    empty,
    importance,
    joint,
    marginal,
    per_token,
    with_kl_anchor,
    with_nll_anchor,
)
from bvpo.lab.results import Findings, Table
from bvpo.lab.runs import Training, sgd
from bvpo.method import estimators
from bvpo.method.estimators import best_rescaled

BUDGET = 32
"""The equal tokens: as many as this many quads of the joint estimator have in the trace view."""
NUM_WORLDS = 7
STEPS = 40
EMPTY_ALONE = "empty view alone"
_GRID = [step / 200 for step in range(201)]


def trace_estimators(beta: float, *, quick: bool) -> dict[str, Callable[[State], Responses]]:
    """By name. Anchor weights are multiples of beta, as in training."""
    found: dict[str, Callable[[State], Responses]] = {
        "joint": joint,
        "answer": answer,
        "per token": per_token,
        "2 traces, importance-weighted": lambda state: importance(state, 2),
    }
    if not quick:
        found["3 traces, importance-weighted"] = lambda state: importance(state, 3)
    for times in (0.3, 1.0, 3.0):
        found[f"joint + {times:g} beta NLL of the chosen trace"] = _anchored(with_nll_anchor, joint, times * beta)
    for times in (0.3, 1.0, 3.0):
        found[f"joint + {times:g} beta KL of the traces"] = _anchored(with_kl_anchor, joint, times * beta)
    found["answer + 1 beta KL of the traces"] = _anchored(with_kl_anchor, answer, beta)
    return found


def _anchored(
    anchor: Callable[[Responses, State, float], Responses], base: Callable[[State], Responses], weight: float
) -> Callable[[State], Responses]:
    return lambda state: anchor(base(state), state, weight)


def run_tournament(seed: int, *, quick: bool) -> Findings:
    """Every state in one world, then the summary over several."""
    tables = [
        tournament_table(where, compete(state, loss, quick=quick)) for where, state, loss in arena(seed, quick=quick)
    ]
    if not quick:
        tables += [summary(seed, steps) for steps in (0, STEPS)]
    return Findings(tables=tuple(tables))


def arena(seed: int, *, quick: bool) -> Iterator[tuple[str, State, LossConfig]]:
    """At the reference, and after training."""
    yield "small transformer, at the reference", state_after("small transformer", seed, 0, DPO), DPO
    yield "small tabular, at the reference", state_after("small tabular", seed, 0, DPO), DPO
    if not quick:
        yield f"small transformer, after {STEPS} steps", state_after("small transformer", seed, STEPS, DPO), DPO
        strong = LossConfig(beta=1.0)
        after = state_after("small transformer", seed, STEPS, strong)
        yield f"small transformer, beta 1, after {STEPS} steps", after, strong


def state_after(name: str, seed: int, steps: int, loss: LossConfig) -> State:
    """Traces from the reference at T = 1; plain SGD with alpha = 0.5 and 32 quads a step."""
    world = world_of(name, seed)
    training = Training(loss=loss, alpha=0.5, batch=32, learning_rate=0.3)
    return State(world=world, theta=sgd(world, world.reference, training, steps=steps, seed=seed)[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Errors in units of |mu|^2; ``rescaled`` after the best scale, for the mixture at its own best alpha."""

    name: str
    tokens: float
    bias: float
    variance: float
    alone: float
    alone_rescaled: float
    alpha: float
    mixed: float
    mixed_rescaled: float


def compete(state: State, loss: LossConfig, *, quick: bool) -> Iterator[Entry]:
    """Every estimator in one state."""
    target = estimate(state, marginal(state), state.world.trace_pairs, loss)
    empty_view = estimate(state, empty(state), state.world.empty_pairs, loss)
    budget = BUDGET * estimate(state, joint(state), state.world.trace_pairs, loss).tokens
    for name, build in trace_estimators(loss.beta, quick=quick).items():
        trace = estimate(state, build(state), state.world.trace_pairs, loss)
        yield entry_of(name, trace, empty_view, target, budget)
    yield entry_of(EMPTY_ALONE, empty_view, empty_view, target, budget)


def entry_of(name: str, trace: Estimate, empty_view: Estimate, target: Estimate, budget: float) -> Entry:
    """The errors at batches that cost ``budget`` tokens."""
    unit = float(target.mean @ target.mean)
    one_view = moments(trace, empty_view, target)
    alone = one_view.at_batch(budget / trace.tokens)
    both = one_view.at_batch(budget / (trace.tokens + empty_view.tokens))
    star = estimators.alpha_star(both)

    def rescaled(alpha: float, variance: float) -> float:
        mean = alpha * trace.mean + (1 - alpha) * empty_view.mean
        return best_rescaled(unit, float(mean @ mean), float(mean @ target.mean), variance)

    return Entry(
        name=name,
        tokens=trace.tokens,
        bias=one_view.bias_trace_sq / unit,
        variance=one_view.var_trace / unit,
        alone=estimators.mse(alone, 1.0) / unit,
        alone_rescaled=rescaled(1.0, alone.var_trace) / unit,
        alpha=star,
        mixed=estimators.mse(both, star) / unit,
        mixed_rescaled=min(rescaled(alpha, estimators.variance(both, alpha)) for alpha in _GRID) / unit,
    )


def tournament_table(where: str, entries: Iterable[Entry]) -> Table:
    rows = []
    for e in entries:
        mixed = ("-", "-", "-") if e.name == EMPTY_ALONE else (e.alpha, e.mixed, e.mixed_rescaled)
        rows.append((e.name, e.tokens, e.bias, e.variance, e.alone, e.alone_rescaled, *mixed))
    return Table(
        title=f"Estimators: {where}",
        note=f"Errors over |mu|^2, at the tokens of {BUDGET} joint quads. Tokens, |b|^2 and tr S are of one pair; "
        "'rescaled' is the error after the best scaling of the gradient. Mixed: with the empty view, at alpha* (raw) and at "
        "the best alpha (rescaled).",
        header=(
            "estimator", "tokens", "|b|^2", "tr S", "MSE", "rescaled", "alpha*", "MSE mixed", "rescaled mixed",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def summary(seed: int, steps: int) -> Table:
    """Each estimator's errors over those of the joint one alone, in several random transformers."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for number in range(NUM_WORLDS):
        entries = list(compete(state_after("small transformer", seed + number, steps, DPO), DPO, quick=False))
        base = entries[0]
        for e in entries:
            ratios = [e.alone / base.alone, e.alone_rescaled / base.alone_rescaled]
            if e.name != EMPTY_ALONE:
                ratios += [e.mixed / base.alone, e.mixed_rescaled / base.alone_rescaled]
            found.setdefault(e.name, []).append(tuple(ratios))
    rows = []
    for name, every in found.items():
        columns = [sorted(column) for column in zip(*every, strict=True)]
        cells = [f"{column[len(column) // 2]:.2f} [{column[0]:.2f}, {column[-1]:.2f}]" for column in columns]
        rows.append((name, *cells, *["-"] * (4 - len(cells))))
    where = f"after {steps} steps" if steps else "at the reference"
    return Table(
        title=f"Estimators over {NUM_WORLDS} small transformers, {where}",
        note="Errors at equal tokens over the joint estimator's alone: median [smallest, largest]. Below 1 is better.",
        header=("estimator", "MSE", "rescaled", "MSE mixed", "rescaled mixed"),
        rows=tuple(rows),
    )
