"""Products of codes: exact integers, in floating point that holds them (docs/math.md 2 and 6)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
EXACT_FLOAT32 = 1 << 24
"""Integer sums up to this bound are exact in float32 in any order."""


def _exact(product: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast from rounding a product of integers to bfloat16."""

    @functools.wraps(product)
    def exact(values: Tensor, *args: Any) -> T:
        with torch.autocast(values.device.type, enabled=False):
            return product(values, *args)

    return exact


def _exact_dtype(bound: int) -> torch.dtype:
    return torch.float32 if bound < EXACT_FLOAT32 else torch.float64


def _conv_args(
    stride: Sequence[int], padding: Sequence[int]
) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    spatial = len(stride)
    return list(stride), list(padding), [1] * spatial, False, [0] * spatial, 1


@_exact
def output_product(x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """``acc[n, c_o, p] = sum over taps and C_i of code(x) sign(W)``, int32; taps outside the image are skipped.

    x: code values ``[N, C_i, *S]``; w: +-1 ``[C_o, C_i, *kernel]``. Without spatial axes a matrix product.
    """
    dtype = _exact_dtype(math.prod(w.shape[1:]))
    x, w = x.to(dtype), w.to(dtype)
    if not stride:
        return (x @ w.t()).to(torch.int32)
    return torch.ops.aten.convolution(x, w, None, *_conv_args(stride, padding)).to(torch.int32)


@_exact
def grad_input_product(
    codes: Tensor, w: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``acc = sum over taps and C_o of q sign(W)`` int32 ``[K, C_i, *S]`` and ``weight_sum`` int32 ``[1, C_i, *S]``.

    codes: q in 0..2**b - 1, ``[K, C_o, *S_o]``; weight_sum is the same product with q = 1 everywhere: the factor
    of the zero point, which at border pixels counts only the taps that reach the output.
    """
    dtype = _exact_dtype(255 * math.prod(w.shape) // max(1, w.shape[1]))
    w = w.to(dtype)
    with_ones = torch.cat([codes.to(dtype), codes.new_ones(1, *codes.shape[1:], dtype=dtype)])
    if not stride:
        product = with_ones @ w
    else:
        x = with_ones.new_empty(with_ones.shape[0], w.shape[1], *input_size)
        args = (with_ones, x, w, None, *_conv_args(stride, padding), [True, False, False])
        product = torch.ops.aten.convolution_backward(*args)[0]
    return product[:-1].to(torch.int32), product[-1:].to(torch.int32)


@_exact
def grad_weight_product(
    codes: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``acc = sum over samples and positions of q code(x)`` int32 ``[C_o, C_i, *kernel]`` and ``code_sum``.

    codes: ``[K, C_o, *S_o]``; x: code values of the same K samples ``[K, C_i, *S]``; code_sum int32
    ``[1, C_i, *kernel]`` is the same product with q = 1: the factor of the zero point.
    """
    dtype = _exact_dtype(255 * codes.shape[0] * math.prod(codes.shape[2:]))
    x = x.to(dtype)
    with_ones = torch.cat([codes.to(dtype), torch.ones_like(codes[:, :1], dtype=dtype)], dim=1)
    if not stride:
        product = with_ones.t() @ x
    else:
        w = x.new_empty(with_ones.shape[1], x.shape[1], *kernel)
        args = (with_ones, x, w, None, *_conv_args(stride, padding), [False, True, False])
        product = torch.ops.aten.convolution_backward(*args)[1]
    return product[:-1].to(torch.int32), product[-1:].to(torch.int32)
