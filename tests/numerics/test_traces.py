"""The trace estimator 'traces': log pi(y | x) from several traces, against a loop over all of them, in every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixtures import (
    make_trainer,
    random_quads,
    step_gradients,
    tiny_causal_lm,
    use_exact_norms,
    with_traces,
    write_tokens,
)

from bvpo.data.pairing import Candidate, Choice
from bvpo.data.pairing import with_traces as pair_with_traces
from bvpo.method.losses import LOSSES, PairLogps, pair_loss
from bvpo.method.traces import TraceGroups, marginal_pairs
from bvpo.strict import UserError
from bvpo.training.layout import LAYOUTS
from bvpo.training.objective import Weights, describe
from bvpo.training.probe import samples as looks
from bvpo.training.probe.sketching import BUCKETS, CountSketch
from bvpo.training.steps import StepDataset
from bvpo.training.tokens import TokenQuad

pytestmark = pytest.mark.filterwarnings("ignore")

GROUPS = [
    3,
    1,
    2,
    1,
    2,
]  # the second quad has no trace pair, the third no empty pair; the fifth lost its first trace pair
QUADS = with_traces(GROUPS, seed=3)
ROWS = [list(range(sum(GROUPS[:g]), sum(GROUPS[: g + 1]))) for g in range(len(GROUPS))]
TRACED = [traced for rows in ROWS if (traced := [row for row in rows if QUADS[row].branches[0] is not None])]
TIGHT = 1e-10


def moved(folder, quads=QUADS, groups=GROUPS, trace_estimator="traces", **settings):
    """A trainer away from the reference, so that the traces' weights differ, with its reference filled."""
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
    settings = {"beta": 0.3, "groups": groups, "trace_estimator": trace_estimator} | settings
    trainer = make_trainer(folder, model, quads, **settings)
    trainer.fill_reference(trainer.model)
    with torch.no_grad():
        for i, parameter in enumerate(trainer.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    return trainer


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def padded_sums(model, quads):
    """[Q, 4, 2] sums of plain logits, sequence by sequence; missing branches are 0."""
    rows = []
    for quad in quads:
        layout = LAYOUTS["padded"]([quad])
        logits = model(input_ids=layout.input_ids_RT, attention_mask=layout.attention_mask_RT).logits.flatten(0, 1)
        logps = logits[layout.rows_N].log_softmax(-1).gather(1, layout.targets_N[:, None])[:, 0]
        parts = torch.stack([part.sum() for part in logps.split(list(layout.segment_sizes))]).view(-1, 2)
        places = torch.tensor([branch for _, branch in layout.slots])
        rows.append(torch.zeros(4, 2, dtype=parts.dtype).index_put((places,), parts))
    return torch.stack(rows)


def naive_loss(policy, reference, alpha, anchor):
    """L = alpha * mean trace loss + (1 - alpha) * mean empty loss + anchor, with explicit loops over groups and traces."""
    ratio = (policy - reference).sum(-1)
    trace, empty, nll = [], [], []
    for rows in TRACED:
        sides = [torch.log(sum(torch.exp(ratio[row, b]) for row in rows) / len(rows)) for b in (0, 1)]
        trace.append(-torch.nn.functional.logsigmoid(0.3 * (sides[0] - sides[1])))
        nll.append(-sum(policy[row, 0, 0] for row in rows) / len(rows))
    for row in (rows[0] for rows in ROWS if QUADS[rows[0]].branches[2] is not None):
        empty.append(-torch.nn.functional.logsigmoid(0.3 * (ratio[row, 2] - ratio[row, 3])))
    assert (len(trace), len(empty)) == (4, 4)
    return alpha * sum(trace) / len(trace) + (1 - alpha) * sum(empty) / len(empty) + anchor * sum(nll) / len(nll)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Loss and gradient of the naive loop, without and with an NLL anchor on the trace."""
    found = {}
    state = moved(tmp_path_factory.mktemp("oracle")).model.state_dict()
    with torch.no_grad():
        reference = padded_sums(use_exact_norms(tiny_causal_lm("qwen2", seed=2)), QUADS)
    for anchor in (0.0, 0.25):
        model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
        model.load_state_dict(state)
        loss = naive_loss(padded_sums(model, QUADS), reference, 0.6, anchor)
        loss.backward()
        found[anchor] = loss.detach(), flat_gradient(model)
    return found


WAYS = {
    "tree": {"layout": "tree"},
    "packed": {"layout": "packed", "tokens_per_micro_batch": 90},
    "padded": {"layout": "padded", "tokens_per_micro_batch": 10_000},
    "sequence": {"layout": "tree", "backward": "sequence"},
    "anchored": {"tokens_per_micro_batch": 200, "anchor": "nll", "anchor_weight": 0.25},
    "anchored, sequence": {"layout": "packed", "backward": "sequence", "anchor": "nll", "anchor_weight": 0.25},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_equals_the_loop_over_all_traces(tmp_path, oracle, way):
    """Mutations: the mean of log-ratios in place of the log of their mean; weights by rows instead of groups; the cached
    gradient of one member sent to another; an anchor summed over traces."""
    loss, gradient = step_gradients(moved(tmp_path, alpha=0.6, **WAYS[way]))
    expected, direction = oracle[0.25 if way.startswith("anchored") else 0.0]
    assert abs(loss - expected).item() <= TIGHT
    assert ((gradient - direction).norm() / direction.norm()).item() <= 1e-9


def test_one_trace_is_the_joint_estimator_to_the_bit(tmp_path):
    """Mutations: log-ratios that go through a sum with the reference and back; a reference subtracted twice."""
    quads = random_quads(6, seed=4, ragged_views=True, tails=True)
    for name, way in {"plain": {"tokens_per_micro_batch": 100}, "kl": {"anchor": "kl", "anchor_weight": 0.2}}.items():
        found = []
        for estimator in ("joint", "traces"):
            trainer = moved(tmp_path / name / estimator, quads, None, estimator, **way)
            loss, gradient = step_gradients(trainer)
            found.append((loss, gradient, trainer._statistics))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert found[0][1].norm() > 0


def test_groups_of_one_beside_larger_ones_keep_their_bits():
    """Mutations: padding that counts as a trace; the log of a sum (which cancels between the sides of a pair)."""
    values = torch.tensor([0.1, -700.0, 3.7, 2.9, 1e-3], dtype=torch.float32)
    groups = TraceGroups.of([7, 5, 1, 5, 5])
    assert groups.members_GK.tolist() == [[0, 0, 0], [1, 3, 4], [2, 0, 0]]
    for found in (groups.log_mean_exp(values), groups.mean(values)):
        assert torch.equal(found[[0, 2]], values[[0, 2]])
    by_hand = math.log((math.exp(-700.0) + math.exp(2.9) + math.exp(1e-3)) / 3)
    assert groups.log_mean_exp(values)[1].item() == pytest.approx(by_hand, rel=1e-6)
    assert groups.mean(values)[1].item() == pytest.approx((-700 + 2.9 + 1e-3) / 3, rel=1e-6)


def test_the_order_of_traces_does_not_matter(tmp_path):
    """The first keeps the empty pair. Mutation: the first member's trace counted for all."""
    swapped = list(QUADS)
    traces = [QUADS[row].branches[:2] for row in (0, 1, 2)]
    for row, trace in zip((0, 1, 2), (traces[2], traces[0], traces[1]), strict=True):
        quad = QUADS[row]
        swapped[row] = type(quad)(id=quad.id, prefix_ids=quad.prefix_ids, branches=(*trace, *quad.branches[2:]))
    one, other = (step_gradients(moved(tmp_path / name, quads)) for name, quads in (("a", QUADS), ("b", swapped)))
    assert abs(one[0] - other[0]).item() <= TIGHT
    assert ((one[1] - other[1]).norm() / one[1].norm()).item() <= TIGHT


def test_statistics_count_quads_and_average_their_traces(tmp_path):
    """Mutations: one pair counted per trace; lengths of the first trace alone; rewards of a single trace."""
    found = moved(tmp_path)
    step_gradients(found)
    metrics = describe(found._statistics)
    assert (metrics["trace/pairs"], metrics["empty/pairs"]) == (4, 4)
    lengths = [np.mean([len(QUADS[row].branches[0].ids) for row in rows]) for rows in TRACED]
    assert metrics["trace/lengths/chosen"] == pytest.approx(np.mean(lengths))
    joint = moved(tmp_path / "rows", [q for q in QUADS if q.branches[0] is not None], None, "joint")
    step_gradients(joint)
    assert metrics["trace/rewards/chosen"] != pytest.approx(describe(joint._statistics)["trace/rewards/chosen"])


# --- repeated draws ---------------------------------------------------------------------------------------------------


def test_draws_with_their_repeats_tend_to_the_marginal_ratio():
    """From sampled traces through pairing to the estimate: E[pi / ref] is over draws from ref(r | x, y), so a trace that was
    drawn twice counts twice. Mutations: equal traces paired once, or counted once in the mean; a group cut to one trace."""
    share, ratio = np.array([0.7, 0.2, 0.1]), np.array([1.5, 0.2, 0.1])
    truth = math.log(share @ ratio)
    log_ratio, rng = torch.tensor(ratio).log(), np.random.default_rng(0)

    def estimate(groups):
        """The mean of the groups' estimates for the chosen side, which the rejected one leaves at the reference."""
        rows = torch.tensor([trace for group in groups for trace in group])
        zero = torch.zeros(len(rows), dtype=log_ratio.dtype)
        logps = PairLogps(
            chosen=log_ratio[rows], rejected=zero, ref_chosen=zero, ref_rejected=zero,
            chosen_lengths=zero + 1, rejected_lengths=zero + 1,
        )  # fmt: skip
        names = [name for name, group in enumerate(groups) for _ in group]
        return marginal_pairs(logps, TraceGroups.of(names)).chosen.mean().item()

    errors, without_repeats = [], []
    for num in (2, 8, 64):
        groups = []
        for traces in rng.choice(3, size=(300, num), p=share):
            sides = [
                [Candidate(key=f"{side}{i}", index=i, content=side, value=value) for i in range(num)]
                for side, value in (("yes", 1.0), ("no", 0.0))
            ]
            choice = pair_with_traces(Choice(chosen=sides[0][0], rejected=sides[1][0]), sides[0] + sides[1], num)
            groups.append([traces[one.chosen.index] for one in (choice, *choice.more)])
        errors.append(abs(estimate(groups) - truth))
        without_repeats.append(abs(estimate([sorted(set(group)) for group in groups]) - truth))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.015
    assert without_repeats[2] > 0.5 and without_repeats[1] > 10 * errors[1]


def test_a_repeated_trace_counts_twice_in_training(tmp_path):
    """From the reference cache, where both have one key, to the loss. Mutations: rows of a group told apart by their tokens;
    a reference value for the first of equal rows alone."""
    quads = [
        TokenQuad(id=name, prefix_ids=quad.prefix_ids, branches=(*quad.branches[:2], None, None))
        for name, quad in (("q", QUADS[0]), ("q+2", QUADS[0]), ("q+3", QUADS[1]))
    ]
    trainer = moved(tmp_path, quads, [3], alpha=1.0)
    loss, _ = step_gradients(trainer)
    with torch.no_grad():
        reference = padded_sums(use_exact_norms(tiny_causal_lm("qwen2", seed=2)), quads)
        gaps = (padded_sums(trainer.model, quads) - reference).sum(-1)[:, :2].exp()
    sides = ((2 * gaps[0] + gaps[2]) / 3).log()
    assert abs(loss + torch.nn.functional.logsigmoid(0.3 * (sides[0] - sides[1]))).item() <= TIGHT
    once = (gaps[0] + gaps[2]).log()
    assert abs(loss + torch.nn.functional.logsigmoid(0.3 * (once[0] - once[1]))).item() > 1e-6


# --- batching --------------------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    budget=st.none() | st.integers(1, 400),
    world_size=st.integers(1, 3),
    quads_per_step=st.integers(1, 7),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_a_quad_is_never_split(tmp_path_factory, groups, budget, world_size, quads_per_step, seed):
    """Over micro-batches, ranks and steps. Mutations: rows planned instead of groups; pairs counted by rows."""
    quads = with_traces(groups, seed=seed)
    tokens = write_tokens(tmp_path_factory.mktemp("tokens"), quads, groups)
    plan = {"quads_per_step": quads_per_step, "tokens_per_micro_batch": budget, "world_size": world_size}
    ranks = [
        StepDataset(tokens, layout="packed", rank=rank, seed=seed, last_step="keep", **plan)
        for rank in range(world_size)
    ]
    seen: list[str] = []
    for number in range(len(ranks[0])):
        steps = [rank[number]["step"] for rank in ranks]
        in_step: list[str] = []
        for micro in (m for step in steps for m in step.micro_batches if not m.is_filler):
            names = [quad.id for quad in micro.quads]
            roots = {name.split("+")[0] for name in names}
            assert sorted(names) == sorted(quad.id for quad in quads if quad.id.split("+")[0] in roots), "whole groups"
            traced = {quad.id.split("+")[0] for quad in micro.quads if quad.branches[0] is not None}
            if tokens.has_groups and traced:
                assert len(micro.trace_groups.members_GK) == len(traced)
            in_step += roots
        assert len(in_step) == len(set(in_step)) == steps[0].num_quads <= quads_per_step
        own = [[quad.has_view for quad in quads if quad.id.split("+")[0] == name] for name in in_step]
        pairs = [sum(any(has_view[v] for has_view in views) for views in own) for v in (0, 1)]
        assert steps[0].pairs == {"trace": pairs[0], "empty": pairs[1]}
        seen += in_step
    assert sorted(seen) == sorted(quad.id for quad in quads if "+" not in quad.id)


# --- what does not go together, and what does -------------------------------------------------------------------------


def test_refusals(tmp_path):
    """Mutations: SimPO trained on a log-mean of plain probabilities; members of a group taken for quads by 'joint'."""
    with pytest.raises(UserError, match=r"trace_estimator: 'traces' weighs traces .* loss 'simpo' has no reference"):
        moved(tmp_path / "a", loss="simpo")
    for estimator in ("joint", "answer"):
        with pytest.raises(UserError, match=f"trace_estimator: got '{estimator}', but .* several traces"):
            moved(tmp_path / estimator, trace_estimator=estimator)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_every_loss_with_a_reference_sees_the_estimated_log_ratios(name):
    """As if they were of one response with the traces' mean length. Mutations: a loss that reads raw log-probs; the lengths
    of the first trace; groups of the rejected side that are not those of the chosen one."""
    sums = {side: torch.randn(3, generator=torch.Generator().manual_seed(i)).double() for i, side in enumerate("abcd")}
    lengths = torch.tensor([4, 6, 9]), torch.tensor([5, 5, 2])
    rows = PairLogps(
        chosen=sums["a"], rejected=sums["b"], ref_chosen=sums["c"], ref_rejected=sums["d"],
        chosen_lengths=lengths[0], rejected_lengths=lengths[1],
    )  # fmt: skip
    found = pair_loss(name, marginal_pairs(rows, TraceGroups.of([0, 1, 0])))
    gaps = [(sums[one] - sums[ref]).exp() for one, ref in ("ac", "bd")]
    by_hand = [torch.stack([(gap[0] + gap[2]) / 2, gap[1]]).log() for gap in gaps]
    expected = PairLogps(
        chosen=by_hand[0] - 7, rejected=by_hand[1] - 9, ref_chosen=torch.tensor([-7.0, -7.0]).double(),
        ref_rejected=torch.tensor([-9.0, -9.0]).double(), chosen_lengths=torch.tensor([6.5, 6.0]),
        rejected_lengths=torch.tensor([3.5, 5.0]),
    )  # fmt: skip
    torch.testing.assert_close(found.loss, pair_loss(name, expected).loss)
    torch.testing.assert_close(found.chosen_rewards, pair_loss(name, expected).chosen_rewards)


def test_the_kl_anchor_is_the_mean_over_traces(tmp_path):
    """In both backward modes. Mutations: the sum over traces; the cached gradient of the KL sent to another trace."""
    anchor = {"anchor": "kl", "anchor_weight": 0.2}
    one, other = (moved(tmp_path / way, backward=way, **anchor) for way in ("micro_batch", "sequence"))
    found = [step_gradients(one), step_gradients(other)]
    assert abs(found[0][0] - found[1][0]).item() <= TIGHT
    assert ((found[0][1] - found[1][1]).norm() / found[0][1].norm()).item() <= 1e-9
    plain = step_gradients(moved(tmp_path / "plain"))[0]
    alone = moved(tmp_path / "rows", [QUADS[row] for rows in TRACED for row in rows], None, "joint", **anchor)
    values = [describe(_statistics(alone, i))["trace/anchor"] for i in range(sum(map(len, TRACED)))]
    means, start = [], 0
    for rows in TRACED:
        means.append(np.mean(values[start : start + len(rows)]))
        start += len(rows)
    assert (found[0][0] - plain).item() == pytest.approx(0.2 * np.mean(means), rel=1e-9)


def _statistics(trainer, index):
    """Of one of the trainer's quads alone."""
    batch = trainer._train_steps._micro_batch([index], is_filler=False)
    with torch.no_grad():
        return trainer._runner().loss(trainer.model, batch, Weights(views={"trace": 1.0, "empty": 1.0}, anchor=1.0))[1]


@pytest.mark.parametrize("backward", ["micro_batch", "sequence"])
def test_looks_take_the_gradient_of_a_whole_quad(tmp_path, backward):
    """Mutations: the gradient of the first trace alone; the data set's rows taken for quads."""
    trainer = moved(tmp_path / "all", backward=backward)
    rows = trainer.look(looks.Plan(views=("trace", "empty"), quads=(0, 4)), (5, 6), BUCKETS)
    for row, (rows_of_quad, num) in enumerate(((ROWS[0], 3), (ROWS[4], 2))):
        for view, alpha in (("trace", 1.0), ("empty", 0.0)):
            if QUADS[rows_of_quad[0]].branches[0 if view == "trace" else 2] is None:
                continue
            alone = moved(tmp_path / f"{view}{num}", [QUADS[r] for r in rows_of_quad], [num], alpha=alpha)
            expected = CountSketch((5, 6), torch.device("cpu"), torch.float64)([step_gradients(alone)[1]])
            np.testing.assert_allclose(rows.sketches[view][row], expected, rtol=1e-8, atol=1e-9)
