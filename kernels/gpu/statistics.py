"""Statistics for BatchNorm on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, statistics
from ..packing import ceil_div
from .codegen import spec
from .launch import CHANNELS, kernel, launch, offset_type, values

PIECES = 256
"""Pieces of the positions whose integer sums are found at the same time."""
POSITIONS = 32
BLOCKS = 8
"""Blocks of `reference.ROW_BLOCK` positions per program."""
SMALL_LIMIT = 46340
"""Largest integer whose square fits 32 bits."""


@kernel(statistics.channel_moments)
def channel_moments(a: Arguments, var: Tensor, mean: Tensor) -> None:
    channels, count = a.acc.shape[1], a.acc.shape[0] * inner_size(a.acc)
    piece = ceil_div(ceil_div(max(count, 1), PIECES), POSITIONS) * POSITIONS
    pieces = ceil_div(max(count, 1), piece)
    sums, squares = (a.acc.new_empty(pieces, channels, dtype=torch.int64) for _ in range(2))
    made = spec("float", offset=offset_type(a.acc.numel()))
    grid, tile = (ceil_div(channels, CHANNELS), pieces), {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS}
    sizes = (count, channels, piece)
    launch(
        made, "integer_sums", grid, nhwc_memory(a.acc), sums, squares, *sizes, SMALL=a.largest <= SMALL_LIMIT, **tile
    )
    operands = (sums, squares, a.weight_scale, a.bias, var, mean)
    flags = {"BIASED": a.bias is not None, "CHANNELS": CHANNELS}
    launch(made, "moments_of_sums", grid[:1], *operands, count, channels, pieces, **flags, warps=1)


@kernel(statistics.float_moments)
def float_moments(a: Arguments, var: Tensor, mean: Tensor) -> None:
    channels, count = a.x.shape[1], a.x.shape[0] * inner_size(a.x)
    blocks = ceil_div(count, reference.ROW_BLOCK)
    sums = [a.x.new_empty(blocks, channels, dtype=torch.float64) for _ in range(2)]
    made = spec("float", offset=offset_type(a.x.numel()))
    grid = (ceil_div(channels, CHANNELS), ceil_div(blocks, BLOCKS))
    sizes, tile = (count, channels, min(count, reference.ROW_BLOCK)), {"BLOCKS": BLOCKS, "CHANNELS": CHANNELS}
    launch(made, "square_sums", grid, values(a.x), *sums, *sizes, **tile)
    operands, sizes = (*sums, var, mean), (count, channels, blocks)
    launch(made, "float_moments_of_sums", grid[:1], *operands, *sizes, CHANNELS=CHANNELS, warps=1)
