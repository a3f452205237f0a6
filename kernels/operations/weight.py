"""Weights to bits and back, and the gradient through them. Arithmetic: `reference.weight` (docs/math.md 2 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing, reference
from ..operands import MODES, choice, empty_nhwc, panels, require_float, vector
from ..packing import PANEL, WORD, ceil_div, stored_nhwc
from .declare import Arguments, operation

PHASE = "weight packing and gradient"


def weight_values(bits: Tensor) -> Tensor:
    """+-1 of bits, float32."""
    return reference.code_values(bits, "sign")


def _check_mode(a: Arguments) -> None:
    choice("mode", a.mode, MODES)


def _panels_and_scale(a: Arguments) -> tuple[Tensor, Tensor]:
    out_channels, in_channels, *kernel = a.weight.shape
    shape = [ceil_div(out_channels, PANEL), *kernel, ceil_div(in_channels, WORD), PANEL]
    return a.weight.new_empty(shape, dtype=torch.int64), a.weight.new_empty(out_channels, dtype=torch.float32)


@operation(results=_panels_and_scale, contract=_check_mode, phase=PHASE, shareable=True)
def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Panels of sign(W) for W ``[C_o, C_i, *kernel]``, any strides, and alpha float32 ``[C_o]`` by ``mode``."""
    return packing.pack_panels(reference.weight_bits(weight)), reference.weight_scale(weight, mode)


def _check_panels(a: Arguments) -> None:
    a.w_bits = panels("w_bits", a.w_bits, a.out_channels, a.in_channels)


def _transposed(a: Arguments) -> Tensor:
    _, *kernel, _, _ = a.w_bits.shape
    return a.w_bits.new_empty([ceil_div(a.in_channels, PANEL), *kernel, ceil_div(a.out_channels, WORD), PANEL])


@operation(results=_transposed, contract=_check_panels, phase=PHASE, shareable=True)
def transpose_weight(w_bits: Tensor, in_channels: int, out_channels: int) -> Tensor:
    """Panels ``[ceil(C_o/16), *kernel, ceil(C_i/64), 16]`` -> panels_t, the same with C_o and C_i exchanged."""
    return packing.pack_panels_t(packing.unpack_panels(w_bits, out_channels, in_channels))


def _check_unpack(a: Arguments) -> None:
    a.w_bits = panels("w_bits", a.w_bits, a.weight_scale.shape[0], a.in_channels)
    a.weight_scale = vector(a.weight_scale)


def _unpacked(a: Arguments) -> Tensor:
    _, *kernel, _, _ = a.w_bits.shape
    return empty_nhwc(a.weight_scale, [a.weight_scale.shape[0], a.in_channels, *kernel], torch.float32)


@operation(results=_unpacked, contract=_check_unpack, phase=PHASE, shareable=True)
def unpack_weight(w_bits: Tensor, weight_scale: Tensor, in_channels: int) -> Tensor:
    """``alpha sign(W)`` of panels and alpha ``[C_o]``: float32 ``[C_o, C_i, *kernel]``, NHWC."""
    values = weight_values(packing.unpack_panels(w_bits, weight_scale.shape[0], in_channels))
    return stored_nhwc(values * reference.per_row(weight_scale, values))


def _check_gradient(a: Arguments) -> None:
    choice("mode", a.mode, MODES)
    require_float(a.grad_hat)
    a.weight_scale = vector(a.weight_scale)


@operation(
    results=lambda a: torch.empty_like(a.weight, dtype=torch.float32),
    contract=_check_gradient,
    phase=PHASE,
    role="grad_weight",
)
def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    """`reference.weight_gradient`, float32 ``[C_o, C_i, *kernel]``.

    Returned with the strides of ``weight``, so that the optimizer sees matching layouts.
    """
    grad = reference.weight_gradient(grad_hat, weight, weight_scale, mode)
    return torch.empty_like(weight, dtype=torch.float32).copy_(grad)
