"""Inductor's wrapper code calls native kernels as `kernels.cpu.launch` wrote them down, without the dispatcher.

Inductor writes a Python function that runs a compiled graph line by line. It would call an operation of ours as
``torch.ops.fqt.<name>.default(...)``. This module registers what it writes instead where the operands are on the CPU,
their shapes are known, and the operation can be written down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.codegen.wrapper import ExternKernelAllocLine, PythonWrapperCodegen
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves

from .kernels.cpu import launch
from .kernels.operations import NAMESPACE, OPERATIONS

IMPORT = "from fqt_compile.kernels.cpu import launch as fqt"


def register() -> None:
    """Tell Inductor what to write for every operation of ours; again is the same."""
    for name in OPERATIONS:

        def write(node: ir.FallbackKernel, writeline: Any, operation: str = name) -> None:
            _write(operation, node, writeline)

        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{NAMESPACE}.{name}.default"] = CustomCodegen(python=write)


def _write(operation: str, node: ir.FallbackKernel, writeline: Any) -> None:
    operands: Any = node.inputs
    name = _launch(operation, node, operands)
    if name is None:
        writeline(ExternKernelAllocLine(V.graph.wrapper_code, node))
    else:
        values = ", ".join(operand.codegen_reference() for operand in operands)
        writeline(f"{node.get_name()} = {name}({values})")


def _launch(operation: str, node: ir.FallbackKernel, operands: Any) -> str | None:
    """The name of the launch of a node, which is defined in front of the wrapper's code; None if there is none."""
    wrapper = V.graph.wrapper_code
    fakes = [_fake(operand) for operand in operands]
    # A subgraph's wrapper has no module of its own to define a function in.
    known = all(fake is not None for fake in fakes) and not any(map(_is_symbolic, tree_leaves(node.constant_args)))
    if type(wrapper) is not PythonWrapperCodegen or not known:
        return None
    args, kwargs = node.unflatten_args(fakes, node.constant_args)
    defined: dict[str, str] = wrapper.__dict__.setdefault("fqt_launches", {})
    with V.fake_mode:
        launched = launch.record(operation, args, kwargs, f"fqt_{operation}_{len(defined)}")
    if launched is None:
        return None
    if not defined:
        wrapper.header.writeline(IMPORT)
    _, _, text = launched.source.partition("(")
    if text not in defined:
        defined[text] = launched.name
        wrapper.header.splice(f"\n{launched.source}\n")
    return defined[text]


def _is_symbolic(value: Any) -> bool:
    return bool(getattr(value, "free_symbols", None)) or isinstance(value, torch.SymInt)


def _fake(operand: Any) -> torch.Tensor | None:
    """A fake tensor like an operand; None off the CPU or where its shape is not known."""
    shape = (operand.get_size(), operand.get_stride())
    known = all(getattr(size, "is_Integer", isinstance(size, int)) for sizes in shape for size in sizes)
    if operand.get_device().type != "cpu" or not known:
        return None
    size, stride = (tuple(map(int, sizes)) for sizes in shape)
    with V.fake_mode:
        return torch.empty_strided(size, stride, dtype=operand.get_dtype(), device="cpu")
