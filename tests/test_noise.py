"""The noise hash: the quality the docstring of kernels/noise.py claims, and the definition itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fqt_compile.kernels import noise

COUNT = 1 << 18
INDEX = torch.arange(COUNT)


def test_known_values():
    keys = noise.stream_keys(0, 0)
    x = (5 ^ keys[0]) * noise.MULTIPLIERS[0] & noise.MASK32
    x ^= x >> 16
    x = x * noise.MULTIPLIERS[1] & noise.MASK32
    x ^= x >> 15
    x = (x + keys[1]) * noise.MULTIPLIERS[2] & noise.MASK32
    x ^= x >> 16
    assert noise.hash32(torch.tensor([5]), keys).item() == x
    assert noise.uniform(torch.tensor([5]), keys).item() == (x >> 8) / 2**24


def test_index_wraps_at_32_bits():
    keys = noise.stream_keys(1, 2)
    assert torch.equal(noise.hash32(INDEX[:10], keys), noise.hash32(INDEX[:10] + 2**32, keys))


@pytest.mark.parametrize("stream", range(6))
def test_uniformity_and_serial_correlation(stream):
    u = noise.uniform(INDEX, noise.stream_keys(1234, stream)).double()
    assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / COUNT)
    counts = torch.bincount((u * 4096).long(), minlength=4096).double()
    expected = COUNT / 4096
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 4095) < 5 * math.sqrt(2 * 4095)
    centered = (u - u.mean()) / u.std()
    for lag in (1, 2, 3, 16, 64, 256, 4096):
        correlation = (centered[:-lag] * centered[lag:]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(COUNT - lag), lag


def test_streams_are_uncorrelated():
    streams = [noise.uniform(INDEX, noise.stream_keys(7, stream)).double() for stream in range(8)]
    for a, b in itertools.combinations(streams, 2):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(COUNT)


def test_streams_of_sites_and_roles_differ():
    streams = {noise.stream_of(site, role) for site in range(50) for role in noise.Role}
    assert len(streams) == 50 * len(noise.Role)
    assert noise.STEP_STREAM not in streams
    assert max(noise.Role) < noise.ROLES_PER_SITE


def test_ranks_draw_different_seeds_from_one_generator(monkeypatch):
    def drawn(rank: int) -> int:
        monkeypatch.setattr(noise, "rank", lambda: rank)
        torch.manual_seed(3)
        return int(noise.draw_seed(torch.device("cpu")))

    torch.manual_seed(3)
    seed = int(torch.randint(0, 2**62, ()))
    assert drawn(0) == seed  # as without a process group
    assert drawn(5) == seed ^ (5 * 0x9E3779B97F4A7C15 % 2**62)
    seeds = [drawn(rank) for rank in range(100)]
    assert len({*seeds}) == 100
    assert all(0 <= seed < noise.SEEDS for seed in seeds)


def test_noise_of_ranks_is_uncorrelated():
    ranks = [noise.uniform(INDEX, noise.stream_keys(7 ^ noise.rank_bits(rank), 1)).double() for rank in range(8)]
    for a, b in itertools.combinations(ranks, 2):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / math.sqrt(COUNT)
