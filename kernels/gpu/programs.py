"""Operations made from pointwise programs on a GPU (program.py): a file is rendered for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedInputError
from .. import packing, reference
from ..operands import empty_nhwc, inner_size
from ..operations import Arguments, programs
from ..packing import INT16_LIMIT, WORD, ceil_div
from .codegen import spec
from .launch import CHANNELS, PIXELS, ROWS, kernel, launch, offset_type, pixel_grid, values
from .statistics import BLOCKS
from .sums import mean_of_sums, sums_of_groups

GRADIENT_PIXELS = 16
PIECES = 8
"""Blocks of GRADIENT_PIXELS that a program of `fused_gradient` measures one after the other."""


def _window_constants(window: Sequence[int]) -> dict[str, int]:
    """Kernel, stride and padding as compile-time constants."""
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True)) if window else {}


@kernel(programs.fused_activation)
def fused_activation(a: Arguments, bits: Tensor, mask: Tensor, values: Tensor, below: Tensor) -> None:
    (n, channels, *spatial), size, words = a.shape, bits.shape[1:-1], bits.shape[-1]
    pixels = bits.numel() // max(words, 1)
    sign, count, limits = a.code == "sign", pixels * channels, a.threshold
    made = spec(
        "fused_activation",
        program=a.text,
        code=a.code,
        known=limits is not None and not sign,
        values=a.keep_values,
        below=a.keep_below,
        offset=offset_type(count, bits.numel(), *(o.numel() for o in a.memory)),
    )
    images, shape = (*spatial, *size) if a.window else (), _window_constants(a.window)
    kept, groups = values if a.keep_values else None, 1
    if not sign and limits is None:
        groups = n if a.rule == "sample" else 1
        limits = bits.new_empty(groups, dtype=torch.float32)
        sums, sizes = sums_of_groups(bits, groups, count)
        grid, pointers = [ceil_div(sums.numel(), ROWS)], (*a.memory, kept, sums)
        launch(made, "program_sums", grid, *pointers, *sizes, channels, *images, **shape, BLOCKS=ROWS)
        mean_of_sums(sums, limits, *sizes[:3])
    results = (limits, kept, bits, mask, below if a.keep_below else None)
    places = (pixels, channels, words, pixels // max(groups, 1), *images)
    launch(made, "pack_program", pixel_grid(pixels, channels), *a.memory, *results, *places, **shape, PIXELS=PIXELS)


@kernel(programs.fused_gradient)
def fused_gradient(a: Arguments, result: Tensor, rows: Tensor, columns: Tensor) -> None:
    n, channels = result.shape[:2]
    words, pixels = ceil_div(channels, WORD), result.numel() // max(channels, 1)
    grid = (ceil_div(pixels, GRADIENT_PIXELS * PIECES), words)
    made = spec("fused_gradient", program=a.text, offset=offset_type(result.numel(), *(o.numel() for o in a.memory)))
    by_pixel, by_channel = [pixels, words] if a.measure else [0], [grid[0], channels] if a.measure else [0]
    found = [result.new_empty(size) for size in (by_pixel, by_pixel, by_channel, by_channel)]
    flags = {"MEASURE": a.measure, "SCALED": a.measure and a.weight_scale is not None}
    tile = {"PIXELS": GRADIENT_PIXELS, "PIECES": PIECES}
    outputs, sizes = (a.weight_scale, result, *found), (pixels, channels, inner_size(result), words)
    launch(made, "program_values", grid, *a.memory, *outputs, *sizes, **flags, **tile)
    if a.measure:
        merge = spec("groups", offset=offset_type(pixels * words, grid[0] * channels))
        inner = pixels // max(n, 1) * words
        launch(merge, "merge_extremes", [n], *found[:2], rows, n, inner, inner, 1, GROUPS=1, PIECES=1024)
        strides, blocks = (1, channels), [ceil_div(channels, CHANNELS)]
        tile = {"GROUPS": CHANNELS, "PIECES": 32}
        launch(merge, "merge_extremes", blocks, *found[2:], columns, channels, grid[0], *strides, **tile)


@kernel(programs.gradient_moments)
def gradient_moments(a: Arguments, total: Tensor, moment: Tensor) -> None:
    n, channels, inner = a.operands[0].shape[0], a.operands[0].shape[1], inner_size(a.operands[0])
    blocks = ceil_div(n * inner, reference.ROW_BLOCK)
    sums = [a.center.new_empty(blocks, channels, dtype=torch.float64) for _ in range(2)]
    made = spec("gradient_moments", program=a.text, offset=offset_type(*(o.numel() for o in a.memory)))
    grid = (ceil_div(channels, WORD), ceil_div(blocks, BLOCKS))
    sizes = (n * inner, channels, inner, min(n * inner, reference.ROW_BLOCK))
    launch(made, "program_product_sums", grid, *a.memory, *sums, *sizes, BLOCKS=BLOCKS)
    operands = (*sums, a.weight_scale, a.bias, a.center, total, moment)
    flags = {"SCALED": a.weight_scale is not None, "BIASED": a.bias is not None, "CHANNELS": CHANNELS}
    made, grid_of_sums = spec("float", offset=offset_type(sums[0].numel())), [ceil_div(channels, CHANNELS)]
    launch(made, "gradient_moments_of_sums", grid_of_sums, *operands, channels, blocks, **flags, warps=1)


@kernel(programs.max_pool_gradient)
def max_pool_gradient(a: Arguments, grad: Tensor) -> None:
    """One kernel finds the maximum of every window, one lets every pixel collect what is its own: no atomics."""
    if math.prod(a.kernel) > INT16_LIMIT:
        raise UnsupportedInputError(
            f"max_pool_gradient: got a window of {list(a.kernel)}; accepted: at most {INT16_LIMIT} pixels"
        )
    gradient, (n, channels, *size) = values(a.g), a.shape
    taps = torch.empty_like(gradient, dtype=torch.int16)
    result = grad if grad.dtype == torch.float32 else empty_nhwc(grad, grad.shape, torch.float32)
    made = spec("max_pool_gradient", program=a.text, offset=offset_type(grad.numel(), *(o.numel() for o in a.memory)))
    images = (channels, *size, *a.g.shape[2:])
    tile = _window_constants([*a.kernel, *a.stride, *a.padding]) | {"PIXELS": GRADIENT_PIXELS}
    windows = {f"WINDOWS_{axis}": ceil_div(k, s) for axis, k, s in zip("HW", a.kernel, a.stride, strict=True)}
    outputs, inputs, words = a.g.shape[0] * inner_size(a.g), n * math.prod(size), ceil_div(channels, WORD)
    grid, pointers = (ceil_div(outputs, GRADIENT_PIXELS), words), (*a.memory, taps)
    launch(made, "max_pool_taps", grid, *pointers, outputs, *images, **tile)
    grid, pointers = (ceil_div(inputs, GRADIENT_PIXELS), words), (gradient, taps, packing.channels_last(result))
    launch(made, "max_pool_gradient", grid, *pointers, inputs, *images, **tile, **windows)
    if result is not grad:
        grad.copy_(result)
