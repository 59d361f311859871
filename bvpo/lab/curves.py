"""Curves of the exact error: against alpha, against the batch, with the distance from the reference, and along training.

In: a seed. Out: plots, in units of |mu|^2 where they are errors. All on the transformer at the paper's temperature, 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bvpo.config import LossConfig
from bvpo.lab.catalog import DPO, PAPER_SAMPLING, world_of
from bvpo.lab.exact import Views, views
from bvpo.lab.responses import State
from bvpo.lab.results import Findings, Line, Plot
from bvpo.lab.runs import Training, sgd
from bvpo.lab.worlds import World, drifted
from bvpo.method import estimators

BATCHES = tuple(2**power for power in range(12))
ALPHAS = np.linspace(0, 1, 101)


def draw_curves(seed: int, *, quick: bool) -> Findings:
    """All plots."""
    world = world_of("small transformer" if quick else "transformer", seed, sampling=PAPER_SAMPLING)
    start = views(State(world=world, theta=world.reference), DPO)
    drifts = [0.0, 0.1, 0.2] if quick else [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4]
    away = {sigma: start if sigma == 0 else drift_views(world, sigma, seed) for sigma in drifts}
    trained = {beta: along_training(world, beta, seed, quick=quick) for beta in (0.1, 1.0)}
    return Findings(
        plots=(
            error_against_alpha(start, "at the reference"),
            error_against_alpha(trained[0.1][-1][1], f"after {trained[0.1][-1][0]} steps of training"),
            error_against_batch(start),
            alpha_along_training(trained),
            alpha_against_batch(away, trained[0.1][-1]),
            alpha_against_drift(away),
        )
    )


def drift_views(world: World, sigma: float, seed: int) -> Views:
    return views(State(world=world, theta=drifted(world, sigma, seed + 1)), DPO)


def along_training(world: World, beta: float, seed: int, *, quick: bool) -> list[tuple[int, Views]]:
    """Exact views at some steps of an SGD run with alpha = 0.5, B = 32."""
    loss = LossConfig(beta=beta)
    steps = [0, 10, 20] if quick else [0, 5, 10, 20, 30, 40, 60, 80]
    training = Training(loss=loss, alpha=0.5, batch=32, learning_rate=0.3)
    points = sgd(world, world.reference, training, steps=steps[-1], seed=seed)
    return [(step, views(State(world=world, theta=points[step]), loss)) for step in steps]


def error_against_alpha(found: Views, where: str) -> Plot:
    lines = []
    for batch in (8, 32, 128, 512):
        m = found.moments.at_batch(batch)
        errors = estimators.mse(m, ALPHAS) / found.target_sq
        best = (estimators.alpha_star(m), estimators.error_floor(m) / found.target_sq)
        lines.append(Line(label=f"B = {batch}", x=tuple(ALPHAS.tolist()), y=tuple(errors.tolist()), mark=best))
    return Plot(
        title=f"Error of the mixed gradient against alpha, {where}",
        caption="E|g_c - mu|^2 over |mu|^2, exact; the marks are alpha* of Theorem 2 and the error floor there.",
        x_label="alpha",
        y_label="E|g_c − μ|² / |μ|²",
        lines=tuple(lines),
        log_y=True,
    )


def error_against_batch(found: Views) -> Plot:
    def errors(alpha_of: object) -> tuple[float, ...]:
        values = []
        for batch in BATCHES:
            m = found.moments.at_batch(batch)
            alpha = estimators.alpha_star(m) if alpha_of == "best" else float(alpha_of)  # type: ignore[arg-type]
            values.append(estimators.mse(m, alpha) / found.target_sq)
        return tuple(values)

    labels = {"alpha* (the floor)": "best", "alpha = 0.5": 0.5, "alpha = 1 (trace)": 1.0, "alpha = 0 (empty)": 0.0}
    return Plot(
        title="The error floor by batch, at the reference",
        caption="The smallest error of any mixture, and the error at the paper's alpha and of each view alone.",
        x_label="quads per step",
        y_label="E|g_c − μ|² / |μ|²",
        lines=tuple(Line(label=label, x=BATCHES, y=errors(kind)) for label, kind in labels.items()),
        log_x=True,
        log_y=True,
    )


def alpha_along_training(trained: dict[float, list[tuple[int, Views]]]) -> Plot:
    lines = []
    for beta, points in trained.items():
        for batch in (32, 512):
            stars = tuple(estimators.alpha_star(found.moments.at_batch(batch)) for _, found in points)
            steps = tuple(float(step) for step, _ in points)
            lines.append(Line(label=f"beta {beta:g}, B = {batch}", x=steps, y=stars))
    return Plot(
        title="alpha* along training",
        caption="SGD at alpha = 0.5 with 32 quads a step; alpha* of the exact moments at visited points, for two batches.",
        x_label="step",
        y_label="α*",
        lines=tuple(lines),
    )


def alpha_against_batch(away: dict[float, Views], trained: tuple[int, Views]) -> Plot:
    chosen: dict[str, Views] = {
        f"drift {sigma:g}": away[sigma] for sigma in sorted(away)[:: max(1, len(away) // 2)][:3]
    }
    chosen[f"after {trained[0]} steps"] = trained[1]
    lines = tuple(
        Line(label=label, x=BATCHES, y=tuple(estimators.alpha_star(f.moments.at_batch(b)) for b in BATCHES))
        for label, f in chosen.items()
    )
    return Plot(
        title="alpha* against the batch size",
        caption="Covariances shrink with the batch and biases do not: here, the larger the batch, the more weight for the "
        "trace view. Drift is normal noise of this standard deviation on every parameter of the reference.",
        x_label="quads per step",
        y_label="α*",
        lines=lines,
        log_x=True,
    )


def alpha_against_drift(away: dict[float, Views]) -> Plot:
    sigmas: Sequence[float] = sorted(away)
    lines = tuple(
        Line(
            label=f"B = {batch}",
            x=tuple(sigmas),
            y=tuple(estimators.alpha_star(away[sigma].moments.at_batch(batch)) for sigma in sigmas),
        )
        for batch in (1, 32, 128, 512)
    )
    return Plot(
        title="alpha* with the distance from the reference",
        caption="The same world, pushed away from the reference by random noise on its parameters.",
        x_label="drift (standard deviation of the noise)",
        y_label="α*",
        lines=lines,
    )
