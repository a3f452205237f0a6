"""The definition of every operation, in plain PyTorch on unpacked values. Kernels must equal it bit for bit.

Notation: N samples (or rows of a linear layer), C_i and C_o channels, ``*S`` spatial axes (0, 1 or 2), all
tensors logical ``[N, C, *S]``; wherever an order matters it is the memory order NHWC. Floating point is
float32, evaluated in the order written, without fused multiply-add. Derivations: docs/math.md.
Source: 1-bit FQT, arXiv 2408.14267; XNOR-Net, arXiv 1603.05279.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import FQTWarning
from . import noise
from .packing import channels_last, channels_second

T = TypeVar("T")
LANES = 64
"""Width of the vector a sum is defined over."""
BLOCK = 4096
"""Elements per block of the mean of a whole tensor."""
ROW_BLOCK = 1024
"""Positions per block of the sums of `gradient_moments`."""
SMALLEST_NORMAL = 2.0**-126
"""Least float32 whose reciprocal is finite for certain."""
EXACT_FLOAT32 = 1 << 24
"""Integer sums up to this bound are exact in float32 in any order."""


def as_float32(x: Tensor) -> Tensor:
    """float32 values of a float32, bfloat16 or float16 tensor (exact)."""
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def lane_sum(values: Tensor) -> Tensor:
    """The sum over the last axis, ``[..., n]`` -> ``[...]``, in one defined order.

    The axis is padded with zeros to a multiple of 64 and cut into vectors of 64 lanes; the vectors are
    added one after the other, starting from zero; then the lanes are halved: lane l += lane l + 32, 16, ... 1.
    """
    count = -(-values.shape[-1] // LANES)
    padded = torch.nn.functional.pad(values, (0, count * LANES - values.shape[-1])).unflatten(-1, (count, LANES))
    lanes = torch.zeros_like(padded[..., 0, :]) if count else values.new_zeros(*values.shape[:-1], LANES)
    for k in range(count):
        lanes = lanes + padded[..., k, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def nhwc_rows(x: Tensor) -> Tensor:
    """``[N, C, *S]`` -> ``[N, prod(S) * C]`` in NHWC order."""
    return channels_last(x).flatten(1)


# -- 1. binarizing (math.md 1) ----------------------------------------------------------------------------


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


def code_values(bits: Tensor, code: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """bits -> code values: {-1, +1} for ``sign``, {0, +1} for ``threshold``."""
    values = bits.to(dtype)
    return 2 * values - 1 if code == "sign" else values


def weight_bits(weight: Tensor) -> Tensor:
    """bool ``[C_o, C_i, *kernel]``: True where sign(W) = +1, that is, not W < 0."""
    return ~(weight < 0)


def weight_scale(weight: Tensor, mode: str) -> Tensor:
    """``alpha[c_o]`` float32: mean |W| over the channel (``xnor``, XNOR-Net section 3.1) or 1 (``none``)."""
    rows = nhwc_rows(as_float32(weight))
    if mode == "none":
        return torch.ones_like(rows[:, 0])
    return lane_sum(rows.abs()) / rows.shape[1]


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


def max_pool_gradient(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient of a 2-D max-pool of ``x [N, C, H, W]``: g ``[N, C, H', W']`` goes to the first maximum of its window.

    First in row-major order; a NaN counts as larger than everything before it. Overlapping windows add up in
    row-major order of the windows, starting from zero.
    """
    args = (list(kernel), list(stride), list(padding), [1, 1], False)
    x32, g32 = as_float32(x).contiguous(), as_float32(g).contiguous()
    _, index = torch.ops.aten.max_pool2d_with_indices(x32, *args)
    return torch.ops.aten.max_pool2d_with_indices_backward(g32, x32, *args, index).to(g.dtype)


# -- 2. products: exact integers ---------------------------------------------------------------------------


