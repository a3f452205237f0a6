"""Codes and integer products back to float32 on a GPU."""

from __future__ import annotations

import math

from torch import Tensor

from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, dequantize
from ..packing import ceil_div
from .codegen import spec
from .launch import BLOCK, PIXELS, kernel, launch, offset_type


@kernel(dequantize.dequantize_rows)
def dequantize_rows(a: Arguments, out: Tensor) -> None:
    bits, count, *spatial, words = a.planes.shape
    inner = math.prod(spatial)
    out.zero_()
    made = spec("dequantize", offset=offset_type(out.numel(), a.planes.numel()))
    operands, sizes = (a.planes, a.scale, a.zero_point, a.rows, out), (a.size, count, inner, a.channels, words, bits)
    launch(made, "dequantize_rows", (ceil_div(count * inner, PIXELS), words), *operands, *sizes, PIXELS=PIXELS)


@kernel(dequantize.dequantize_grad_input)
def dequantize_grad_input(a: Arguments, out: Tensor) -> None:
    count, channels, inner, words = a.acc.shape[0], a.acc.shape[1], inner_size(a.acc), a.mask.shape[-1]
    if not a.compact:
        out.zero_()
    made = spec("dequantize", offset=offset_type(out.numel(), a.acc.numel(), a.mask.numel()))
    operands = (nhwc_memory(a.acc), nhwc_memory(a.weight_sum), a.scale, a.zero_point, a.rows, a.mask, out)
    sizes, grid = (a.mask.shape[0], count, inner, channels, words), (ceil_div(count * inner, PIXELS), words)
    launch(made, "dequantize_grad_input", grid, *operands, *sizes, COMPACT=a.compact, PIXELS=PIXELS)


@kernel(dequantize.dequantize_grad_weight)
def dequantize_grad_weight(a: Arguments, out: Tensor) -> None:
    size, subset = math.prod(a.acc.shape[1:]), a.channels is not None
    if subset:
        out.zero_()
    made = spec("dequantize", offset=offset_type(out.numel(), a.acc.numel()))
    operands = (nhwc_memory(a.acc), nhwc_memory(a.code_sum), a.scale, a.zero_point, a.channels, out)
    grid = (a.acc.shape[0], ceil_div(size, BLOCK))
    launch(made, "dequantize_grad_weight", grid, *operands, a.out_channels, size, SUBSET=subset, BLOCK=BLOCK)
