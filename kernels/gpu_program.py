"""Triton operations made from pointwise programs (program.py): a file is rendered for each.

Definitions: `reference_ops`. Nothing here waits for the device (`gpu_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .cpu_forward import CODES
from .cpu_program import operand_memory
from .gpu_codegen import spec
from .gpu_float import CHANNELS, pixel_grid, window_constants
from .gpu_forward import PIXELS, ROWS
from .gpu_launch import launch, offset_type
from .native import choice, vector
from .ops import empty_nhwc, output_size
from .packing import WORD, ceil_div

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choice("code", code, CODES)
    memory, (n, channels, *spatial) = operand_memory("fused_activation", operands, text)
    size = [*map(int, output_size(spatial, window[:2], window[2:4], window[4:6]))] if window else spatial
    like, words = memory[0], ceil_div(channels, WORD)
    bits, mask = (like.new_empty([n, *size, words], dtype=torch.int64) for _ in range(2))
    x = empty_nhwc(like, [n, channels, *size], torch.float32) if keep_values else like.new_empty(0, dtype=torch.float32)
    below = torch.empty_like(bits) if keep_below else bits.new_empty(0)
    pixels, count = bits.numel() // max(words, 1), bits.numel() // max(words, 1) * channels
    made = spec(
        "fused_activation",
        program=text,
        code=code,
        values=keep_values,
        below=keep_below,
        offset=offset_type(count, bits.numel(), *(o.numel() for o in memory)),
    )
    images = (*spatial, *size) if window else ()
    shape = window_constants(window)
    threshold = None
    if code == "threshold":
        threshold, blocks = like.new_zeros((), dtype=torch.float32), ceil_div(count, reference.BLOCK)
        sums, grid = like.new_empty(blocks, dtype=torch.float32), [ceil_div(blocks, ROWS)]
        sizes = (count, blocks, channels, *images)
        launch(made, "program_sums", grid, *memory, x if keep_values else None, sums, *sizes, **shape, BLOCKS=ROWS)
        mean = spec("activation", code=code, offset=offset_type(count))
        launch(mean, "mean_of_sums", [min(blocks, 1)], sums, threshold, blocks, count, warps=1)
    results = (threshold, x if keep_values else None, bits, mask, below if keep_below else None)
    sizes = (pixels, channels, words, *images)
    launch(made, "pack_program", pixel_grid(pixels, channels), *memory, *results, *sizes, **shape, PIXELS=PIXELS)
    return bits, mask, x, below


def fused_gradient(
    operands: Sequence[Tensor], text: str, measure: bool, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    memory, shape = operand_memory("fused_gradient", operands, text)
    like, (n, channels, *_) = memory[0], shape
    values = empty_nhwc(like, shape, torch.float32)
    rows, columns = (like.new_empty([2, size] if measure else [0], dtype=torch.float32) for size in (n, channels))
    words, pixels = ceil_div(channels, WORD), values.numel() // max(channels, 1)
    grid = (ceil_div(pixels, GRADIENT_PIXELS * PIECES), words)
    made = spec("fused_gradient", program=text, offset=offset_type(values.numel(), *(o.numel() for o in memory)))
    by_pixel, by_channel = [pixels, words] if measure else [0], [grid[0], channels] if measure else [0]
    found = [like.new_empty(size, dtype=torch.float32) for size in (by_pixel, by_pixel, by_channel, by_channel)]
    flags = {"MEASURE": measure, "SCALED": measure and weight_scale is not None}
    tile = {"PIXELS": GRADIENT_PIXELS, "PIECES": PIECES}
    outputs, sizes = (vector(weight_scale), values, *found), (pixels, channels, words)
    launch(made, "program_values", grid, *memory, *outputs, *sizes, **flags, **tile)
    if measure:
        merge = spec("groups", offset=offset_type(pixels * words, grid[0] * channels))
        inner = pixels // max(n, 1) * words
        launch(merge, "merge_extremes", [n], *found[:2], rows, n, inner, inner, 1, GROUPS=1, PIECES=1024)
        strides, blocks = (1, channels), [ceil_div(channels, CHANNELS)]
        tile = {"GROUPS": CHANNELS, "PIECES": 32}
        launch(merge, "merge_extremes", blocks, *found[2:], columns, channels, grid[0], *strides, **tile)
    return values, rows, columns
