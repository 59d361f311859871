"""Gradients in 256 numbers: a count sketch, whose inner products estimate those of the gradients without bias.

In: the tensors of one gradient, in a fixed order. Out: 256 numbers (or as many as asked for); coordinate j was added, with
a random sign, to bucket j mod 256. Sketches made with the same seed can be added and compared: E[sketch(a) . sketch(b)] is
a . b, with a standard deviation of at most about |a| |b| sqrt(2 / 256). A larger model costs time (one pass), not memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BUCKETS = 256
_BLOCK = 1 << 18  # coordinates with independent signs; a multiple of BUCKETS, small enough for a processor's cache


class CountSketch:
    """Signs of one seed. Shards of a gradient that lie on several devices need one seed each, and their sketches add up.

    A table of random signs is reused for every block of 2^18 coordinates, from a random place and with a random sign of
    the block's own, so that products of different blocks have expectation 0 as well.
    """

    def __init__(
        self, seed: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32, buckets: int = BUCKETS
    ) -> None:
        assert _BLOCK % buckets == 0, f"{buckets} buckets do not divide a block of {_BLOCK}"
        self.buckets = buckets
        self._seed = np.random.SeedSequence(seed)
        table, _ = self._seed.spawn(2)
        bits = np.unpackbits(np.random.default_rng(table).integers(0, 256, _BLOCK // 4, dtype=np.uint8))
        self._signs = torch.from_numpy(bits).to(device=device, dtype=dtype).mul_(2).sub_(1)  # two blocks long
        self.dtype = dtype

    def __call__(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sketch of these tensors, taken as one vector; the same shapes in the same order give comparable ones."""
        places = np.random.default_rng(np.random.SeedSequence(self._seed.entropy, spawn_key=(1,)))
        total = torch.zeros(self.buckets, dtype=self.dtype, device=self._signs.device)
        for tensor in _joined(tensors):
            for block in tensor.split(_BLOCK):
                start, sign = int(places.integers(_BLOCK)), int(places.integers(2)) * 2 - 1
                signed = block.to(self.dtype) * self._signs[start : start + len(block)]
                if rest := len(signed) % self.buckets:
                    signed = F.pad(signed, (0, self.buckets - rest))
                total.add_(signed.view(-1, self.buckets).sum(0), alpha=sign)
        return total


def _joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Flat tensors; those of a small model as one, which saves most of the time there."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return [torch.cat(flat)] if sum(len(one) for one in flat) <= _BLOCK else flat
