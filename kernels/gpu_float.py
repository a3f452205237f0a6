"""Triton operations between the products: masks as bits, BatchNorm statistics, max-pooling.

Definitions: `reference_ops`. Nothing here waits for the device (`gpu_forward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import native, packing, reference
from .gpu_codegen import spec
from .gpu_forward import PIXELS
from .gpu_launch import as_integers, launch, offset_type, values
from .native import inner_size, nhwc_memory, vector
from .ops import empty_nhwc
from .packing import WORD, ceil_div

PIECES = 256
"""Pieces of the positions whose integer sums are found at the same time."""
POSITIONS = 32
CHANNELS = 32
BLOCKS = 8
"""Blocks of `reference.ROW_BLOCK` positions per program."""
SMALL_LIMIT = 46340
"""Largest integer whose square fits 32 bits."""


def pixel_grid(pixels: int, channels: int) -> tuple[int, int]:
    return ceil_div(pixels, PIXELS), ceil_div(channels, WORD)


def window_constants(window: Sequence[int]) -> dict[str, int]:
    """Kernel, stride and padding as compile-time constants."""
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True)) if window else {}


# -- masks ---------------------------------------------------------------------------------------------------


def pack_bool(mask: Tensor) -> Tensor:
    n, channels, *spatial = mask.shape
    words = mask.new_empty([n, *spatial, ceil_div(channels, WORD)], dtype=torch.int64)
    pixels = n * inner_size(mask)
    made = spec("float", offset=offset_type(mask.numel(), words.numel()))
    operands, sizes = (as_integers(nhwc_memory(mask)), words), (pixels, channels, words.shape[-1])
    launch(made, "pack_bool", pixel_grid(pixels, channels), *operands, *sizes, PIXELS=PIXELS)
    return words


def unpack_bool(words: Tensor, channels: int) -> Tensor:
    bits = native.words("words", words, channels)
    n, *spatial, count = bits.shape
    mask = empty_nhwc(bits, [n, channels, *spatial], torch.bool)
    pixels = bits.numel() // max(1, count)
    made = spec("float", offset=offset_type(mask.numel(), bits.numel()))
    operands, sizes = (bits, as_integers(packing.channels_last(mask))), (pixels, channels, count)
    launch(made, "unpack_bool", pixel_grid(pixels, channels), *operands, *sizes, PIXELS=PIXELS)
    return mask


# -- statistics ----------------------------------------------------------------------------------------------


def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    memory, channels, count = nhwc_memory(acc), acc.shape[1], acc.shape[0] * inner_size(acc)
    shape = [1, channels, *[1] * (acc.dim() - 2)]
    var, mean = (weight_scale.new_empty(shape, dtype=torch.float32) for _ in range(2))
    piece = ceil_div(ceil_div(max(count, 1), PIECES), POSITIONS) * POSITIONS
    pieces = ceil_div(max(count, 1), piece)
    sums, squares = (acc.new_empty(pieces, channels, dtype=torch.int64) for _ in range(2))
    made = spec("float", offset=offset_type(acc.numel()))
    grid, tile = (ceil_div(channels, CHANNELS), pieces), {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS}
    sizes = (count, channels, piece)
    launch(made, "integer_sums", grid, memory, sums, squares, *sizes, SMALL=largest <= SMALL_LIMIT, **tile)
    operands = (sums, squares, vector(weight_scale), vector(bias), var, mean)
    flags = {"BIASED": bias is not None, "CHANNELS": CHANNELS}
    launch(made, "moments_of_sums", grid[:1], *operands, count, channels, pieces, **flags, warps=1)
    return var, mean


def _product_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``[blocks, C]``: sums of g and of g x over blocks of positions."""
    channels, count = g.shape[1], g.shape[0] * inner_size(g)
    blocks = ceil_div(count, reference.ROW_BLOCK)
    totals, products = (g.new_empty(blocks, channels, dtype=torch.float64) for _ in range(2))
    made = spec("float", offset=offset_type(g.numel()))
    grid = (ceil_div(channels, CHANNELS), ceil_div(blocks, BLOCKS))
    sizes, tile = (count, channels, min(count, reference.ROW_BLOCK)), {"BLOCKS": BLOCKS, "CHANNELS": CHANNELS}
    memory = (values(g), values(x) if x.is_floating_point() else nhwc_memory(x))
    launch(made, "product_sums", grid, *memory, totals, products, *sizes, **tile)
    return totals, products


def gradient_moments(
    g: Tensor, acc: Tensor, weight_scale: Tensor, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    return _gradient_moments(g, acc, weight_scale, bias, center)


def float_gradient_moments(g: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient_moments(g, x, None, None, center)


def _gradient_moments(
    g: Tensor, x: Tensor, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    total, moment = (center.new_empty(g.shape[1], dtype=torch.float32) for _ in range(2))
    sums = _product_sums(g, x)
    blocks, channels = sums[0].shape
    operands = (*sums, vector(weight_scale), vector(bias), vector(center), total, moment)
    flags = {"SCALED": weight_scale is not None, "BIASED": bias is not None, "CHANNELS": CHANNELS}
    made, grid = spec("float", offset=offset_type(sums[0].numel())), [ceil_div(channels, CHANNELS)]
    launch(made, "gradient_moments_of_sums", grid, *operands, channels, blocks, **flags, warps=1)
    return total, moment


def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = (x.new_empty([1, x.shape[1], *[1] * (x.dim() - 2)], dtype=torch.float32) for _ in range(2))
    sums = _product_sums(x, x)
    blocks, channels = sums[0].shape
    made, grid = spec("float", offset=offset_type(sums[0].numel())), [ceil_div(channels, CHANNELS)]
    sizes = (x.shape[0] * inner_size(x), channels, blocks)
    launch(made, "float_moments_of_sums", grid, *sums, var, mean, *sizes, CHANNELS=CHANNELS, warps=1)
    return var, mean


# -- max-pooling ---------------------------------------------------------------------------------------------


def max_pool_gradient(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """One kernel finds the maximum of every window, one lets every pixel collect what is its own: no atomics."""
    if math.prod(kernel) > packing.INT16_LIMIT:
        raise UnsupportedInputError(
            f"max_pool_gradient: got a window of {list(kernel)}; accepted: at most {packing.INT16_LIMIT} pixels"
        )
    memory, gradient = values(x), values(g)
    taps = torch.empty_like(gradient, dtype=torch.int16)
    grad = empty_nhwc(g, x.shape, torch.float32)
    made = spec("float", offset=offset_type(x.numel(), g.numel()))
    images = (x.shape[1], *x.shape[2:], *g.shape[2:])
    tile = window_constants([*kernel, *stride, *padding]) | {"PIXELS": POSITIONS, "CHANNELS": CHANNELS}
    windows = {f"WINDOWS_{axis}": ceil_div(k, s) for axis, k, s in zip("HW", kernel, stride, strict=True)}
    outputs, inputs = g.shape[0] * inner_size(g), x.shape[0] * inner_size(x)
    columns = ceil_div(x.shape[1], CHANNELS)
    launch(made, "max_pool_taps", (ceil_div(outputs, POSITIONS), columns), memory, taps, outputs, *images, **tile)
    operands, grid = (gradient, taps, packing.channels_last(grad)), (ceil_div(inputs, POSITIONS), columns)
    launch(made, "max_pool_gradient", grid, *operands, inputs, *images, **tile, **windows)
    return grad.to(g.dtype)
