"""Activations to bits and back; truth values to bits and back. Arithmetic: `reference.activation` (docs/math.md 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing, reference
from ..operands import CODES, RULES, choice, empty_nhwc, require_float, threshold_groups, vector, words
from ..packing import WORD, ceil_div, stored_nhwc
from .declare import Arguments, operation

PHASE = "packing"


def _check_threshold(a: Arguments) -> None:
    require_float(a.x)
    choice("rule", a.rule, RULES)


@operation(
    results=lambda a: a.x.new_empty([a.x.shape[0], 1] if a.rule == "sample" else [], dtype=torch.float32),
    contract=_check_threshold,
    phase=PHASE,
    shareable=True,
)
def activation_threshold(x: Tensor, rule: str) -> Tensor:
    """The mean of x ``[N, C, *S]``: float32 ``[N, 1]`` of every row (``sample``) or ``[]`` of all (``batch``)."""
    return reference.activation_threshold(x, rule)


def _bits_and_mask(a: Arguments) -> tuple[Tensor, Tensor]:
    n, c, *spatial = a.x.shape
    shape = [n, *spatial, ceil_div(c, WORD)]
    return a.x.new_empty(shape, dtype=torch.int64), a.x.new_empty(shape, dtype=torch.int64)


def _check_pack(a: Arguments) -> None:
    require_float(a.x)
    a.by_channel, a.groups = threshold_groups(a.threshold, a.x)
    a.threshold = vector(a.threshold)


@operation(results=_bits_and_mask, contract=_check_pack, phase=PHASE, shareable=True)
def pack_activation(x: Tensor, threshold: Tensor | None, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bits and straight-through mask of x ``[N, C, *S]``, both rows int64 ``[N, *S, ceil(C/64)]``.

    threshold: None for the ``sign`` code, else `reference.threshold_of`. ``after`` is not read: an operand that must
    have been computed before.
    """
    bits = packing.pack_rows(reference.activation_bits(x, threshold))
    return bits, packing.pack_rows(reference.activation_mask(x, threshold))


def activation_values(x_bits: Tensor, channels: int, code: str) -> Tensor:
    """Code values of rows, float32 ``[N, C, *S]``."""
    return reference.code_values(packing.unpack_rows(x_bits, channels), code)


def _check_unpack(a: Arguments) -> None:
    choice("code", a.code, CODES)
    a.x_bits = words("x_bits", a.x_bits, a.channels)


def _unpacked(a: Arguments) -> Tensor:
    n, *spatial, _ = a.x_bits.shape
    return empty_nhwc(a.x_bits, [n, a.channels, *spatial], torch.float32)


@operation(results=_unpacked, contract=_check_unpack, phase=PHASE, shareable=True)
def unpack_activation(x_bits: Tensor, channels: int, code: str) -> Tensor:
    """Code values of rows ``[N, *S, ceil(C/64)]``: float32 ``[N, C, *S]``, NHWC."""
    return stored_nhwc(activation_values(x_bits, channels, code))


def _check_mask(a: Arguments) -> None:
    n, channels, *spatial = a.g.shape
    a.mask = words("mask", a.mask, channels, [n, *spatial])


@operation(results=lambda a: empty_nhwc(a.g, a.g.shape, a.g.dtype), contract=_check_mask, phase=PHASE)
def apply_mask(g: Tensor, mask: Tensor) -> Tensor:
    """g ``[N, C, *S]``, any dtype, where the bit of mask ``[N, *S, ceil(C/64)]`` is set, else 0; NHWC."""
    keep = packing.unpack_rows(mask, g.shape[1])
    return stored_nhwc(torch.where(keep, g, torch.zeros_like(g)))


def _bool_words(a: Arguments) -> Tensor:
    n, c, *spatial = a.mask.shape
    return a.mask.new_empty([n, *spatial, ceil_div(c, WORD)], dtype=torch.int64)


@operation(results=_bool_words, phase=PHASE)
def pack_bool(mask: Tensor) -> Tensor:
    """bool ``[N, C, *S]`` as rows int64 ``[N, *S, ceil(C/64)]``."""
    return packing.pack_rows(mask)


def _check_unpack_bool(a: Arguments) -> None:
    a.words = words("words", a.words, a.channels)


def _bools(a: Arguments) -> Tensor:
    n, *spatial, _ = a.words.shape
    return empty_nhwc(a.words, [n, a.channels, *spatial], torch.bool)


@operation(results=_bools, contract=_check_unpack_bool, phase=PHASE)
def unpack_bool(words: Tensor, channels: int) -> Tensor:
    """Rows int64 ``[N, *S, ceil(C/64)]`` as bool ``[N, C, *S]``, NHWC."""
    return stored_nhwc(packing.unpack_rows(words, channels))
