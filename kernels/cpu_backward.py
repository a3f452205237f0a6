"""Native CPU operations on gradients. Definitions: `reference_ops`; layouts: `packing`; selection: `selection`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import native, packing, reference, selection
from .cpu_forward import CODES, in_weight_order
from .native import call, choice, empty_nhwc, indices, inner_size, nhwc, vector
from .packing import LANE_TILE, WORD, ceil_div

KINDS = {"norm": 0, "range": 1, "uniform": 2}
PRUNES = {"none": 0, "topk": 1, "bernoulli": 2, "systematic": 3}


def row_importance(g: Tensor, kind: str) -> Tensor:
    rows, size, number = g.shape[0], g[:1].numel(), choice("kind", kind, KINDS)
    if kind == "uniform" or size == 0:
        return g.new_ones(rows, dtype=torch.float32)
    importance = g.new_empty(rows, dtype=torch.float32)
    call("quantize", "row_importance", nhwc(g), rows, size, number, importance)
    return importance


def channel_importance(g: Tensor, rows: Tensor, row_scale: Tensor | None, kind: str) -> Tensor:
    importance = g.new_empty(g.shape[1], dtype=torch.float32)
    kept = (indices(rows), rows.shape[0], vector(row_scale))
    call("quantize", "channel_importance", nhwc(g), *_sizes(g), *kept, choice("kind", kind, KINDS), importance)
    return importance


def _sizes(g: Tensor) -> tuple[int, int, int]:
    """Samples, positions per sample and channels."""
    return g.shape[0], inner_size(g), g.shape[1]


def select(
    importance: Tensor, seed: Tensor, stream: int, prune: str, keep_num: int, keep_den: int
) -> tuple[Tensor, Tensor]:
    size, number = importance.shape[0], choice("prune", prune, PRUNES)
    count = selection.kept_count(size, keep_num, keep_den)
    entries = selection.selected_size(size, prune, Fraction(keep_num, keep_den))
    rows, scale = importance.new_empty(entries, dtype=torch.int32), importance.new_empty(entries, dtype=torch.float32)
    values, keys = vector(importance), native.stream_keys(seed, stream)
    # Selection is sequential; the number of threads, which every kernel is passed, is not used.
    call("select", "select_rows", values, size, number, count, *keys, rows, scale, entries)
    return rows, scale


# -- moving rows ----------------------------------------------------------------------------------------------


def prune_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    pruned = torch.zeros_like(g)
    kept = rows[rows >= 0].long()
    pruned[kept] = reference.kept_gradient(g, rows, row_scale).to(g.dtype)
    return pruned


def keep_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    kept = packing.channels_last(g).contiguous().index_select(0, rows.clamp(min=0))
    factor = (row_scale * (rows >= 0)).view(-1, *[1] * (g.dim() - 1))
    if bool((rows < 0).any()):
        kept[rows < 0] = 0  # 0 * inf is not 0
    return packing.channels_second((kept * factor).to(g.dtype))


def _gather(x: Tensor, rows: Tensor, gathered: Tensor) -> Tensor:
    """Rows of contiguous memory into ``gathered``; zero where an index is -1."""
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    call("pack", "gather_rows", x, x.shape[0], row_bytes, indices(rows), rows.shape[0], gathered)
    return gathered


def gather_words(words: Tensor, rows: Tensor) -> Tensor:
    return _gather(words.contiguous(), rows, words.new_empty([rows.shape[0], *words.shape[1:]]))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    return _gather(native.nhwc_memory(x), rows, empty_nhwc(x, [rows.shape[0], *x.shape[1:]], x.dtype))


def scatter_rows(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    full = packing.channels_second(kept.new_zeros(size, *kept.shape[2:], kept.shape[1]))
    used = rows[rows >= 0].long()
    full[used] = kept[: used.shape[0]]
    return full


# -- quantizing ----------------------------------------------------------------------------------------------


def known_extremes(name: str, extremes: Tensor | None, groups: int) -> Tensor | None:
    """float32 ``[2, groups]``, if known; raises unless that is the shape."""
    if extremes is not None and extremes.shape != (2, groups):
        raise UnsupportedInputError(f"{name}: got extremes of shape {tuple(extremes.shape)}; accepted: (2, {groups})")
    return vector(extremes)


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
    samples, inner, channels = _sizes(g)
    count = rows.shape[0]
    planes = g.new_empty([bits, count, *g.shape[2:], ceil_div(channels, WORD)], dtype=torch.int64)
    scale, zero = (g.new_empty(count, dtype=torch.float32) for _ in range(2))
    kept = (vector(weight_scale), indices(rows), count, vector(row_scale))
    keys = native.stream_keys(seed, stream)
    sizes = (samples, inner, channels, compact)
    known = known_extremes("quantize_rows", extremes, samples)
    call("quantize", "quantize_rows", nhwc(g), *sizes, *kept, *keys, bits, grid, known, planes, scale, zero)
    return planes, scale, zero


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
    count, width = rows.shape[0], g.shape[1] if channels is None else channels.shape[0]
    shape = [bits, ceil_div(width, LANE_TILE), ceil_div(count * inner_size(g), WORD), LANE_TILE]
    lanes = g.new_empty(shape, dtype=torch.int64)
    scale, zero = (g.new_empty(width, dtype=torch.float32) for _ in range(2))
    kept = (indices(rows), count, vector(row_scale))
    chosen = (None if channels is None else indices(channels), width, vector(channel_scale))
    keys = native.stream_keys(seed, stream)
    sizes = (*_sizes(g), compact)
    known = known_extremes("quantize_channels", extremes, g.shape[1])
    call("quantize", "quantize_channels", nhwc(g), *sizes, *kept, *chosen, *keys, bits, grid, known, lanes, scale, zero)
    return lanes, scale, zero


def dequantize_rows(
    planes: Tensor, scale: Tensor, zero_point: Tensor, rows: Tensor, channels: int, size: int
) -> Tensor:
    packed = native.words("planes", planes, channels)
    bits, count, *spatial, _ = packed.shape
    native.require_bits("dequantize_rows", bits)
    out = empty_nhwc(scale, [size, channels, *spatial], torch.float32)
    kept = (vector(scale), vector(zero_point), indices(rows), count)
    call("dequantize", "dequantize_rows", packed, bits, *kept, size, math.prod(spatial), channels, out)
    return out


# -- products ------------------------------------------------------------------------------------------------


def grad_input_product(
    planes: Tensor,
    w_bits_t: Tensor,
    in_channels: int,
    out_channels: int,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    codes = native.words("planes", planes, out_channels)
    w = native.panels("w_bits_t", w_bits_t, in_channels, out_channels)
    bits, count, *spatial, word_count = codes.shape
    _, *kernel, _, _ = w.shape
    native.require_bits("grad_input_product", bits)
    native.require_int32("grad_input_product", 2**bits - 1, out_channels * math.prod(kernel))
    acc = empty_nhwc(codes, [count, in_channels, *input_size], torch.int32)
    weight_sum = empty_nhwc(codes, [1, in_channels, *input_size], torch.int32)
    shape = native.geometry(
        batch=count,
        words=word_count,
        channels=in_channels,
        input_size=spatial,
        output_size=input_size,
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    call("grad_input_product", "grad_input_product", codes, bits, w, shape, out_channels, acc, weight_sum)
    return acc, weight_sum


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
    x = native.words("x_bits", x_bits, in_channels)
    positions = rows.shape[0] * math.prod(output_size)
    g = require_lanes(lanes, out_channels, positions)
    native.require_int32("grad_weight_product", 2 ** g.shape[0] - 1, positions)
    acc = empty_nhwc(g, [out_channels, in_channels, *kernel], torch.int32)
    code_sum = empty_nhwc(g, [1, in_channels, *kernel], torch.int32)
    shape = native.geometry(
        batch=x.shape[0],
        words=x.shape[-1],
        in_channels=in_channels,
        out_channels=out_channels,
        input_size=x.shape[1:-1],
        output_size=output_size,
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    kept, sign = (indices(rows), rows.shape[0]), choice("code", code, CODES)
    call("grad_weight_product", "grad_weight_product", g, g.shape[0], x, *kept, shape, sign, acc, code_sum)
    return acc, code_sum


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
    out_channels, in_channels, *kernel = weight.shape
    x = native.words("x_bits", x_bits, in_channels)
    g = require_lanes(lanes, out_channels, rows.shape[0] * math.prod(output_size))
    native.require_int32("grad_weight", 2 ** g.shape[0] - 1, rows.shape[0] * math.prod(output_size))
    shape = native.geometry(
        batch=x.shape[0],
        words=x.shape[-1],
        in_channels=in_channels,
        out_channels=out_channels,
        input_size=x.shape[1:-1],
        output_size=output_size,
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    product = (g, g.shape[0], x, indices(rows), rows.shape[0], shape, choice("code", code, CODES))
    factors, alpha = (vector(scale), vector(zero_point)), vector(weight_scale)

    def fill(w: Tensor, by_tap: bool, xnor: int, result: Tensor) -> None:
        call("grad_weight_product", "grad_weight", *product, *factors, w, alpha, by_tap, xnor, result)

    return in_weight_order(weight, mode, fill)


def require_lanes(lanes: Tensor, channels: int, positions: int) -> Tensor:
    """Contiguous lanes of ``channels`` channels and ``positions`` positions; raises unless they fit."""
    expected = (ceil_div(channels, LANE_TILE), ceil_div(positions, WORD), LANE_TILE)
    if lanes.dtype != torch.int64 or tuple(lanes.shape[1:]) != expected:
        raise UnsupportedInputError(
            f"lanes: got {lanes.dtype} of shape {tuple(lanes.shape)}; accepted: torch.int64 (bits, "
            f"{', '.join(map(str, expected))})"
        )
    native.require_bits("lanes", lanes.shape[0])
    return lanes.contiguous()


# -- dequantizing --------------------------------------------------------------------------------------------


def dequantize_grad_input(
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    samples, channels = mask.shape[0], acc.shape[1]
    keep = native.words("mask", mask, channels, [samples, *acc.shape[2:]])
    out = empty_nhwc(scale, [acc.shape[0] if compact else samples, *acc.shape[1:]], torch.float32)
    integers = (native.nhwc_memory(acc), native.nhwc_memory(weight_sum))
    kept = (vector(scale), vector(zero_point), indices(rows), rows.shape[0])
    sizes = (samples, inner_size(acc), channels)
    call("dequantize", "dequantize_grad_input", *integers, *kept, keep, *sizes, compact, out)
    return out


def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    out = empty_nhwc(scale, [out_channels, *acc.shape[1:]], torch.float32)
    integers = (native.nhwc_memory(acc), native.nhwc_memory(code_sum))
    chosen = (None if channels is None else indices(channels), acc.shape[0])
    size = math.prod(acc.shape[1:])
    values = (vector(scale), vector(zero_point))
    call("dequantize", "dequantize_grad_weight", *integers, *values, *chosen, out_channels, size, out)
    return out
