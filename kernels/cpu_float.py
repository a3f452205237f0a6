"""Native CPU operations between the products: masks as bits, BatchNorm statistics."""

from __future__ import annotations

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


def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.dtype == torch.bfloat16
    var, mean = (x.new_empty([1, x.shape[1], *[1] * (x.dim() - 2)], dtype=torch.float32) for _ in range(2))
    values, count = native.nhwc_memory(x) if half else nhwc(x), x.shape[0] * inner_size(x)
    call("float", "float_moments", values, half, count, x.shape[1], var, mean)
    return var, mean
