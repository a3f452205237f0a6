"""Launches: what an operation on the CPU does for operands of known shapes, written down as a Python function.

Through the dispatcher, an operation spends tens of microseconds of every step on its schema, shapes, checks and
options, all of which a compiled graph knows beforehand. `record` runs the operation's own kernel once
on fake tensors and notes what it allocates and which kernels it calls. The function in `Launch.source` does only that:

    def launch(a0, a1, kernel_0=fqt.Kernel('output_product', ...), constant_1=fqt.constant((128, 1, ...))):
        b0 = fqt.empty((128, 64, 32, 32), (65536, 1, 2048, 64), torch.int16)
        kernel_0(a0.data_ptr(), a1.data_ptr(), constant_1, 0, 64, 1, b0.data_ptr())
        return b0

An implementation that computes with torch, copies an operand or reads values is not written down; it goes on being
called.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import FQTError
from ..operations import OPERATIONS
from . import native
from .codegen import Parameters
from .native import Kernel, advise_huge_pages, check_threshold, stream_keys
from .programs import program_parameters

__all__ = [
    "Kernel",
    "Launch",
    "advise_huge_pages",
    "check_threshold",
    "constant",
    "empty",
    "program_parameters",
    "record",
    "stream_keys",
]

empty: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_HARMLESS = {
    torch.ops.prim.device.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.view.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.detach.default,
}


class NotRecordableError(Exception):
    """An implementation does more than allocating and calling kernels."""


@dataclass(frozen=True)
class Launch:
    """source: a function named ``name`` of the tensor operands, as text; it refers to this module as ``fqt``."""

    name: str
    source: str


@functools.cache
def constant(fields: tuple[int, ...]) -> int:
    """The address of an int64 array that lives as long as the process."""
    array = (ctypes.c_int64 * len(fields))(*fields)
    _constants.append(array)
    return ctypes.addressof(array)


_constants: list[ctypes.Array[ctypes.c_int64]] = []


class Recorder(TorchDispatchMode):
    """Notes the allocations, kernel calls and reads of one implementation that runs on fake tensors."""

    def __init__(self, operation: str, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.names = {_storage(t): f"a{i}" for i, t in enumerate(tensors)}
        self.fresh: dict[int, Tensor] = {}
        self.defaults: dict[str, str] = {}
        self.lines: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _ALLOCATIONS and func not in _HARMLESS:
            raise NotRecordableError(str(func))
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.fresh[_storage(result)] = result
            self.names[_storage(result)] = f"b{len(self.fresh) - 1}"
        return result

    def call(self, template: str, function: str, args: Sequence[Any], parameters: Parameters) -> None:
        """`native.call`, written down."""
        kernel = self._default(
            "kernel", f"fqt.Kernel({template!r}, {function!r}, {_text(parameters)}, {self.operation!r})"
        )
        self.lines.append(f"{kernel}({', '.join(map(self._argument, args))})")

    def stream_keys(self, seed: Tensor, stream: int) -> tuple[Any, Any]:
        names = tuple(f"key_{len(self.lines)}_{half}" for half in ("low", "high"))
        self.lines.append(f"{', '.join(names)} = fqt.stream_keys({self._name(seed)}, {stream})")
        return _Name(names[0]), _Name(names[1])

    def check_threshold(self, threshold: Tensor) -> None:
        self.lines.append(f"fqt.check_threshold({self._name(threshold)})")

    def source(self, name: str, result: Any) -> str:
        """The function that does what was noted and returns ``result``."""
        returned = list(result) if isinstance(result, tuple) else [result]
        shown = {_storage(t): t for t in returned}
        if len(shown) < len(returned) or not shown.keys() <= self.fresh.keys():
            raise NotRecordableError("a result that is an operand, or twice the same")
        inputs = [a for a in self.names.values() if a.startswith("a")]
        parameters = [*inputs, *(f"{key}={text}" for key, text in self.defaults.items())]
        body = [line for at, t in self.fresh.items() for line in self._allocation(shown.get(at, t))]
        values = ", ".join(self._name(t) for t in returned)
        body += [*self.lines, f"return ({values},)" if isinstance(result, tuple) else f"return {values}"]
        return "\n".join([f"def {name}({', '.join(parameters)}):", *(f"    {line}" for line in body)])

    def _allocation(self, t: Tensor) -> list[str]:
        size, stride = tuple(map(int, t.shape)), tuple(map(int, t.stride()))
        lines = [f"{self._name(t)} = fqt.empty({size}, {stride}, {t.dtype})"]
        if t.numel() * t.element_size() >= 2 * native.HUGE_PAGE:
            lines.append(f"fqt.advise_huge_pages({self._name(t)})")
        return lines

    def _argument(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{self._name(value)}.data_ptr()"
        if value is None:
            return "0"
        if isinstance(value, ctypes.Array):
            return self._default("constant", f"fqt.constant({tuple(value)})")
        return repr(int(value) if isinstance(value, bool) else value)

    def _name(self, t: Tensor) -> str:
        if t.storage_offset() != 0 or _storage(t) not in self.names:
            raise NotRecordableError("a pointer that is neither an operand's nor a result's")
        return self.names[_storage(t)]

    def _default(self, prefix: str, text: str) -> str:
        for key, known in self.defaults.items():
            if known == text:
                return key
        key = f"{prefix}_{len(self.defaults)}"
        self.defaults[key] = text
        return key


class _Name(int):
    """A number that is known when the launch runs: its name in the text."""

    name: str

    def __new__(cls, name: str) -> _Name:
        self = super().__new__(cls)
        self.name = name
        return self

    def __repr__(self) -> str:
        return self.name


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _text(parameters: Parameters) -> str:
    if not parameters:
        return "()"
    values = dict(parameters)
    return f"fqt.program_parameters({values['text']!r}, {tuple(o.type for o in values['operands'])!r})"


def record(operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Launch | None:
    """The launch of an operation for fake CPU operands; None where its implementation cannot be written down.

    Every tensor has a storage of its own and offset 0; what the launch gets has the same sizes, strides and dtypes.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    recorder = Recorder(operation, tensors)
    try:
        with native.recording(recorder), recorder:
            result = OPERATIONS[operation].on("cpu")(*args, **kwargs)
        return Launch(name, recorder.source(name, result))
    except (NotRecordableError, DataDependentOutputException, FQTError):
        return None
