"""Native CPU operations between the products: masks as bits, BatchNorm statistics, max-pooling."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import codegen, native, program, reference
from .cpu_forward import CODES
from .native import call, choice, empty_nhwc, inner_size, nhwc
from .ops import output_size
from .packing import WORD, ceil_div

ELEMENTS = {torch.float32: "float", torch.int32: "i32", torch.int16: "i16", torch.bfloat16: "bf16"}


@functools.cache
def program_parameters(text: str, types: tuple[str, ...]) -> codegen.Parameters:
    """What the template of pointwise programs is rendered with; ``types``: C++ types of the operands."""
    parsed = program.parse(text)
    operands = tuple(
        _Operand(index, kind == program.FULL, element)
        for index, (kind, element) in enumerate(zip(parsed.operands, types, strict=True))
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
    types = (ELEMENTS[d] if kind == program.FULL else "float" for kind, d in zip(kinds, dtypes, strict=True))
    return program_parameters(text, tuple(types))


@dataclasses.dataclass(frozen=True)
class _Operand:
    index: int
    full: bool
    type: str


def fused_activation(
    operands: Sequence[Tensor],
    text: str,
    code: str,
    window: Sequence[int],
    keep_values: bool,
    keep_below: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kinds = program.parse(text).operands
    memory = [
        native.nhwc_memory(o) if kind == program.FULL else o.to(torch.float32).contiguous()
        for o, kind in zip(operands, kinds, strict=True)
    ]
    parameters = parameters_for(text, [o.dtype for o in memory])
    n, channels, *spatial = operands[kinds.index(program.FULL)].shape
    for operand, kind in zip(memory, kinds, strict=True):
        if kind == program.CHANNEL and operand.shape != (channels,):
            raise UnsupportedInputError(
                f"fused_activation: got a channel operand of shape {tuple(operand.shape)}; accepted: ({channels},)"
            )
    kernel, stride, padding = (list(window[i : i + 2]) for i in (0, 2, 4))
    size = [*map(int, output_size(spatial, kernel, stride, padding))] if window else spatial
    like = memory[0]
    bits, mask = (like.new_empty([n, *size, ceil_div(channels, WORD)], dtype=torch.int64) for _ in range(2))
    values = empty_nhwc(like, [n, channels, *size], torch.float32) if keep_values else None
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
    call(codegen.PROGRAM_TEMPLATE, "fused_activation", *memory, shape, *outputs, parameters=parameters)
    if code == "threshold":
        reference.warn_unless_finite(threshold.item())
    return (
        bits,
        mask,
        like.new_empty(0, dtype=torch.float32) if values is None else values,
        bits.new_empty(0) if below is None else below,
    )


def pack_bool(mask: Tensor) -> Tensor:
    values, (n, channels, *spatial) = native.nhwc_memory(mask), mask.shape
    words = mask.new_empty([n, *spatial, ceil_div(channels, WORD)], dtype=torch.int64)
    call("float", "pack_bool", values, n * inner_size(mask), channels, words)
    return words


def unpack_bool(words: Tensor, channels: int) -> Tensor:
    bits = native.words("words", words, channels)
    n, *spatial, word_count = bits.shape
    mask = empty_nhwc(bits, [n, channels, *spatial], torch.bool)
    call("float", "unpack_bool", bits, bits.numel() // max(1, word_count), channels, mask)
    return mask


def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    values, channels = native.nhwc_memory(acc), acc.shape[1]
    shape = [1, channels, *[1] * (acc.dim() - 2)]
    var, mean = (weight_scale.new_empty(shape, dtype=torch.float32) for _ in range(2))
    factors = (native.vector(weight_scale), native.vector(bias))
    narrow, count = acc.dtype == torch.int16, acc.shape[0] * inner_size(acc)
    call("float", "channel_moments", values, narrow, count, channels, largest, *factors, var, mean)
    return var, mean


def gradient_moments(
    g: Tensor, acc: Tensor, weight_scale: Tensor, bias: Tensor | None, center: Tensor
) -> tuple[Tensor, Tensor]:
    channels = g.shape[1]
    total, moment = (weight_scale.new_empty(channels, dtype=torch.float32) for _ in range(2))
    operands = (nhwc(g), native.nhwc_memory(acc.to(torch.int32)), g.shape[0] * inner_size(g), channels)
    vectors = (native.vector(weight_scale), native.vector(bias), native.vector(center))
    call("float", "gradient_moments", *operands, *vectors, total, moment)
    return total, moment


def max_pool_gradient(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    grad = empty_nhwc(g, x.shape, torch.float32)
    shape = native.geometry(
        batch=x.shape[0],
        words=0,
        channels=x.shape[1],
        input_size=x.shape[2:],
        output_size=g.shape[2:],
        kernel=kernel,
        stride=stride,
        padding=padding,
    )
    call("float", "max_pool_gradient", nhwc(g), nhwc(x), shape, grad)
    return grad.to(g.dtype)
