"""Weights to bits and back on the CPU, and the gradient through them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import packing
from ..operands import MODES, inner_size, nhwc_memory, panel_taps
from ..operations import Arguments, weight
from .native import call, empty_nhwc, kernel, nhwc


def _stored(w: Tensor) -> tuple[Tensor, bool]:
    """float32 weight memory, and whether its taps are outside its channels (NHWC) or inside (contiguous)."""
    w = w.to(torch.float32)
    if packing.channels_last(w).is_contiguous() or not w.is_contiguous():
        return nhwc_memory(w), True
    return w, False


def _sizes(w: Tensor) -> tuple[int, int, int]:
    """Output channels, input channels and taps."""
    return w.shape[0], w.shape[1], inner_size(w)


@kernel(weight.quantize_weight)
def quantize_weight(a: Arguments, panels: Tensor, scale: Tensor) -> None:
    w, by_tap = _stored(a.weight)
    call("weight", "quantize_weight", w, *_sizes(a.weight), by_tap, MODES[a.mode], panels, scale)


@kernel(weight.transpose_weight)
def transpose_weight(a: Arguments, panels_t: Tensor) -> None:
    call("weight", "transpose_weight", a.w_bits, a.out_channels, a.in_channels, panel_taps(a.w_bits), panels_t)


@kernel(weight.unpack_weight)
def unpack_weight(a: Arguments, w: Tensor) -> None:
    call("weight", "unpack_weight", a.w_bits, a.weight_scale, *_sizes(w), w)


@kernel(weight.weight_gradient)
def weight_gradient(a: Arguments, grad: Tensor) -> None:
    values, sizes = nhwc(a.grad_hat), _sizes(a.weight)

    def fill(w: Tensor, by_tap: bool, result: Tensor) -> None:
        call("weight", "weight_gradient", values, w, a.weight_scale, *sizes, by_tap, MODES[a.mode], result)

    in_weight_order(a.weight, grad, fill)


def in_weight_order(w: Tensor, grad: Tensor, fill: Callable[[Tensor, bool, Tensor], None]) -> None:
    """Fill ``grad``, which has the strides of ``w``; ``fill`` gets the weight's memory, whether it is NHWC, and where
    to write in that order."""
    memory, by_tap = _stored(w)
    in_order = (packing.channels_last(grad) if by_tap else grad).is_contiguous()
    result = grad if in_order else empty_nhwc(grad, grad.shape, torch.float32)
    fill(memory, by_tap, result)
    if not in_order:
        grad.copy_(result)
