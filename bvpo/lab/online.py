"""``alpha = "auto"`` in worlds where the best alpha is known: where the shipped rule converges, and what looks find.

In: a state and a loss. Out: the rule's alpha without noise (:func:`population`), how far the policy is from its reference
(:func:`log_ratio`), and the shipped estimator after looks at single quads' gradients (:func:`estimated`). The gradients go
through the shipped losses; how they are compressed on the way to the estimator is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.lab.exact import slopes
from bvpo.lab.policies import EMPTY
from bvpo.lab.responses import State
from bvpo.lab.worlds import QuadBatch
from bvpo.method.estimators import Moments
from bvpo.method.online_alpha import PREFIX, OnlineAlpha, StepPairs, ingredients, james_stein, products

Compress = Callable[[int, Tensor], Tensor]
"""(number of the look, gradients [B, P]) -> [B, S]; the trainer's is a count sketch."""


def population(moments: Moments) -> float:
    """Where the rule ends with endless looks: Theorem 2 as if b_t were 0."""
    distance = moments.bias_trace_sq + moments.bias_empty_sq - 2 * moments.bias_dot
    values = {"trace": moments.var_trace, "empty": moments.var_empty, "covariance": moments.cov, "distance": distance}
    return james_stein(values)


def log_ratio(state: State) -> float:
    """Mean |log pi - log ref| of a response in the trace view's pairs: what looks call drift, in nats."""
    world = state.world
    answers = torch.zeros_like(world.rewards)
    for side in world.pair_index:
        answers.index_add_(1, side, world.trace_pairs / 2)
    ratio = (state.probs.joint - world.reference_probs.joint).transpose(1, 2)
    return float((answers[:, :, None] * world.trace_given_answer * ratio.abs()).sum())


def single_gradients(state: State, quads: QuadBatch, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Every quad's gradient in the trace view and in the empty view: two [B, P]."""
    world, joint, reference = state.world, state.probs.joint, state.world.reference_probs.joint
    tree, answers = world.policy.tree.lengths, world.policy.answer_lengths

    def view(trace_w: Tensor, answer_w: Tensor, trace_l: Tensor, answer_l: Tensor) -> Tensor:
        w, l = (quads.prompt, trace_w, answer_w), (quads.prompt, trace_l, answer_l)  # noqa: E741 - as in the papers
        lengths = tree[trace_w] + answers[answer_w], tree[trace_l] + answers[answer_l]
        _, for_w, for_l = slopes(loss, joint[w], joint[l], reference[w], reference[l], *lengths)
        score_w, score_l = (state.atoms[quads.prompt, trace * len(answers) + y] for _, trace, y in (w, l))
        return for_w[:, None] * score_w + for_l[:, None] * score_l

    none = torch.full_like(quads.prompt, EMPTY)
    return (
        view(quads.chosen_trace, quads.chosen, quads.rejected_trace, quads.rejected),
        view(none, quads.empty_chosen, none, quads.empty_rejected),
    )


def estimated(
    state: State, loss: LossConfig, *, batch: int, look: int, seed: int, compress: Compress, pool: int = 600
) -> Iterator[OnlineAlpha]:
    """The shipped estimator after each of endless looks at ``look`` quads, for steps of ``batch`` quads."""
    gradients = single_gradients(state, state.world.draw(pool, torch.Generator().manual_seed(seed)), loss)
    drift, pairs = log_ratio(state), StepPairs(trace=batch, empty=batch, both=batch)
    rng, online, number = np.random.default_rng(seed), OnlineAlpha(0.5, beta=loss.beta), 0
    while True:
        chosen = torch.from_numpy(rng.choice(pool, look, replace=False))
        trace, empty = (compress(number, view[chosen]).numpy() for view in gradients)
        found = ingredients(products(trace, trace), products(empty, empty), products(trace, empty), pairs)
        online.observe(found | {f"{PREFIX}quads": float(look), f"{PREFIX}drift": drift})
        number += 1
        yield online
