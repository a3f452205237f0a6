"""Gradients to bit planes on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operands import inner_size
from ..operations import Arguments, quantize
from ..packing import LANE_TILE, ceil_div
from .codegen import spec
from .groups import GROUPS, channel_extremes, group_spec, row_extremes, samples
from .launch import BLOCK, CHANNELS, PIXELS, kernel, launch, next_power_of_2, offset_type, values

WORDS = 4
"""Words of positions per program."""


def _picked(known: Tensor, index: Tensor | None, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Known extremes ``[2, N]`` of the groups, by index if there is one; inf and -inf where a group is unused (-1)."""
    low, high = known if index is None else known[:, index.clamp(min=0).long()]
    if groups is not None:
        low, high = torch.where(groups >= 0, low, math.inf), torch.where(groups >= 0, high, -math.inf)
    return low.contiguous()[:, None], high.contiguous()[:, None]


@dataclass(frozen=True)
class Groups:
    """What quantizes (center, inverse, level) and dequantizes (scale and zero_point, 1/p folded in) every group."""

    center: Tensor
    inverse: Tensor
    level: Tensor
    scale: Tensor
    zero_point: Tensor


def _groups(
    g: Tensor,
    extremes: tuple[Tensor, Tensor],
    fold: Tensor | None,
    results: tuple[Tensor, Tensor],
    bits: int,
    *,
    grid: bool,
    by_row: bool,
) -> Groups:
    """The groups of known extremes; ``results`` are where to write scale and zero point."""
    groups, pieces = extremes[0].shape
    center, inverse, level = (g.new_empty(groups, dtype=torch.float32) for _ in range(3))
    made = Groups(center, inverse, level, *results)
    operands = (*extremes, fold, *vars(made).values(), groups, pieces, 2**bits - 1)
    constants = {"GRID": grid, "BY_ROW": by_row, "FOLD": fold is not None}
    blocks = {"GROUPS": GROUPS, "PIECES": next_power_of_2(pieces)}
    launch(group_spec(g, groups), "make_groups", [ceil_div(groups, GROUPS)], *operands, **constants, **blocks)
    return made


@kernel(quantize.quantize_rows)
def quantize_rows(a: Arguments, planes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    g, factor, words = a.g, a.weight_scale, planes.shape[-1]
    count, channels, inner = a.rows.shape[0], g.shape[1], inner_size(g)
    if a.extremes is None or not a.extremes.numel():
        extremes = row_extremes(g, factor, a.rows, a.compact)
    else:
        extremes = _picked(a.extremes, None if a.compact else a.rows, a.rows)
    groups = _groups(g, extremes, a.row_scale, (scale, zero_point), a.bits, grid=a.grid, by_row=True)
    made = spec("quantize", bits=a.bits, offset=offset_type(g.numel(), planes.numel()))
    operands = (values(g), factor, a.rows, groups.center, groups.inverse, groups.level, a.seed, a.stream, planes)
    sizes = (samples(g, a.compact), count, inner, channels, words)
    blocks, flags = (ceil_div(count * inner, PIXELS), words), {"SCALED": factor is not None, "COMPACT": a.compact}
    launch(made, "quantize_rows", blocks, *operands, *sizes, **flags, PIXELS=PIXELS)


@kernel(quantize.quantize_channels)
def quantize_channels(a: Arguments, lanes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    g, factor, chosen, width = a.g, a.row_scale, a.channels, scale.shape[0]
    count, inner, tiles, words = a.rows.shape[0], inner_size(g), lanes.shape[1], lanes.shape[2]
    if a.extremes is None or not a.extremes.numel():
        extremes = channel_extremes(g, a.rows, factor, chosen, a.compact)
    else:
        extremes = _picked(a.extremes, chosen, chosen)
    # With zero on the grid the zero point makes sums exact, which takes the codes; without, it is the group's center.
    results = (torch.empty_like(scale), torch.empty_like(scale)) if a.grid else (scale, zero_point)
    groups = _groups(g, extremes, None if a.grid else a.channel_scale, results, a.bits, grid=a.grid, by_row=False)
    codes = g.new_empty(words, width, dtype=torch.int32) if a.grid else None
    made = spec("quantize", bits=a.bits, offset=offset_type(g.numel(), lanes.numel()))
    gradient, sizes = (
        (values(g), a.rows, factor, chosen),
        (samples(g, a.compact), count, inner, g.shape[1], width, words),
    )
    operands = (groups.center, groups.inverse, groups.level, a.seed, a.stream, lanes, codes)
    flags = {"SCALED": factor is not None, "SUBSET": chosen is not None, "COMPACT": a.compact, "CHANNELS": CHANNELS}
    blocks = (words, ceil_div(tiles * LANE_TILE, CHANNELS))
    launch(made, "quantize_channels", blocks, *gradient, *operands, *sizes, GRID=a.grid, **flags)
    if codes is not None:
        _exact_zero_points(groups, gradient, codes, a.channel_scale, (scale, zero_point), sizes, flags)


def _exact_zero_points(
    groups: Groups,
    gradient: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    codes: Tensor,
    fold: Tensor | None,
    results: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    flags: dict[str, int],
) -> None:
    """Scale and zero point, with ``fold`` in them, of channels whose ``codes [words, C']`` are added up word by word.

    gradient: values, rows, factors of rows, channels. The values are added up in a kernel of their own, whose loop
    follows the order that is defined; `quantize_channels` has the positions of a word in parallel.
    """
    words, width = codes.shape
    steps, made = torch.empty_like(codes, dtype=torch.float32), group_spec(gradient[0], codes.numel())
    blocks = (ceil_div(words, WORDS), ceil_div(width, CHANNELS))
    launch(made, "step_sums", blocks, *gradient, groups.center, groups.inverse, steps, *sizes, **flags, WORDS=WORDS)
    operands = (gradient[1], gradient[3], fold, groups.center, groups.scale, steps, codes, *results)
    chosen = {"SUBSET": flags["SUBSET"], "FOLD": fold is not None, "ROWS": BLOCK, "CHANNELS": CHANNELS}
    launch(made, "exact_zero_points", blocks[1:], *operands, *sizes, **chosen, warps=1)
