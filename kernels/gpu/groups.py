"""Least and greatest values of rows and channels on a GPU, in pieces: for importance and for quantizing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operands import INT32_LIMIT, inner_size
from ..packing import ceil_div
from .codegen import Spec, spec
from .launch import BLOCK, CHANNELS, launch, next_power_of_2, offset_type, values

MAX_PIECES = 64
"""Pieces that the range of a group is found in at the same time."""
GROUPS = 16
POSITIONS = 64


def group_spec(g: Tensor, groups: int) -> Spec:
    return spec("groups", offset=offset_type(g.numel(), groups * MAX_PIECES))


def _pieces(size: int, block: int) -> tuple[int, int]:
    """Number of pieces of an axis, and their size, a multiple of ``block``."""
    size = max(size, 1)
    piece = ceil_div(ceil_div(size, MAX_PIECES), block) * block
    return ceil_div(size, piece), piece


def samples(g: Tensor, compact: bool) -> int:
    """Row numbers below this are used: any, where g holds the kept rows only."""
    return INT32_LIMIT if compact else g.shape[0]


def row_extremes(g: Tensor, factor: Tensor | None, rows: Tensor, compact: bool = False) -> tuple[Tensor, Tensor]:
    """float32 ``[K, pieces]`` each, of ``factor g`` on the rows."""
    size = math.prod(g.shape[1:])
    pieces, piece = _pieces(size, BLOCK)
    low, high = (g.new_empty(rows.shape[0], pieces, dtype=torch.float32) for _ in range(2))
    operands, sizes = (values(g), factor, rows, low, high), (samples(g, compact), size, g.shape[1], pieces, piece)
    grid, flags = (rows.shape[0], pieces), {"SCALED": factor is not None, "COMPACT": compact}
    launch(group_spec(g, rows.shape[0]), "row_extremes", grid, *operands, *sizes, **flags, BLOCK=BLOCK)
    return low, high


def channel_extremes(
    g: Tensor, rows: Tensor, row_scale: Tensor | None, chosen: Tensor | None, compact: bool = False
) -> tuple[Tensor, Tensor]:
    """float32 ``[C', pieces]`` each, over the rows of ``row_scale g``, of the chosen channels."""
    width = g.shape[1] if chosen is None else chosen.shape[0]
    pieces, piece = _pieces(rows.shape[0] * inner_size(g), POSITIONS)
    low, high = (g.new_empty(width, pieces, dtype=torch.float32) for _ in range(2))
    operands = (values(g), rows, row_scale, chosen, low, high)
    sizes = (samples(g, compact), rows.shape[0], inner_size(g), g.shape[1], width, pieces, piece)
    grid, tile = (ceil_div(width, CHANNELS), pieces), {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS}
    flags = {"SCALED": row_scale is not None, "SUBSET": chosen is not None, "COMPACT": compact}
    launch(group_spec(g, width), "channel_extremes", grid, *operands, *sizes, **flags, **tile)
    return low, high


def write_ranges(g: Tensor, low: Tensor, high: Tensor, importance: Tensor) -> None:
    """Greatest less least value of every group."""
    groups, pieces = low.shape
    operands, tile = (low, high, importance), {"GROUPS": GROUPS, "PIECES": next_power_of_2(pieces)}
    launch(group_spec(g, groups), "ranges", [ceil_div(groups, GROUPS)], *operands, groups, pieces, **tile)
