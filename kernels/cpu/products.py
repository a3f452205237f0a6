"""Products of packed operands on the CPU: exact integers."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..operands import CODES, MODES
from ..operations import Arguments, products
from .functions import geometry
from .native import call, kernel
from .weight import in_weight_order


@kernel(products.output_product)
def output_product(a: Arguments, acc: Tensor) -> None:
    n, *spatial, words = a.x_bits.shape
    shape = geometry(
        batch=n,
        words=words,
        channels=a.out_channels,
        input_size=spatial,
        output_size=acc.shape[2:],
        kernel=a.w_bits.shape[1:-2],
        stride=a.stride,
        padding=a.padding,
    )
    operands = (a.x_bits, a.w_bits, shape, CODES[a.code], a.in_channels, a.narrow)
    call("output_product", "output_product", *operands, acc)


@kernel(products.grad_input_product)
def grad_input_product(a: Arguments, acc: Tensor, weight_sum: Tensor) -> None:
    bits, count, *spatial, words = a.planes.shape
    shape = geometry(
        batch=count,
        words=words,
        channels=a.in_channels,
        input_size=spatial,
        output_size=a.input_size,
        kernel=a.w_bits_t.shape[1:-2],
        stride=a.stride,
        padding=a.padding,
    )
    operands = (a.planes, bits, a.w_bits_t, shape, a.out_channels)
    call("grad_input_product", "grad_input_product", *operands, acc, weight_sum)


@kernel(products.grad_weight_product)
def grad_weight_product(a: Arguments, acc: Tensor, code_sum: Tensor) -> None:
    call("grad_weight_product", "grad_weight_product", *_grad_weight_operands(a), acc, code_sum)


@kernel(products.grad_weight)
def grad_weight(a: Arguments, grad: Tensor) -> None:
    product, factors = _grad_weight_operands(a), (a.scale, a.zero_point)

    def fill(w: Tensor, by_tap: bool, result: Tensor) -> None:
        weight = (w, a.weight_scale, by_tap, MODES[a.mode])
        call("grad_weight_product", "grad_weight", *product, *factors, *weight, result)

    in_weight_order(a.weight, grad, fill)


def _grad_weight_operands(a: Arguments) -> tuple[Tensor | int | ctypes.Array[ctypes.c_int64], ...]:
    n, *spatial, words = a.x_bits.shape
    shape = geometry(
        batch=n,
        words=words,
        in_channels=a.in_channels,
        out_channels=a.out_channels,
        input_size=spatial,
        output_size=a.output_size,
        kernel=a.kernel,
        stride=a.stride,
        padding=a.padding,
    )
    return a.lanes, a.lanes.shape[0], a.x_bits, a.rows, a.rows.shape[0], shape, CODES[a.code]
