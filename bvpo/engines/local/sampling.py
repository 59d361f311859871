"""From next-token logits to sampled tokens and their log-probabilities, row by row.

In: logits, per-row noise keys, steps and sampling parameters. Out: one token per row, drawn from the tempered and truncated
distribution, and its log-probability under the untempered, untruncated one. A row's result depends on that row alone.
It knows nothing of models, caches or requests.

Legend: B rows, V vocabulary, C blocks of at most 512 tokens.

The draw is Gumbel-max in two levels, first over blocks of the vocabulary (with the log-sum-exp of each block), then over the
tokens of the winning block: P(block) P(token | block) is exactly the categorical distribution, and it costs C + 512 random
numbers per token instead of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo.engines.local.noise import gumbel_noise

SAMPLER = "philox4x32-10/gumbel-max/blocks-of-512"
_BLOCK = 512
# Rows are processed a few at a time: on CPU the temporaries of a chunk then stay in cache (80 x 151,936 logits: 31 ms
# instead of 65), elsewhere it bounds their memory.
_CHUNK_ELEMENTS = {"cpu": 1 << 17}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
# Candidates looked at before the whole vocabulary is, when the nucleus of top-p is cut out.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParams:
    """Sampling parameters of B rows as tensors; ``top_k`` 0 and ``top_p`` 1 mean off, ``temperature`` 0 means greedy."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor

    def select(self, rows: slice) -> RowParams:
        return RowParams(temperature_B=self.temperature_B[rows], top_k_B=self.top_k_B[rows], top_p_B=self.top_p_B[rows])


def sample_tokens(
    logits_BV: Tensor, keys_B2: Tensor, steps_B: Tensor, params: RowParams, truncated: bool
) -> tuple[Tensor, Tensor]:
    """Draw token number ``steps_B`` of each row; returns int64 tokens ``[B]`` and float32 log-probabilities ``[B]``.

    ``truncated`` says whether any row uses top-k or top-p (known to the caller, so that no device is asked).
    """
    num_rows, vocab = logits_BV.shape
    chunk = max(1, _CHUNK_ELEMENTS.get(logits_BV.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // vocab)
    num_blocks = -(-vocab // _BLOCK)
    block_noise_BC = gumbel_noise(keys_B2, steps_B, 0, num_blocks)
    token_noise_B = gumbel_noise(keys_B2, steps_B, 1, min(_BLOCK, vocab))
    tokens, logprobs = [], []
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        some_tokens, some_logprobs = _sample_rows(
            logits_BV[rows].float(), params.select(rows), truncated, block_noise_BC[rows], token_noise_B[rows]
        )
        tokens.append(some_tokens)
        logprobs.append(some_logprobs)
    return torch.cat(tokens), torch.cat(logprobs)


def _sample_rows(
    logits_BV: Tensor, params: RowParams, truncated: bool, block_noise_BC: Tensor, token_noise_B: Tensor
) -> tuple[Tensor, Tensor]:
    greedy_B = params.temperature_B == 0
    temperature_B1 = torch.where(greedy_B, 1.0, params.temperature_B)[:, None]
    top_B, argmax_B = logits_BV.max(dim=-1)
    shifted_BV = logits_BV - top_B[:, None]
    normaliser_B = shifted_BV.exp().sum(-1).log()
    scaled_BV = shifted_BV / temperature_B1
    if truncated:
        threshold_B = truncation_threshold(scaled_BV, params.top_k_B, params.top_p_B)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < threshold_B[:, None], -torch.inf)
    drawn_B = _draw(scaled_BV, block_noise_BC, token_noise_B)
    tokens_B = torch.where(greedy_B, argmax_B, drawn_B)
    logprobs_B = shifted_BV.gather(1, tokens_B[:, None])[:, 0] - normaliser_B
    return tokens_B, logprobs_B


def _draw(scaled_BV: Tensor, block_noise_BC: Tensor, token_noise_B: Tensor) -> Tensor:
    """One token per row from softmax(scaled), whose largest entry is 0."""
    vocab = scaled_BV.shape[1]
    whole = vocab - vocab % _BLOCK
    weights_BV = scaled_BV.exp()
    sums = [weights_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)] if whole else []
    if whole < vocab:
        sums.append(weights_BV[:, whole:].sum(-1, keepdim=True))
    block_B = (torch.cat(sums, dim=1).double().log() + block_noise_BC).argmax(-1)
    offsets = torch.arange(token_noise_B.shape[1], device=scaled_BV.device)
    members = block_B[:, None] * _BLOCK + offsets
    inside = members < vocab
    candidates = scaled_BV.gather(1, members.clamp(max=vocab - 1)).double() + token_noise_B
    return members.gather(1, candidates.masked_fill(~inside, -torch.inf).argmax(-1, keepdim=True))[:, 0]


def truncation_threshold(scaled_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Per row, the smallest scaled logit that top-k and then top-p keep; tokens that tie with it are all kept.

    Keeping ties makes the kept set a function of the probabilities alone: a sort would have to order equal logits, and
    would order them differently from one batch or device to the next.
    """
    vocab = scaled_BV.shape[1]
    k_B = torch.where(top_k_B == 0, vocab, top_k_B).clamp(max=vocab)
    widest = int(top_k_B.max())
    candidates = min(vocab, max(_FIRST_CANDIDATES, widest))
    threshold_B = torch.empty(scaled_BV.shape[0], dtype=scaled_BV.dtype, device=scaled_BV.device)
    open_rows = torch.arange(scaled_BV.shape[0], device=scaled_BV.device)
    while open_rows.numel():
        found, settled = _threshold_among(scaled_BV[open_rows], k_B[open_rows], top_p_B[open_rows], candidates)
        threshold_B[open_rows[settled]] = found[settled]
        open_rows = open_rows[~settled]
        candidates = min(vocab, candidates * 16)
    return threshold_B


def _threshold_among(scaled_BV: Tensor, k_B: Tensor, top_p_B: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The thresholds, and for which rows the ``num_candidates`` most probable tokens were enough to find them."""
    vocab = scaled_BV.shape[1]
    top = scaled_BV.topk(num_candidates, dim=-1).values
    weights = top.double().exp()
    ranks = torch.arange(num_candidates, device=top.device)
    below_k = ranks < k_B[:, None]
    # top-p is a share of what top-k left; without top-k that is the whole vocabulary.
    limited_B = k_B <= num_candidates
    total_B = torch.where(limited_B, (weights * below_k).sum(-1), scaled_BV.exp().sum(-1).double())
    before = weights.cumsum(-1) - weights
    kept = (below_k & (before < (top_p_B.double() * total_B)[:, None])).sum(-1).clamp(min=1)
    settled = limited_B | (kept < num_candidates) | (num_candidates == vocab)
    threshold_B = top.gather(1, (kept - 1)[:, None])[:, 0]
    # A row with neither truncation keeps everything, whatever rounding did to its sums.
    everything = (k_B == vocab) & (top_p_B >= 1)
    return threshold_B.masked_fill(everything, -torch.inf), settled | everything
