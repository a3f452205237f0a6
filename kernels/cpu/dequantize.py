"""Codes and integer products back to float32 on the CPU."""

from __future__ import annotations

import math

from torch import Tensor

from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, dequantize
from .native import call, kernel


@kernel(dequantize.dequantize_rows)
def dequantize_rows(a: Arguments, out: Tensor) -> None:
    bits, count, *spatial, _ = a.planes.shape
    kept = (a.scale, a.zero_point, a.rows, count)
    call("dequantize", "dequantize_rows", a.planes, bits, *kept, a.size, math.prod(spatial), a.channels, out)


@kernel(dequantize.dequantize_grad_input)
def dequantize_grad_input(a: Arguments, out: Tensor) -> None:
    integers = (nhwc_memory(a.acc), nhwc_memory(a.weight_sum))
    kept = (a.scale, a.zero_point, a.rows, a.rows.shape[0])
    sizes = (a.mask.shape[0], inner_size(a.acc), a.acc.shape[1])
    call("dequantize", "dequantize_grad_input", *integers, *kept, a.mask, *sizes, a.compact, out)


@kernel(dequantize.dequantize_grad_weight)
def dequantize_grad_weight(a: Arguments, out: Tensor) -> None:
    integers = (nhwc_memory(a.acc), nhwc_memory(a.code_sum))
    groups = (a.scale, a.zero_point, a.channels, a.acc.shape[0])
    size = math.prod(a.acc.shape[1:])
    call("dequantize", "dequantize_grad_weight", *integers, *groups, a.out_channels, size, out)
