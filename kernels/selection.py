"""Choosing what to keep: the rows (or channels) of AGP, in float64, one row after the other.

Inclusion probabilities by water-filling: p_i = min(1, lambda R_i) with sum p_i = K, so that a kept row
scaled by 1/p_i is unbiased. The paper's p_i = N R_i / (b sum R) can exceed 1 and is then biased
(arXiv 2408.14267, AGP; departure: capped and redistributed). The order of every addition is part of the
definition: the C++ kernel does the same float64 operations in the same order.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from . import noise

NON_FINITE_IMPORTANCE = 1e300
"""A row whose importance is NaN or infinite is kept before all finite ones, so that it cannot vanish."""


def kept_count(rows: int, num: int, den: int) -> int:
    """``K = max(1, round(keep * N))`` with keep = num / den, halves rounded up; works on symbolic sizes."""
    count = (2 * rows * num + den) // (2 * den)
    return torch.sym_max(count, 1) if isinstance(rows, torch.SymInt) else max(count, 1)


def selected_size(rows: int, prune: str, keep: Fraction) -> int:
    """Length of a selection: K where the number of kept rows is fixed, N for ``none`` and ``bernoulli``."""
    return rows if prune in ("none", "bernoulli") else kept_count(rows, keep.numerator, keep.denominator)


def inclusion_probabilities(importance: list[float], count: int) -> list[float]:
    """Water-filled probabilities: p_i = min(1, lambda R_i), sum p_i = count.

    Rows are sorted by importance, largest first, ties by index. ``m`` rows are certain, where m is the
    smallest number with (count - m) R_m <= sum of R from m on. Where the rest has no importance at all, it
    shares what is left evenly (its gradient is zero and stays zero).
    """
    size = len(importance)
    if count >= size:
        return [1.0] * size
    finite = [r if math.isfinite(r) else NON_FINITE_IMPORTANCE for r in importance]
    order = sorted(range(size), key=lambda i: -finite[i])
    suffix = [0.0] * (size + 1)
    for j in range(size - 1, -1, -1):
        suffix[j] = suffix[j + 1] + finite[order[j]]
    certain = 0
    while certain < count and (count - certain) * finite[order[certain]] > suffix[certain]:
        certain += 1
    left, total = count - certain, suffix[certain]
    p = [1.0] * size
    for i in order[certain:]:
        p[i] = left * finite[i] / total if total > 0 else left / (size - certain)
    return p


def _systematic(p: list[float], count: int, keys: tuple[int, int]) -> list[int]:
    """Systematic sampling on a random permutation: exactly ``count`` rows, each with probability p_i."""
    size = len(p)
    ranks = noise.hash32(torch.arange(size), keys).tolist()
    start = float(noise.uniform(torch.tensor([size]), keys))
    picked: list[int] = []
    cumulative = 0.0
    for position, i in enumerate(sorted(range(size), key=lambda i: (ranks[i], i))):
        cumulative += p[i]
        needed = count - len(picked)
        # The second condition only repairs rounding: as many rows are left as are still needed.
        if needed and (cumulative > start + len(picked) or size - position <= needed):
            picked.append(i)
    return sorted(picked)


def _bernoulli(p: list[float], keys: tuple[int, int]) -> list[int]:
    """Independent draws; the number of kept rows varies."""
    draws = noise.uniform(torch.arange(len(p)), keys).tolist()
    return [i for i, draw in enumerate(draws) if draw < p[i]]


def _largest(importance: list[float], count: int) -> list[int]:
    """The ``count`` most important rows, ties by index."""
    finite = [r if math.isfinite(r) else NON_FINITE_IMPORTANCE for r in importance]
    return sorted(sorted(range(len(finite)), key=lambda i: -finite[i])[:count])


def select(importance: Tensor, keys: tuple[int, int], prune: str, keep: Fraction) -> tuple[Tensor, Tensor]:
    """Choose rows by importance.

    importance: float32 ``[N]``. Returns ``rows`` int32 ``[K]``, ascending, and ``scale`` float32 ``[K]`` = 1/p_i.
    ``bernoulli`` returns N entries of which the unused ones, at the end, are row -1 with scale 0.
    """
    size = importance.shape[0]
    values = importance.tolist()
    if prune == "none":
        rows, p = list(range(size)), [1.0] * size
    elif prune == "topk":
        rows, p = _largest(values, kept_count(size, keep.numerator, keep.denominator)), [1.0] * size
    elif prune == "bernoulli":
        p = inclusion_probabilities(values, kept_count(size, keep.numerator, keep.denominator))
        rows = _bernoulli(p, keys)
    elif prune == "systematic":
        count = kept_count(size, keep.numerator, keep.denominator)
        p = inclusion_probabilities(values, count)
        rows = _systematic(p, min(count, size), keys)
    else:
        raise ValueError(f"prune: got {prune!r}; accepted: 'systematic', 'bernoulli', 'topk', 'none'")
    scale = [1.0 / p[i] if p[i] > 0 else 0.0 for i in rows]
    unused = selected_size(size, prune, keep) - len(rows)
    device = importance.device
    return (
        torch.tensor(rows + [-1] * unused, dtype=torch.int32, device=device),
        torch.tensor(scale + [0.0] * unused, dtype=torch.float64, device=device).to(torch.float32),
    )
