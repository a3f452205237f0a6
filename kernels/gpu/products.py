"""Products of packed operands on a GPU: exact integers, by the strategy that `strategy` chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import empty_nhwc, pair
from ..operations import Arguments, products
from ..packing import WORD, ceil_div
from . import strategy as strategies
from .codegen import Spec, spec
from .launch import kernel, launch, offset_type
from .strategy import TILES, Tile
from .weight import weight_gradient_of_product

PROGRAMS = 512
"""Programs that fill a large GPU; grad_weight_product cuts its positions until there are about as many."""


def _product_spec(template: str, strategy: str, tile: Tile, **options: object) -> tuple[Spec, dict[str, int]]:
    """The spec of a product, and the launch options of its tile."""
    autotune = strategies.autotunes()
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
    strategy, tile = strategies.choose("conv_product", pixels, channels, planes)
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

    launch(made, "conv_product", grid, x, w, acc, scale, bias, *sizes, **constants)


@kernel(products.output_product)
def output_product(a: Arguments, acc: Tensor) -> None:
    _output_product(a, acc, None, None)


def scaled_output(product: Sequence[Any], weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`output_product` of these arguments and its `reference.dequantize_output` in the same kernel, float32."""
    a = products.output_product.bind(product, {})
    products.output_product.contract(a)
    acc = products.output_product.results(a)
    assert isinstance(acc, Tensor)
    y = torch.empty_like(acc, dtype=torch.float32)
    _output_product(a, y, weight_scale, bias)
    return y


def _output_product(a: Arguments, acc: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    _conv_product(
        a.x_bits,
        a.w_bits,
        acc,
        planes=1,
        code=a.code,
        packed_channels=a.in_channels,
        stride=a.stride,
        padding=a.padding,
        scale=scale,
        bias=bias,
    )


@kernel(products.grad_input_product)
def grad_input_product(a: Arguments, acc: Tensor, weight_sum: Tensor) -> None:
    """The sum of the weights is the same product with a code of 1 everywhere, of one sample."""
    _, _, *spatial, words = a.planes.shape
    ones = a.planes.new_full([1, 1, *spatial, words], -1)
    if a.out_channels % WORD:
        ones[..., -1] = (1 << a.out_channels % WORD) - 1
    for x, result in ((a.planes, acc), (ones, weight_sum)):
        _conv_product(
            x,
            a.w_bits_t,
            result,
            planes=x.shape[0],
            code="planes",
            packed_channels=a.out_channels,
            stride=a.stride,
            padding=a.padding,
            transposed=True,
        )


@kernel(products.grad_weight_product)
def grad_weight_product(a: Arguments, acc: Tensor, code_sum: Tensor) -> None:
    acc.zero_()
    code_sum.zero_()
    (bits, _, groups, _), words, taps = a.lanes.shape, a.x_bits.shape[-1], math.prod(a.kernel)
    out_channels, in_channels, positions = a.out_channels, a.in_channels, a.rows.shape[0] * math.prod(a.output_size)
    strategy, tile = strategies.choose("grad_weight_product", out_channels, in_channels, bits)
    transposed = taps * groups * words * WORD
    offset = offset_type(acc.numel(), a.x_bits.numel(), a.lanes.numel(), positions, transposed)
    made, constants = _product_spec("grad_weight_product", strategy, tile, bits=bits, code=a.code, offset=offset)
    axes = zip("HW", pair(a.kernel, 1), pair(a.stride, 1), pair(a.padding, 0), strict=True)
    shape: dict[str, int] = {}
    for axis, size, step, border in axes:
        shape |= {f"KERNEL_{axis}": size, f"STRIDE_{axis}": step, f"PADDING_{axis}": border}
    images = (*pair(a.x_bits.shape[1:-1], 1), *pair(a.output_size, 1))
    kept = (a.x_bits.shape[0], a.rows.shape[0])
    blocks = ceil_div(out_channels, tile.m) * ceil_div(in_channels, tile.n)
    part = ceil_div(groups, max(1, min(groups, PROGRAMS // (blocks * taps))))

    def grid(m: int, n: int) -> tuple[int, int, int]:
        return ceil_div(out_channels, m) * ceil_div(in_channels, n), taps, ceil_div(groups, max(part, 1))

    sizes = (out_channels, in_channels, words, positions, part)
    if strategy == "tensor-core":
        operands = (a.lanes, a.x_bits, a.rows, acc, code_sum, *kept)
        launch(made, "grad_weight_product", grid, *operands, *sizes, *images, **constants, **shape)
        return
    x_t, inside_t = a.x_bits.new_empty(transposed), a.x_bits.new_empty(taps * groups)
    operands = (a.x_bits, a.rows, x_t, inside_t, code_sum, *kept)
    launch(made, "transpose_taps", (groups, words, taps), *operands, in_channels, words, positions, *images, **shape)
    kernel_only = {key: shape[key] for key in ("KERNEL_H", "KERNEL_W")}
    launch(made, "grad_weight_product", grid, a.lanes, x_t, inside_t, acc, *sizes, **constants, **kernel_only)


@kernel(products.grad_weight)
def grad_weight(a: Arguments, grad: Tensor) -> None:
    """The product, whose parts of the positions are added up in memory, and one kernel for all that follows it."""
    acc = empty_nhwc(a.lanes, [a.out_channels, a.in_channels, *a.kernel], torch.int32)
    code_sum = empty_nhwc(a.lanes, [1, a.in_channels, *a.kernel], torch.int32)
    grad_weight_product(a, acc, code_sum)
    weight_gradient_of_product(a, acc, code_sum, grad)
