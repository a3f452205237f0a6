"""Activations to bits and back on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import CODES, inner_size, nhwc_memory
from ..operations import Arguments, activation
from .native import call, check_threshold, kernel, nhwc


@kernel(activation.activation_threshold)
def activation_threshold(a: Arguments, mean: Tensor) -> None:
    probe = a.x.new_empty((), dtype=torch.float32)
    n, size = a.x.shape[0], inner_size(a.x) * a.x.shape[1]
    groups = (n, size) if a.rule == "sample" else (1, n * size)
    call("pack", "activation_threshold", nhwc(a.x), *groups, mean, probe)
    check_threshold(probe)


@kernel(activation.pack_activation)
def pack_activation(a: Arguments, bits: Tensor, mask: Tensor) -> None:
    n, channels, *_ = a.x.shape
    limits = (a.threshold, a.by_channel, a.groups)
    call("pack", "pack_activation", nhwc(a.x), n * inner_size(a.x), channels, *limits, bits, mask)


@kernel(activation.unpack_activation)
def unpack_activation(a: Arguments, x: Tensor) -> None:
    pixels = x.shape[0] * inner_size(x)
    call("pack", "unpack_activation", a.x_bits, pixels, a.channels, CODES[a.code], x)


@kernel(activation.apply_mask)
def apply_mask(a: Arguments, out: Tensor) -> None:
    n, channels, *_ = a.g.shape
    memory, pixels = nhwc_memory(a.g), n * inner_size(a.g)
    call("pack", "apply_mask", memory, a.g.element_size(), a.mask, pixels, channels, out)


@kernel(activation.pack_bool)
def pack_bool(a: Arguments, words: Tensor) -> None:
    n, channels, *_ = a.mask.shape
    call("float", "pack_bool", nhwc_memory(a.mask), n * inner_size(a.mask), channels, words)


@kernel(activation.unpack_bool)
def unpack_bool(a: Arguments, mask: Tensor) -> None:
    call("float", "unpack_bool", a.words, mask.shape[0] * inner_size(mask), a.channels, mask)
