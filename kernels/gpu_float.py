"""Triton operations between the products: masks as bits, BatchNorm statistics.

Definitions: `reference_ops`. Nothing here waits for the device (`gpu_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    channels, count = x.shape[1], x.shape[0] * inner_size(x)
    var, mean = (x.new_empty([1, channels, *[1] * (x.dim() - 2)], dtype=torch.float32) for _ in range(2))
    blocks = ceil_div(count, reference.ROW_BLOCK)
    sums = [x.new_empty(blocks, channels, dtype=torch.float64) for _ in range(2)]
    made = spec("float", offset=offset_type(x.numel()))
    grid = (ceil_div(channels, CHANNELS), ceil_div(blocks, BLOCKS))
    sizes, tile = (count, channels, min(count, reference.ROW_BLOCK)), {"BLOCKS": BLOCKS, "CHANNELS": CHANNELS}
    launch(made, "square_sums", grid, values(x), *sums, *sizes, **tile)
    launch(
        made, "float_moments_of_sums", grid[:1], *sums, var, mean, count, channels, blocks, CHANNELS=CHANNELS, warps=1
    )
    return var, mean
