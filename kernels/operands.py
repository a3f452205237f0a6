"""Contracts of packed operands, for every device: the options, shapes and memory that kernels take, checked once.

A contract returns the operand as kernels read it, or raises an error that names it, with what it got and accepts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedInputError
from . import packing, program
from .packing import LANE_TILE, PANEL, WORD, ceil_div

Size = Annotated[int, "SymInt"]
"""A size that may be symbolic while a graph is traced."""

CODES = {"threshold": 0, "sign": 1}
MODES = {"none": 0, "xnor": 1}
RULES = {"batch": 0, "sample": 1}
KINDS = {"norm": 0, "range": 1, "uniform": 2}
PRUNES = {"none": 0, "topk": 1, "bernoulli": 2, "systematic": 3}
"""The accepted values of every option, and their numbers in C++."""

INT32_LIMIT = 2**31 - 1
MAX_BITS = 8


# -- options and sizes ----------------------------------------------------------------------------------------


def choice(name: str, value: str, accepted: Mapping[str, int]) -> str:
    """The value of an option; raises `ConfigError` naming the accepted ones."""
    if value not in accepted:
        raise ConfigError(f"{name}: got {value!r}; accepted: {', '.join(map(repr, accepted))}")
    return value


def require_bits(name: str, bits: int) -> None:
    """Raise unless a code fits into a byte."""
    if not 1 <= bits <= MAX_BITS:
        raise UnsupportedInputError(f"{name}: got bits={bits}; accepted: 1 to {MAX_BITS}")


def require_int32(name: str, largest_code: int, products: int) -> None:
    """Raise where a sum of ``products`` codes times +-1 may leave int32."""
    if largest_code * products > INT32_LIMIT:
        raise UnsupportedInputError(
            f"{name}: {products} products of codes up to {largest_code} can exceed int32; accepted: at most "
            f"{INT32_LIMIT // largest_code} products; remedy: a smaller batch or fewer bits"
        )


def output_size(
    size: Sequence[Size], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[Size]:
    """Spatial size of a convolution's output, without dilation."""
    return [(s + 2 * p - k) // t + 1 for s, k, t, p in zip(size, kernel, stride, padding, strict=True)]


def pair(values: Sequence[int], missing: int) -> tuple[int, int]:
    """Values of 0, 1 or 2 spatial axes as two; an axis that does not exist in front."""
    if len(values) > 2:
        raise UnsupportedInputError(f"got {len(values)} spatial axes; accepted: 0 (linear), 1 or 2")
    height, width = [missing] * (2 - len(values)) + list(values)
    return height, width


def inner_size(x: Tensor) -> int:
    """Number of positions of a logical ``[N, C, *S]`` tensor: the product of its spatial axes."""
    return math.prod(x.shape[2:])


# -- floating point and lists ---------------------------------------------------------------------------------


def require_float(x: Tensor) -> None:
    """Raise unless ``x`` is float32, bfloat16 or float16."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedInputError(f"got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")


def empty_nhwc(like: Tensor, shape: Sequence[Size], dtype: torch.dtype) -> Tensor:
    """An uninitialized logical ``[N, C, *S]`` tensor stored in NHWC order."""
    n, c, *spatial = shape
    return packing.channels_second(like.new_empty([n, *spatial, c], dtype=dtype))


def nhwc_memory(x: Tensor) -> Tensor:
    """``[N, *S, C]``, contiguous, of logical ``[N, C, *S]``, in any dtype; an image that is so already as it is."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return packing.channels_last(x).contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """A contiguous float32 operand, or None."""
    return None if x is None else x.to(torch.float32).contiguous()


def indices(x: Tensor) -> Tensor:
    """A contiguous int32 list of rows or channels."""
    return x.to(torch.int32).contiguous()


def known_extremes(name: str, extremes: Tensor | None, groups: int) -> Tensor | None:
    """float32 ``[2, groups]``, if known; raises unless that is the shape."""
    if extremes is not None and extremes.shape != (2, groups):
        raise UnsupportedInputError(f"{name}: got extremes of shape {tuple(extremes.shape)}; accepted: (2, {groups})")
    return vector(extremes)


def known_threshold(threshold: Tensor | None, channels: int) -> Tensor | None:
    """A threshold of every channel ``[1, C]``; raises for another shape."""
    if threshold is not None and threshold.shape != (1, channels):
        raise UnsupportedInputError(
            f"fused_activation: got a threshold of shape {tuple(threshold.shape)}; accepted: (1, {channels})"
        )
    return vector(threshold)


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


# -- packed bits ----------------------------------------------------------------------------------------------


def words(name: str, x: Tensor, channels: int, leading: Sequence[int] | None = None) -> Tensor:
    """Contiguous rows or planes of ``channels`` channels; raises unless the last axis, and the others if given, fit."""
    expected = ceil_div(channels, WORD)
    if x.dtype != torch.int64 or x.shape[-1] != expected:
        raise UnsupportedInputError(
            f"{name}: got {x.dtype} words of shape {tuple(x.shape)}; "
            f"accepted: torch.int64 with a last axis of {expected} for {channels} channels"
        )
    if leading is not None and list(x.shape[:-1]) != list(leading):
        raise UnsupportedInputError(
            f"{name}: got words of shape {tuple(x.shape)}; accepted: {(*leading, ceil_div(channels, WORD))}"
        )
    return x.contiguous()


def panels(name: str, x: Tensor, channels: int, packed_channels: int) -> Tensor:
    """Contiguous panels ``[ceil(channels/16), *kernel, ceil(packed_channels/64), 16]``; raises unless they fit."""
    expected = (ceil_div(channels, PANEL), ceil_div(packed_channels, WORD), PANEL)
    if x.dtype != torch.int64 or (x.shape[0], *x.shape[-2:]) != expected:
        raise UnsupportedInputError(
            f"{name}: got {x.dtype} panels of shape {tuple(x.shape)}; accepted: torch.int64 "
            f"[{expected[0]}, *kernel, {expected[1]}, {expected[2]}]"
        )
    return x.contiguous()


def panel_taps(x: Tensor) -> int:
    """Taps of the kernel of panels."""
    return math.prod(x.shape[1:-2])


def lanes(name: str, x: Tensor, channels: int, positions: int) -> Tensor:
    """Contiguous lanes of ``channels`` channels and ``positions`` positions; raises unless they fit."""
    expected = (ceil_div(channels, LANE_TILE), ceil_div(positions, WORD), LANE_TILE)
    if x.dtype != torch.int64 or tuple(x.shape[1:]) != expected:
        raise UnsupportedInputError(
            f"{name}: got {x.dtype} of shape {tuple(x.shape)}; accepted: torch.int64 (bits, "
            f"{', '.join(map(str, expected))})"
        )
    require_bits(name, x.shape[0])
    return x.contiguous()


# -- operands of pointwise programs ---------------------------------------------------------------------------

PROGRAM_DTYPES = (torch.float32, torch.int32, torch.int16, torch.bfloat16)
"""What a kernel reads of full and map operands; anything else is converted to float32."""


def full_operand(operands: Sequence[Tensor], text: str) -> Tensor:
    """The first operand of a program with an element for every element of the result."""
    return operands[program.parse(text).operands.index(program.FULL)]


def program_memory(name: str, operands: Sequence[Tensor], text: str) -> list[Tensor]:
    """Operands of a program in the memory that a kernel reads; raises unless they fit the first full one."""
    kinds = program.parse(text).operands
    shape = list(full_operand(operands, text).shape)
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
    return [_program_memory(operand, kind) for operand, kind in zip(operands, kinds, strict=True)]


def _require_kinds(name: str, kinds: Sequence[str]) -> None:
    """Raise unless an operation can run a program with operands of these kinds."""
    by_row = [kind for kind in kinds if kind in (program.ROW, program.MAP)]
    if name == "fused_activation" and by_row:
        raise UnsupportedInputError(f"{name}: got a {by_row[0]} operand; accepted: full, channel and bits operands")
    if name == "gradient_moments" and kinds[0] != program.FULL:  # what it multiplies the values with
        raise UnsupportedInputError(f"{name}: got a {kinds[0]} operand first; accepted: a full one")


def _program_memory(operand: Tensor, kind: str) -> Tensor:
    if kind in (program.FULL, program.MAP):
        return nhwc_memory(operand if operand.dtype in PROGRAM_DTYPES else operand.to(torch.float32))
    return (operand if kind == program.BITS else operand.to(torch.float32)).contiguous()
