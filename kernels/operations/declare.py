"""How an operation is declared: once. Whatever needs to know of an operation reads it from its declaration.

    @operation(results=_product_results, contract=_product_contract, phase="output products", role="output")
    def output_product(x_bits: Tensor, w_bits: Tensor, in_channels: int, ...) -> Tensor:
        "the definition: plain PyTorch, which every kernel must equal bit for bit"

The signature gives the schema. ``results`` allocates what the operation returns: for fake tensors while a graph is
traced, and for kernels, which only fill it. ``contract`` checks the operands, for every device, and brings them into
the memory that kernels read. A kernel is a function of the operands and the results, registered by its device:

    @kernel(products.output_product)
    def output_product(a: Arguments, acc: Tensor) -> None: ...
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import Size

NAMESPACE = "fqt"
"""Of the operations in ``torch.ops``."""
Arguments = types.SimpleNamespace
"""The arguments of one call by name; a contract replaces operands and adds what it derives from them."""
Results = Tensor | tuple[Tensor, ...]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    int: "int",
    Sequence[int]: "int[]",
    Size: "SymInt",
    Sequence[Size]: "SymInt[]",
    bool: "bool",
    str: "str",
    torch.device: "Device",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A declared operation; calling it is calling its definition. Fields: `operation`."""

    definition: Callable[..., Any]
    results: Callable[[Arguments], Results]
    contract: Callable[[Arguments], None]
    phase: str
    role: str
    shareable: bool
    runs_anywhere: bool
    kernels: dict[str, Callable[..., Results]] = dataclasses.field(default_factory=dict)
    """By device: functions with the signature of the definition."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.definition(*args, **kwargs)

    @property
    def name(self) -> str:
        return self.definition.__name__

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Parameters in order, with their default values; ``inspect.Parameter.empty`` where there is none."""
        return {p.name: p.default for p in inspect.signature(self.definition).parameters.values()}

    @functools.cached_property
    def schema(self) -> str:
        """The signature in the language of torch's dispatcher, without the name."""
        hints = typing.get_type_hints(self.definition, include_extras=True)
        parameters = []
        for name, default in self.defaults.items():
            text = f"{_SCHEMA_TYPES[hints[name]]} {name}"
            parameters.append(text if default is inspect.Parameter.empty else f"{text}={default!r}")
        returned = typing.get_args(hints["return"]) or (hints["return"],)
        results = ", ".join(_SCHEMA_TYPES[result] for result in returned)
        return f"({', '.join(parameters)}) -> {results if len(returned) == 1 else f'({results})'}"

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a call, defaults filled in."""
        return Arguments(**self.defaults | dict(zip(self.defaults, args, strict=False)) | kwargs)

    def fake(self, *args: Any, **kwargs: Any) -> Results:
        """Results of the right shapes, dtypes and strides, not filled."""
        return self.results(self.bind(args, kwargs))

    def on(self, device: str) -> Callable[..., Any]:
        """The operation on a device: a function with the signature of its definition."""
        return self.definition if self.runs_anywhere else self.kernels[device]

    def implement(
        self, device: str, fill: Callable[..., None], allocated: Callable[[Results], None] = lambda results: None
    ) -> None:
        """Register a kernel, ``fill(arguments, *results)``; ``allocated`` is told of the results before."""

        def run(*args: Any, **kwargs: Any) -> Results:
            a = self.bind(args, kwargs)
            self.contract(a)
            results = self.results(a)
            allocated(results)
            fill(a, *(results if isinstance(results, tuple) else (results,)))
            return results

        self.kernels[device] = run


OPERATIONS: dict[str, Operation] = {}
"""Every operation of the rewritten graph by name, in order of declaration."""


def operation(
    *,
    results: Callable[[Arguments], Results],
    phase: str,
    contract: Callable[[Arguments], None] = lambda a: None,
    role: str = "",
    shareable: bool = False,
    runs_anywhere: bool = False,
    registry: dict[str, Operation] | None = None,
) -> Callable[[Callable[..., Any]], Operation]:
    """Declare the operation that the decorated function defines.

    phase: where `fqt_compile.bench_phases` counts its time.
    role: which of a layer's values it computes (``output``, ``grad_input``, ``grad_weight``), for
        `fqt_compile.compare`; none prepares operands.
    shareable: a pure function of operands that several layers may have in common: equal calls become one.
    runs_anywhere: the definition is also the kernel, of every device: it has no operand that says which one.
    registry: where to list it; `OPERATIONS` by default.
    """

    def declare(definition: Callable[..., Any]) -> Operation:
        made = Operation(definition, results, contract, phase, role, shareable, runs_anywhere)
        (OPERATIONS if registry is None else registry)[made.name] = made
        return made

    return declare


def kernels_of(device: str) -> dict[str, Callable[..., Any]]:
    """Every operation on a device: name -> function with the signature of its definition. Complete, or a KeyError."""
    return {name: made.on(device) for name, made in OPERATIONS.items()}
