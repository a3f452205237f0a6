"""Exported C++ functions of compiled templates: arguments to C, one function for every instruction set.

Every function takes pointers, int64 and, last, the number of threads; it returns a status. ctypes releases the GIL.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..operands import pair
from ..rendering import GEOMETRY
from . import codegen

Argument = Tensor | int | ctypes.Array[ctypes.c_int64] | None


class Function:
    """One exported function of a template's library, compiled and loaded when it is first called."""

    def __init__(self, template: str, function: str, parameters: codegen.Parameters = ()) -> None:
        self.template, self.function, self.parameters = template, function, parameters
        self._entries: dict[str, Callable[..., int]] = {}

    def on(self, isa: str, threads: int, *args: Argument) -> int:
        """Run it for an instruction set that need not be the one in use; its status."""
        return self.entry(isa, len(args) + 1)(*map(argument, args), threads)

    def entry(self, isa: str, count: int) -> Callable[..., int]:
        """The function for an instruction set, of ``count`` arguments."""
        return self._entries.get(isa) or self._load(isa, count)

    def _load(self, isa: str, count: int) -> Callable[..., int]:
        entry = _entry(codegen.library(self.template, isa, self.parameters), self.function, count)
        self._entries[isa] = entry
        return entry


@functools.cache
def _entry(library: ctypes.CDLL, function: str, count: int) -> Callable[..., int]:
    """An exported function whose arguments are declared once: converting 20 of them in every call took 7 us."""
    entry: Any = getattr(library, function)
    entry.argtypes = (ctypes.c_int64,) * count  # pointers too
    return entry


def argument(value: Argument) -> int:
    """A pointer, or the number itself; 0 for None."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return value if isinstance(value, int) else ctypes.addressof(value)


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
    """The C++ ``Geometry``: fields in the order of `rendering.GEOMETRY`. Not to be written to: calls share it."""
    sizes = (tuple(s) for s in (input_size, output_size, kernel, stride, padding))
    return _geometry(batch, words, in_channels, out_channels, channels, *sizes)


@functools.lru_cache(maxsize=4096)
def _geometry(*fields: Any) -> ctypes.Array[ctypes.c_int64]:
    counts, axes = fields[:5], fields[5:]
    pairs = (pair(sizes, missing) for sizes, missing in zip(axes, (1, 1, 1, 1, 0), strict=True))
    return (ctypes.c_int64 * len(GEOMETRY))(*counts, *(size for both in pairs for size in both))
