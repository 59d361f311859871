"""Random numbers that depend only on a sample's seed and the position of the token, never on the batch.

Every number is a pure function of (seed, step, stage, index) through the counter-based generator Philox4x32-10, written
in torch integer arithmetic so that it gives the same bits on CPU and GPU. In: per-row keys and steps; out: standard Gumbel
noise in float64. It holds no state, and does not know what is sampled with it.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), Table 2 and the Random123 reference code.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF


def noise_key(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a seed. Hashing lets seeds be any integers: 0, 1, 2, ... give unrelated streams."""
    return struct.unpack("<II", hashlib.blake2b(str(int(seed)).encode(), digest_size=8, person=b"bvpo-noise").digest())


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words and broadcast with one another.

    The 32 x 32 bit products do not fit a signed 64-bit integer but wrap around to the right 64 bits, so the low word is
    exact, and the high word is exact once the sign that the arithmetic shift drags in is masked off.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) ^ c1 ^ k0) & _MASK32, ((product0 >> 32) ^ c3 ^ k1) & _MASK32
        c1, c3 = product1 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(keys_B2: Tensor, steps_B: Tensor, stage: int, num: int) -> Tensor:
    """Standard Gumbel noise ``[B, num]`` in float64 for draw ``stage`` of token ``steps_B`` of the samples ``keys_B2``.

    One 32-bit word makes one number, u = (word + 1/2) / 2^32, so the noise lies in [-3.14, 22.9]: events rarer than about
    2^-32 per draw are not represented.
    """
    groups = torch.arange((num + 3) // 4, device=keys_B2.device)
    step = steps_B[:, None]
    counter = (groups[None, :], step, torch.full_like(step, stage), torch.zeros_like(step))
    words = philox4x32(counter, (keys_B2[:, :1], keys_B2[:, 1:]))
    uniform = (torch.stack(words, dim=-1).flatten(1)[:, :num].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
