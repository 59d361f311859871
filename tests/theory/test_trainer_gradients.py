"""The trainer's own gradients in a world that is enumerated: a real Qwen2, five traces, three answers, samples at T = 0.8.

Every quad goes through ``BVPOTrainer.training_step`` alone. Its gradient must be the one that log-softmax, the chain rule
and DPO's formula give, and so the theory must hold for what really trains.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_fixtures import make_trainer, step_gradients, tiny_causal_lm, use_exact_norms

from bvpo.lab import theorems
from bvpo.method import mixing
from bvpo.training.tokens import Branch, TokenQuad

pytestmark = pytest.mark.filterwarnings("ignore")

BETA = 0.3
PROMPT, CLOSE = (9, 8), 5
TRACES = ((), (3,), (4,), (3, 4), (4, 4))
ANSWERS = (6, 7, 2)
STATES = list(itertools.product(range(len(TRACES)), range(len(ANSWERS))))
QUADS = [
    (won, lost) for won, lost in itertools.product(STATES, STATES) if won[1] != lost[1]
]  # every pair with two answers


def small_model() -> Any:
    sizes = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    return use_exact_norms(tiny_causal_lm("qwen2", seed=4, **sizes))


def move(model: Any) -> Any:
    """Away from the reference, the same way for equal models."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
    return model


def branch(trace: int, answer: int) -> Branch:
    ids = (*TRACES[trace], CLOSE, ANSWERS[answer])
    return Branch(ids=np.array(ids, dtype=np.int32), scored_from=0, answer_from=len(ids) - 1)


def token_quads() -> list[TokenQuad]:
    """The empty view has the same answers after no trace."""
    prefix = np.array(PROMPT, dtype=np.int32)
    return [
        TokenQuad(
            id=f"{won}{lost}",
            prefix_ids=prefix,
            branches=(branch(*won), branch(*lost), branch(0, won[1]), branch(0, lost[1])),
        )
        for won, lost in QUADS
    ]


def joint_logps(model: Any, temperature: float = 1.0) -> Tensor:
    """log pi(trace, answer) [R, Y] over the whole vocabulary, by one plain forward pass per sequence."""
    values = []
    for trace, answer in STATES:
        ids = torch.tensor([[*PROMPT, *TRACES[trace], CLOSE, ANSWERS[answer]]])
        logps = (model(ids).logits[0] / temperature).log_softmax(-1)
        rows = torch.arange(len(PROMPT) - 1, ids.shape[1] - 1)
        values.append(logps[rows, ids[0, rows + 1]].sum())
    return torch.stack(values).view(len(TRACES), len(ANSWERS))


def flat_gradient(value: Tensor, model: Any) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def trainer_gradients(folder: Any, *, moved: bool, alpha: float) -> dict[str, Tensor]:
    """Every quad's gradient, a step of one quad each."""
    trainer = make_trainer(
        folder, small_model(), token_quads(), beta=BETA, alpha=alpha, quads_per_step=1, telemetry_steps=0
    )
    trainer.fill_reference(trainer.model)
    if moved:
        move(trainer.model)
    found = {}
    for step in range(len(QUADS)):
        (micro_batch,) = trainer._train_steps[step]["step"].micro_batches
        found[micro_batch.quads[0].id] = step_gradients(trainer, step)[1].clone()
    return found


def exact_gradients(model: Any, reference: Tensor) -> tuple[Tensor, Tensor]:
    """[quads, P] in the trace view and in the empty view: -beta sigmoid(-beta margin) (grad chosen - grad rejected)."""
    joint = joint_logps(model)
    rows = {state: flat_gradient(joint[state], model) for state in STATES}
    ratio = (joint - reference).detach()

    def of(won: tuple[int, int], lost: tuple[int, int]) -> Tensor:
        slope = -BETA * torch.sigmoid(-BETA * (ratio[won] - ratio[lost]))
        return slope * (rows[won] - rows[lost])

    trace = torch.stack([of(won, lost) for won, lost in QUADS])
    return trace, torch.stack([of((0, won[1]), (0, lost[1])) for won, lost in QUADS])


def probabilities(sampled: Tensor) -> Tensor:
    """Of every quad: two responses drawn from ``sampled`` [R, Y], kept when their answers differ; the teacher ranks the
    answers 0, 1, 2 by Bradley and Terry's rule with rewards 2, 1, 0."""
    prefer = [torch.sigmoid(torch.tensor(float(lost[1] - won[1]), dtype=torch.float64)) for won, lost in QUADS]
    weights = torch.stack([sampled[won] * sampled[lost] * p for (won, lost), p in zip(QUADS, prefer, strict=True)])
    return weights / weights.sum()


def marginal_gradient(model: Any, reference: Tensor, prob: Tensor) -> Tensor:
    """mu: the same loss on log pi(y) = log of the sum over the traces, expected over the pairs."""
    gap = joint_logps(model).logsumexp(0) - reference.logsumexp(0)
    losses = torch.stack([-torch.nn.functional.logsigmoid(BETA * (gap[won[1]] - gap[lost[1]])) for won, lost in QUADS])
    return flat_gradient(prob @ losses, model)


