"""Launching a Triton kernel: the same code for a GPU, for the interpreter and, without running, for tests.

A kernel of an operation registers itself, fills its results and launches:

    @kernel(activation.apply_mask)
    def apply_mask(a: Arguments, out: Tensor) -> None:
        launch(made, "apply_mask", grid, ..., out)

Results are bit for bit those of the reference because nothing is contracted (``enable_fp_fusion=False``), divisions and
square roots are the correctly rounded ones, and sums follow the defined order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import TritonMissingError
from .. import packing
from ..operands import INT32_LIMIT
from ..operations.declare import Operation
from ..packing import WORD, ceil_div
from .codegen import INTERPRET, Spec, import_triton, interpreted, load

PIXELS = 32
"""Pixels per program, of one word of channels each."""
ROWS = 4
"""Sums of 64 lanes per program."""
BLOCK = 1024
"""Elements per program."""
CHANNELS = 32
"""Channels per program, where it works on several positions of each."""
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for one launch.

    types: of the arguments, ``*fp32`` for a tensor, ``i32`` or ``i64``; ``1`` and ``None`` are constants to Triton.
    """

    spec: Spec
    kernel: str
    types: tuple[str, ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int


_recorded: list[Launch] | None = None
_runs = True


def kernel(operation: Operation) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function, of the operands and the results, as an operation's kernel on a GPU."""

    def register(fill: Callable[..., None]) -> Callable[..., None]:
        operation.implement("gpu", fill)
        return fill

    return register


@contextlib.contextmanager
def recording(*, run: bool = True) -> Iterator[list[Launch]]:
    """Collect launches instead of (or, with ``run``, besides) doing them; results are uninitialized then."""
    global _recorded, _runs
    before, _recorded, _runs = (_recorded, _runs), [], run
    try:
        yield _recorded
    finally:
        _recorded, _runs = before


def launch(
    spec: Spec,
    kernel: str,
    grid: Sequence[int] | Callable[[int, int], Sequence[int]],
    *arguments: Tensor | int | None,
    warps: int = 4,
    stages: int = 2,
    **constants: int,
) -> None:
    """Run ``kernel`` of a spec's file over a grid of programs; an empty grid is nothing to do.

    The grid of a product is a function of its tile (m, n), which Triton chooses where it autotunes.
    """
    programs = grid(constants["TILE_M"], constants["TILE_N"]) if callable(grid) else grid
    if 0 in programs:
        return
    if _recorded is not None:
        types = tuple(_type(argument) for argument in arguments)
        _recorded.append(Launch(spec, kernel, types, tuple(constants.items()), warps, stages))
        if not _runs:
            return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    require_triton([device.type])
    function: Any = getattr(load(spec), kernel)
    with _on(device):
        if callable(grid) and dict(spec.options)["autotune"]:
            fixed = {name: value for name, value in constants.items() if not name.startswith("TILE_")}
            chosen = grid  # a callable, which the type checker forgets inside the lambda
            by_tile = function[lambda made: tuple(chosen(made["TILE_M"], made["TILE_N"]))]
            by_tile(*arguments, **fixed, enable_fp_fusion=False)
        else:
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
            function[tuple(programs)](*arguments, **constants, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU; its interpreter computes with NumPy, which would warn of every infinity."""
    if device.type != "cpu":
        return torch.cuda.device(device)
    import numpy

    return numpy.errstate(all="ignore")


def require_triton(device_types: Iterable[str]) -> None:
    """Raise `TritonMissingError` unless kernels can run on tensors of these devices: ``cpu`` needs the interpreter."""
    import_triton()
    if "cpu" in device_types and not interpreted():
        raise TritonMissingError(
            f"Triton kernels were called with CPU tensors; accepted: CUDA and ROCm tensors; remedy: set {INTERPRET}=1 "
            "before Python starts, which runs them in Triton's interpreter (slow, for tests)"
        )


def _type(argument: Tensor | int | None) -> str:
    if isinstance(argument, Tensor):
        return "*" + _TYPES[argument.dtype]
    if argument is None or argument == 1:
        return str(argument)
    return "i32" if -INT32_LIMIT <= argument <= INT32_LIMIT else "i64"


def offset_type(*sizes: int) -> str:
    """The type of memory offsets: 64 bits where a tensor has more elements than int32 counts.

    Half the range is left for the masked elements of the last block.
    """
    return "tl.int64" if max(sizes, default=0) > INT32_LIMIT // 2 else "tl.int32"


def values(x: Tensor) -> Tensor:
    """``[N, *S, C]``, contiguous, of a floating point ``[N, C, *S]``; kernels convert to float32 as they load."""
    return packing.channels_last(x).contiguous()


def pixel_grid(pixels: int, channels: int) -> tuple[int, int]:
    """Programs of PIXELS pixels and one word of channels."""
    return ceil_div(pixels, PIXELS), ceil_div(channels, WORD)


def as_integers(x: Tensor) -> Tensor:
    """The bits of a contiguous tensor of any type of 1, 2, 4 or 8 bytes."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below ``value``; Triton's blocks are powers of two."""
    return 1 << max(0, value - 1).bit_length()
