"""Triton operations made from pointwise programs (program.py): a file is rendered for each.

Definitions: `reference_ops`. Nothing here waits for the device (`gpu_forward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import packing, reference
from .cpu_forward import CODES, RULES
from .cpu_program import known_threshold, operand_memory
from .gpu_codegen import spec
from .gpu_float import BLOCKS, CHANNELS, pixel_grid, window_constants
from .gpu_forward import PIXELS, ROWS, mean_of_sums, sums_of_groups
from .gpu_launch import launch, offset_type, values
from .native import choice, inner_size, vector
from .ops import empty_nhwc, output_size
from .packing import INT16_LIMIT, WORD, ceil_div

GRADIENT_PIXELS = 16
PIECES = 8
"""Blocks of GRADIENT_PIXELS that a program of `fused_gradient` measures one after the other."""


def fused_activation(
    operands: Sequence[Tensor],
    text: str,
    code: str,
    window: Sequence[int],
    keep_values: bool,
    keep_below: bool,
    after: Tensor | None = None,
    threshold: Tensor | None = None,
    rule: str = "sample",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sign, by_sample = bool(choice("code", code, CODES)), bool(choice("rule", rule, RULES))
    memory, (n, channels, *spatial) = operand_memory("fused_activation", operands, text)
    size = [*map(int, output_size(spatial, window[:2], window[2:4], window[4:6]))] if window else spatial
    like, words = memory[0], ceil_div(channels, WORD)
    bits, mask = (like.new_empty([n, *size, words], dtype=torch.int64) for _ in range(2))
    x = empty_nhwc(like, [n, channels, *size], torch.float32) if keep_values else like.new_empty(0, dtype=torch.float32)
    below = torch.empty_like(bits) if keep_below else bits.new_empty(0)
    pixels, count = bits.numel() // max(words, 1), bits.numel() // max(words, 1) * channels
    limits = known_threshold(threshold, channels)
    made = spec(
        "fused_activation",
        program=text,
        code=code,
        known=limits is not None and not sign,
        values=keep_values,
        below=keep_below,
        offset=offset_type(count, bits.numel(), *(o.numel() for o in memory)),
    )
    images, shape, kept = (*spatial, *size) if window else (), window_constants(window), x if keep_values else None
    groups = 1
    if not sign and limits is None:
        groups = n if by_sample else 1
        limits = like.new_empty(groups, dtype=torch.float32)
        sums, sizes = sums_of_groups(like, groups, count)
        grid, pointers = [ceil_div(sums.numel(), ROWS)], (*memory, kept, sums)
        launch(made, "program_sums", grid, *pointers, *sizes, channels, *images, **shape, BLOCKS=ROWS)
        mean_of_sums(sums, limits, *sizes[:3])
    results = (limits, kept, bits, mask, below if keep_below else None)
    places = (pixels, channels, words, pixels // max(groups, 1), *images)
    launch(made, "pack_program", pixel_grid(pixels, channels), *memory, *results, *places, **shape, PIXELS=PIXELS)
    return bits, mask, x, below


def fused_gradient(
    operands: Sequence[Tensor], text: str, measure: bool, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    memory, shape = operand_memory("fused_gradient", operands, text)
    like, (n, channels, *_) = memory[0], shape
    result = empty_nhwc(like, shape, torch.float32)
    rows, columns = (like.new_empty([2, size] if measure else [0], dtype=torch.float32) for size in (n, channels))
    words, pixels = ceil_div(channels, WORD), result.numel() // max(channels, 1)
    grid = (ceil_div(pixels, GRADIENT_PIXELS * PIECES), words)
    made = spec("fused_gradient", program=text, offset=offset_type(result.numel(), *(o.numel() for o in memory)))
    by_pixel, by_channel = [pixels, words] if measure else [0], [grid[0], channels] if measure else [0]
    found = [like.new_empty(size, dtype=torch.float32) for size in (by_pixel, by_pixel, by_channel, by_channel)]
    flags = {"MEASURE": measure, "SCALED": measure and weight_scale is not None}
    tile = {"PIXELS": GRADIENT_PIXELS, "PIECES": PIECES}
    outputs, sizes = (vector(weight_scale), result, *found), (pixels, channels, inner_size(result), words)
    launch(made, "program_values", grid, *memory, *outputs, *sizes, **flags, **tile)
    if measure:
        merge = spec("groups", offset=offset_type(pixels * words, grid[0] * channels))
        inner = pixels // max(n, 1) * words
        launch(merge, "merge_extremes", [n], *found[:2], rows, n, inner, inner, 1, GROUPS=1, PIECES=1024)
        strides, blocks = (1, channels), [ceil_div(channels, CHANNELS)]
        tile = {"GROUPS": CHANNELS, "PIECES": 32}
        launch(merge, "merge_extremes", blocks, *found[2:], columns, channels, grid[0], *strides, **tile)
    return result, rows, columns


def gradient_moments(
    operands: Sequence[Tensor], text: str, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    memory, (n, channels, *_) = operand_memory("gradient_moments", operands, text)
    inner = inner_size(operands[0])
    blocks = ceil_div(n * inner, reference.ROW_BLOCK)
    sums = [center.new_empty(blocks, channels, dtype=torch.float64) for _ in range(2)]
    made = spec("gradient_moments", program=text, offset=offset_type(*(o.numel() for o in memory)))
    grid = (ceil_div(channels, WORD), ceil_div(blocks, BLOCKS))
    sizes = (n * inner, channels, inner, min(n * inner, reference.ROW_BLOCK))
    launch(made, "program_product_sums", grid, *memory, *sums, *sizes, BLOCKS=BLOCKS)
    total, moment = (center.new_empty(channels, dtype=torch.float32) for _ in range(2))
    vectors = (vector(weight_scale), vector(bias), vector(center))
    flags = {"SCALED": weight_scale is not None, "BIASED": bias is not None, "CHANNELS": CHANNELS}
    made, grid_of_sums = spec("float", offset=offset_type(sums[0].numel())), [ceil_div(channels, CHANNELS)]
    launch(
        made,
        "gradient_moments_of_sums",
        grid_of_sums,
        *sums,
        *vectors,
        total,
        moment,
        channels,
        blocks,
        **flags,
        warps=1,
    )
    return total, moment


def max_pool_gradient(
    g: Tensor,
    operands: Sequence[Tensor],
    text: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """One kernel finds the maximum of every window, one lets every pixel collect what is its own: no atomics."""
    if math.prod(kernel) > INT16_LIMIT:
        raise UnsupportedInputError(
            f"max_pool_gradient: got a window of {list(kernel)}; accepted: at most {INT16_LIMIT} pixels"
        )
    memory, shape = operand_memory("max_pool_gradient", operands, text)
    gradient = values(g)
    taps = torch.empty_like(gradient, dtype=torch.int16)
    grad = empty_nhwc(g, shape, torch.float32)
    made = spec("max_pool_gradient", program=text, offset=offset_type(grad.numel(), *(o.numel() for o in memory)))
    images = (shape[1], *shape[2:], *g.shape[2:])
    tile = window_constants([*kernel, *stride, *padding]) | {"PIXELS": GRADIENT_PIXELS}
    windows = {f"WINDOWS_{axis}": ceil_div(k, s) for axis, k, s in zip("HW", kernel, stride, strict=True)}
    outputs, inputs, words = g.shape[0] * inner_size(g), shape[0] * math.prod(shape[2:]), ceil_div(shape[1], WORD)
    launch(made, "max_pool_taps", (ceil_div(outputs, GRADIENT_PIXELS), words), *memory, taps, outputs, *images, **tile)
    pointers, grid = (gradient, taps, packing.channels_last(grad)), (ceil_div(inputs, GRADIENT_PIXELS), words)
    launch(made, "max_pool_gradient", grid, *pointers, inputs, *images, **tile, **windows)
    return grad.to(g.dtype)
