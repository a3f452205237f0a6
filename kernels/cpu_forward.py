"""Native CPU operations on activations and weights. Definitions: `reference_ops`; layouts: `packing`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import native, packing
from .native import call, choice, empty_nhwc, inner_size, nhwc
from .ops import output_size
from .packing import PANEL, WORD, ceil_div

CODES = {"threshold": 0, "sign": 1}
MODES = {"none": 0, "xnor": 1}


RULES = {"batch": 0, "sample": 1}


def activation_threshold(x: Tensor, rule: str) -> Tensor:
    by_sample = bool(choice("rule", rule, RULES))
    mean = x.new_empty([x.shape[0], 1] if by_sample else [], dtype=torch.float32)
    probe = x.new_empty((), dtype=torch.float32)
    groups, size = (x.shape[0], inner_size(x) * x.shape[1]) if by_sample else (1, x.numel())
    call("pack", "activation_threshold", nhwc(x), groups, size, mean, probe)
    native.check_threshold(probe)
    return mean


def pack_activation(x: Tensor, threshold: Tensor | None, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values, (n, channels, *spatial) = nhwc(x), x.shape
    bits, mask = (x.new_empty([n, *spatial, ceil_div(channels, WORD)], dtype=torch.int64) for _ in range(2))
    limits = (native.vector(threshold), *threshold_groups(threshold, x))
    call("pack", "pack_activation", values, n * inner_size(x), channels, *limits, bits, mask)
    return bits, mask


def threshold_groups(threshold: Tensor | None, x: Tensor) -> tuple[bool, int]:
    """Is a threshold one of every channel ``[1, C]``? Else, of how many groups of samples (``[]`` or ``[N, 1]``)?

    Raises `UnsupportedInputError` for another shape. ``[1, 1]`` means the same either way.
    """
    if threshold is None or threshold.dim() == 0:
        return False, 1
    if threshold.shape == (1, x.shape[1]):
        return True, 1
    if threshold.shape != (x.shape[0], 1):
        raise UnsupportedInputError(
            f"threshold: got shape {tuple(threshold.shape)}; accepted: (), ({x.shape[0]}, 1) or (1, {x.shape[1]})"
        )
    return False, x.shape[0]


def unpack_activation(x_bits: Tensor, channels: int, code: str) -> Tensor:
    bits = native.words("x_bits", x_bits, channels)
    n, *spatial, word_count = bits.shape
    x = empty_nhwc(bits, [n, channels, *spatial], torch.float32)
    pixels = bits.numel() // word_count
    call("pack", "unpack_activation", bits, pixels, channels, choice("code", code, CODES), x)
    return x


def apply_mask(g: Tensor, mask: Tensor) -> Tensor:
    n, channels, *spatial = g.shape
    keep = native.words("mask", mask, channels, [n, *spatial])
    out = empty_nhwc(g, g.shape, g.dtype)
    values, pixels = native.nhwc_memory(g), n * inner_size(g)
    call("pack", "apply_mask", values, g.element_size(), keep, pixels, channels, out)
    return out


def _stored(weight: Tensor) -> tuple[Tensor, bool]:
    """float32 weight memory, and whether its taps are outside its channels (NHWC) or inside (contiguous)."""
    w = weight.to(torch.float32)
    if packing.channels_last(w).is_contiguous() or not w.is_contiguous():
        return native.nhwc_memory(w), True
    return w, False


def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    out_channels, in_channels, *kernel = weight.shape
    shape = [ceil_div(out_channels, PANEL), *kernel, ceil_div(in_channels, WORD), PANEL]
    panels = weight.new_empty(shape, dtype=torch.int64)
    scale = weight.new_empty(out_channels, dtype=torch.float32)
    w, by_tap = _stored(weight)
    sizes = (out_channels, in_channels, inner_size(weight))
    call("weight", "quantize_weight", w, *sizes, by_tap, choice("mode", mode, MODES), panels, scale)
    return panels, scale


def _taps(panels: Tensor) -> int:
    return math.prod(panels.shape[1:-2])


def transpose_weight(w_bits: Tensor, in_channels: int, out_channels: int) -> Tensor:
    panels = native.panels("w_bits", w_bits, out_channels, in_channels)
    _, *kernel, _, _ = panels.shape
    panels_t = panels.new_empty([ceil_div(in_channels, PANEL), *kernel, ceil_div(out_channels, WORD), PANEL])
    call("weight", "transpose_weight", panels, out_channels, in_channels, _taps(panels), panels_t)
    return panels_t


def unpack_weight(w_bits: Tensor, weight_scale: Tensor, in_channels: int) -> Tensor:
    out_channels = weight_scale.shape[0]
    panels = native.panels("w_bits", w_bits, out_channels, in_channels)
    _, *kernel, _, _ = panels.shape
    weight = empty_nhwc(panels, [out_channels, in_channels, *kernel], torch.float32)
    sizes = (out_channels, in_channels, _taps(panels))
    call("weight", "unpack_weight", panels, native.vector(weight_scale), *sizes, weight)
    return weight


def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    sizes = (weight.shape[0], weight.shape[1], inner_size(weight))
    values, scale = nhwc(grad_hat), native.vector(weight_scale)

    def fill(w: Tensor, by_tap: bool, xnor: int, result: Tensor) -> None:
        call("weight", "weight_gradient", values, w, scale, *sizes, by_tap, xnor, result)

    return in_weight_order(weight, mode, fill)


def in_weight_order(weight: Tensor, mode: str, fill: Callable[[Tensor, bool, int, Tensor], None]) -> Tensor:
    """A gradient with the strides of ``weight``; ``fill`` gets the weight's memory, whether it is NHWC, the mode, and
    where to write in that order."""
    grad = torch.empty_like(weight, dtype=torch.float32)
    w, by_tap = _stored(weight)
    in_order = (packing.channels_last(grad) if by_tap else grad).is_contiguous()
    result = grad if in_order else empty_nhwc(grad, grad.shape, torch.float32)
    fill(w, by_tap, choice("mode", mode, MODES), result)
    return grad if in_order else grad.copy_(result)


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
    x = native.words("x_bits", x_bits, in_channels)
    w = native.panels("w_bits", w_bits, out_channels, in_channels)
    n, *spatial, _ = x.shape
    _, *kernel, _, _ = w.shape
    native.require_int32("output_product", 1, in_channels * _taps(w))
    size = output_size(spatial, kernel, stride, padding)
    dtype = packing.output_dtype(in_channels * _taps(w), narrow)
    acc = empty_nhwc(x, [n, out_channels, *map(int, size)], dtype)
    shape = native.geometry(
        batch=n,
        words=x.shape[-1],
        channels=out_channels,
        input_size=spatial,
        output_size=acc.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    sign = choice("code", code, CODES)
    call("output_product", "output_product", x, w, shape, sign, in_channels, narrow, acc)
    return acc
