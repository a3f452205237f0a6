"""Native CPU operations made from pointwise programs (program.py): a library is rendered and compiled for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import codegen, native, program
from .cpu_forward import CODES
from .native import call, choice, empty_nhwc, inner_size
from .ops import output_size
from .packing import WORD, ceil_div

ELEMENTS = {torch.float32: "float", torch.int32: "i32", torch.int16: "i16", torch.bfloat16: "bf16"}
FIXED = {program.CHANNEL: "float", program.BITS: "u64"}
"""C++ types of operands that every caller gives in one dtype."""


@functools.cache
def program_parameters(text: str, types: tuple[str, ...]) -> codegen.Parameters:
    """What the template of pointwise programs is rendered with; ``types``: C++ types of the operands."""
    parsed = program.parse(text)
    operands = tuple(
        _Operand(index, kind, element) for index, (kind, element) in enumerate(zip(parsed.operands, types, strict=True))
    )
    before, after, pool = parsed.before_pool, parsed.after_pool, parsed.pool
    first = before[-1].name if before else "x0"
    result = pool.arguments[0] if pool else first
    return (
        ("text", text),
        ("operands", operands),
        ("before", tuple(program.cpp_lines(before))),
        ("before_result", result),
        ("pooled", pool.name if pool else ""),
        ("after", tuple(program.cpp_lines(after))),
        ("after_result", after[-1].name if after else pool.name if pool else ""),
    )


def parameters_for(text: str, dtypes: Sequence[torch.dtype]) -> codegen.Parameters:
    """`program_parameters` by torch dtypes."""
    kinds = program.parse(text).operands
    types = (FIXED.get(kind) or ELEMENTS[d] for kind, d in zip(kinds, dtypes, strict=True))
    return program_parameters(text, tuple(types))


@dataclasses.dataclass(frozen=True)
class _Operand:
    index: int
    kind: str
    type: str


def operand_memory(name: str, operands: Sequence[Tensor], text: str) -> tuple[list[Tensor], list[int]]:
    """Operands in the memory that a kernel reads, and the shape of the full ones; raises unless the others fit it."""
    kinds = program.parse(text).operands
    shape = list(operands[kinds.index(program.FULL)].shape)
    n, channels, *spatial = shape
    accepted = {
        program.FULL: shape,
        program.CHANNEL: [channels],
        program.BITS: [n, *spatial, ceil_div(channels, WORD)],
    }
    for operand, kind in zip(operands, kinds, strict=True):
        if list(operand.shape) != accepted[kind]:
            raise UnsupportedInputError(
                f"{name}: got a {kind} operand of shape {tuple(operand.shape)}; accepted: {tuple(accepted[kind])}"
            )
    return [_memory(operand, kind) for operand, kind in zip(operands, kinds, strict=True)], shape


def _memory(operand: Tensor, kind: str) -> Tensor:
    if kind == program.FULL:
        return native.nhwc_memory(operand)
    return (operand if kind == program.BITS else operand.to(torch.float32)).contiguous()


def fused_activation(
    operands: Sequence[Tensor],
    text: str,
    code: str,
    window: Sequence[int],
    keep_values: bool,
    keep_below: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memory, (n, channels, *spatial) = operand_memory("fused_activation", operands, text)
    parameters = parameters_for(text, [o.dtype for o in memory])
    kernel, stride, padding = (list(window[i : i + 2]) for i in (0, 2, 4))
    size = [*map(int, output_size(spatial, kernel, stride, padding))] if window else spatial
    like = memory[0]
    bits, mask = (like.new_empty([n, *size, ceil_div(channels, WORD)], dtype=torch.int64) for _ in range(2))
    # A pooled value has several inputs: keeping it from the first pass to the second is less than making it twice.
    made_once = keep_values or (bool(window) and code == "threshold")
    values = empty_nhwc(like, [n, channels, *size], torch.float32) if made_once else None
    below = torch.empty_like(bits) if keep_below else None
    threshold = torch.empty((), dtype=torch.float32)
    ones = [1] * len(spatial)
    shape = native.geometry(
        batch=n,
        words=0,
        channels=channels,
        input_size=spatial,
        output_size=size,
        kernel=kernel or ones,
        stride=stride or ones,
        padding=padding or [0] * len(spatial),
    )
    outputs = (choice("code", code, CODES), threshold, bits, mask, values, below)
    call("fused_activation", "fused_activation", *memory, shape, *outputs, parameters=parameters)
    if code == "threshold":
        native.check_threshold(threshold)
    return (
        bits,
        mask,
        values if keep_values and values is not None else like.new_empty(0, dtype=torch.float32),
        bits.new_empty(0) if below is None else below,
    )


def fused_gradient(
    operands: Sequence[Tensor], text: str, measure: bool, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    memory, shape = operand_memory("fused_gradient", operands, text)
    parameters = parameters_for(text, [o.dtype for o in memory])
    like, (n, channels, *_) = memory[0], shape
    values = empty_nhwc(like, shape, torch.float32)
    rows, columns = (like.new_empty([2, size] if measure else [0], dtype=torch.float32) for size in (n, channels))
    extremes = (rows, columns) if measure else (None, None)
    sizes = (n, inner_size(values), channels)
    scale = native.vector(weight_scale)
    call("fused_gradient", "fused_gradient", *memory, *sizes, scale, values, *extremes, parameters=parameters)
    return values, rows, columns
