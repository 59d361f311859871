"""Theorem 3 of BVPO: both forms of the bound on SGD, in one exact step (eq. 14) and along runs, alpha fixed or adaptive.

    eq. 3:  mean_k |grad L|^2 <= 2 (L_0 - L_K) / (K eta) + mean_k (|Bias_k|^2 + eta L Var_k),   eta <= 1 / L
    eq. 4:  mean_k |grad L|^2 <= 2 (L_0 - L*) / (K eta) + B_c^2 + eta L sigma_c^2
In: a seed. Out: verdicts and tables. Runs are averaged over seeds; docs/lab.md says how L, L*, B_c and sigma_c are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.lab.catalog import DPO, PAPER_SAMPLING, world_of
from bvpo.lab.exact import views
from bvpo.lab.policies import Tabular
from bvpo.lab.responses import State
from bvpo.lab.results import Findings, Table, Verdict
from bvpo.lab.runs import Training, marginal_gradient, marginal_loss, quad_gradients, sgd
from bvpo.lab.theorems import BOUNDARY_SEEDS, raw_step
from bvpo.lab.worlds import Sampling, World, drifted
from bvpo.method import estimators
from bvpo.method.estimators import Moments

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ETA_LS = (0.1, 0.25, 0.5, 1.0)


def check_descent(seed: int, *, quick: bool) -> Findings:
    """All of this module."""
    steps, runs = (8, 2) if quick else (25, 3)
    cells = [measure(cell) for cell in grid(seed, steps=steps, runs=runs)]
    single, chosen = [measure(cell) for cell in one_term(seed)], [measure(cell) for cell in adaptive(seed, steps, runs)]
    verdicts = (
        one_step(seed),
        *both_forms(cells, "grid", f"along SGD runs, proven L; largest of {len(cells)} cells of alpha and eta L"),
        *both_forms(single, "one_term", f"where one of the three terms decides; largest of {len(single)}"),
        *adaptive_verdicts(chosen),
    )
    tables = (grid_table([*cells, *chosen]), one_term_table(single))
    if quick:
        return Findings(verdicts=verdicts, tables=tables)
    return Findings(
        verdicts=(*verdicts, in_the_transformer(transformer_runs(seed))), tables=(*tables, one_step_table(seed))
    )


# --- one step, exactly -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class OneStep:
    """A world in which the step from ``theta`` is enumerated: both views' gradient of every quad, and probabilities."""

    world: World
    theta: Tensor
    loss: LossConfig
    trace: Tensor
    empty: Tensor
    prob: Tensor
    smoothness: float

    @classmethod
    def of(cls, seed: int, sigma: float, loss: LossConfig) -> OneStep:
        world = world_of("tiny tabular", seed, sampling=PAPER_SAMPLING)
        theta = drifted(world, sigma, seed + 1)
        quads, prob = world.every_quad()
        trace, empty = (quad_gradients(world, theta, quads, loss, alpha) for alpha in (1.0, 0.0))
        assert isinstance(world.policy, Tabular)
        smoothness = world.policy.smoothness(loss.beta)
        return cls(
            world=world, theta=theta, loss=loss, trace=trace, empty=empty, prob=prob, smoothness=smoothness
        )  # fmt: skip

    def expected_loss(self, alpha: float, eta_l: float) -> float:
        """E L(theta - eta g_c) over every quad, a batch of one."""
        after = self.theta - eta_l / self.smoothness * (alpha * self.trace + (1 - alpha) * self.empty)
        losses = torch.func.vmap(lambda theta: marginal_loss(self.world, theta, self.loss))(after)
        return float(self.prob @ losses)

    def bound(self, alpha: float, eta_l: float) -> float:
        """L - eta/2 |grad L|^2 + eta/2 (|Bias|^2 + eta L Var): one step of Theorem 3."""
        target = marginal_gradient(self.world, self.theta, self.loss)
        mixed = alpha * self.trace + (1 - alpha) * self.empty
        mean = self.prob @ mixed
        term = float((mean - target).square().sum() + eta_l * (self.prob @ (mixed - mean).square().sum(1)))
        now = float(marginal_loss(self.world, self.theta, self.loss))
        return now + eta_l / self.smoothness / 2 * (term - float(target @ target))


