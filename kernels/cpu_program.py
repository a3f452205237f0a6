"""Native CPU operations made from pointwise programs (program.py): a library is rendered and compiled for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import codegen, native, program
from .cpu_forward import CODES, RULES
from .native import call, choice, empty_nhwc, inner_size, nhwc, vector
from .ops import output_size
from .packing import WORD, ceil_div

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


def operand_memory(name: str, operands: Sequence[Tensor], text: str) -> tuple[list[Tensor], list[int]]:
    """Operands in the memory that a kernel reads, and the shape of the full ones; raises unless the others fit it."""
    kinds = program.parse(text).operands
    shape = list(operands[kinds.index(program.FULL)].shape)
    n, channels, *spatial = shape
    accepted = {
        program.FULL: shape,
        program.CHANNEL: [channels],
        program.ROW: [n],
        program.MAP: [1, channels, *spatial],
        program.BITS: [n, *spatial, ceil_div(channels, WORD)],
    }
    _require_kinds(name, kinds)
    for operand, kind in zip(operands, kinds, strict=True):
        if list(operand.shape) != accepted[kind]:
            raise UnsupportedInputError(
                f"{name}: got a {kind} operand of shape {tuple(operand.shape)}; accepted: {tuple(accepted[kind])}"
            )
    return [_memory(operand, kind) for operand, kind in zip(operands, kinds, strict=True)], shape


def _require_kinds(name: str, kinds: Sequence[str]) -> None:
    """Raise unless an operation can run a program with operands of these kinds."""
    by_row = [kind for kind in kinds if kind in (program.ROW, program.MAP)]
    if name == "fused_activation" and by_row:
        raise UnsupportedInputError(f"{name}: got a {by_row[0]} operand; accepted: full, channel and bits operands")
    if name == "gradient_moments" and kinds[0] != program.FULL:  # what it multiplies the values with
        raise UnsupportedInputError(f"{name}: got a {kinds[0]} operand first; accepted: a full one")


def _memory(operand: Tensor, kind: str) -> Tensor:
    if kind in (program.FULL, program.MAP):
        return native.nhwc_memory(operand if operand.dtype in ELEMENTS else operand.to(torch.float32))
    return (operand if kind == program.BITS else operand.to(torch.float32)).contiguous()


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
    memory, (n, channels, *spatial) = operand_memory("fused_activation", operands, text)
    parameters = parameters_for(text, [o.dtype for o in memory])
    kernel, stride, padding = (list(window[i : i + 2]) for i in (0, 2, 4))
    size = [*map(int, output_size(spatial, kernel, stride, padding))] if window else spatial
    like = memory[0]
    bits, mask = (like.new_empty([n, *size, ceil_div(channels, WORD)], dtype=torch.int64) for _ in range(2))
    sign, by_sample = choice("code", code, CODES), bool(choice("rule", rule, RULES))
    limits = known_threshold(threshold, channels)
    # A sample's values stay in the cache from the pass for its mean to the pass for its bits; a batch's do not.
    made_once = keep_values or (not sign and limits is None and not by_sample)
    values = empty_nhwc(like, [n, channels, *size], torch.float32) if made_once else None
    below = torch.empty_like(bits) if keep_below else None
    probe = like.new_empty((), dtype=torch.float32)
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
    outputs = (sign, limits, n if by_sample else 1, probe, bits, mask, values, below)
    call("fused_activation", "fused_activation", *memory, shape, *outputs, parameters=parameters)
    if not sign:
        native.check_threshold(probe)
    return (
        bits,
        mask,
        values if keep_values and values is not None else like.new_empty(0, dtype=torch.float32),
        bits.new_empty(0) if below is None else below,
    )


def known_threshold(threshold: Tensor | None, channels: int) -> Tensor | None:
    """A threshold of every channel ``[1, C]`` as a kernel reads it; raises for another shape."""
    if threshold is not None and threshold.shape != (1, channels):
        raise UnsupportedInputError(
            f"fused_activation: got a threshold of shape {tuple(threshold.shape)}; accepted: (1, {channels})"
        )
    return vector(threshold)


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
    scale = vector(weight_scale)
    call("fused_gradient", "fused_gradient", *memory, *sizes, scale, values, *extremes, parameters=parameters)
    return values, rows, columns


def gradient_moments(
    operands: Sequence[Tensor], text: str, weight_scale: Tensor | None, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    memory, (n, channels, *_) = operand_memory("gradient_moments", operands, text)
    total, moment = (center.new_empty(channels, dtype=torch.float32) for _ in range(2))
    vectors = (vector(weight_scale), vector(bias), vector(center))
    parameters, sizes = parameters_for(text, [o.dtype for o in memory]), (n, inner_size(operands[0]), channels)
    call("gradient_moments", "gradient_moments", *memory, *sizes, *vectors, total, moment, parameters=parameters)
    return total, moment


def max_pool_gradient(
    g: Tensor,
    operands: Sequence[Tensor],
    text: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    memory, x_shape = operand_memory("max_pool_gradient", operands, text)
    grad = empty_nhwc(g, x_shape, torch.float32)
    shape = native.geometry(
        batch=x_shape[0],
        words=0,
        channels=x_shape[1],
        input_size=x_shape[2:],
        output_size=g.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    parameters = parameters_for(text, [o.dtype for o in memory])
    call("max_pool_gradient", "max_pool_gradient", *memory, nhwc(g), shape, grad, parameters=parameters)
    return grad.to(g.dtype)
