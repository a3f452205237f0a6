"""Weights to bits and back on a GPU, and the gradient through them; weights are read by their strides."""

from __future__ import annotations

import math

from torch import Tensor

from ..operands import nhwc_memory, pair, panel_taps
from ..operations import Arguments, weight
from ..packing import WORD, ceil_div
from .codegen import spec
from .launch import ROWS, kernel, launch, offset_type, values


def _strides(w: Tensor) -> tuple[int, int, int, int]:
    """Strides of output channels, input channels and two spatial axes, those that do not exist 0."""
    o, c, *spatial = w.stride()
    height, width = [0] * (2 - len(spatial)) + spatial
    return o, c, height, width


def _sizes(w: Tensor) -> tuple[int, int, int, int]:
    """Output channels, input channels, taps and the width of the kernel."""
    out_channels, channels, *kernel = w.shape
    return out_channels, channels, math.prod(kernel), pair(kernel, 1)[1]


def _extent(x: Tensor) -> int:
    """One more than the largest memory offset of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@kernel(weight.quantize_weight)
def quantize_weight(a: Arguments, panels: Tensor, scale: Tensor) -> None:
    out_channels, channels, taps, width = _sizes(a.weight)
    count, words = panels.shape[0], panels.shape[-2]
    made = spec("weight", mode=a.mode, offset=offset_type(_extent(a.weight), panels.numel()))
    places, grid = (*_strides(a.weight), width), [count, taps, words]
    launch(made, "quantize_weight", grid, a.weight, panels, out_channels, channels, taps, words, *places)
    if a.mode == "none":
        scale.fill_(1)
        return
    sizes = (out_channels, channels, channels * taps)
    launch(made, "weight_scale", [ceil_div(out_channels, ROWS)], a.weight, scale, *sizes, *places, ROWS=ROWS)


@kernel(weight.transpose_weight)
def transpose_weight(a: Arguments, panels_t: Tensor) -> None:
    taps, words, out_words = panel_taps(a.w_bits), ceil_div(a.in_channels, WORD), ceil_div(a.out_channels, WORD)
    made = spec("weight", mode="none", offset=offset_type(a.w_bits.numel(), panels_t.numel()))
    grid, sizes = (panels_t.shape[0], taps, out_words), (a.out_channels, taps, words, out_words)
    launch(made, "transpose_weight", grid, a.w_bits, panels_t, *sizes)


@kernel(weight.unpack_weight)
def unpack_weight(a: Arguments, w: Tensor) -> None:
    taps, words = panel_taps(a.w_bits), ceil_div(a.in_channels, WORD)
    made = spec("weight", mode="none", offset=offset_type(w.numel()))
    grid, sizes = (a.w_bits.shape[0], taps, words), (w.shape[0], a.in_channels, taps, words)
    launch(made, "unpack_weight", grid, a.w_bits, a.weight_scale, w, *sizes)


@kernel(weight.weight_gradient)
def weight_gradient(a: Arguments, grad: Tensor) -> None:
    _weight_gradient(a, grad, values(a.grad_hat), None, None, None)


def weight_gradient_of_product(a: Arguments, acc: Tensor, code_sum: Tensor, grad: Tensor) -> None:
    """`weight_gradient` of ``dequantize_grad_weight`` of all channels, which is not written."""
    _weight_gradient(a, grad, nhwc_memory(acc), nhwc_memory(code_sum), a.scale, a.zero_point)


def _weight_gradient(a: Arguments, grad: Tensor, *grad_hat: Tensor | None) -> None:
    """grad_hat: values, or the integer product and code sum with scale and zero point."""
    out_channels, channels, taps, width = _sizes(a.weight)
    made = spec("weight", mode=a.mode, offset=offset_type(_extent(a.weight), _extent(grad)))
    sizes, places = (out_channels, channels, channels * taps), (*_strides(a.weight), *_strides(grad), width)
    operands, flags = (*grad_hat, a.weight, a.weight_scale, grad), {"PRODUCT": grad_hat[1] is not None, "ROWS": ROWS}
    launch(made, "weight_gradient", [ceil_div(out_channels, ROWS)], *operands, *sizes, *places, **flags)