def test_each_quad_has_the_exact_gradient(tmp_path):
    """Away from the reference, both views and the mixture, each of the 150 quads; and Theorem 1 on the trainer's numbers.
    Mutation: the closing marker not scored; the reference of another branch; alpha on the wrong view; the prefix's last
    token not predicting the first of a branch."""
    base = small_model()
    model = move(copy.deepcopy(base))
    trace, empty = exact_gradients(model, joint_logps(base).detach())
    found = {alpha: trainer_gradients(tmp_path / str(alpha), moved=True, alpha=alpha) for alpha in (1.0, 0.3)}
    ids = [quad.id for quad in token_quads()]
    ours = {alpha: torch.stack([gradients[i] for i in ids]) for alpha, gradients in found.items()}
    for alpha, gradients in ours.items():
        expected = alpha * trace + (1 - alpha) * empty
        assert ((gradients - expected).norm(dim=1) <= 1e-9 * expected.norm(dim=1).clamp(min=1e-3)).all()
    for pair in itertools.permutations(range(len(ANSWERS)), 2):  # given the data, only the traces are random
        given = torch.tensor([(won[1], lost[1]) == pair for won, lost in QUADS])
        prob = probabilities(joint_logps(base, 0.8).detach().exp())[given]
        spreads = {alpha: _spread(gradients[given], prob / prob.sum()) for alpha, gradients in ours.items()}
        assert spreads[0.3] == pytest.approx(0.3**2 * spreads[1.0], rel=1e-10)


def test_the_trainers_trace_view_is_biased_at_the_papers_temperature(tmp_path):
    """At the reference: b_t = 0 with traces sampled at T = 1, and at T = 0.8 the bias that enumeration says.
    Mutation: a trainer that scores the answer alone (its b_t is not 0); samples and scores at the same temperature."""
    model = small_model()
    reference = joint_logps(model).detach()
    exact, _ = exact_gradients(model, reference)
    found = trainer_gradients(tmp_path, moved=False, alpha=1.0)
    ours = torch.stack([found[quad.id] for quad in token_quads()])
    bias = {}
    for temperature in (1.0, 0.8):
        prob = probabilities(joint_logps(model, temperature).detach().exp())
        mu = marginal_gradient(model, reference, prob)
        bias[temperature] = ((prob @ ours - mu).square().sum() / mu.square().sum()).item()
        expected = ((prob @ exact - mu).square().sum() / mu.square().sum()).item()
        assert bias[temperature] == pytest.approx(expected, rel=1e-6, abs=1e-20)
    assert bias[1.0] <= 1e-18
    assert bias[0.8] >= 1e-4


def test_trainer_evaluation_and_laboratory_mix_by_one_function(tmp_path, monkeypatch):
    """All three are red when the weights are wrong, and when the sum is. Mutation: any of them mixing on its own."""
    monkeypatch.setattr(theorems, "every_loss", lambda: {"dpo": theorems.DPO})
    assert mixing_errors(tmp_path / "honest") == pytest.approx((0, 0, 0), abs=1e-9)
    honest = mixing.view_weight
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "view_weight", lambda alpha, *given: honest(alpha**2, *given))
        assert min(mixing_errors(tmp_path / "weights")) > 0.01
    # whoever imported the function by name has the same object: its code is exchanged
    monkeypatch.setattr(mixing.mix_views, "__code__", with_alpha_squared.__code__)
    assert min(mixing_errors(tmp_path / "sum")) > 0.01


def with_alpha_squared(loss_sums, weights, anchor_sum=None):
    return sum(weights.views[view] ** (2 if view == "trace" else 1) * loss for view, loss in loss_sums.items())


def mixing_errors(folder: Any, alpha: float = 0.3) -> tuple[float, float, float]:
    """Relative errors of a training step's gradient, of the held-out loss, and of the laboratory's Theorem 1."""
    trainer = make_trainer(folder, small_model(), token_quads(), beta=BETA, alpha=alpha, telemetry_steps=0)
    trainer.fill_reference(trainer.model)
    move(trainer.model)
    trace, empty = exact_gradients(trainer.model, joint_logps(small_model()).detach())
    expected = (alpha * trace + (1 - alpha) * empty).mean(0)
    step = float((step_gradients(trainer)[1] - expected).norm() / expected.norm())
    held_out = trainer._mixed_loss({"eval_trace/loss": 2.0, "eval_empty/loss": 5.0}, "eval", alpha)
    return step, abs(held_out / (alpha * 2 + (1 - alpha) * 5) - 1), theorems.theorem_1(0, quick=True).value


def _spread(gradients: Tensor, prob: Tensor) -> float:
    mean = prob @ gradients
    return float(prob @ (gradients - mean).square().sum(1))
