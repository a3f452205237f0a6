"""The same definitions behind the signatures of the graph's operations: unpack, call `reference`, pack.

``lowering="eager"`` interprets a rewritten graph with these functions, and every native kernel is tested
against them. `OPERATIONS` maps an operation's name (``ops.py``) to its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from . import noise, packing, reference, selection

OPERATIONS: dict[str, Callable[..., Any]] = {}


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    OPERATIONS[function.__name__] = function
    return function


def _keys(seed: Tensor, stream: int) -> tuple[int, int]:
    return noise.stream_keys(int(seed), stream)


def _nhwc(x: Tensor) -> Tensor:
    """The same logical tensor, stored in NHWC order as every kernel returns it."""
    return packing.channels_second(packing.channels_last(x).contiguous())


def _weight_values(bits: Tensor) -> Tensor:
    return reference.code_values(bits, "sign")


def _activation_values(x_bits: Tensor, channels: int, code: str) -> Tensor:
    return reference.code_values(packing.unpack_rows(x_bits, channels), code)


def non_finite_message(where: str, bad: int, size: int) -> str:
    return (
        f"{where}: {bad} of {size} values are NaN or infinite; accepted: finite values only, since "
        "check_finite=True. Remedy: lower the learning rate or clip gradients upstream of this layer"
    )


@_operation
def draw_seed(device: torch.device) -> Tensor:
    return torch.randint(0, 2**62, (), device=device)


@_operation
def check_finite(x: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(non_finite_message(where, bad, x.numel()))
    return x.clone()


@_operation
def activation_threshold(x: Tensor) -> Tensor:
    return reference.activation_threshold(x)


@_operation
def pack_activation(x: Tensor, threshold: Tensor | None, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    bits = packing.pack_rows(reference.activation_bits(x, threshold))
    return bits, packing.pack_rows(reference.activation_mask(x, threshold))


@_operation
def unpack_activation(x_bits: Tensor, channels: int, code: str) -> Tensor:
    return _nhwc(_activation_values(x_bits, channels, code))


@_operation
def apply_mask(g: Tensor, mask: Tensor) -> Tensor:
    keep = packing.unpack_rows(mask, g.shape[1])
    return _nhwc(torch.where(keep, g, torch.zeros_like(g)))


@_operation
def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return packing.pack_panels(reference.weight_bits(weight)), reference.weight_scale(weight, mode)


@_operation
def transpose_weight(w_bits: Tensor, in_channels: int, out_channels: int) -> Tensor:
    return packing.pack_panels_t(packing.unpack_panels(w_bits, out_channels, in_channels))


@_operation
def unpack_weight(w_bits: Tensor, weight_scale: Tensor, in_channels: int) -> Tensor:
    bits = packing.unpack_panels(w_bits, weight_scale.shape[0], in_channels)
    values = _weight_values(bits)
    return _nhwc(values * reference.per_row(weight_scale, values))


@_operation
def output_product(
    x_bits: Tensor,
    w_bits: Tensor,
    in_channels: int,
    out_channels: int,
    code: str,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    w = _weight_values(packing.unpack_panels(w_bits, out_channels, in_channels))
    x = _activation_values(x_bits, in_channels, code)
    return _nhwc(reference.output_product(x, w, stride, padding))


@_operation
def row_importance(g: Tensor, kind: str) -> Tensor:
    return reference.importance(reference.nhwc_rows(reference.as_float32(g)), kind)


@_operation
def channel_importance(g: Tensor, rows: Tensor, row_scale: Tensor | None, kind: str) -> Tensor:
    kept = reference.kept_gradient(g, rows, row_scale)
    return reference.importance(kept.transpose(0, 1).flatten(1), kind)


@_operation
def select(
    importance: Tensor, seed: Tensor, stream: int, prune: str, keep_num: int, keep_den: int
) -> tuple[Tensor, Tensor]:
    return selection.select(importance, _keys(seed, stream), prune, Fraction(keep_num, keep_den))


@_operation
def prune_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    pruned = torch.zeros_like(g)
    count = int((rows >= 0).sum())
    pruned[rows[:count].long()] = reference.kept_gradient(g, rows, row_scale).to(g.dtype)
    return pruned


@_operation
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    gathered = x[rows.long().clamp(min=0)]
    return _nhwc(torch.where(reference.per_row(rows >= 0, gathered), gathered, torch.zeros_like(gathered)))


@_operation
def scatter_rows(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    full = kept.new_zeros(size, *kept.shape[1:])
    count = int((rows >= 0).sum())
    full[rows[:count].long()] = kept[:count]
    return _nhwc(full)


@_operation
def quantize_rows(
    g: Tensor,
    weight_scale: Tensor | None,
    rows: Tensor,
    row_scale: Tensor | None,
    seed: Tensor,
    stream: int,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = reference.quantize_rows(g, weight_scale, rows, row_scale, _keys(seed, stream), bits)
    return packing.pack_planes(codes, bits), scale, zero


@_operation
def dequantize_rows(
    planes: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor, channels: int, size: int
) -> Tensor:
    codes = packing.unpack_planes(planes, channels)
    values = reference.per_row(scale, codes) * codes.to(torch.float32) + reference.per_row(zero_point, codes)
    return scatter_rows(values, rows, size)


@_operation
def quantize_channels(
    g: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    channels: Tensor | None,
    channel_scale: Tensor | None,
    seed: Tensor,
    stream: int,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = _keys(seed, stream)
    codes, scale, zero = reference.quantize_channels(g, rows, row_scale, channels, channel_scale, keys, bits)
    return packing.pack_lanes(codes, bits), scale, zero


@_operation
def grad_input_product(
    planes: Tensor,
    w_bits_t: Tensor,
    in_channels: int,
    out_channels: int,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    w = _weight_values(packing.unpack_panels_t(w_bits_t, out_channels, in_channels))
    codes = packing.unpack_planes(planes, out_channels)
    acc, weight_sum = reference.grad_input_product(codes, w, input_size, stride, padding)
    return _nhwc(acc), _nhwc(weight_sum)


@_operation
def dequantize_grad_input(
    acc: Tensor, weight_sum: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor, mask: Tensor
) -> Tensor:
    keep = packing.unpack_rows(mask, acc.shape[1])
    return _nhwc(reference.dequantize_grad_input(acc, weight_sum, scale, zero_point, rows, keep))


@_operation
def grad_weight_product(
    lanes: Tensor,
    x_bits: Tensor,
    rows: Tensor,
    in_channels: int,
    out_channels: int,
    code: str,
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    codes = packing.unpack_lanes(lanes, out_channels, rows.shape[0], output_size)
    count = int((rows >= 0).sum())
    x = _activation_values(x_bits[rows[:count].long()], in_channels, code)
    acc, code_sum = reference.grad_weight_product(codes[:count], x, kernel, stride, padding)
    return _nhwc(acc), _nhwc(code_sum)


@_operation
def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    return _nhwc(reference.dequantize_grad_weight(acc, code_sum, scale, zero_point, channels, out_channels))


@_operation
def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    """Returned with the strides of ``weight``, so that the optimizer sees matching layouts."""
    grad = reference.weight_gradient(grad_hat, weight, weight_scale, mode)
    return torch.empty_like(weight, dtype=torch.float32).copy_(grad)
