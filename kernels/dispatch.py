"""The declared operations as ``torch.ops.fqt.*``: importing this defines them.

Defined with ``torch.library.Library``, which costs 2 us a call against 9 for ``custom_op``. ``passes/layout.py`` asks
Inductor for NHWC operands through the tag ``needs_fixed_stride_order``, so that nothing is copied.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .operations import NAMESPACE, OPERATIONS, Operation

DEVICES = {"cpu": "CPU", "gpu": "CUDA"}
"""Rooms with kernels and the dispatch keys that they serve: CUDA is also ROCm's."""

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(library: torch.library.Library, operation: Operation) -> None:
    """Define an operation in a library, with its fake and its kernels."""
    tags = [torch.Tag.needs_fixed_stride_order]
    if operation.runs_anywhere:
        tags.append(torch.Tag.nondeterministic_seeded)
    library.define(operation.name + operation.schema, tags=tags)
    torch.library.register_fake(f"{library.ns}::{operation.name}", operation.fake, lib=library)
    if operation.runs_anywhere:  # no operand that says where, as torch.rand
        library.impl(operation.name, operation.definition, "BackendSelect")
        return
    for room, key in DEVICES.items():
        library.impl(operation.name, _kernel(operation, room), key)


def _kernel(operation: Operation, room: str) -> Callable[..., Any]:
    """The kernel of an operation; its room is imported on the first call: that may need a compiler or Triton."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        importlib.import_module(f"{__package__}.{room}")
        return operation.on(room)

    return lambda *args: kernel()(*args)


for _operation in OPERATIONS.values():
    define(_LIBRARY, _operation)
