"""Tokens are drawn from the right distribution, and their log-probabilities are those of the model itself.

All draws use fixed seeds, so a red test is red again. ``frequencies`` draws many tokens from one row of logits by using it
as many rows of one seed at successive steps, which is what a long response does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models_fixtures import MODEL_FAMILIES, tiny_model, tiny_tokenizer
from scipy import stats

from bvpo.engines.base import Generation, Request, Sampling
from bvpo.engines.local.engine import BatchSettings, from_model
from bvpo.engines.local.noise import noise_key
from bvpo.engines.local.sampling import RowParams, sample_tokens, truncation_threshold

VOCAB = 1300  # three blocks, the last one short
DRAWS = 20_000


def row_params(num: int, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0) -> RowParams:
    return RowParams(
        temperature_B=torch.full((num,), temperature),
        top_k_B=torch.full((num,), top_k),
        top_p_B=torch.full((num,), top_p),
    )


def draw(logits: torch.Tensor, params: RowParams, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of ``logits``, at steps 0, 1, 2, ... of one seed."""
    num = logits.shape[0]
    keys = torch.tensor([noise_key(seed)]).repeat(num, 1)
    truncated = bool((params.top_k_B > 0).any() or (params.top_p_B < 1).any())
    return sample_tokens(logits, keys, torch.arange(num), params, truncated)


def frequencies(logits: torch.Tensor, params: dict[str, Any], seed: int = 0) -> np.ndarray:
    counts = torch.zeros(len(logits), dtype=torch.long)
    for start in range(0, DRAWS, 2000):
        rows = logits.repeat(2000, 1)
        counts += draw(rows, row_params(2000, **params), seed + start)[0].bincount(minlength=len(logits))
    return counts.numpy()