def one_step(seed: int) -> Verdict:
    """E L(theta') <= L - eta/2 |grad L|^2 + eta/2 (|Bias|^2 + eta L Var), for every alpha and eta <= 1 / L."""
    worst, count = -torch.inf, 0
    for beta in (0.1, 1.0):
        for sigma in (0.0, 0.5):
            step = OneStep.of(seed, sigma, LossConfig(beta=beta))
            for alpha in ALPHAS:
                for eta_l in ETA_LS:
                    worst = max(worst, step.expected_loss(alpha, eta_l) - step.bound(alpha, eta_l))
                    count += 1
    return Verdict(
        key="theorem_3_one_step",
        statement="Theorem 3, eq. 14",
        checked="one step of the descent: E L(theta - eta g_c) <= L - eta/2 |grad L|^2 + eta/2 (|Bias|^2 + eta L Var), "
        f"over every quad, with a proven L; largest left minus right of {count}",
        value=worst,
        bound=0.0,
    )


def one_step_table(seed: int) -> Table:
    """Which alpha the loss itself prefers after one step, beside what the bound prefers."""
    rows = []
    for beta, sigma in ((0.1, 0.0), (1.0, 0.0), (1.0, 0.5)):
        step = OneStep.of(seed, sigma, LossConfig(beta=beta))
        m = views(State(world=step.world, theta=step.theta), step.loss).moments
        for eta_l in ETA_LS:
            losses = {a / 20: step.expected_loss(a / 20, eta_l) for a in range(21)}
            best = min(losses, key=losses.__getitem__)
            rows.append(
                (beta, sigma, eta_l, best, estimators.alpha_star_step(m, eta_l=eta_l), estimators.alpha_star(m))
            )
    return Table(
        title="One step, enumerated: the alpha that lowers the loss most",
        note="A batch of one quad in the tiny tabular world. The bound's own optimum need not be the loss's: it gives away "
        "that the trace view's mean points along the gradient, and takes the largest curvature for every direction.",
        header=("beta", "drift", "eta L", "best for the loss (to 0.05)", "per-step optimum", "alpha* (MSE)"),
        rows=tuple(rows),
    )


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cell:
    """SGD runs from ``start`` (the reference if ``None``). ``alpha`` ``None``: the best for the per-step term, at each
    iterate. ``batch`` ``None``: endless, without noise."""

    name: str
    world: World
    alpha: float | None
    eta_l: float
    smoothness: float
    steps: int
    runs: int
    seed: int
    loss: LossConfig = DPO
    batch: int | None = 8
    start: Tensor | None = None

    @property
    def eta(self) -> float:
        return self.eta_l / self.smoothness


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Iterate:
    """One visited point: |mu|^2, the moments and the alpha there, without the enumeration, of which memory holds few.

    ``term``: in adaptive runs the per-step term by alpha, from raw second moments instead of the closed forms that chose
    alpha_k*.
    """

    target_sq: float
    moments: Moments
    alpha: float
    term: Callable[[float], float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Theorem 3 for one cell, averaged over runs: the left side, the marginal loss at both ends, and what was visited."""

    cell: Cell
    left: float
    first: float
    last: float
    iterates: tuple[Iterate, ...] = field(repr=False)

    @property
    def progress(self) -> float:
        return self.first - self.last

    @property
    def right(self) -> float:
        return descent_bound(self.cell, self.progress, self.iterates)

    @property
    def uniform(self) -> tuple[float, float, float]:
        return uniform_bound(self.cell, self.first - least_loss(self.cell.world), self.iterates)

    @property
    def ratio(self) -> float:
        return _over(self.left, self.right)

    @property
    def uniform_ratio(self) -> float:
        return _over(self.left, sum(self.uniform))


def _over(left: float, right: float) -> float:
    """A bound that is not above zero bounds no square."""
    return left / right if right > 0 else torch.inf


def measure(cell: Cell) -> Measured:
    """SGD through the shipped losses, every point analysed exactly."""
    start = cell.world.reference if cell.start is None else cell.start
    first = float(marginal_loss(cell.world, start, cell.loss))
    visited: list[Iterate] = []
    last = 0.0

    def visit(theta: Tensor) -> float:
        visited.append(_look(cell, theta))
        return visited[-1].alpha

    # alpha is what visit says
    training = Training(loss=cell.loss, alpha=0.0, batch=cell.batch or 0, learning_rate=cell.eta)
    for run in range(cell.runs):
        end = sgd(
            cell.world, start, training, steps=cell.steps, seed=cell.seed + run, alpha_of=visit,
            endless=cell.batch is None,
        )[-1]  # fmt: skip
        last += float(marginal_loss(cell.world, end, cell.loss)) / cell.runs
    return Measured(
        cell=cell,
        left=sum(one.target_sq for one in visited) / len(visited),
        first=first,
        last=last,
        iterates=tuple(visited),
    )


def _look(cell: Cell, theta: Tensor) -> Iterate:
    found = views(State(world=cell.world, theta=theta), cell.loss)
    m = found.moments.scale_covariances(0.0) if cell.batch is None else found.moments.at_batch(cell.batch)
    alpha = estimators.alpha_star_step(m, eta_l=cell.eta_l) if cell.alpha is None else cell.alpha
    term = raw_step(found, cell.batch, cell.eta_l) if cell.alpha is None and cell.batch else None
    return Iterate(target_sq=found.target_sq, moments=m, alpha=alpha, term=term)


def descent_bound(cell: Cell, progress: float, visited: Sequence[Iterate]) -> float:
    """Right side of eq. 3: 2 (L_0 - E L_K) / (K eta) + mean_k (|Bias_k|^2 + eta L Var_k)."""
    terms = [estimators.step_term(one.moments, one.alpha, eta_l=cell.eta_l) for one in visited]
    return 2 * progress / (cell.steps * cell.eta) + sum(terms) / len(terms)


def uniform_bound(cell: Cell, distance: float, visited: Sequence[Iterate]) -> tuple[float, float, float]:
    """Right side of eq. 4, term by term: 2 (L_0 - L*) / (K eta), B_c^2, eta L sigma_c^2; the largest visited values."""
    biases = [estimators.bias_sq(one.moments, one.alpha) for one in visited]
    variances = [estimators.variance(one.moments, one.alpha) for one in visited]
    return 2 * distance / (cell.steps * cell.eta), max(biases), cell.eta_l * max(variances)


def least_loss(world: World) -> float:
    """L* of the marginal DPO loss, a lower bound for every policy and beta, and the infimum for a table.

    Given which two answers a pair has, the teacher prefers with probability sigmoid(r_w - r_l), and a log-loss is least at
    the true probability (Gibbs): where beta times the log-ratios differ like the rewards.
    """
    chosen, rejected = world.pair_index
    return float((world.trace_pairs * F.softplus(world.rewards[:, rejected] - world.rewards[:, chosen])).sum())


def proven_smoothness(world: World, beta: float) -> float:
    assert isinstance(world.policy, Tabular)
    return world.policy.smoothness(beta)


def grid(seed: int, *, steps: int, runs: int) -> Iterator[Cell]:
    """Every cell; the same quads in each run's every cell."""
    world = world_of("small tabular", seed, sampling=PAPER_SAMPLING)
    proven = proven_smoothness(world, DPO.beta)
    for alpha in ALPHAS:
        for eta_l in ETA_LS:
            yield Cell(
                name="small tabular", world=world, alpha=alpha, eta_l=eta_l, smoothness=proven, steps=steps, runs=runs,
                seed=seed,
            )  # fmt: skip


def one_term(seed: int) -> Iterator[Cell]:
    """Runs in which the bound is nearly reached, by one term each: leave that term out, and it is broken."""
    loss, world = LossConfig(beta=4.0), world_of("two traces", seed)
    common = {"eta_l": 1.0, "smoothness": proven_smoothness(world, loss.beta), "seed": seed, "loss": loss}
    yield Cell(name="progress", world=world, alpha=1.0, batch=None, steps=60, runs=1, **common)  # type: ignore[arg-type]
    training = Training(loss=loss, alpha=0.0, batch=0, learning_rate=1.0 / common["smoothness"])  # type: ignore[operator]
    there = sgd(world, world.reference, training, steps=40, seed=seed, endless=True)[-1]
    yield Cell(name="bias", world=world, alpha=0.0, batch=None, steps=80, runs=1, start=there, **common)  # type: ignore[arg-type]
    # a teacher that does not care: the reference is the optimum, and all that happens is noise
    flat = replace(world, rewards=torch.zeros_like(world.rewards))
    yield Cell(name="noise", world=flat, alpha=1.0, batch=1, steps=40, runs=4, **common)  # type: ignore[arg-type]


def both_forms(cells: Sequence[Measured], key: str, where: str) -> Iterator[Verdict]:
    yield Verdict(
        key=f"theorem_3_{key}",
        statement="Theorem 3, eq. 3",
        checked=f"mean |grad L|^2 over 2 (L_0 - L_K) / (K eta) + mean (|Bias|^2 + eta L Var) {where}",
        value=max(cell.ratio for cell in cells),
        bound=1.0,
    )
    yield Verdict(
        key=f"theorem_3_uniform_{key}",
        statement="Theorem 3, eq. 4",
        checked=f"mean |grad L|^2 over 2 (L_0 - L*) / (K eta) + B_c^2 + eta L sigma_c^2 {where}",
        value=max(cell.uniform_ratio for cell in cells),
        bound=1.0,
    )


def transformer_runs(seed: int, *, steps: int = 12, runs: int = 2) -> list[Measured]:
    """The same with shared parameters, where L is only what was seen: 1.5 times the sharpest of a path."""
    world = world_of("small transformer", seed, sampling=PAPER_SAMPLING)
    probe = Training(loss=DPO, alpha=0.5, batch=8, learning_rate=0.2)
    path = sgd(world, world.reference, probe, steps=20, seed=seed)[::10]
    seen = 1.5 * max(sharpness(world, point, seed) for point in path)
    return [
        measure(
            Cell(
                name="small transformer", world=world, alpha=alpha, eta_l=0.5, smoothness=seen, steps=steps, runs=runs,
                seed=seed,
            )
        )
        for alpha in (0.0, 0.5, 1.0)
    ]  # fmt: skip


def in_the_transformer(cells: Sequence[Measured]) -> Verdict:
    return Verdict(
        key="theorem_3_transformer",
        statement="Theorem 3, eq. 3",
        checked=f"the same in the small transformer at eta L = 0.5, with L = {cells[0].cell.smoothness:.3g}, 1.5 times the "
        f"largest Hessian eigenvalue met on a path (not proven); largest of {len(cells)} alphas",
        value=max(cell.ratio for cell in cells),
        bound=1.0,
    )


def sharpness(world: World, theta: Tensor, seed: int, iterations: int = 30) -> float:
    """Largest absolute Hessian eigenvalue of the marginal loss, by power iteration."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_loss(world, theta, DPO), theta, create_graph=True)
    vector = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)
    length = torch.ones(())
    for _ in range(iterations):
        (image,) = torch.autograd.grad(gradient, theta, vector / vector.norm(), retain_graph=True)
        vector, length = image, image.norm()
    return float(length)


# --- alpha at each iterate -------------------------------------------------------------------------------------------


def adaptive(seed: int, steps: int, runs: int) -> Iterator[Cell]:
    """The grid's runs with alpha_k*, and two worlds far from the reference, where its clip is at work."""
    for cell in grid(seed, steps=steps, runs=runs):
        if cell.alpha == ALPHAS[0]:
            yield replace(cell, alpha=None)
    for number in BOUNDARY_SEEDS:
        world = world_of("two traces", number, sampling=Sampling(temperature=0.5))
        loss = LossConfig(beta=1.0)
        yield Cell(
            name="two traces, far away", world=world, alpha=None, eta_l=1.0, smoothness=proven_smoothness(world, 1.0),
            steps=4, runs=1, seed=seed, loss=loss, batch=1024, start=drifted(world, 3.0, number + 100),
        )  # fmt: skip


def adaptive_verdicts(cells: Sequence[Measured]) -> Iterator[Verdict]:
    """Bound, single steps, and the sum of steps."""
    yield Verdict(
        key="theorem_3_adaptive",
        statement="Theorem 3, adaptive",
        checked="eq. 3 with alpha_k* at each iterate: mean |grad L|^2 over the bound along SGD runs that use it; largest of "
        f"{len(cells)} cells",
        value=max(cell.ratio for cell in cells),
        bound=1.0,
    )
    steps = [step_ratio(one) for cell in cells for one in cell.iterates]
    yield Verdict(
        key="adaptive_step",
        statement="Theorem 3, adaptive",
        checked="|Bias_k|^2 + eta L Var_k at alpha_k* over the smallest of either end and of 99 weights between them; "
        f"largest of {len(steps)} iterates",
        value=max(steps),
        bound=1 + 1e-12,
    )
    yield Verdict(
        key="adaptive_bound",
        statement="Theorem 3, adaptive",
        checked="so the bound with alpha_k* is never looser than with either end at the same iterates: its right side over "
        "the smaller of theirs, eq. 3 and eq. 4 with the largest per-step term; largest",
        value=max(ratio for cell in cells for ratio in bound_ratios(cell)),
        bound=1 + 1e-12,
    )


def step_ratio(one: Iterate) -> float:
    assert one.term is not None
    return one.term(one.alpha) / min(one.term(step / 100) for step in range(101))


def bound_ratios(measured: Measured) -> tuple[float, float]:
    """alpha_k* over the better end: mean per-step term with the progress (eq. 3), largest per-step term (eq. 4)."""
    cell = measured.cell
    first = 2 * measured.progress / (cell.steps * cell.eta), measured.uniform[0]
    chosen, trace, empty = (
        [one.term(one.alpha if alpha is None else alpha) for one in measured.iterates if one.term]
        for alpha in (None, 1.0, 0.0)
    )

    def mean(terms: list[float]) -> float:
        return first[0] + sum(terms) / len(terms)

    def largest(terms: list[float]) -> float:
        return first[1] + max(terms)

    return tuple(side(chosen) / min(side(trace), side(empty)) for side in (mean, largest))  # type: ignore[return-value]


# --- tables ----------------------------------------------------------------------------------------------------------


def grid_table(cells: Sequence[Measured]) -> Table:
    return Table(
        title="Theorem 3 along SGD runs",
        note="T = 0.8 and B = 8 in the small tabular world. Left side, right side of eq. 3 and of eq. 4, averaged over "
        "runs, and how much the marginal loss fell. best: alpha_k* at each iterate.",
        header=("world", "alpha", "eta L", "left", "right", "left / right", "right, eq. 4", "left / eq. 4", "progress"),
        rows=tuple(
            (
                c.cell.name, "best" if c.cell.alpha is None else c.cell.alpha, c.cell.eta_l, c.left, c.right, c.ratio,
                sum(c.uniform), c.uniform_ratio, c.progress,
            )
            for c in cells
        ),
    )  # fmt: skip


def one_term_table(cells: Sequence[Measured]) -> Table:
    return Table(
        title="Theorem 3 where one term decides",
        note="World of two traces, beta = 4, eta L = 1. progress: the trace view's mean gradient, without noise; bias: the "
        "empty view's, from where it has nearly come to rest; noise: one quad a step, a teacher that is indifferent.",
        header=("decides", "left / eq. 3", "left / eq. 4", "share of progress", "share of bias", "share of noise"),
        rows=tuple(
            (c.cell.name, c.ratio, c.uniform_ratio, *(term / sum(c.uniform) for term in c.uniform)) for c in cells
        ),
    )
