"""The counter-based noise: right bits, right distribution, and nothing of a row depends on the other rows."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from bvpo.engines.local import noise
from bvpo.engines.local.noise import gumbel_noise, noise_key, philox4x32

ONES = 0xFFFFFFFF
GOLDEN_KEY = (2129234322, 52840413)
GOLDEN_NOISE = [-0.5485240209413074, 0.028983351853614253, 0.5055809624926674]


def keys_of(*seeds: int) -> torch.Tensor:
    return torch.tensor([noise_key(seed) for seed in seeds])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Random123's published vectors. Mutation: nine rounds, swapped multipliers, or a missing mask after the shift."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def test_rows_do_not_see_one_another() -> None:
    """Mutation: a counter that runs over the whole batch, or the row number mixed into it."""
    keys, steps = keys_of(5, 6, 7, 8), torch.tensor([0, 3, 3, 90])
    together = gumbel_noise(keys, steps, 1, 50)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gumbel_noise(keys[order], steps[order], 1, 50), together[order])
    for row in range(4):
        assert torch.equal(gumbel_noise(keys[row : row + 1], steps[row : row + 1], 1, 50)[0], together[row])


def test_fewer_numbers_are_a_prefix_of_more() -> None:
    """Mutation: words laid out group after group (all first words, then all second ones)."""
    keys, steps = keys_of(1), torch.tensor([4])
    assert torch.equal(gumbel_noise(keys, steps, 0, 7), gumbel_noise(keys, steps, 0, 512)[:, :7])


@pytest.mark.parametrize("change", ["seed", "step", "stage", "index"])
def test_every_coordinate_counts(change: str) -> None:
    """Mutation: seed, step, stage or index left out of key or counter."""
    base = gumbel_noise(keys_of(1), torch.tensor([4]), 0, 64)[0]
    other = {
        "seed": gumbel_noise(keys_of(2), torch.tensor([4]), 0, 64)[0],
        "step": gumbel_noise(keys_of(1), torch.tensor([5]), 0, 64)[0],
        "stage": gumbel_noise(keys_of(1), torch.tensor([4]), 1, 64)[0],
        "index": base.roll(1),
    }[change]
    assert not torch.isin(base, other).any() if change != "index" else base.unique().numel() == 64


def test_distribution_is_standard_gumbel() -> None:
    """Kolmogorov-Smirnov at fixed seeds. Mutation: a dropped logarithm or sign, or 31 instead of 32 bits of scale."""
    draws = gumbel_noise(keys_of(*range(100)), torch.arange(100), 0, 1000).flatten()
    assert stats.kstest(draws.numpy(), "gumbel_r").pvalue > 0.01
    assert abs(float(draws.mean()) - 0.577216) < 4 * math.pi / math.sqrt(6) / math.sqrt(draws.numel())


def test_neighbouring_seeds_and_steps_are_uncorrelated() -> None:
    """Mutation: the seed added to the step (sample k at step t would equal sample k + 1 at step t - 1)."""
    grid = torch.stack([gumbel_noise(keys_of(*range(60)), torch.full((60,), step), 0, 20) for step in range(60)])
    for moved in (grid.roll(1, 0), grid.roll(1, 1), grid.roll((1, -1), (0, 1)), grid.roll(1, 2)):
        correlation = torch.corrcoef(torch.stack([grid.flatten(), moved.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(grid.numel())


@pytest.mark.parametrize(("word", "expected"), [(0, -math.log(33 * math.log(2))), (ONES, 33 * math.log(2))])
def test_extreme_words_give_finite_noise(monkeypatch: pytest.MonkeyPatch, word: int, expected: float) -> None:
    """Mutation: u computed in float32 (the largest words round to 1 and the noise to infinity), or without the half."""
    monkeypatch.setattr(noise, "philox4x32", lambda counter, key: (torch.full_like(counter[1] + counter[0], word),) * 4)
    drawn = gumbel_noise(keys_of(0), torch.tensor([0]), 0, 4)
    assert drawn.isfinite().all()
    assert float(drawn[0, 0]) == pytest.approx(expected, abs=1e-6)


def test_any_integer_is_a_seed() -> None:
    """Mutation: the seed packed into 64 bits (overflow) or its sign lost."""
    seeds = [0, 1, -1, 2**64, 2**64 + 1, -(2**200)]
    assert len({noise_key(seed) for seed in seeds}) == len(seeds)
    assert all(0 <= word <= ONES for seed in seeds for word in noise_key(seed))


def test_noise_stays_what_it_is() -> None:
    """Stored samples are reproduced from their seeds; a change here needs a new name in ``sampling.SAMPLER``."""
    assert noise_key(42) == GOLDEN_KEY
    assert gumbel_noise(keys_of(42), torch.tensor([7]), 1, 3)[0].tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-12)
