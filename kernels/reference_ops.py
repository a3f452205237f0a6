"""The same definitions behind the signatures of the graph's operations: unpack, call `reference`, pack.

``lowering="eager"`` interprets a rewritten graph with these functions, and every native kernel is tested
against them. `OPERATIONS` maps an operation's name (``ops.py``) to its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from . import noise, packing, program, reference, selection

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
def activation_threshold(x: Tensor, rule: str) -> Tensor:
    return reference.activation_threshold(x, rule)


@_operation
def pack_activation(x: Tensor, threshold: Tensor | None, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    bits = packing.pack_rows(reference.activation_bits(x, threshold))
    return bits, packing.pack_rows(reference.activation_mask(x, threshold))


@_operation
def fused_activation(
    operands: Sequence[Tensor],
    text: str,
    code: str,
    window: Sequence[int],
    keep_values: bool,
    keep_below: bool,
    after: Tensor | None = None,
    threshold: Tensor | None = None,
    rule: str = "sample",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pointwise program, then `pack_activation` of its result x.

    The threshold is that of channels ``[1, C]``, if given, else `activation_threshold` of x by ``rule``.
    Returns bits, mask, the values of x if ``keep_values`` and the bits of x <= 0 if ``keep_below``; empty tensors
    for what is not asked for.
    """
    x = program.evaluate(program.parse(text), operands, window)
    if code == "threshold" and threshold is None:
        threshold = reference.activation_threshold(x, rule)
    bits, mask = pack_activation(x, threshold)
    values = _nhwc(x) if keep_values else x.new_empty(0)
    below = packing.pack_rows(x <= 0) if keep_below else bits.new_empty(0)
    return bits, mask, values, below


@_operation
def fused_gradient(
    operands: Sequence[Tensor], text: str, measure: bool, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The float32 values v ``[N, C, *S]`` of a pointwise program, and what quantizing them starts with if ``measure``.

    That is least and greatest value of ``weight_scale v`` per row, ``[2, N]``, and of v per channel, ``[2, C]``; NaN
    where there is one, +0 for -0, empty unless asked for.
    """
    values = program.evaluate(program.parse(text), operands, ())
    if not measure:
        return _nhwc(values), values.new_empty(0), values.new_empty(0)
    scaled = values if weight_scale is None else values * reference.per_channel(weight_scale, values)
    rows, channels = scaled.flatten(1), values.transpose(0, 1).flatten(1)
    row_extremes, channel_extremes = (torch.stack([v.amin(1), v.amax(1)]) + 0.0 for v in (rows, channels))
    return _nhwc(values), row_extremes, channel_extremes


@_operation
def unpack_activation(x_bits: Tensor, channels: int, code: str) -> Tensor:
    return _nhwc(_activation_values(x_bits, channels, code))


@_operation
def pack_bool(mask: Tensor) -> Tensor:
    return packing.pack_rows(mask)


@_operation
def unpack_bool(words: Tensor, channels: int) -> Tensor:
    return _nhwc(packing.unpack_rows(words, channels))


@_operation
def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    """largest: a bound of ``|acc|``, which tells a kernel how many squares fit into 32 bits."""
    return reference.channel_moments(acc, weight_scale, bias)


@_operation
def gradient_moments(
    operands: Sequence[Tensor], text: str, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.gradient_moments` of the values g of a pointwise program; its first operand, a full one, is acc."""
    values = program.evaluate(program.parse(text), operands, ())
    return reference.gradient_moments(values, operands[0], weight_scale, bias, center)


@_operation
def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.float_moments(x)


@_operation
def max_pool_gradient(
    g: Tensor,
    operands: Sequence[Tensor],
    text: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`reference.max_pool_gradient` of the values x of a pointwise program."""
    x = program.evaluate(program.parse(text), operands, ())
    return _nhwc(reference.max_pool_gradient(g, x, kernel, stride, padding))


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
    narrow: bool = False,
) -> Tensor:
    w = _weight_values(packing.unpack_panels(w_bits, out_channels, in_channels))
    x = _activation_values(x_bits, in_channels, code)
    dtype = packing.output_dtype(math.prod(w.shape[1:]), narrow)
    return _nhwc(reference.output_product(x, w, stride, padding).to(dtype))


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
def keep_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    kept = g.new_zeros(rows.shape[0], *g.shape[1:])
    valid = reference.kept_gradient(g, rows, row_scale).to(g.dtype)
    kept[: valid.shape[0]] = valid
    return _nhwc(kept)


@_operation
def gather_words(words: Tensor, rows: Tensor) -> Tensor:
    return words[rows.long().clamp(min=0)] * (rows >= 0).long().view(-1, *[1] * (words.dim() - 1))


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
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (_keys(seed, stream), bits, compact, extremes, grid)
    codes, scale, zero = reference.quantize_rows(g, weight_scale, rows, row_scale, *groups)
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
    compact: bool = False,
    extremes: Tensor | None = None,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (channels, channel_scale, _keys(seed, stream), bits, compact, extremes, grid)
    codes, scale, zero = reference.quantize_channels(g, rows, row_scale, *groups)
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
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    keep = packing.unpack_rows(mask, acc.shape[1])
    return _nhwc(reference.dequantize_grad_input(acc, weight_sum, scale, zero_point, rows, keep, compact))


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
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`grad_weight_product`, `dequantize_grad_weight` and `weight_gradient` of all output channels as one."""
    out_channels, in_channels, *kernel = weight.shape
    sizes = (output_size, kernel, stride, padding)
    acc, code_sum = grad_weight_product(lanes, x_bits, rows, in_channels, out_channels, code, *sizes)
    grad_hat = dequantize_grad_weight(acc, code_sum, scale, zero_point, None, out_channels)
    return weight_gradient(grad_hat, weight, weight_scale, mode)


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
