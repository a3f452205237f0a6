"""Operations made from pointwise programs (program.py): every kernel computes one from its operands as it reads them.

``operands`` and ``text`` are a program's; ``[N, C, *S]`` is the shape of its full operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import packing, program, reference
from ..operands import (
    CODES,
    RULES,
    choice,
    empty_nhwc,
    full_operand,
    known_threshold,
    output_size,
    program_memory,
    require_float,
    vector,
)
from ..packing import WORD, ceil_div, stored_nhwc
from .activation import pack_activation
from .declare import Arguments, operation

PHASE = "fused float"


def _check_activation(a: Arguments) -> None:
    choice("code", a.code, CODES)
    choice("rule", a.rule, RULES)
    a.memory, a.shape = program_memory("fused_activation", a.operands, a.text), full_operand(a.operands, a.text).shape
    a.threshold = known_threshold(a.threshold, a.shape[1])


def _activation(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    full = full_operand(a.operands, a.text)
    n, c, *spatial = full.shape
    window = a.window
    size = output_size(spatial, window[:2], window[2:4], window[4:6]) if window else spatial
    bits, mask = (full.new_empty([n, *size, ceil_div(c, WORD)], dtype=torch.int64) for _ in range(2))
    nothing = full.new_empty(0, dtype=torch.float32)
    values = empty_nhwc(full, [n, c, *size], torch.float32) if a.keep_values else nothing
    return bits, mask, values, torch.empty_like(bits) if a.keep_below else bits.new_empty(0)


@operation(results=_activation, contract=_check_activation, phase=PHASE)
def fused_activation(
    operands: Sequence[Tensor],
    text: str,
    code: str,
    window: Sequence[int],
    keep_values: bool,
    keep_below: bool,
    after: Tensor | None = None,
    threshold: Tensor | None = None,
    rule: str = "sample",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pointwise program, then `pack_activation` of its result x.

    The threshold is that of channels ``[1, C]``, if given, else `activation_threshold` of x by ``rule``.
    window: kernel, stride and padding of the program's max-pool, two each; empty without one.
    Returns bits, mask, the float32 values of x if ``keep_values`` and the bits of x <= 0 if ``keep_below``; empty
    tensors for what is not asked for.
    """
    x = program.evaluate(program.parse(text), operands, window)
    if code == "threshold" and threshold is None:
        threshold = reference.activation_threshold(x, rule)
    bits, mask = pack_activation(x, threshold)
    values = stored_nhwc(x) if keep_values else x.new_empty(0)
    below = packing.pack_rows(x <= 0) if keep_below else bits.new_empty(0)
    return bits, mask, values, below


def _check_gradient(a: Arguments) -> None:
    a.memory = program_memory("fused_gradient", a.operands, a.text)
    a.weight_scale = vector(a.weight_scale)


def _gradient(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    full = full_operand(a.operands, a.text)
    sizes = ([2, full.shape[0]], [2, full.shape[1]]) if a.measure else ([0], [0])
    row_extremes, channel_extremes = (full.new_empty(size, dtype=torch.float32) for size in sizes)
    return empty_nhwc(full, full.shape, torch.float32), row_extremes, channel_extremes


@operation(results=_gradient, contract=_check_gradient, phase=PHASE)
def fused_gradient(
    operands: Sequence[Tensor], text: str, measure: bool, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The float32 values v ``[N, C, *S]`` of a pointwise program, and what quantizing them starts with if ``measure``.

    That is least and greatest value of ``weight_scale v`` per row, ``[2, N]``, and of v per channel, ``[2, C]``; NaN
    where there is one, +0 for -0, empty unless asked for.
    """
    values = program.evaluate(program.parse(text), operands, ())
    if not measure:
        return stored_nhwc(values), values.new_empty(0), values.new_empty(0)
    scaled = values if weight_scale is None else values * reference.per_channel(weight_scale, values)
    rows, channels = scaled.flatten(1), values.transpose(0, 1).flatten(1)
    row_extremes, channel_extremes = (torch.stack([v.amin(1), v.amax(1)]) + 0.0 for v in (rows, channels))
    return stored_nhwc(values), row_extremes, channel_extremes


def _check_moments(a: Arguments) -> None:
    a.memory = program_memory("gradient_moments", a.operands, a.text)
    a.weight_scale, a.bias, a.center = vector(a.weight_scale), vector(a.bias), vector(a.center)


def _moments(a: Arguments) -> tuple[Tensor, Tensor]:
    channels = a.operands[0].shape[1]
    return a.center.new_empty(channels, dtype=torch.float32), a.center.new_empty(channels, dtype=torch.float32)


@operation(results=_moments, contract=_check_moments, phase=PHASE)
def gradient_moments(
    operands: Sequence[Tensor], text: str, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.gradient_moments` of the values g of a pointwise program, two float32 ``[C]``.

    Its first operand, a full one, is acc.
    """
    values = program.evaluate(program.parse(text), operands, ())
    return reference.gradient_moments(values, operands[0], weight_scale, bias, center)


def _check_pool(a: Arguments) -> None:
    require_float(a.g)
    a.memory, a.shape = program_memory("max_pool_gradient", a.operands, a.text), full_operand(a.operands, a.text).shape


@operation(
    results=lambda a: empty_nhwc(a.g, full_operand(a.operands, a.text).shape, a.g.dtype),
    contract=_check_pool,
    phase=PHASE,
)
def max_pool_gradient(
    g: Tensor,
    operands: Sequence[Tensor],
    text: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`reference.max_pool_gradient` of the values x ``[N, C, H, W]`` of a pointwise program, in the dtype of g."""
    x = program.evaluate(program.parse(text), operands, ())
    return stored_nhwc(reference.max_pool_gradient(g, x, kernel, stride, padding))
