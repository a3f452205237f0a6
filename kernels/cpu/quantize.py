"""Gradients to bit planes on the CPU."""

from __future__ import annotations

from torch import Tensor

from ..operations import Arguments, quantize
from .native import call, kernel, nhwc, stream_keys
from .rows import sizes_of


@kernel(quantize.quantize_rows)
def quantize_rows(a: Arguments, planes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    kept = (a.weight_scale, a.rows, a.rows.shape[0], a.row_scale)
    codes = (*stream_keys(a.seed, a.stream), a.bits, a.grid, a.extremes)
    sizes = (*sizes_of(a.g), a.compact)
    call("quantize", "quantize_rows", nhwc(a.g), *sizes, *kept, *codes, planes, scale, zero_point)


@kernel(quantize.quantize_channels)
def quantize_channels(a: Arguments, lanes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    kept = (a.rows, a.rows.shape[0], a.row_scale)
    chosen = (a.channels, scale.shape[0], a.channel_scale)
    codes = (*stream_keys(a.seed, a.stream), a.bits, a.grid, a.extremes)
    sizes = (*sizes_of(a.g), a.compact)
    call("quantize", "quantize_channels", nhwc(a.g), *sizes, *kept, *chosen, *codes, lanes, scale, zero_point)
