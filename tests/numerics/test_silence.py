"""Training that rejects silence: empty answers and unclosed traces, from sampled ids to one step, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_fixtures import make_trainer, step_gradients, tiny_causal_lm, use_exact_norms

from bvpo.formats import view_prompt
from bvpo.method.losses import kl_from_logits
from bvpo.records import Message, Pair, Quad, Response, View
from bvpo.training.tokenizing import TokenSettings, tokenize_views
from bvpo.training.tokens import Branch, TokenQuad
from tests.formats_fixtures import format_of, tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZER, FMT = tokenizer_of("r1-distill"), format_of("r1-distill")
EOS = 331  # the fixture's end of sequence
LAYOUTS = ("tree", "packed", "padded", "single")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


CLOSE = ids_of("</think>")


def pair(ask: str, view: View, chosen: list[int], rejected: list[int]) -> Pair:
    prompt = view_prompt(TOKENIZER, FMT, (Message(role="user", content=ask),), view)
    return Pair(
        view=view,
        chosen=Response(answer="Yes.", token_ids=tuple(chosen)),
        rejected=Response(answer="", token_ids=tuple(rejected)),
        prompt_ids=prompt.prompt_ids,
        completion_start=prompt.completion_start,
    )


def quads(answer_only: bool = False, score_empty_block: bool = True) -> list[TokenQuad]:
    """Every kind of silence once; where answers alone are scored, only the trace that closed and ended has a pair."""
    said, thought = [*ids_of("I think so"), *CLOSE, *ids_of("Yes."), EOS], ids_of("Hm, is it so or")
    kinds: list[tuple[str, list[int], list[int]]] = [
        ("Is it so?", thought, [EOS]),  # unclosed; ended at once
        ("Or not?", [*thought, *CLOSE, EOS], []),  # closed, ended; the forced marker alone
        ("Why?", [*thought, *CLOSE], [EOS]),  # closed, cut
    ]
    made = []
    limits = TokenSettings(max_length=500, answer_only=answer_only, score_empty_block=score_empty_block)
    assert TOKENIZER.eos_token_id == EOS
    for ask, trace, empty in kinds:
        quad = Quad(
            id=ask,
            messages=(Message(role="user", content=ask),),
            trace=pair(ask, "trace", said, trace),
            empty=pair(ask, "empty", [*ids_of("Yes."), EOS], empty),
        )
        result = tokenize_views(quad, TOKENIZER, FMT, limits)
        assert result.quad is not None
        made.append(result.quad)
    kept = [quad.branches[1] is not None for quad in made]
    assert kept == ([False, True, False] if answer_only else [True] * 3)
    return made


def model_of(state=None):
    model = use_exact_norms(tiny_causal_lm("qwen2", seed=2, vocab_size=len(TOKENIZER)))
    if state is not None:
        model.load_state_dict(state)
    return model


def logits_of(model, quad: TokenQuad, branch: Branch):
    """[scored tokens, vocab] of one plain sequence, and those tokens."""
    ids = torch.from_numpy(np.concatenate([quad.prefix_ids, branch.ids]).astype(np.int64))
    first = len(quad.prefix_ids) + branch.scored_from
    return model(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]


def plain_loss(model, reference, data: list[TokenQuad], estimator: str, anchor: str):
    """Sequence after sequence: .6 of the trace view's mean DPO loss, .4 of the empty view's, and .25 of the anchor's."""
    losses: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    anchors: list[torch.Tensor] = []
    for quad in data:
        for first, found in losses.items():
            ratios, anchored = [], []
            for branch in quad.branches[first : first + 2]:
                if branch is None:
                    continue
                logits, ids = logits_of(model, quad, branch)
                with torch.no_grad():
                    ref_logits, _ = logits_of(reference, quad, branch)
                mine, theirs = (one.log_softmax(-1).gather(1, ids[:, None])[:, 0] for one in (logits, ref_logits))
                skipped = branch.answer_from - branch.scored_from if estimator == "answer" and first == 0 else 0
                ratios.append((mine - theirs)[skipped:].sum())
                anchored.append(kl_from_logits(ref_logits, logits).sum() if anchor == "kl" else -mine.sum())
            if ratios:
                found.append(-torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])))
                if first == 0:
                    anchors.append(anchored[0] + anchored[1] if anchor == "kl" else anchored[0])
    weight = 0.25 if anchor != "none" else 0.0
    trace, empty, anchored = (torch.stack(values).mean() for values in (losses[0], losses[2], anchors))
    return 0.6 * trace + 0.4 * empty + weight * anchored


WAYS = [
    *((name, "joint", anchor, {"layout": name}) for name in LAYOUTS for anchor in ("none", "kl", "nll")),
    *((name, estimator, "kl", {"layout": name}) for name in LAYOUTS for estimator in ("answer", "traces")),
    ("by sequence", "joint", "kl", {"layout": "tree", "backward": "sequence"}),
    ("block unscored", "joint", "none", {"layout": "tree"}),
]


@pytest.mark.parametrize(("name", "estimator", "anchor", "way"), WAYS)
def test_a_step_that_rejects_silence_equals_plain_sequences(tmp_path, name, estimator, anchor, way):
    """Mutations: an empty segment that shifts its neighbours' sums; a closing marker or an end of sequence added; the
    anchor over a silent response left out; a trace without an answer token kept where answers alone are scored."""
    data = quads(answer_only=estimator != "joint", score_empty_block=name != "block unscored")
    if name == "block unscored":  # nothing is left of the forced marker alone
        assert data[1].branches[3] is None
    settings = {"beta": 0.3, "alpha": 0.6, "trace_estimator": estimator, **way}
    if anchor != "none":
        settings |= {"anchor": anchor, "anchor_weight": 0.25, "anchor_tokens": "both"}
    trainer = make_trainer(tmp_path, model_of(), data, **settings)
    trainer.fill_reference(trainer.model)
    with torch.no_grad():
        for i, parameter in enumerate(trainer.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    loss, gradient = step_gradients(trainer)
    model = model_of(trainer.model.state_dict())
    expected = plain_loss(model, model_of(), data, estimator, anchor)
    expected.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert abs(loss - expected).item() <= 1e-10
    assert ((gradient - plain).norm() / plain.norm()).item() <= 1e-9
