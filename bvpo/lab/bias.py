"""When is the trace view unbiased? b_t at the reference for every loss, sampling and estimator; and a Monte Carlo check.

In: a seed. Out: verdicts, and the table of |b_t|^2 / |mu|^2. The registry's ``zero_trace_bias_at_reference`` is held to the
exact numbers of the full worlds. The Monte Carlo check draws responses token by token, as an engine would, and so also tests
the probabilities that everything else in the laboratory enumerates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo.lab.catalog import DPO, PAPER_SAMPLING, every_loss, world_of
from bvpo.lab.exact import estimate, views
from bvpo.lab.policies import EMPTY
from bvpo.lab.responses import Responses, State, answer, joint, marginal
from bvpo.lab.results import Findings, Table, Verdict
from bvpo.lab.runs import quad_gradients
from bvpo.lab.worlds import QuadBatch, Sampling, World, drifted
from bvpo.method.losses import LOSSES

SAMPLINGS = {
    "T = 1": Sampling(),
    "T = 0.8": PAPER_SAMPLING,
    "top-p 0.9": Sampling(top_p=0.9),
    "cut traces": Sampling(max_trace_tokens=3),
}
_CUT_TABULAR = Sampling(max_trace_tokens=20)
TRACE_ESTIMATORS: dict[str, Callable[[State], Responses]] = {"joint": joint, "answer": answer}


def check_bias(seed: int, *, quick: bool) -> Findings:
    """All of this module."""
    entries = list(trace_biases(seed, ("small tabular",) if quick else ("tabular", "transformer")))
    return Findings(
        verdicts=(*at_the_reference(entries), *monte_carlo(seed, num=1000 if quick else 4000)),
        tables=(bias_table(entries),),
    )


# --- b_t -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBias:
    """|b_t|^2 / |mu|^2 at policy = reference."""

    world: str
    loss: str
    name: str
    estimator: str
    sampling: str
    value: float

    @property
    def promised(self) -> bool:
        """Whether the registry says it is zero: it speaks of the joint estimator and of untruncated traces at T = 1."""
        entry = LOSSES[self.name]
        return self.estimator == "joint" and self.sampling == "T = 1" and entry.zero_trace_bias_at_reference


def trace_biases(seed: int, worlds: tuple[str, ...]) -> Iterator[TraceBias]:
    """Every combination."""
    for world_name in worlds:
        base = world_of(world_name, seed)
        at_reference = State(world=base, theta=base.reference)
        for sampling_name, sampling in SAMPLINGS.items():
            if sampling_name == "cut traces" and "tabular" in world_name:
                sampling = _CUT_TABULAR
            state = at_reference.with_sampling(sampling)
            for loss_name, loss in every_loss().items():
                target = estimate(state, marginal(state), state.world.trace_pairs, loss).mean
                for estimator_name, estimator in TRACE_ESTIMATORS.items():
                    bias = estimate(state, estimator(state), state.world.trace_pairs, loss).mean - target
                    yield TraceBias(
                        world=world_name,
                        loss=loss_name,
                        name=loss.name,
                        estimator=estimator_name,
                        sampling=sampling_name,
                        value=float((bias @ bias) / (target @ target)),
                    )


def at_the_reference(entries: list[TraceBias]) -> Iterator[Verdict]:
    """The registry's promise, and that it is one: elsewhere the bias is there."""
    promised = [e for e in entries if e.promised]
    yield Verdict(
        key="b_t_zero",
        statement="Ours: b_t = 0",
        checked="at the reference, joint estimator, untruncated traces at T = 1, losses with zero_trace_bias_at_reference: "
        f"largest |b_t|^2 / |mu|^2 of {len(promised)}",
        value=max(e.value for e in promised),
        bound=1e-24,
    )
    others = {
        ("other_losses", "the other losses there"): [
            e for e in entries if e.estimator == "joint" and e.sampling == "T = 1" and not e.promised
        ],
        ("other_sampling", "the same losses at T = 0.8, top-p 0.9 and with long traces cut"): [
            e
            for e in entries
            if e.estimator == "joint" and e.sampling != "T = 1" and LOSSES[e.name].zero_trace_bias_at_reference
        ],
        ("answer_estimator", "the answer estimator"): [e for e in entries if e.estimator == "answer"],
    }
    for (key, name), some in others.items():
        yield Verdict(
            key=f"b_t_{key}",
            statement="Ours: b_t != 0",
            checked=f"{name}: smallest |b_t|^2 / |mu|^2 of {len(some)}",
            value=min(e.value for e in some),
            bound=1e-4,
            at_least=True,
        )


def bias_table(entries: list[TraceBias]) -> Table:
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for e in entries:
        groups.setdefault((e.world, e.estimator, e.loss), {})[e.sampling] = e.value
    return Table(
        title="|b_t|^2 / |mu|^2 at the reference",
        note="0 is unbiased. Nucleus sampling and the cut are at T = 1; cut: traces over 20 tokens (tabular) or 3 "
        "(transformer) have no answer.",
        header=("world", "estimator", "loss", *SAMPLINGS),
        rows=tuple((*key, *values.values()) for key, values in groups.items()),
    )


