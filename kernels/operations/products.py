"""Products of packed operands: exact integers. Arithmetic: `reference.products` (docs/math.md 2 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import packing, reference
from ..operands import (
    CODES,
    MODES,
    Size,
    choice,
    empty_nhwc,
    indices,
    lanes,
    output_size,
    panel_taps,
    panels,
    require_bits,
    require_int32,
    vector,
    words,
)
from ..packing import stored_nhwc
from .activation import activation_values
from .declare import Arguments, operation
from .dequantize import dequantize_grad_weight
from .weight import weight_gradient, weight_values


def _check_output(a: Arguments) -> None:
    choice("code", a.code, CODES)
    a.x_bits = words("x_bits", a.x_bits, a.in_channels)
    a.w_bits = panels("w_bits", a.w_bits, a.out_channels, a.in_channels)
    require_int32("output_product", 1, a.in_channels * panel_taps(a.w_bits))


def _output(a: Arguments) -> Tensor:
    n, *spatial, _ = a.x_bits.shape
    _, *kernel, _, _ = a.w_bits.shape
    dtype = packing.output_dtype(a.in_channels * math.prod(kernel), a.narrow)
    return empty_nhwc(a.x_bits, [n, a.out_channels, *output_size(spatial, kernel, a.stride, a.padding)], dtype)


@operation(results=_output, contract=_check_output, phase="output products", role="output")
def output_product(
    x_bits: Tensor,
    w_bits: Tensor,
    in_channels: int,
    out_channels: int,
    code: str,
    stride: Sequence[int],
    padding: Sequence[int],
    narrow: bool = False,
) -> Tensor:
    """`reference.output_product` of rows and panels: ``[N, C_o, *S_o]``, int32 or int16 (``narrow``), NHWC.

    x_bits: ``[N, *S, ceil(C_i/64)]`` of ``code``; w_bits: ``[ceil(C_o/16), *kernel, ceil(C_i/64), 16]``.
    """
    w = weight_values(packing.unpack_panels(w_bits, out_channels, in_channels))
    x = activation_values(x_bits, in_channels, code)
    dtype = packing.output_dtype(math.prod(w.shape[1:]), narrow)
    return stored_nhwc(reference.output_product(x, w, stride, padding).to(dtype))


def _check_grad_input(a: Arguments) -> None:
    a.planes = words("planes", a.planes, a.out_channels)
    a.w_bits_t = panels("w_bits_t", a.w_bits_t, a.in_channels, a.out_channels)
    bits = a.planes.shape[0]
    require_bits("grad_input_product", bits)
    require_int32("grad_input_product", 2**bits - 1, a.out_channels * panel_taps(a.w_bits_t))


def _grad_input(a: Arguments) -> tuple[Tensor, Tensor]:
    acc = empty_nhwc(a.planes, [a.planes.shape[1], a.in_channels, *a.input_size], torch.int32)
    return acc, empty_nhwc(a.planes, [1, a.in_channels, *a.input_size], torch.int32)


@operation(results=_grad_input, contract=_check_grad_input, phase="grad_input products", role="grad_input")
def grad_input_product(
    planes: Tensor,
    w_bits_t: Tensor,
    in_channels: int,
    out_channels: int,
    input_size: Sequence[Size],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`reference.grad_input_product` of planes ``[b, K, *S_o, ceil(C_o/64)]`` and panels_t, NHWC.

    Returns acc int32 ``[K, C_i, *input_size]`` and the sum of the weights int32 ``[1, C_i, *input_size]``.
    """
    w = weight_values(packing.unpack_panels_t(w_bits_t, out_channels, in_channels))
    codes = packing.unpack_planes(planes, out_channels)
    acc, weight_sum = reference.grad_input_product(codes, w, input_size, stride, padding)
    return stored_nhwc(acc), stored_nhwc(weight_sum)


def _check_grad_weight_product(a: Arguments) -> None:
    choice("code", a.code, CODES)
    positions = a.rows.shape[0] * math.prod(a.output_size)
    a.x_bits = words("x_bits", a.x_bits, a.in_channels)
    a.lanes = lanes("lanes", a.lanes, a.out_channels, positions)
    require_int32("grad_weight_product", 2 ** a.lanes.shape[0] - 1, positions)
    a.rows = indices(a.rows)


def _grad_weight_product(a: Arguments) -> tuple[Tensor, Tensor]:
    acc = empty_nhwc(a.lanes, [a.out_channels, a.in_channels, *a.kernel], torch.int32)
    return acc, empty_nhwc(a.lanes, [1, a.in_channels, *a.kernel], torch.int32)


@operation(
    results=_grad_weight_product,
    contract=_check_grad_weight_product,
    phase="grad_weight products",
    role="grad_weight",
)
def grad_weight_product(
    lanes: Tensor,
    x_bits: Tensor,
    rows: Tensor,
    in_channels: int,
    out_channels: int,
    code: str,
    output_size: Sequence[Size],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`reference.grad_weight_product` of the kept rows, NHWC: acc int32 ``[C_o, C_i, *kernel]`` and the code sum.

    lanes: ``[b, ceil(C_o/8), ceil(K prod(output_size)/64), 8]``; x_bits ``[N, *S, ceil(C_i/64)]`` of ``code``; rows
    int32 ``[K]``: which samples of x_bits (-1: unused, at the end). The code sum is int32 ``[1, C_i, *kernel]``.
    """
    codes = packing.unpack_lanes(lanes, out_channels, rows.shape[0], output_size)
    count = int((rows >= 0).sum())
    x = activation_values(x_bits[rows[:count].long()], in_channels, code)
    acc, code_sum = reference.grad_weight_product(codes[:count], x, kernel, stride, padding)
    return stored_nhwc(acc), stored_nhwc(code_sum)


def _check_grad_weight(a: Arguments) -> None:
    choice("mode", a.mode, MODES)
    a.out_channels, a.in_channels, *a.kernel = a.weight.shape
    _check_grad_weight_product(a)
    a.scale, a.zero_point, a.weight_scale = vector(a.scale), vector(a.zero_point), vector(a.weight_scale)


@operation(
    results=lambda a: torch.empty_like(a.weight, dtype=torch.float32),
    contract=_check_grad_weight,
    phase="grad_weight products",
    role="grad_weight",
)
def grad_weight(
    lanes: Tensor,
    x_bits: Tensor,
    rows: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    mode: str,
    code: str,
    output_size: Sequence[Size],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`grad_weight_product`, `dequantize_grad_weight` and `weight_gradient` of all output channels as one.

    float32 ``[C_o, C_i, *kernel]`` with the strides of ``weight``; scale, zero_point and weight_scale ``[C_o]``.
    """
    out_channels, in_channels, *kernel = weight.shape
    sizes = (output_size, kernel, stride, padding)
    acc, code_sum = grad_weight_product(lanes, x_bits, rows, in_channels, out_channels, code, *sizes)
    grad_hat = dequantize_grad_weight(acc, code_sum, scale, zero_point, None, out_channels)
    grad: Tensor = weight_gradient(grad_hat, weight, weight_scale, mode)
    return grad
