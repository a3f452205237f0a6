"""Triton operations on gradients: importance, quantizing, dequantizing. Definitions: `reference_ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .cpu_backward import KINDS, known_extremes
from .gpu_codegen import Spec, spec
from .gpu_forward import BLOCK, PIXELS
from .gpu_launch import launch, next_power_of_2, offset_type, values
from .native import INT32_LIMIT, choice, indices, inner_size, nhwc_memory, vector
from .ops import empty_nhwc
from .packing import LANE_TILE, WORD, ceil_div

MAX_PIECES = 64
"""Pieces that the range of a group is found in at the same time."""
GROUPS = 16
POSITIONS = 64
CHANNELS = 32
WORDS = 4
"""Words of positions per program."""


def _group_spec(g: Tensor, groups: int) -> Spec:
    return spec("groups", offset=offset_type(g.numel(), groups * MAX_PIECES))


def _pieces(size: int, block: int) -> tuple[int, int]:
    """Number of pieces of an axis, and their size, a multiple of ``block``."""
    size = max(size, 1)
    piece = ceil_div(ceil_div(size, MAX_PIECES), block) * block
    return ceil_div(size, piece), piece


def _samples(g: Tensor, compact: bool) -> int:
    """Row numbers below this are used: any, where g holds the kept rows only."""
    return INT32_LIMIT if compact else g.shape[0]


def _row_extremes(g: Tensor, factor: Tensor | None, rows: Tensor, compact: bool = False) -> tuple[Tensor, Tensor]:
    size = math.prod(g.shape[1:])
    pieces, piece = _pieces(size, BLOCK)
    low, high = (g.new_empty(rows.shape[0], pieces, dtype=torch.float32) for _ in range(2))
    operands = (values(g), vector(factor), rows, low, high)
    sizes = (_samples(g, compact), size, g.shape[1], pieces, piece)
    grid, flags = (rows.shape[0], pieces), {"SCALED": factor is not None, "COMPACT": compact}
    made = _group_spec(g, rows.shape[0])
    launch(made, "row_extremes", grid, *operands, *sizes, **flags, BLOCK=BLOCK)
    return low, high


def _channel_extremes(
    g: Tensor, rows: Tensor, row_scale: Tensor | None, chosen: Tensor | None, compact: bool = False
) -> tuple[Tensor, Tensor]:
    width = g.shape[1] if chosen is None else chosen.shape[0]
    pieces, piece = _pieces(rows.shape[0] * inner_size(g), POSITIONS)
    low, high = (g.new_empty(width, pieces, dtype=torch.float32) for _ in range(2))
    operands = (values(g), rows, vector(row_scale), chosen, low, high)
    sizes = (_samples(g, compact), rows.shape[0], inner_size(g), g.shape[1], width, pieces, piece)
    grid = (ceil_div(width, CHANNELS), pieces)
    flags = {"SCALED": row_scale is not None, "SUBSET": chosen is not None, "COMPACT": compact}
    made = _group_spec(g, width)
    launch(made, "channel_extremes", grid, *operands, *sizes, **flags, POSITIONS=POSITIONS, CHANNELS=CHANNELS)
    return low, high


def _ranges(g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    groups, pieces = low.shape
    importance = g.new_empty(groups, dtype=torch.float32)
    constants = {"GROUPS": GROUPS, "PIECES": next_power_of_2(pieces)}
    launch(
        _group_spec(g, groups), "ranges", [ceil_div(groups, GROUPS)], low, high, importance, groups, pieces, **constants
    )
    return importance


def row_importance(g: Tensor, kind: str) -> Tensor:
    choice("kind", kind, KINDS)
    samples, size = g.shape[0], math.prod(g.shape[1:])
    if kind == "uniform" or size == 0:
        return g.new_ones(samples, dtype=torch.float32)
    if kind == "range":
        rows = torch.arange(samples, dtype=torch.int32, device=g.device)
        return _ranges(g, *_row_extremes(g, None, rows))
    importance = g.new_empty(samples, dtype=torch.float32)
    grid = [ceil_div(samples, 2)]
    launch(_group_spec(g, samples), "row_norms", grid, values(g), importance, samples, size, ROWS=2, warps=1)
    return importance


def channel_importance(g: Tensor, rows: Tensor, row_scale: Tensor | None, kind: str) -> Tensor:
    choice("kind", kind, KINDS)
    channels = g.shape[1]
    if kind == "uniform":
        return g.new_ones(channels, dtype=torch.float32)
    if kind == "range":
        return _ranges(g, *_channel_extremes(g, indices(rows), row_scale, None))
    importance = g.new_empty(channels, dtype=torch.float32)
    operands = (values(g), indices(rows), vector(row_scale), importance)
    sizes = (g.shape[0], rows.shape[0], inner_size(g), channels)
    grid, scaled = [ceil_div(channels, CHANNELS)], row_scale is not None
    launch(_group_spec(g, channels), "channel_norms", grid, *operands, *sizes, SCALED=scaled, CHANNELS=CHANNELS)
    return importance


def _picked(known: Tensor, index: Tensor | None, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Known extremes ``[2, N]`` of the groups, by index if there is one; inf and -inf where a group is unused (-1)."""
    low, high = known if index is None else known[:, index.clamp(min=0).long()]
    if groups is not None:
        low, high = torch.where(groups >= 0, low, math.inf), torch.where(groups >= 0, high, -math.inf)
    return low.contiguous()[:, None], high.contiguous()[:, None]


