"""Quantizing gradients: groups of values, stochastic rounding, one group per row or channel (docs/math.md 5)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import noise
from ..packing import channels_second
from .rows import kept_gradient, kept_rows
from .values import as_float32, nhwc_rows

SMALLEST_NORMAL = 2.0**-126
"""Least float32 whose reciprocal is finite for certain."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the values v of each group ``[G]`` become codes: q = floor((v - center) inverse + u) + level in 0..top.

    The value of a code is ``scale (q - level) + center``: an exact zero has the code ``level`` where center is 0.
    """

    center: Tensor
    inverse: Tensor
    level: Tensor
    scale: Tensor


def make_groups(low: Tensor, high: Tensor, bits: int, grid: bool) -> Groups:
    """Groups of least and greatest values ``low`` and ``high``, float32 ``[G]``; B = 2**b - 1.

    grid: zero lies on the grid, since gradients are full of exact zeros. With lo = min(low, 0), hi = max(high, 0):
    level = floor(-lo / (hi - lo) B + 1/2), in 1..B-1 if lo < 0 < hi (else clamping would be biased), and
    scale = max(-lo / level, hi / (B - level)), where a level of 0 or B leaves one of the two.
    One bit cannot have both signs and zero: as without ``grid``, center = low, scale = (high - low) / B, level = 0.
    inverse = 1 / scale. A scale below 2**-126 (whose inverse would overflow) counts as 0, with inverse and level 0.
    A group whose range is not finite has scale NaN, codes 0: nothing non-finite vanishes.
    """
    top = float((1 << bits) - 1)
    zero = torch.zeros_like(low)
    lo, hi = torch.where(low < 0, low, zero), torch.where(high > 0, high, zero)
    both = (lo < 0) & (hi > 0)
    spread = hi - lo
    level = torch.where(spread > 0, ((0.0 - lo) / spread * top + 0.5).floor(), zero)
    level = torch.where(both, level.clamp(1.0, max(top - 1, 1.0)), level)
    left = torch.where(level > 0, (0.0 - lo) / level, zero)
    right = torch.where(level < top, hi / (top - level), zero)
    scale = torch.where(left > right, left, right)
    free = both if bits == 1 else torch.zeros_like(both)
    free = free if grid else torch.ones_like(both)
    center = torch.where(free, low + 0.0, zero)  # -0.0 becomes +0.0
    scale, level = torch.where(free, (high + 0.0 - center) / top, scale), torch.where(free, zero, level)
    used = scale >= SMALLEST_NORMAL
    scale, level = torch.where(used, scale, zero), torch.where(used, level, zero)
    finite = (high - low) < math.inf
    center, level = (torch.where(finite, v, zero) for v in (center, level))
    scale = torch.where(finite, scale, torch.full_like(scale, math.nan))
    inverse = torch.where(scale > 0, 1 / scale, zero)
    return Groups(center, inverse, level, scale)


def quantize_groups(
    v: Tensor, index: Tensor, keys: tuple[int, int], bits: int, extremes: Tensor | None = None, grid: bool = True
) -> tuple[Tensor, Groups, Tensor]:
    """Stochastic rounding of every row of ``v [G, n]`` to b bits: codes int64, the `Groups`, and v in steps.

    t = (v - center) inverse; q = floor(t + u) + level clamped to 0..B, u = uniform noise of the element ``index``.
    Departure: a multiplication by the rounded reciprocal instead of a division (four times cheaper; the bias is below
    2**-22 of a step). extremes: min v and max v, ``[2, G]``, where they are known.
    """
    low, high = (v.amin(1), v.amax(1)) if extremes is None else extremes
    groups = make_groups(low, high, bits, grid)
    steps = (v - groups.center[:, None]) * groups.inverse[:, None]
    least, most = -groups.level[:, None], float((1 << bits) - 1) - groups.level[:, None]
    position = steps + noise.uniform(index, keys)
    position = torch.where(position > least, position, least)  # a NaN has code 0
    position = torch.where(position < most, position, most)
    return (position.floor() + groups.level[:, None]).to(torch.int64), groups, steps


def _element_index(g: Tensor, rows: Tensor) -> Tensor:
    """NHWC position of every element of ``g[rows]`` in the whole ``g``, logical ``[K, C, *S]``."""
    size = math.prod(g.shape[1:])
    inner = torch.arange(size, device=g.device).view(1, *g.shape[2:], g.shape[1])
    return channels_second(inner + rows.to(torch.int64).view(-1, *[1] * (g.dim() - 1)) * size)


def quantize_rows(
    g: Tensor,
    weight_scale: Tensor | None,
    rows: Tensor,
    row_scale: Tensor | None,
    keys: tuple[int, int],
    bits: int,
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """PSQ: one group per kept row of ``alpha * g`` (paper, per-sample quantizer). For grad_input.

    g ``[N, C, *S]``, rows int32 ``[K]`` (-1: unused). Returns codes int64 ``[K, C, *S]``, s = scale / p_i and
    zero_point = center / p_i - s level, float32 ``[K]``: ``s q + zero_point`` is exactly 0 for an exact 0.
    Quantizing commutes with the positive factor 1/p_i. Departure from the paper: zero on the grid (`make_groups`).
    compact: g holds the kept rows only, ``[K, C, *S]``; the noise is that of their places in the whole gradient.
    extremes: least and greatest value of every row of ``alpha * g``, ``[2, N]`` (compact: ``[2, K]``), if known.
    """
    valid = rows[rows >= 0].to(torch.int64)
    kept = kept_rows(as_float32(g), rows, compact)
    if weight_scale is not None:
        kept = kept * weight_scale.view(1, -1, *[1] * (g.dim() - 2))
    codes = torch.zeros(rows.shape[0], *g.shape[1:], dtype=torch.int64, device=g.device)
    scale, zero = torch.zeros(2, rows.shape[0], device=g.device)
    if valid.numel():
        index = nhwc_rows(_element_index(g, valid))
        known = None if extremes is None else kept_rows(extremes.t(), rows, compact).t()
        flat, groups, _ = quantize_groups(nhwc_rows(kept), index, keys, bits, known, grid)
        count = valid.shape[0]
        codes[:count] = channels_second(flat.view(count, *g.shape[2:], g.shape[1]))
        factor = 1.0 if row_scale is None else row_scale[:count]
        scale[:count] = groups.scale * factor
        zero[:count] = groups.center * factor - scale[:count] * groups.level
    return codes, scale, zero


def quantize_channels(
    g: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    channels: Tensor | None,
    channel_scale: Tensor | None,
    keys: tuple[int, int],
    bits: int,
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """PCQ: one group per output channel over the kept rows of ``g / p`` (paper, per-channel quantizer).

    channels int32 ``[C']`` (-1: unused) restricts to kept channels, whose 1/p_c is folded into scale and
    zero_point. Returns codes int64 ``[K, C', *S]``, scale and zero_point float32 ``[C']``. For grad_weight.
    With ``grid`` the zero point makes the sum over a channel exact (`exact_zero_point`; departure from the paper);
    without, it is the group's center, the least value.
    ``compact`` as in `quantize_rows`. extremes: least and greatest value of every channel, ``[2, C]``, of all of
    ``g / p``, if known: for a compact g, or where every row is kept.
    """
    kept = kept_gradient(g, rows, row_scale, compact)
    index = _element_index(g, rows[rows >= 0])
    count, width = kept.shape[0], g.shape[1] if channels is None else channels.shape[0]
    codes = torch.zeros(rows.shape[0], width, *g.shape[2:], dtype=torch.int64, device=g.device)
    scale, zero = torch.zeros(2, width, device=g.device)
    used = width
    if channels is not None:
        chosen = channels[channels >= 0].to(torch.int64)
        kept, index, used = kept[:, chosen], index[:, chosen], chosen.shape[0]
        extremes = None if extremes is None else extremes[:, chosen]
    if count and used:
        values, places = (t.transpose(0, 1).flatten(1) for t in (kept, index))
        flat, groups, steps = quantize_groups(values, places, keys, bits, extremes, grid)
        codes[:count, :used] = flat.view(used, count, *g.shape[2:]).transpose(0, 1)
        factor = 1.0 if channel_scale is None else channel_scale[:used]
        point = exact_zero_point(flat, groups, steps) if grid else groups.center
        scale[:used], zero[:used] = groups.scale * factor, point * factor
    return codes, scale, zero


def exact_zero_point(codes: Tensor, groups: Groups, steps: Tensor) -> Tensor:
    """z' with ``sum of (s q + z') = sum of v`` in every group: center + s (sum t - sum q) / n, float32 ``[G]``.

    codes and steps (t, in units of s) ``[G, n]``. It is linear in the codes, so it stays unbiased; and the error of a
    product with codes of a common mean (0/1 activations) loses its largest, rank-one part (docs/math.md 5).
    t is added up in float32 in words of 64 elements, one after the other from 0, and the words in float64.
    """
    size = steps.shape[1]
    words = torch.nn.functional.pad(steps, (0, -size % 64)).unflatten(1, (-1, 64))
    sums = torch.zeros_like(words[..., 0])
    for k in range(64):
        sums = sums + words[..., k]
    total = torch.zeros_like(groups.scale, dtype=torch.float64)
    for word in sums.unbind(1):
        total = total + word.to(torch.float64)
    mean = (total - codes.sum(1).to(torch.float64)) / float(max(size, 1))
    return (groups.center.to(torch.float64) + groups.scale.to(torch.float64) * mean).to(torch.float32)
