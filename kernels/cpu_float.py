"""Native CPU operations between the products: masks as bits, BatchNorm statistics, max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .native import call, empty_nhwc, inner_size, nhwc
from .packing import WORD, ceil_div


def pack_bool(mask: Tensor) -> Tensor:
    values, (n, channels, *spatial) = native.nhwc_memory(mask), mask.shape
    words = mask.new_empty([n, *spatial, ceil_div(channels, WORD)], dtype=torch.int64)
    call("float", "pack_bool", values, n * inner_size(mask), channels, words)
    return words


def unpack_bool(words: Tensor, channels: int) -> Tensor:
    bits = native.words("words", words, channels)
    n, *spatial, word_count = bits.shape
    mask = empty_nhwc(bits, [n, channels, *spatial], torch.bool)
    call("float", "unpack_bool", bits, bits.numel() // max(1, word_count), channels, mask)
    return mask


def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    values, channels = native.nhwc_memory(acc), acc.shape[1]
    shape = [1, channels, *[1] * (acc.dim() - 2)]
    var, mean = (weight_scale.new_empty(shape, dtype=torch.float32) for _ in range(2))
    factors = (native.vector(weight_scale), native.vector(bias))
    narrow, count = acc.dtype == torch.int16, acc.shape[0] * inner_size(acc)
    call("float", "channel_moments", values, narrow, count, channels, largest, *factors, var, mean)
    return var, mean


def gradient_moments(
    g: Tensor, acc: Tensor, weight_scale: Tensor, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    channels = g.shape[1]
    total, moment = (weight_scale.new_empty(channels, dtype=torch.float32) for _ in range(2))
    narrow = acc.dtype == torch.int16
    operands = (nhwc(g), native.nhwc_memory(acc), narrow, g.shape[0] * inner_size(g), channels)
    vectors = (native.vector(weight_scale), native.vector(bias), native.vector(center))
    call("float", "gradient_moments", *operands, *vectors, total, moment)
    return total, moment


def _floats(x: Tensor) -> tuple[Tensor, bool]:
    """NHWC memory of float32 or bfloat16 values, and whether they are bfloat16."""
    half = x.dtype == torch.bfloat16
    return (native.nhwc_memory(x) if half else nhwc(x)), half


def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = (x.new_empty([1, x.shape[1], *[1] * (x.dim() - 2)], dtype=torch.float32) for _ in range(2))
    call("float", "float_moments", *_floats(x), x.shape[0] * inner_size(x), x.shape[1], var, mean)
    return var, mean


def float_gradient_moments(g: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    total, moment = (center.new_empty(g.shape[1], dtype=torch.float32) for _ in range(2))
    sizes = (g.shape[0] * inner_size(g), g.shape[1])
    call("float", "float_gradient_moments", nhwc(g), *_floats(x), *sizes, native.vector(center), total, moment)
    return total, moment


def max_pool_gradient(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    grad = empty_nhwc(g, x.shape, torch.float32)
    shape = native.geometry(
        batch=x.shape[0],
        words=0,
        channels=x.shape[1],
        input_size=x.shape[2:],
        output_size=g.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    call("float", "max_pool_gradient", nhwc(g), nhwc(x), shape, grad)
    return grad.to(g.dtype)
