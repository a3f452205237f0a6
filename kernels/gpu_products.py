"""Triton products of packed operands: exact integers, by the strategy that `gpu_strategy` chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import gpu_strategy, native, packing
from .cpu_backward import require_lanes
from .cpu_forward import CODES
from .gpu_codegen import Spec, spec
from .gpu_forward import weight_gradient_of_product
from .gpu_launch import launch, offset_type
from .gpu_strategy import TILES, Tile
from .native import choice, indices, pair, vector
from .ops import empty_nhwc, output_size
from .packing import WORD, ceil_div

PROGRAMS = 512
"""Programs that fill a large GPU; grad_weight_product cuts its positions until there are about as many."""


def _product_spec(template: str, strategy: str, tile: Tile, **options: object) -> tuple[Spec, dict[str, int]]:
    """The spec of a product, and the launch options of its tile."""
    autotune = gpu_strategy.autotunes()
    tiles = TILES[template, strategy] if autotune else ()
    made = spec(template, strategy=strategy, **options, autotune=autotune, tiles=tiles)
    return made, {"TILE_M": tile.m, "TILE_N": tile.n, "warps": tile.warps, "stages": tile.stages}


def _conv_product(
    x: Tensor,
    w: Tensor,
    acc: Tensor,
    *,
    planes: int,
    code: str,
    packed_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool = False,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """x: ``[planes, N, *S, words]`` (without planes for activations); writes ``acc`` ``[N, C, *S_out]``."""
    channels, words, kernel = acc.shape[1], x.shape[-1], w.shape[1:-2]
    pixels, in_pixels = acc.numel() // max(channels, 1), x.numel() // planes // max(words, 1)
    strategy, tile = gpu_strategy.choose("conv_product", pixels, channels, planes)
    plain = math.prod(kernel) == 1 and all(s == 1 for s in stride) and not any(padding)
    epilogue = "none" if scale is None else "scale" if bias is None else "scale+bias"
    if acc.dtype == torch.int16:
        epilogue = "int16"
    made, constants = _product_spec(
        "conv_product",
        strategy,
        tile,
        code=code,
        planes=planes,
        shape="matrix" if plain else "convolution",
        transposed=transposed,
        epilogue=epilogue,
        offset=offset_type(acc.numel(), x.numel(), w.numel()),
    )
    axes = zip("HW", pair(kernel, 1), pair(stride, 1), pair(padding, 0), strict=True)
    for axis, taps, step, border in axes:
        constants |= {f"KERNEL_{axis}": taps, f"STRIDE_{axis}": step, f"PADDING_{axis}": border}
    images = x.shape[-1 - len(stride) : -1], acc.shape[2:]
    sizes = (pixels, in_pixels, channels, packed_channels, words, *pair(images[0], 1), *pair(images[1], 1))

    def grid(m: int, n: int) -> tuple[int, int]:
        return ceil_div(pixels, m), ceil_div(channels, n)

    launch(made, "conv_product", grid, x, w, acc, vector(scale), bias, *sizes, **constants)


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
    return scaled_output(x_bits, w_bits, in_channels, out_channels, code, stride, padding, None, None, narrow)


def scaled_output(
    x_bits: Tensor,
    w_bits: Tensor,
    in_channels: int,
    out_channels: int,
    code: str,
    stride: Sequence[int],
    padding: Sequence[int],
    weight_scale: Tensor | None,
    bias: Tensor | None,
    narrow: bool = False,
) -> Tensor:
    """`output_product`, and with ``weight_scale`` its `reference.dequantize_output` in the same kernel (float32)."""
    choice("code", code, CODES)
    x = native.words("x_bits", x_bits, in_channels)
    w = native.panels("w_bits", w_bits, out_channels, in_channels)
    n, *spatial, _ = x.shape
    kernel = w.shape[1:-2]
    native.require_int32("output_product", 1, in_channels * math.prod(kernel))
    size = output_size(spatial, kernel, stride, padding)
    dtype = torch.float32
    if weight_scale is None:
        dtype = packing.output_dtype(in_channels * math.prod(kernel), narrow)
    acc = empty_nhwc(x, [n, out_channels, *map(int, size)], dtype)
    _conv_product(
        x,
        w,
        acc,
        planes=1,
        code=code,
        packed_channels=in_channels,
        stride=stride,
        padding=padding,
        scale=weight_scale,
        bias=bias,
    )
    return acc


def grad_input_product(
    planes: Tensor,
    w_bits_t: Tensor,
    in_channels: int,
    out_channels: int,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The sum of the weights is the same product with a code of 1 everywhere, of one sample."""
    codes = native.words("planes", planes, out_channels)
    w = native.panels("w_bits_t", w_bits_t, in_channels, out_channels)
    bits, count, *spatial, words = codes.shape
    native.require_bits("grad_input_product", bits)
    native.require_int32("grad_input_product", 2**bits - 1, out_channels * math.prod(w.shape[1:-2]))
    acc = empty_nhwc(codes, [count, in_channels, *input_size], torch.int32)
    weight_sum = empty_nhwc(codes, [1, in_channels, *input_size], torch.int32)
    ones = codes.new_full([1, 1, *spatial, words], -1)
    if out_channels % WORD:
        ones[..., -1] = (1 << out_channels % WORD) - 1
    for x, result in ((codes, acc), (ones, weight_sum)):
        _conv_product(
            x,
            w,
            result,
            planes=x.shape[0],
            code="planes",
            packed_channels=out_channels,
            stride=stride,
            padding=padding,
            transposed=True,
        )
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
    choice("code", code, CODES)
    x = native.words("x_bits", x_bits, in_channels)
    positions, taps = rows.shape[0] * math.prod(output_size), math.prod(kernel)
    g = require_lanes(lanes, out_channels, positions)
    bits, words, groups = g.shape[0], x.shape[-1], g.shape[2]
    native.require_int32("grad_weight_product", 2**bits - 1, positions)
    acc = empty_nhwc(g, [out_channels, in_channels, *kernel], torch.int32).zero_()
    code_sum = empty_nhwc(g, [1, in_channels, *kernel], torch.int32).zero_()
    strategy, tile = gpu_strategy.choose("grad_weight_product", out_channels, in_channels, bits)
    transposed = taps * groups * words * WORD
    offset = offset_type(acc.numel(), x.numel(), g.numel(), positions, transposed)
    made, constants = _product_spec("grad_weight_product", strategy, tile, bits=bits, code=code, offset=offset)
    axes = zip("HW", pair(kernel, 1), pair(stride, 1), pair(padding, 0), strict=True)
    shape: dict[str, int] = {}
    for axis, size, step, border in axes:
        shape |= {f"KERNEL_{axis}": size, f"STRIDE_{axis}": step, f"PADDING_{axis}": border}
    images = (*pair(x.shape[1:-1], 1), *pair(output_size, 1))
    kept = (x.shape[0], rows.shape[0])
    blocks = ceil_div(out_channels, tile.m) * ceil_div(in_channels, tile.n)
    part = ceil_div(groups, max(1, min(groups, PROGRAMS // (blocks * taps))))

    def grid(m: int, n: int) -> tuple[int, int, int]:
        return ceil_div(out_channels, m) * ceil_div(in_channels, n), taps, ceil_div(groups, max(part, 1))

    sizes = (out_channels, in_channels, words, positions, part)
    if strategy == "tensor-core":
        operands = (g, x, indices(rows), acc, code_sum, *kept)
        launch(made, "grad_weight_product", grid, *operands, *sizes, *images, **constants, **shape)
        return acc, code_sum
    x_t, inside_t = x.new_empty(transposed), x.new_empty(taps * groups)
    operands = (x, indices(rows), x_t, inside_t, code_sum, *kept)
    launch(made, "transpose_taps", (groups, words, taps), *operands, in_channels, words, positions, *images, **shape)
    kernel_only = {key: shape[key] for key in ("KERNEL_H", "KERNEL_W")}
    launch(made, "grad_weight_product", grid, g, x_t, inside_t, acc, *sizes, **constants, **kernel_only)
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
    """The product, whose parts of the positions are added up in memory, and one kernel for all that follows it."""
    out_channels, in_channels, *kernel = weight.shape
    sizes = (output_size, kernel, stride, padding)
    integers = grad_weight_product(lanes, x_bits, rows, in_channels, out_channels, code, *sizes)
    return weight_gradient_of_product(*integers, scale, zero_point, weight, weight_scale, mode)
