"""How an operation runs on the CPU: a kernel registers itself, fills its results and calls C++ functions.

@kernel(activation.apply_mask)
def apply_mask(a: Arguments, out: Tensor) -> None:
    call("pack", "apply_mask", ..., out)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import UnsupportedInputError
from .. import noise, operands, reference
from ..operations.declare import NAMESPACE, Operation, Results
from . import codegen, memory
from .counting import isa_of
from .functions import Argument, Function, argument

_OK = 0
_profiler_enabled = torch.autograd._profiler_enabled


def kernel(operation: Operation) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function, of the operands and the results, as an operation's kernel on the CPU."""

    def register(fill: Callable[..., None]) -> Callable[..., None]:
        operation.implement("cpu", fill, _allocated)
        return fill

    return register


def _allocated(results: Results) -> None:
    if _thread.recorder is None:
        for result in results if isinstance(results, tuple) else (results,):
            advise_huge_pages(result)


class Kernel(Function):
    """A function for the instruction set it has when it is called (`counting`).

    ``operation`` names it to the profiler, which sees what goes through the dispatcher by itself.
    """

    def __init__(self, template: str, function: str, parameters: codegen.Parameters = (), operation: str = "") -> None:
        super().__init__(template, function, parameters)
        self.event = f"{NAMESPACE}::{operation}" if operation else ""

    def __call__(self, *arguments: int) -> None:
        """Run it on all of torch's threads; raises where it refuses its operands."""
        entry = self.entry(isa_of(self.template), len(arguments) + 1)
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
    *args: Argument,
    parameters: codegen.Parameters = (),
) -> None:
    """Run one exported function of a template's library on all of torch's threads."""
    if _thread.recorder is not None:
        _thread.recorder.call(template, function, args, parameters)
    else:
        _kernel(template, function, parameters)(*map(argument, args))


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


def nhwc(x: Tensor) -> Tensor:
    """``[N, *S, C]``, contiguous, float32, of floating point values ``[N, C, *S]``."""
    return operands.nhwc_memory(x.to(torch.float32))


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`operands.empty_nhwc` for what is no result, in huge pages where it is large."""
    result = operands.empty_nhwc(like, shape, dtype)
    _allocated(result)
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