# -- quantizing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """What quantizes (center, inverse, level) and dequantizes (scale and zero_point, 1/p folded in) every group."""

    center: Tensor
    inverse: Tensor
    level: Tensor
    scale: Tensor
    zero_point: Tensor


def _groups(
    g: Tensor, low: Tensor, high: Tensor, fold: Tensor | None, bits: int, *, grid: bool, by_row: bool
) -> Groups:
    groups, pieces = low.shape
    made = _group_spec(g, groups)
    results = Groups(*(g.new_empty(groups, dtype=torch.float32) for _ in range(5)))
    operands = (low, high, vector(fold), *vars(results).values(), groups, pieces, 2**bits - 1)
    constants = {"GRID": grid, "BY_ROW": by_row, "FOLD": fold is not None}
    blocks = {"GROUPS": GROUPS, "PIECES": next_power_of_2(pieces)}
    launch(made, "make_groups", [ceil_div(groups, GROUPS)], *operands, **constants, **blocks)
    return results


def quantize_rows(
    g: Tensor,
    weight_scale: Tensor | None,
    rows: Tensor,
    row_scale: Tensor | None,
    seed: Tensor,
    stream: int,
    bits: int,
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    native.require_bits("quantize_rows", bits)
    count, channels, inner = rows.shape[0], g.shape[1], inner_size(g)
    words, kept, factor = ceil_div(channels, WORD), indices(rows), vector(weight_scale)
    known = known_extremes("quantize_rows", extremes, g.shape[0])
    if known is None or not known.numel():
        low, high = _row_extremes(g, factor, kept, compact)
    else:
        low, high = _picked(known, None if compact else kept, kept)
    groups = _groups(g, low, high, row_scale, bits, grid=grid, by_row=True)
    planes = g.new_empty([bits, count, *g.shape[2:], words], dtype=torch.int64)
    made = spec("quantize", bits=bits, offset=offset_type(g.numel(), planes.numel()))
    operands = (values(g), factor, kept, groups.center, groups.inverse, groups.level, seed, stream, planes)
    sizes = (_samples(g, compact), count, inner, channels, words)
    blocks, flags = (ceil_div(count * inner, PIXELS), words), {"SCALED": factor is not None, "COMPACT": compact}
    launch(made, "quantize_rows", blocks, *operands, *sizes, **flags, PIXELS=PIXELS)
    return planes, groups.scale, groups.zero_point


def quantize_channels(
    g: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    channels: Tensor | None,
    channel_scale: Tensor | None,
    seed: Tensor,
    stream: int,
    bits: int,
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    native.require_bits("quantize_channels", bits)
    count, inner, kept = rows.shape[0], inner_size(g), indices(rows)
    chosen = None if channels is None else indices(channels)
    width = g.shape[1] if chosen is None else chosen.shape[0]
    words, tiles, factor = ceil_div(count * inner, WORD), ceil_div(width, LANE_TILE), vector(row_scale)
    known = known_extremes("quantize_channels", extremes, g.shape[1])
    if known is None or not known.numel():
        low, high = _channel_extremes(g, kept, factor, chosen, compact)
    else:
        low, high = _picked(known, chosen, chosen)
    folded = vector(channel_scale)
    groups = _groups(g, low, high, None if grid else folded, bits, grid=grid, by_row=False)
    lanes = g.new_empty([bits, tiles, words, LANE_TILE], dtype=torch.int64)
    codes = g.new_empty(words, width, dtype=torch.int32) if grid else None
    made = spec("quantize", bits=bits, offset=offset_type(g.numel(), lanes.numel()))
    gradient, sizes = (values(g), kept, factor, chosen), (_samples(g, compact), count, inner, g.shape[1], width, words)
    operands = (groups.center, groups.inverse, groups.level, seed, stream, lanes, codes)
    flags = {"SCALED": factor is not None, "SUBSET": chosen is not None, "COMPACT": compact, "CHANNELS": CHANNELS}
    blocks = (words, ceil_div(tiles * LANE_TILE, CHANNELS))
    launch(made, "quantize_channels", blocks, *gradient, *operands, *sizes, GRID=grid, **flags)
    if codes is None:
        return lanes, groups.scale, groups.zero_point
    return lanes, *_exact_zero_points(groups, gradient, codes, folded, sizes, flags)


def _exact_zero_points(
    groups: Groups,
    gradient: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    codes: Tensor,
    fold: Tensor | None,
    sizes: Sequence[int],
    flags: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, with ``fold`` in them, of channels whose ``codes [words, C']`` are added up word by word.

    gradient: values, rows, factors of rows, channels. The values are added up in a kernel of their own, whose loop
    follows the order that is defined; `quantize_channels` has the positions of a word in parallel.
    """
    words, width = codes.shape
    steps, made = torch.empty_like(codes, dtype=torch.float32), _group_spec(gradient[0], codes.numel())
    blocks = (ceil_div(words, WORDS), ceil_div(width, CHANNELS))
    launch(made, "step_sums", blocks, *gradient, groups.center, groups.inverse, steps, *sizes, **flags, WORDS=WORDS)
    scale, zero_point = (torch.empty_like(groups.scale) for _ in range(2))
    operands = (gradient[1], gradient[3], fold, groups.center, groups.scale, steps, codes, scale, zero_point)
    chosen = {"SUBSET": flags["SUBSET"], "FOLD": fold is not None, "ROWS": BLOCK, "CHANNELS": CHANNELS}
    launch(made, "exact_zero_points", blocks[1:], *operands, *sizes, **chosen, warps=1)
    return scale, zero_point


# -- dequantizing --------------------------------------------------------------------------------------------


def dequantize_rows(
    planes: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor, channels: int, size: int
) -> Tensor:
    packed = native.words("planes", planes, channels)
    bits, count, *spatial, words = packed.shape
    native.require_bits("dequantize_rows", bits)
    out, inner = empty_nhwc(scale, [size, channels, *spatial], torch.float32).zero_(), math.prod(spatial)
    made = spec("dequantize", offset=offset_type(out.numel(), packed.numel()))
    operands = (packed, vector(scale), vector(zero_point), indices(rows), out)
    sizes = (size, count, inner, channels, words, bits)
    launch(made, "dequantize_rows", (ceil_div(count * inner, PIXELS), words), *operands, *sizes, PIXELS=PIXELS)
    return out


def dequantize_grad_input(
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    samples, channels, count, inner = mask.shape[0], acc.shape[1], acc.shape[0], inner_size(acc)
    keep = native.words("mask", mask, channels, [samples, *acc.shape[2:]])
    out = empty_nhwc(scale, [count if compact else samples, *acc.shape[1:]], torch.float32)
    out = out if compact else out.zero_()
    made = spec("dequantize", offset=offset_type(out.numel(), acc.numel(), keep.numel()))
    operands = (nhwc_memory(acc), nhwc_memory(weight_sum), vector(scale), vector(zero_point), indices(rows), keep, out)
    sizes = (samples, count, inner, channels, keep.shape[-1])
    grid = (ceil_div(count * inner, PIXELS), keep.shape[-1])
    launch(made, "dequantize_grad_input", grid, *operands, *sizes, COMPACT=compact, PIXELS=PIXELS)
    return out


def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    size, subset = math.prod(acc.shape[1:]), channels is not None
    out = empty_nhwc(scale, [out_channels, *acc.shape[1:]], torch.float32)
    out = out.zero_() if subset else out
    made = spec("dequantize", offset=offset_type(out.numel(), acc.numel()))
    chosen = None if channels is None else indices(channels)
    operands = (nhwc_memory(acc), nhwc_memory(code_sum), vector(scale), vector(zero_point), chosen, out)
    grid = (acc.shape[0], ceil_div(size, BLOCK))
    launch(made, "dequantize_grad_weight", grid, *operands, out_channels, size, SUBSET=subset, BLOCK=BLOCK)
    return out
