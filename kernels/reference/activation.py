"""Activations: the threshold, the bits and the straight-through mask (docs/math.md 1)."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ...errors import FQTWarning
from .values import as_float32, lane_sum, nhwc_rows

BLOCK = 4096
"""Elements per block of the mean of a whole tensor."""


def warn_unless_finite(x: Tensor) -> None:
    """One bit cannot carry a NaN: say so where it is noticed for free, instead of letting it vanish silently."""
    if not bool(torch.isfinite(x).all()):
        warnings.warn(
            "fqt1bit: NaN or infinite values reached a packed layer, whose bits cannot carry them; "
            "check_finite=True names the layer",
            FQTWarning,
            stacklevel=2,
        )


def activation_threshold(x: Tensor, rule: str) -> Tensor:
    """``t`` = mean of a group: of every row, float32 ``[N, 1]`` (``sample``), or of all, ``[]`` (``batch``).

    Blocks of 4096 elements of a group (NHWC order) are lane-summed in float32, the block sums are added one after the
    other in float64, divided by the number of elements and rounded to float32; 0 for an empty group.
    A row's threshold depends on no other row: predictions stand alone (math.md 1).
    """
    groups = nhwc_rows(as_float32(x))
    groups = groups if rule == "sample" else groups.reshape(1, -1)
    size = groups.shape[1]
    count = -(-size // BLOCK)
    blocks = lane_sum(torch.nn.functional.pad(groups, (0, count * BLOCK - size)).unflatten(1, (count, BLOCK)))
    total = torch.zeros(groups.shape[0], dtype=torch.float64, device=x.device)
    for k in range(count):
        total = total + blocks[:, k].to(torch.float64)
    mean = total / max(size, 1)
    return mean.to(torch.float32)[:, None] if rule == "sample" else mean.to(torch.float32)[0]


def batch_norm_threshold(
    weight: Tensor | None, bias: Tensor | None, channels: int, window: int, top: float, repeat: int
) -> Tensor:
    """``t[c]`` = E of a BatchNorm's output behind ReLU, from its parameters; float32 ``[1, channels * repeat]``.

    BatchNorm's output in training has mean beta and standard deviation |gamma| in every channel (None: 0 and 1). With
    it normally distributed, E ReLU(N(m, d**2)) = d phi(m / d) + m Phi(m / d) =: h(m, d), and h(m, d) - h(m - top, d)
    where values above ``top`` are clipped (ReLU6; infinity for ReLU). The largest of ``window`` neighbours (max-pools
    in between; 1 without) is taken as normal with m = beta + a |gamma| and d = b |gamma|, a = 0.8 sqrt(l),
    b = 1 / (1 + l / 4), l = log2(window) / 2: 2.2 times h(0, 1) for 2 x 2, which was measured (docs/math.md 1).
    In float64, rounded once. ``repeat``: features that one channel was flattened to, side by side.
    Needs no data, so it is the same for every batch, in training and in evaluation.
    """
    like = weight if weight is not None else bias
    device = None if like is None else like.device
    width = torch.ones(channels, device=device) if weight is None else weight.abs()
    mean = torch.zeros(channels, device=device) if bias is None else bias
    width, mean = width.to(torch.float64), mean.to(torch.float64)
    level = math.log2(window) / 2
    mean, width = mean + 0.8 * math.sqrt(level) * width, width / (1 + level / 4)
    t = _normal_relu(mean, width)
    if math.isfinite(top):
        t = t - _normal_relu(mean - top, width)
    return t.clamp(min=0).to(torch.float32)[:, None].expand(channels, repeat).reshape(1, channels * repeat)


def _normal_relu(mean: Tensor, width: Tensor) -> Tensor:
    """E ReLU(N(mean, width**2)) in float64; ReLU(mean) where width is 0."""
    z = mean / torch.where(width > 0, width, torch.ones_like(width))
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    below = 0.5 + 0.5 * torch.erf(z * math.sqrt(0.5))
    return torch.where(width > 0, width * density + mean * below, mean.clamp(min=0))


def threshold_of(threshold: Tensor, x: Tensor) -> Tensor:
    """A threshold ``[]``, ``[N, 1]`` (of rows) or ``[1, C]`` (of channels) that broadcasts over x ``[N, C, *S]``."""
    return threshold.view(*threshold.shape, *[1] * (x.dim() - 2)) if threshold.dim() else threshold


def activation_bits(x: Tensor, threshold: Tensor | None) -> Tensor:
    """bool ``[N, C, *S]``: the larger code value. ``sign`` code (no threshold): not x < 0; else x > t.

    -0.0 and NaN count as +1 in the sign code; NaN as 0 in the threshold code. threshold: see `threshold_of`.
    """
    if threshold is None:
        return ~(as_float32(x) < 0)
    warn_unless_finite(x)
    return as_float32(x) > threshold_of(threshold, x)


def activation_mask(x: Tensor, threshold: Tensor | None) -> Tensor:
    """The straight-through mask, bool: |x| <= 1 for ``sign``, 0 < x <= 2 max(t, 0.5) for ``threshold``."""
    x = as_float32(x)
    if threshold is None:
        return x.abs() <= 1
    return (x > 0) & (x <= 2 * torch.clamp(threshold_of(threshold, x), min=0.5))
