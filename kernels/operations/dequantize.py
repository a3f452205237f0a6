"""Codes and integer products back to float32, NHWC. Arithmetic: `reference.dequantize` (docs/math.md 2 and 6).

scale and zero_point: float32, of every group; rows as in `rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing, reference
from ..operands import Size, empty_nhwc, indices, require_bits, vector, words
from ..packing import stored_nhwc
from .declare import Arguments, operation
from .rows import scatter_rows

PHASE = "quantizing"


def _check_rows(a: Arguments) -> None:
    a.planes = words("planes", a.planes, a.channels)
    require_bits("dequantize_rows", a.planes.shape[0])
    a.scale, a.zero_point, a.rows = vector(a.scale), vector(a.zero_point), indices(a.rows)


@operation(
    results=lambda a: empty_nhwc(a.scale, [a.size, a.channels, *a.planes.shape[2:-1]], torch.float32),
    contract=_check_rows,
    phase=PHASE,
)
def dequantize_rows(
    planes: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor, channels: int, size: Size
) -> Tensor:
    """``s q + z`` of planes ``[b, K, *S, ceil(C/64)]`` at their ``rows``: float32 ``[size, C, *S]``, 0 elsewhere."""
    codes = packing.unpack_planes(planes, channels)
    values = reference.per_row(scale, codes) * codes.to(torch.float32) + reference.per_row(zero_point, codes)
    full: Tensor = scatter_rows(values, rows, size)
    return full


def _check_grad_input(a: Arguments) -> None:
    a.mask = words("mask", a.mask, a.acc.shape[1], [a.mask.shape[0], *a.acc.shape[2:]])
    a.scale, a.zero_point, a.rows = vector(a.scale), vector(a.zero_point), indices(a.rows)


def _grad_input(a: Arguments) -> Tensor:
    rows = a.acc.shape[0] if a.compact else a.mask.shape[0]
    return empty_nhwc(a.scale, [rows, *a.acc.shape[1:]], torch.float32)


@operation(results=_grad_input, contract=_check_grad_input, phase=PHASE, role="grad_input")
def dequantize_grad_input(
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    """`reference.dequantize_grad_input` of acc int32 ``[K, C, *S]``: float32 ``[N, C, *S]``, or ``[K, C, *S]``.

    mask: rows ``[N, *S, ceil(C/64)]``.
    """
    keep = packing.unpack_rows(mask, acc.shape[1])
    return stored_nhwc(reference.dequantize_grad_input(acc, weight_sum, scale, zero_point, rows, keep, compact))


def _check_grad_weight(a: Arguments) -> None:
    a.scale, a.zero_point = vector(a.scale), vector(a.zero_point)
    a.channels = None if a.channels is None else indices(a.channels)


@operation(
    results=lambda a: empty_nhwc(a.scale, [a.out_channels, *a.acc.shape[1:]], torch.float32),
    contract=_check_grad_weight,
    phase=PHASE,
)
def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    """`reference.dequantize_grad_weight` of acc int32 ``[C', C_i, *kernel]``: float32 ``[C_o, C_i, *kernel]``."""
    return stored_nhwc(reference.dequantize_grad_weight(acc, code_sum, scale, zero_point, channels, out_channels))
