"""Calling a native kernel: arguments to C, tensors to NHWC memory, errors from a status.

Every kernel takes pointers, int64 and, last, the number of threads; it returns a status. ctypes releases the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedInputError
from . import codegen, memory, noise, ops, packing, reference
from .counting import isa_of
from .packing import ceil_div

INT32_LIMIT = 2**31 - 1
MAX_BITS = 8
_OK = 0
_profiler_enabled = torch.autograd._profiler_enabled


class Kernel:
    """One exported function of a template's library, for the instruction set it has when it is called (`counting`).

    ``operation`` names it to the profiler, which sees what goes through the dispatcher by itself.
    """

    def __init__(self, template: str, function: str, parameters: codegen.Parameters = (), operation: str = "") -> None:
        self.template, self.function, self.parameters = template, function, parameters
        self.event = f"{ops.NAMESPACE}::{operation}" if operation else ""
        self._entries: dict[str, Callable[..., int]] = {}

    def __call__(self, *arguments: int) -> None:
        """Run it on all of torch's threads; raises where it refuses its operands."""
        isa = isa_of(self.template)
        entry = self._entries.get(isa) or self._load(isa, len(arguments) + 1)
        if self.event and _profiler_enabled():
            with torch.profiler.record_function(self.event):
                status = entry(*arguments, torch.get_num_threads())
        else:
            status = entry(*arguments, torch.get_num_threads())
        if status != _OK:
            raise UnsupportedInputError(
                f"{self.function}: a kept row or channel has an index outside the tensor, or -1 before a used one; "
                "accepted: indices below its size, then only -1"
            )

    def on(self, isa: str, threads: int, *args: Tensor | int | ctypes.Array[ctypes.c_int64] | None) -> None:
        """Run it for an instruction set that is not the one in use, without a look at its status."""
        (self._entries.get(isa) or self._load(isa, len(args) + 1))(*map(_argument, args), threads)

    def _load(self, isa: str, count: int) -> Callable[..., int]:
        entry = _entry(codegen.library(self.template, isa, self.parameters), self.function, count)
        self._entries[isa] = entry
        return entry


class Recorder(Protocol):
    """Writes down what an implementation does instead of doing it (`launch`)."""

    def call(self, template: str, function: str, args: Sequence[Any], parameters: codegen.Parameters) -> None: ...

    def stream_keys(self, seed: Tensor, stream: int) -> tuple[int, int]: ...

    def check_threshold(self, threshold: Tensor) -> None: ...


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let ``recorder`` note what this thread would have run inside the block; its tensors are fake."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def call(
    template: str,
    function: str,
    *args: Tensor | int | ctypes.Array[ctypes.c_int64] | None,
    parameters: codegen.Parameters = (),
) -> None:
    """Run one exported function of a template's library on all of torch's threads."""
    if _thread.recorder is not None:
        _thread.recorder.call(template, function, args, parameters)
    else:
        _kernel(template, function, parameters)(*map(_argument, args))


_kernel = functools.cache(Kernel)


def stream_keys(seed: Tensor, stream: int) -> tuple[int, int]:
    """`noise.stream_keys` of a seed in memory."""
    if _thread.recorder is not None:
        return _thread.recorder.stream_keys(seed, stream)
    return noise.stream_keys(int(seed), stream)


def check_threshold(threshold: Tensor) -> None:
    """Warn where a threshold shows that NaN or infinite values are about to become bits."""
    if _thread.recorder is not None:
        _thread.recorder.check_threshold(threshold)
    else:
        if not math.isfinite(threshold.item()):
            reference.warn_unless_finite(threshold)


@functools.cache
def _entry(library: ctypes.CDLL, function: str, count: int) -> Callable[..., int]:
    """An exported function whose arguments are declared once: converting 20 of them in every call took 7 us."""
    entry: Any = getattr(library, function)
    entry.argtypes = (ctypes.c_int64,) * count  # pointers too
    return entry


def _argument(value: Tensor | int | ctypes.Array[ctypes.c_int64] | None) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return value if isinstance(value, int) else ctypes.addressof(value)


