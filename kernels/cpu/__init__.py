"""Every operation of the graph on the CPU: name -> function with the signature of its definition.

Operands may have any strides and activations bfloat16 or float16. Each equals its definition bit for bit for every
instruction set and number of threads (tests/test_kernels.py). Importing this compiles nothing.
"""

from __future__ import annotations

from ..operations import kernels_of
from . import activation, checks, dequantize, products, programs, quantize, rows, statistics, weight  # noqa: F401
from .isa import force_isa, supported_isas

__all__ = ["OPERATIONS", "force_isa", "supported_isas"]

OPERATIONS = kernels_of("cpu")
