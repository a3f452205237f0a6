"""Operations made from pointwise programs on the CPU (program.py): a library is rendered and compiled for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import program
from ..operands import CODES, inner_size
from ..operations import Arguments, programs
from . import codegen
from .functions import geometry
from .native import call, check_threshold, empty_nhwc, kernel, nhwc

ELEMENTS = {torch.float32: "float", torch.int32: "i32", torch.int16: "i16", torch.bfloat16: "bf16"}
FIXED = {program.CHANNEL: "float", program.ROW: "float", program.BITS: "u64"}
"""C++ types of operands that every caller gives in one dtype."""


@functools.cache
def program_parameters(text: str, types: tuple[str, ...]) -> codegen.Parameters:
    """What the template of pointwise programs is rendered with; ``types``: C++ types of the operands."""
    parsed = program.parse(text)
    operands = tuple(
        _Operand(index, kind, element) for index, (kind, element) in enumerate(zip(parsed.operands, types, strict=True))
    )
    before, after, pool = parsed.before_pool, parsed.after_pool, parsed.pool
    return (
        ("text", text),
        ("operands", operands),
        ("pointers", "".join(f"const void* p{operand.index}, " for operand in operands)),
        ("operand_values", "{" + ", ".join(f"(const {operand.type}*)p{operand.index}" for operand in operands) + "}"),
        ("before", tuple(program.cpp_lines(before))),
        ("before_result", parsed.before_result),
        ("pooled", pool.name if pool else ""),
        ("after", tuple(program.cpp_lines(after))),
        ("after_result", after[-1].name if after else pool.name if pool else ""),
    )


def parameters_for(text: str, dtypes: Sequence[torch.dtype]) -> codegen.Parameters:
    """`program_parameters` by torch dtypes."""
    kinds = program.parse(text).operands
    types = (FIXED.get(kind) or ELEMENTS.get(d, "float") for kind, d in zip(kinds, dtypes, strict=True))
    return program_parameters(text, tuple(types))


@dataclasses.dataclass(frozen=True)
class _Operand:
    index: int
    kind: str
    type: str


def _parameters(a: Arguments) -> codegen.Parameters:
    return parameters_for(a.text, [operand.dtype for operand in a.memory])


@kernel(programs.fused_activation)
def fused_activation(a: Arguments, bits: Tensor, mask: Tensor, values: Tensor, below: Tensor) -> None:
    (n, channels, *spatial), size, like = a.shape, bits.shape[1:-1], a.memory[0]
    sign, by_sample = CODES[a.code], a.rule == "sample"
    # A sample's values stay in the cache from the pass for its mean to the pass for its bits; a batch's do not.
    made_once = a.keep_values or (not sign and a.threshold is None and not by_sample)
    made = values if a.keep_values else empty_nhwc(like, [n, channels, *size], torch.float32) if made_once else None
    probe, ones = like.new_empty((), dtype=torch.float32), [1] * len(spatial)
    shape = geometry(
        batch=n,
        words=0,
        channels=channels,
        input_size=spatial,
        output_size=size,
        kernel=a.window[:2] or ones,
        stride=a.window[2:4] or ones,
        padding=a.window[4:6] or [0] * len(spatial),
    )
    outputs = (sign, a.threshold, n if by_sample else 1, probe, bits, mask, made, below if a.keep_below else None)
    call("fused_activation", "fused_activation", *a.memory, shape, *outputs, parameters=_parameters(a))
    if not sign:
        check_threshold(probe)


@kernel(programs.fused_gradient)
def fused_gradient(a: Arguments, values: Tensor, rows: Tensor, channels: Tensor) -> None:
    sizes, extremes = (values.shape[0], inner_size(values), values.shape[1]), (rows, channels)
    outputs = (a.weight_scale, values, *(extremes if a.measure else (None, None)))
    call("fused_gradient", "fused_gradient", *a.memory, *sizes, *outputs, parameters=_parameters(a))


@kernel(programs.gradient_moments)
def gradient_moments(a: Arguments, total: Tensor, moment: Tensor) -> None:
    acc = a.operands[0]
    sizes, vectors = (acc.shape[0], inner_size(acc), acc.shape[1]), (a.weight_scale, a.bias, a.center)
    call("gradient_moments", "gradient_moments", *a.memory, *sizes, *vectors, total, moment, parameters=_parameters(a))


@kernel(programs.max_pool_gradient)
def max_pool_gradient(a: Arguments, grad: Tensor) -> None:
    n, channels, *size = a.shape
    shape = geometry(
        batch=n,
        words=0,
        channels=channels,
        input_size=size,
        output_size=a.g.shape[2:],
        kernel=a.kernel,
        stride=a.stride,
        padding=a.padding,
    )
    result = grad if grad.dtype == torch.float32 else empty_nhwc(grad, grad.shape, torch.float32)
    operands = (*a.memory, nhwc(a.g), shape)
    call("max_pool_gradient", "max_pool_gradient", *operands, result, parameters=_parameters(a))
    if result is not grad:
        grad.copy_(result)