def reference_distribution(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Temperature, then top-k, then top-p over the rest, in plain numpy; no ties in the logits."""
    scaled = logits.double().numpy() / temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """P-value of the counts; rare outcomes (fewer than 8 expected) are pooled into one."""
    assert not counts[expected == 0].any(), "a token outside the support was drawn"
    expected = expected * counts.sum()
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    pooled = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(observed[pooled > 0], pooled[pooled > 0]).pvalue)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 0.8, "top_k": 40},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(logits: torch.Tensor, params: dict[str, Any]) -> None:
    """Mutation: no temperature, top-p before temperature or before top-k, one token too many or too few in the nucleus,
    or the short last block scored like a full one."""
    assert chi_square_p(frequencies(logits, params), reference_distribution(logits, **params)) > 0.01


def test_a_long_tail_gets_its_share() -> None:
    """One token with probability 0.9 and 1,299 that share the rest. Mutation: blocks weighted by their largest logit."""
    logits = torch.full((VOCAB,), float(np.log(0.1 / (VOCAB - 1))))
    logits[700] = float(np.log(0.9))
    counts = frequencies(logits, {"temperature": 1.0})
    head = counts[700] / DRAWS
    assert abs(head - 0.9) < 3 * np.sqrt(0.09 / DRAWS)
    tail = np.delete(counts, 700)
    # Half of the tail lies on either side of the head's block as often as its size says.
    left, total = tail[:512].sum(), tail.sum()
    assert abs(left / total - 512 / (VOCAB - 1)) < 3 * np.sqrt(0.25 / total)


def test_block_and_token_are_drawn_independently() -> None:
    """Sixteen equal tokens, four each at the start of four blocks. Mutation: the same noise for blocks and tokens, which
    prefers the token whose place in its block is the block's own number."""
    logits = torch.full((4 * 512,), float("-inf"))
    logits[[512 * block + place for block in range(4) for place in range(4)]] = 0.0
    counts = frequencies(logits, {"temperature": 1.0})
    assert chi_square_p(counts, (logits == 0).numpy() / 16) > 0.01


@pytest.mark.parametrize("vocab", [3, 512, 513])
def test_vocabulary_sizes_around_the_block(vocab: int) -> None:
    """Mutation: a vocabulary that is no multiple of the block loses or repeats its last tokens."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    counts = frequencies(logits, {"temperature": 0.8})
    assert chi_square_p(counts, reference_distribution(logits, 0.8)) > 0.01


def test_truncation_with_ties_keeps_them_all() -> None:
    """Mutation: cutting a sorted list by position, which keeps an arbitrary one of equal logits."""
    scaled = torch.log(torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    scaled = scaled - scaled.max()
    kept = [
        (scaled >= truncation_threshold(scaled, torch.tensor([k]), torch.tensor([p]))[:, None]).sum().item()
        for k, p in [(2, 1.0), (0, 0.45), (0, 0.25), (0, 0.95), (9, 1.0), (0, 1.0), (1, 0.1)]
    ]
    assert kept == [4, 4, 1, 5, 5, 5, 1]


def test_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    """1,000 of 5,000 equal-ish tokens are needed. Mutation: a nucleus capped at the candidates looked at first."""
    generator = torch.Generator().manual_seed(1)
    scaled = torch.rand(2, 5000, generator=generator) * 0.1
    scaled = scaled - scaled.amax(-1, keepdim=True)
    threshold = truncation_threshold(scaled, torch.tensor([0, 0]), torch.tensor([0.2, 0.97]))
    for row, top_p in enumerate((0.2, 0.97)):
        expected = np.count_nonzero(reference_distribution(scaled[row], 1.0, top_p=top_p))
        assert abs(int((scaled[row] >= threshold[row]).sum()) - expected) <= 1


def test_rows_are_drawn_alone_or_together_bit_for_bit() -> None:
    """Mixed parameters, more rows than one chunk. Mutation: a parameter or a noise row taken from a neighbour."""
    num = 230
    rows = torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    params = RowParams(
        temperature_B=torch.linspace(0, 1.5, num),
        top_k_B=torch.arange(num) % 7 * 5,
        top_p_B=torch.where(torch.arange(num) % 3 == 0, 0.8, 1.0),
    )
    keys, steps = torch.tensor([noise_key(i) for i in range(num)]), torch.arange(num) % 11
    tokens, logprobs = sample_tokens(rows, keys, steps, params, truncated=True)
    for i in range(0, num, 13):
        one = slice(i, i + 1)
        token, logprob = sample_tokens(rows[one], keys[one], steps[one], params.select(one), truncated=True)
        assert int(token) == int(tokens[i]) and float(logprob) == float(logprobs[i])


def test_logprobs_are_untempered_and_untruncated(logits: torch.Tensor) -> None:
    """Mutation: log-probabilities of the tempered or truncated distribution."""
    rows = logits.repeat(200, 1)
    tokens, logprobs = draw(rows, row_params(200, temperature=0.5, top_k=20))
    expected = torch.log_softmax(logits.double(), -1)[tokens]
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)


def test_temperature_zero_takes_the_first_of_the_best() -> None:
    """Mutation: division by zero, or noise added to greedy rows."""
    rows = torch.zeros(64, VOCAB)
    rows[:, [77, 900]] = 1.0
    assert draw(rows, row_params(64, temperature=0.0))[0].tolist() == [77] * 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_logits_show_in_the_logprob(bad: float) -> None:
    """Mutation: a clamp or nan_to_num that turns a broken model into samples."""
    rows = torch.zeros(2, VOCAB)
    rows[0, 5] = bad
    _, logprobs = draw(rows, row_params(2))
    assert not logprobs[0].isfinite() and logprobs[1].isfinite()


def teacher_forced(model: Any, request: Request, generation: Generation) -> torch.Tensor:
    """Log-probabilities of the sampled tokens from one plain forward pass over the whole sequence."""
    ids = torch.tensor([request.prompt_ids + generation.token_ids])
    with torch.inference_mode():
        logps = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_engine_logprobs_equal_a_teacher_forced_forward(family: str) -> None:
    """Prompts shorter and longer than the sliding window, computed in pieces, decoded side by side, one batch growing.
    Mutation: a ring slot off by one, a mask one token short, a position that restarts at the response."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    requests = [
        Request(
            key=str(i),
            prompt_ids=tuple(torch.randint(3, 300, (length,), generator=generator).tolist()),
            seed=i,
            params=Sampling(max_new_tokens=90, temperature=1.0),
        )
        for i, length in enumerate((1, 8, 9, 10, 40, 130))
    ]
    engine = from_model(model, tiny_tokenizer(), BatchSettings(prefill_chunk=7))
    by_key = {g.key: g for g in engine.generate(requests)}
    assert max(len(g.token_ids) for g in by_key.values()) > 60
    for request in requests:
        generation = by_key[request.key]
        assert generation.logprobs is not None
        expected = teacher_forced(model, request, generation)
        assert torch.allclose(torch.tensor(generation.logprobs, dtype=torch.float64), expected, atol=1e-4)


def test_engine_frequencies_match_the_model() -> None:
    """Second tokens of 3,000 samples at T = 0.8. Mutation: one seed for all samples, the step left out of the counter
    (then the second token repeats the first one's noise), or a temperature applied twice."""
    model = tiny_model("qwen2", vocab_size=23, spread=0.12)
    prompt = (5, 6, 7)
    requests = [
        Request(key=str(i), prompt_ids=prompt, seed=i, params=Sampling(max_new_tokens=2, temperature=0.8))
        for i in range(3000)
    ]
    engine = from_model(model, tiny_tokenizer(), BatchSettings(max_batch_rows=512))
    pairs = [g.token_ids for g in engine.generate(requests)]
    with torch.inference_mode():
        first = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.8).softmax(-1).numpy()
        nexts = model(torch.tensor([(*prompt, t) for t in range(23)])).logits[:, -1].double()
    second = (nexts / 0.8).softmax(-1).numpy()
    joint = first[:, None] * second
    joint[2, 1:], joint[2, 0] = 0.0, first[2]  # token 2 ends the response
    counts = np.zeros((23, 23))
    for pair in pairs:
        counts[pair[0], pair[1] if len(pair) > 1 else 0] += 1
    assert chi_square_p(counts.flatten(), joint.flatten()) > 0.01