def nhwc(x: Tensor) -> Tensor:
    """float32 values of logical ``[N, C, *S]`` in NHWC memory: the same tensor where it already is."""
    if x.dtype != torch.float32:
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedInputError(f"got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
        x = x.to(torch.float32)
    return nhwc_memory(x)


def nhwc_memory(x: Tensor) -> Tensor:
    """``[N, *S, C]``, contiguous, of logical ``[N, C, *S]``, in any dtype; an image that is so already as it is."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return packing.channels_last(x).contiguous()


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`ops.empty_nhwc`, in huge pages where the result is large."""
    result = ops.empty_nhwc(like, shape, dtype)
    if _thread.recorder is None:
        advise_huge_pages(result)
    return result


HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def advise_huge_pages(x: Tensor) -> None:
    """Ask Linux to back fresh memory with 2 MB pages.

    The allocator returns large blocks to the system, so that a result of 33 MB is 8192 page faults (18 ms) in
    every step, more than the product written into it takes. With huge pages it is 16. Only a hint.
    """
    size = x.numel() * x.element_size()
    if size < 2 * HUGE_PAGE:
        return
    begin = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (x.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    (_advise_once if memory.kept else _advise)(begin, end)


def _advise(begin: int, end: int) -> None:
    madvise = _madvise()
    if madvise is not None:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


# Memory that is never given back keeps what it was advised: 10 us less a call, 30 calls a step.
_advise_once = functools.lru_cache(maxsize=4096)(_advise)


def vector(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A contiguous operand of the expected dtype, or None."""
    return None if x is None else x.to(dtype).contiguous()


def indices(x: Tensor) -> Tensor:
    """A contiguous int32 list of rows or channels."""
    return x.to(torch.int32).contiguous()


def words(name: str, x: Tensor, channels: int, leading: Sequence[int] | None = None) -> Tensor:
    """Contiguous rows or planes of ``channels`` channels; raises unless the last axis, and the others if given, fit."""
    packing.require_words(name, x, channels)
    if leading is not None and list(x.shape[:-1]) != list(leading):
        raise UnsupportedInputError(
            f"{name}: got words of shape {tuple(x.shape)}; accepted: {(*leading, ceil_div(channels, packing.WORD))}"
        )
    return x.contiguous()


def choice(name: str, value: str, accepted: Mapping[str, int]) -> int:
    """The C++ number of an option; raises `ConfigError` naming the accepted values."""
    if value not in accepted:
        raise ConfigError(f"{name}: got {value!r}; accepted: {', '.join(map(repr, accepted))}")
    return accepted[value]


def panels(name: str, x: Tensor, channels: int, packed_channels: int) -> Tensor:
    """Contiguous panels ``[ceil(channels/16), *kernel, ceil(packed_channels/64), 16]``; raises unless they fit."""
    expected = (ceil_div(channels, packing.PANEL), ceil_div(packed_channels, packing.WORD), packing.PANEL)
    if x.dtype != torch.int64 or (x.shape[0], *x.shape[-2:]) != expected:
        raise UnsupportedInputError(
            f"{name}: got {x.dtype} panels of shape {tuple(x.shape)}; accepted: torch.int64 "
            f"[{expected[0]}, *kernel, {expected[1]}, {expected[2]}]"
        )
    return x.contiguous()


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


def pair(values: Sequence[int], missing: int) -> tuple[int, int]:
    """Values of 0, 1 or 2 spatial axes as two; an axis that does not exist in front."""
    if len(values) > 2:
        raise UnsupportedInputError(f"got {len(values)} spatial axes; accepted: 0 (linear), 1 or 2")
    height, width = [missing] * (2 - len(values)) + list(values)
    return height, width


def geometry(
    *,
    batch: int,
    words: int,
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    channels: int = 0,
    in_channels: int = 0,
    out_channels: int = 0,
) -> ctypes.Array[ctypes.c_int64]:
    """The C++ ``Geometry``: fields in the order of `codegen.GEOMETRY`. Not to be written to: calls share it."""
    sizes = (tuple(s) for s in (input_size, output_size, kernel, stride, padding))
    return _geometry(batch, words, in_channels, out_channels, channels, *sizes)


@functools.lru_cache(maxsize=4096)
def _geometry(*fields: Any) -> ctypes.Array[ctypes.c_int64]:
    counts, axes = fields[:5], fields[5:]
    pairs = (pair(sizes, missing) for sizes, missing in zip(axes, (1, 1, 1, 1, 0), strict=True))
    return (ctypes.c_int64 * len(codegen.GEOMETRY))(*counts, *(size for both in pairs for size in both))


def inner_size(x: Tensor) -> int:
    """Number of positions of a logical ``[N, C, *S]`` tensor: the product of its spatial axes."""
    return math.prod(x.shape[2:])
