"""BatchNorm: statistics of its input and what its backward sums (docs/math.md 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..packing import channels_last
from .values import as_float32, per_channel, per_row

ROW_BLOCK = 1024
"""Positions per block of the sums of `gradient_moments`."""


def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Variance and mean over all axes but C of ``y = alpha acc + bias``, float32 ``[1, C, 1, ...]``; for BatchNorm.

    From the exact integers S1 = sum acc and S2 = sum acc**2 over M elements, in float64:
    ``mean = alpha (S1 / M) + bias``, ``var = alpha**2 max(0, S2 / M - (S1 / M)**2)``, rounded once at the end.
    """
    values = acc.to(torch.int64).transpose(0, 1).flatten(1)
    size = float(values.shape[1])
    first, second = values.sum(1).to(torch.float64) / size, (values * values).sum(1).to(torch.float64) / size
    alpha = weight_scale.to(torch.float64)
    mean = alpha * first
    mean = mean if bias is None else mean + bias.to(torch.float64)
    var = alpha * alpha * (second - first * first).clamp(min=0)
    shape = [1, -1, *[1] * (acc.dim() - 2)]
    return var.to(torch.float32).view(shape), mean.to(torch.float32).view(shape)


def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean over all axes but C of a float ``x [N, C, *S]``, float32 ``[1, C, 1, ...]``; for BatchNorm.

    As `channel_moments` of values that are no integers: S1 = sum x and S2 = sum x**2 in float64, added up in the
    order of `gradient_moments`. A mean 10**6 times the standard deviation costs the variance 12 of its 16 digits.
    """
    values = channels_last(as_float32(x)).flatten(0, -2).to(torch.float64)
    first, second = (_blocked_sum(v) / float(values.shape[0]) for v in (values, values * values))
    var = (second - first * first).clamp(min=0)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return var.to(torch.float32).view(shape), first.to(torch.float32).view(shape)


def gradient_moments(
    g: Tensor, acc: Tensor, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum g`` and ``sum g (y - center)`` over all axes but C, with ``y = alpha acc + bias``; float32 ``[C]``.

    What BatchNorm's backward sums; acc may be floats (alpha 1, no bias: y itself). In float64: A = sum g and
    B = sum g acc, positions (NHWC order) in blocks of 1024, one after the other in a block, then block after block;
    ``A`` and ``alpha B + (bias - center) A``, rounded once.
    """
    values = channels_last(as_float32(g)).flatten(0, -2).to(torch.float64)
    products = values * channels_last(acc).flatten(0, -2).to(torch.float64)
    total, weighted = _blocked_sum(values), _blocked_sum(products)
    shift = -center.to(torch.float64) if bias is None else bias.to(torch.float64) - center.to(torch.float64)
    scaled = weighted if weight_scale is None else weight_scale.to(torch.float64) * weighted
    return total.to(torch.float32), (scaled + shift * total).to(torch.float32)


def _blocked_sum(values: Tensor) -> Tensor:
    """Sum over the first axis of ``[M, C]`` in blocks of `ROW_BLOCK`."""
    count = -(-values.shape[0] // ROW_BLOCK)
    padded = torch.nn.functional.pad(values, (0, 0, 0, count * ROW_BLOCK - values.shape[0]))
    blocks = padded.view(count, ROW_BLOCK, values.shape[1])
    partial = torch.zeros_like(blocks[:, 0])
    for k in range(min(ROW_BLOCK, values.shape[0])):
        partial = partial + blocks[:, k]
    total = values.new_zeros(values.shape[1])
    for block in partial:
        total = total + block
    return total


def batch_norm_gradient(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, eps: float, used: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm's input, weight and bias on the kept rows: a projection with their own statistics.

    g and x: the gradient of the output and the input of the K kept rows, ``[K, C, *S]``; mean and invstd ``[C]``
    float32: of the whole batch, as the forward used them. Over the n kept elements of a channel, with m and v the mean
    and variance of x, a = mean g and b = mean g (x - m):

        grad_input  = gamma invstd (g - a - (x - m) b / (v + eps))
        grad_weight = invstd sum g (x - mean),  grad_bias = sum g

    The exact gradient is orthogonal, per channel, to 1 and (up to eps) to x; so is this one, on the rows that are
    left, and with all rows kept it is the exact one (docs/math.md 8). A channel that is constant there, or a single
    element, has x - m = 0: nothing to project on, and a single element has gradient 0.
    used: bool ``[K]`` where rows may be unused (``prune="bernoulli"``): those count for nothing and get 0.
    """
    axes = [0, *range(2, g.dim())]
    g, x = as_float32(g), as_float32(x)
    if used is None:
        v, m = torch.var_mean(x, axes, correction=0, keepdim=True)
        centered, size = x - m, float(math.prod(x.shape[axis] for axis in axes))
        total, moment = g.sum(axes), (g * centered).sum(axes)
        mean_g, mean_moment = total / size, moment / size
    else:
        keep = per_row(used.to(torch.float32), x)
        count = (keep.sum() * float(math.prod(x.shape[2:]))).clamp(min=1)
        m = (x * keep).sum(axes, keepdim=True) / count
        centered, g = (x - m) * keep, g * keep
        v = (centered * centered).sum(axes, keepdim=True) / count
        total, moment = g.sum(axes), (g * centered).sum(axes)
        mean_g, mean_moment = total / count, moment / count
    slope = per_channel(mean_moment, x) / (v + eps)
    scale = invstd if weight is None else invstd * weight.to(torch.float32)
    grad = ((g - centered * slope) - per_channel(mean_g, x)) * per_channel(scale, x)
    if used is not None:
        grad = grad * keep
    return grad, (moment + (m.flatten() - mean) * total) * invstd, total