# --- Monte Carlo -----------------------------------------------------------------------------------------------------


def monte_carlo(seed: int, num: int) -> Iterator[Verdict]:
    """Covariances of drawn quads' gradients against the enumerated ones, in standard errors."""
    world = world_of("small transformer", seed, sampling=PAPER_SAMPLING)
    theta = drifted(world, 0.2, seed + 1)
    exact = views(State(world=world, theta=theta), DPO)
    quads = draw_by_token(world, num, torch.Generator().manual_seed(seed))
    batches = [_part(quads, start, start + 250) for start in range(0, num, 250)]
    trace, empty = (
        torch.cat([quad_gradients(world, theta, batch, DPO, alpha) for batch in batches]) for alpha in (1.0, 0.0)
    )
    around_t, around_e = trace - exact.trace.mean, empty - exact.empty.mean
    found = {
        "tr S_t": (around_t.square().sum(1), exact.moments.var_trace),
        "tr S_e": (around_e.square().sum(1), exact.moments.var_empty),
        "tr S_te": ((around_t * around_e).sum(1), exact.moments.cov),
    }
    for name, (values, expected) in found.items():
        standard_error = float(values.std()) / math.sqrt(num)
        yield Verdict(
            key=f"monte_carlo_{name.removeprefix('tr ').lower()}",
            statement="Monte Carlo",
            checked=f"{name} of {num:,} quads drawn token by token, small transformer away from the reference, T = 0.8: "
            "standard errors from the exact value",
            value=abs(float(values.mean()) - expected) / standard_error,
            bound=3.0,
        )


def draw_by_token(world: World, num: int, generator: torch.Generator) -> QuadBatch:
    """Quads as an engine and a teacher make them: responses walk the tree, equal answers are drawn again."""
    prompt = torch.randint(len(world.rewards), (num,), generator=generator)
    trace_pair = _preferred_pair(world, prompt, generator, thinking=True)
    empty_pair = _preferred_pair(world, prompt, generator, thinking=False)
    return QuadBatch(
        prompt=prompt,
        chosen=trace_pair[0][1],
        rejected=trace_pair[1][1],
        chosen_trace=trace_pair[0][0],
        rejected_trace=trace_pair[1][0],
        empty_chosen=empty_pair[0][1],
        empty_rejected=empty_pair[1][1],
    )


def _preferred_pair(
    world: World, prompt: Tensor, generator: torch.Generator, *, thinking: bool
) -> list[tuple[Tensor, Tensor]]:
    """(trace, answer) of the chosen and of the rejected response."""
    first, second = (_respond(world, prompt, generator, thinking=thinking) for _ in range(2))
    while bool((same := first[1] == second[1]).any()):  # both anew: what is kept is a pair of two independent draws
        for response in (first, second):
            again = _respond(world, prompt[same], generator, thinking=thinking)
            for column, values in zip(response, again, strict=True):
                column[same] = values
    gap = world.rewards[prompt, first[1]] - world.rewards[prompt, second[1]]
    keep = torch.rand(len(prompt), generator=generator, dtype=gap.dtype) < torch.sigmoid(gap)
    chosen, rejected = (
        tuple(torch.where(mask, a, b) for a, b in zip(first, second, strict=True)) for mask in (keep, ~keep)
    )
    return [(chosen[0], chosen[1]), (rejected[0], rejected[1])]


def _respond(
    world: World, prompt: Tensor, generator: torch.Generator, *, thinking: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One response each, by sampling step after step; no nucleus, no cut."""
    tree, temperature = world.policy.tree, world.sampling.temperature
    steps, answers = world.policy.logits(world.reference)
    alive = torch.ones(len(prompt), tree.num_traces, dtype=torch.bool)  # traces that agree with the choices so far
    if thinking:
        for depth in range(tree.nodes.shape[1]):
            on_path = tree.on_path[:, depth]
            goes_on = (alive & on_path).any(1)
            node = tree.nodes[(alive & on_path).to(torch.long).argmax(1), depth]
            choice = torch.multinomial((steps[prompt, node] / temperature).softmax(-1), 1, generator=generator)
            agrees = (tree.choices[:, depth] == choice) & on_path
            alive = torch.where(goes_on[:, None], alive & agrees, alive)
        trace = alive.to(torch.long).argmax(1)
    else:
        trace = torch.full_like(prompt, EMPTY)
    logits = answers[prompt, trace] / temperature
    return trace, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _part(quads: QuadBatch, start: int, stop: int) -> QuadBatch:
    return QuadBatch(**{name: getattr(quads, name)[start:stop] for name in QuadBatch.__slots__})
