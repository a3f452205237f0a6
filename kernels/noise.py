"""The only source of randomness: a counter-based hash, the same in PyTorch, C++ and Triton.

Element ``i`` of a stream with keys ``(k0, k1)`` has, in 32-bit unsigned arithmetic,

    x = (i ^ k0) * C0;  x ^= x >> 16;  x *= C1;  x ^= x >> 15;  x += k1;  x *= C2;  x ^= x >> 16
    u = (x >> 8) * 2**-24                                  # uniform in [0, 1), exact in float32

The keys come from ``splitmix64`` of the step's seed and the stream number, so two streams differ in both.
Quality (``tests/test_noise.py``): Kolmogorov-Smirnov, chi-square on 4096 bins and on 64x64 pairs, serial
correlation at lags 1..4096 and correlation between streams are all within their expected spread. With two
multiplications instead of three, serial correlation at 2**20 draws was 4.8 standard errors; so three.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

MULTIPLIERS = (0x9E3779B1, 0x7FEB352D, 0x846CA68B)
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
ROLES_PER_SITE = 8
SEEDS = 2**62
"""Seeds are drawn below this."""
RANK_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, so that no two ranks have the same product below 2**62."""


class Role(enum.IntEnum):
    """What a stream is used for inside one site."""

    SELECT_ROWS = 0
    QUANTIZE_ROWS = 1
    QUANTIZE_CHANNELS = 2
    SELECT_CHANNELS = 3


STEP_STREAM = 0
"""The stream that chooses rows once per step (``scope="step"``); sites count from 1."""


def stream_of(site: int, role: Role) -> int:
    """The stream number of a site (0-based position in forward order) and a role."""
    return (site + 1) * ROLES_PER_SITE + int(role)


def splitmix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): a bijective 64-bit mix."""
    z = (value + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def rank() -> int:
    """The number of this process in torch.distributed's default group; 0 where there is none."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def rank_bits(rank: int) -> int:
    """The bits in which a rank's seeds differ from those of rank 0, which has none.

    Processes that train together are often seeded alike. With equal noise their errors would be correlated, and
    averaging gradients would gain less: nothing on equal data (docs/math.md, section 10).
    """
    return rank * RANK_MULTIPLIER % SEEDS


def draw_seed(device: torch.device) -> Tensor:
    """int64 ``[]``: the seed of a step, from torch's default generator of ``device`` and this process's rank."""
    return torch.randint(0, SEEDS, (), device=device) ^ rank_bits(rank())


def stream_keys(seed: int, stream: int) -> tuple[int, int]:
    """The two 32-bit keys of a stream: ``splitmix64(splitmix64(seed) ^ stream)``, low and high half."""
    mixed = splitmix64(splitmix64(seed & MASK64) ^ stream)
    return mixed & MASK32, mixed >> 32


def hash32(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """The 32-bit hash of every element of ``index`` (int64, taken modulo 2**32), as int64 in [0, 2**32)."""
    k0, k1 = keys
    x = (index & MASK32) ^ k0
    x = (x * MULTIPLIERS[0]) & MASK32
    x = x ^ (x >> 16)
    x = (x * MULTIPLIERS[1]) & MASK32
    x = x ^ (x >> 15)
    x = (x + k1) & MASK32
    x = (x * MULTIPLIERS[2]) & MASK32
    return x ^ (x >> 16)


def uniform(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """Uniform float32 noise in [0, 1), multiples of 2**-24, for every element of ``index``."""
    return (hash32(index, keys) >> 8).to(torch.float32) * 2.0**-24
