"""Gradients to bit planes by stochastic rounding. Arithmetic: `reference.quantize` (docs/math.md 5).

g: ``[N, C, *S]``, or its kept rows ``[K, C, *S]`` (``compact``); rows and row_scale as in `rows`; seed int64 ``[]``,
``stream`` says which numbers of its noise; bits 1 to 8; ``grid``: zero is a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise, packing, reference
from ..operands import indices, inner_size, known_extremes, require_bits, require_float, vector
from ..packing import LANE_TILE, WORD, ceil_div
from .declare import Arguments, operation

PHASE = "quantizing"


def _check_rows(a: Arguments) -> None:
    require_bits("quantize_rows", a.bits)
    require_float(a.g)
    a.weight_scale, a.rows, a.row_scale = vector(a.weight_scale), indices(a.rows), vector(a.row_scale)
    a.extremes = known_extremes("quantize_rows", a.extremes, a.g.shape[0])


def _planes(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    _, c, *spatial = a.g.shape
    k = a.rows.shape[0]
    planes = a.g.new_empty([a.bits, k, *spatial, ceil_div(c, WORD)], dtype=torch.int64)
    return planes, a.g.new_empty(k, dtype=torch.float32), a.g.new_empty(k, dtype=torch.float32)


@operation(results=_planes, contract=_check_rows, phase=PHASE)
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
    """`reference.quantize_rows`: planes int64 ``[b, K, *S, ceil(C/64)]``, scale and zero point float32 ``[K]``.

    weight_scale: float32 ``[C]``, what g is multiplied with before; extremes: float32 ``[2, N]``.
    """
    groups = (noise.stream_keys(int(seed), stream), bits, compact, extremes, grid)
    codes, scale, zero = reference.quantize_rows(g, weight_scale, rows, row_scale, *groups)
    return packing.pack_planes(codes, bits), scale, zero


def _check_channels(a: Arguments) -> None:
    require_bits("quantize_channels", a.bits)
    require_float(a.g)
    a.rows, a.row_scale = indices(a.rows), vector(a.row_scale)
    a.channels = None if a.channels is None else indices(a.channels)
    a.channel_scale = vector(a.channel_scale)
    a.extremes = known_extremes("quantize_channels", a.extremes, a.g.shape[1])


def _lanes(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    c = a.g.shape[1] if a.channels is None else a.channels.shape[0]
    positions = a.rows.shape[0] * inner_size(a.g)
    lanes = a.g.new_empty([a.bits, ceil_div(c, LANE_TILE), ceil_div(positions, WORD), LANE_TILE], dtype=torch.int64)
    return lanes, a.g.new_empty(c, dtype=torch.float32), a.g.new_empty(c, dtype=torch.float32)


@operation(results=_lanes, contract=_check_channels, phase=PHASE)
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
    """`reference.quantize_channels`: lanes int64 ``[b, ceil(C'/8), W, 8]``, scale and zero point float32 ``[C']``.

    W = ceil(K prod(S) / 64). channels: int32 ``[C']`` (None: all), channel_scale float32 ``[C']``; extremes: float32
    ``[2, C]``.
    """
    groups = (channels, channel_scale, noise.stream_keys(int(seed), stream), bits, compact, extremes, grid)
    codes, scale, zero = reference.quantize_channels(g, rows, row_scale, *groups)
    return packing.pack_lanes(codes, bits), scale, zero