def _exact(product: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast from rounding a product of integers to bfloat16."""

    @functools.wraps(product)
    def exact(values: Tensor, *args: Any) -> T:
        with torch.autocast(values.device.type, enabled=False):
            return product(values, *args)

    return exact


def _exact_dtype(bound: int) -> torch.dtype:
    return torch.float32 if bound < EXACT_FLOAT32 else torch.float64


def _conv_args(
    stride: Sequence[int], padding: Sequence[int]
) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    spatial = len(stride)
    return list(stride), list(padding), [1] * spatial, False, [0] * spatial, 1


@_exact
def output_product(x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """``acc[n, c_o, p] = sum over taps and C_i of code(x) sign(W)``, int32; taps outside the image are skipped.

    x: code values ``[N, C_i, *S]``; w: +-1 ``[C_o, C_i, *kernel]``. Without spatial axes a matrix product.
    """
    dtype = _exact_dtype(math.prod(w.shape[1:]))
    x, w = x.to(dtype), w.to(dtype)
    if not stride:
        return (x @ w.t()).to(torch.int32)
    return torch.ops.aten.convolution(x, w, None, *_conv_args(stride, padding)).to(torch.int32)


@_exact
def grad_input_product(
    codes: Tensor, w: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``acc = sum over taps and C_o of q sign(W)`` int32 ``[K, C_i, *S]`` and ``weight_sum`` int32 ``[1, C_i, *S]``.

    codes: q in 0..2**b - 1, ``[K, C_o, *S_o]``; weight_sum is the same product with q = 1 everywhere: the factor
    of the zero point, which at border pixels counts only the taps that reach the output.
    """
    dtype = _exact_dtype(255 * math.prod(w.shape) // max(1, w.shape[1]))
    w = w.to(dtype)
    with_ones = torch.cat([codes.to(dtype), codes.new_ones(1, *codes.shape[1:], dtype=dtype)])
    if not stride:
        product = with_ones @ w
    else:
        x = with_ones.new_empty(with_ones.shape[0], w.shape[1], *input_size)
        args = (with_ones, x, w, None, *_conv_args(stride, padding), [True, False, False])
        product = torch.ops.aten.convolution_backward(*args)[0]
    return product[:-1].to(torch.int32), product[-1:].to(torch.int32)


@_exact
def grad_weight_product(
    codes: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``acc = sum over samples and positions of q code(x)`` int32 ``[C_o, C_i, *kernel]`` and ``code_sum``.

    codes: ``[K, C_o, *S_o]``; x: code values of the same K samples ``[K, C_i, *S]``; code_sum int32
    ``[1, C_i, *kernel]`` is the same product with q = 1: the factor of the zero point.
    """
    dtype = _exact_dtype(255 * codes.shape[0] * math.prod(codes.shape[2:]))
    x = x.to(dtype)
    with_ones = torch.cat([codes.to(dtype), torch.ones_like(codes[:, :1], dtype=dtype)], dim=1)
    if not stride:
        product = with_ones.t() @ x
    else:
        w = x.new_empty(with_ones.shape[1], x.shape[1], *kernel)
        args = (with_ones, x, w, None, *_conv_args(stride, padding), [False, True, False])
        product = torch.ops.aten.convolution_backward(*args)[1]
    return product[:-1].to(torch.int32), product[-1:].to(torch.int32)


# -- 3. choosing rows (math.md 4; the selection itself is in selection.py) ----------------------------------


def importance(rows: Tensor, kind: str) -> Tensor:
    """float32 ``[N]`` of ``[N, n]`` rows: L2 norm (squares lane-summed), max - min, or 1."""
    if kind == "uniform" or rows.shape[1] == 0:
        return torch.ones_like(rows[:, 0]) if rows.shape[1] else rows.new_ones(rows.shape[0])
    if kind == "norm":
        # Through float64, which rounds correctly to float32: torch's float32 sqrt may be off by one unit.
        return lane_sum(rows * rows).to(torch.float64).sqrt().to(torch.float32)
    return rows.amax(1) - rows.amin(1)


# -- 4. quantizing (math.md 5) ------------------------------------------------------------------------------


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


def kept_rows(g: Tensor, rows: Tensor, compact: bool) -> Tensor:
    """The valid rows of ``g``, ``[K_valid, C, *S]``; those it starts with where it holds no others (``compact``)."""
    valid = rows[rows >= 0].to(torch.int64)
    return g[: valid.shape[0]] if compact else g[valid]


def kept_gradient(g: Tensor, rows: Tensor, row_scale: Tensor | None, compact: bool = False) -> Tensor:
    """``g[n] / p_n`` of the valid rows, float32 ``[K_valid, C, *S]``."""
    kept = kept_rows(as_float32(g), rows, compact)
    if row_scale is None:
        return kept
    return kept * row_scale[: kept.shape[0]].view(-1, *[1] * (g.dim() - 1))


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


# -- 5. dequantizing (math.md 2 and 6) ----------------------------------------------------------------------


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """``[C]`` shaped to broadcast over ``[N, C, *S]``."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """``[N]`` shaped to broadcast over ``[N, C, *S]``."""
    return vector.view(-1, *[1] * (like.dim() - 1))


def dequantize_output(acc: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y = alpha[c_o] float(acc) + bias[c_o]``, float32."""
    y = acc.to(torch.float32) * per_channel(weight_scale, acc)
    return y if bias is None else y + per_channel(as_float32(bias), acc)


def dequantize_grad_input(
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    """``STE_mask (s_n float(acc) + z_n float(weight_sum))``, float32 ``[N, C_i, *S]``; 0 for rows not kept.

    compact: only the kept rows are returned, ``[K, C_i, *S]``, in the order of ``rows``.
    """
    values = per_row(scale, acc) * acc.to(torch.float32) + per_row(zero_point, acc) * weight_sum.to(torch.float32)
    count = int((rows >= 0).sum())
    if compact:
        values[count:] = 0
        return torch.where(mask[rows.long().clamp(min=0)], values, torch.zeros_like(values))
    grad = torch.zeros(mask.shape, dtype=torch.float32, device=acc.device)
    grad[rows[:count].to(torch.int64)] = values[:count]
    return torch.where(mask, grad, torch.zeros_like(grad))


def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    """``s_c float(acc) + z_c float(code_sum)``, float32 ``[C_o, C_i, *kernel]``; 0 for channels not kept."""
    values = per_row(scale, acc) * acc.to(torch.float32) + per_row(zero_point, acc) * code_sum.to(torch.float32)
    if channels is None:
        return values
    grad = torch.zeros(out_channels, *acc.shape[1:], device=acc.device)
    count = int((channels >= 0).sum())
    grad[channels[:count].to(torch.int64)] = values[:count]
    return grad


def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    """Gradient through ``W_hat = alpha sign(W)`` (XNOR-Net), float32 ``[C_o, C_i, *kernel]``.

    ``alpha [|W| <= 1] grad_W_hat + sign(W) mean over the channel of (grad_W_hat sign(W))``; the second term
    only for ``xnor``.
    """
    w = as_float32(weight)
    inside = per_row(weight_scale, w) * grad_hat
    grad = torch.where(w.abs() <= 1, inside, torch.zeros_like(inside))
    if mode == "none":
        return grad
    sign = code_values(weight_bits(w), "sign")
    mean = lane_sum(nhwc_rows(grad_hat * sign)) / math.prod(w.shape[1:])
    return grad + sign * per_row(mean, w)
