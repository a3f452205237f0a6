"""Every operation of the graph on a GPU: name -> function with the signature of its definition.

Generated Triton kernels, for CUDA and ROCm tensors; on CPU tensors in Triton's interpreter. Each equals its definition
bit for bit (tests/test_triton.py). Importing this imports no Triton.

Departures from the CPU: nothing here waits for the device (but `check_finite`), so a mean that is not finite is not
announced (use ``check_finite=True``), and an index of a row outside the tensor counts as unused instead of raising.
"""

from __future__ import annotations

from ..operations import kernels_of
from . import activation, checks, dequantize, products, programs, quantize, rows, statistics, weight  # noqa: F401
from .strategy import force_strategy

__all__ = ["OPERATIONS", "force_strategy"]

OPERATIONS = kernels_of("gpu")
