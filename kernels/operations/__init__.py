"""Every operation of the rewritten graph: its declaration and, as the decorated function, its definition.

A definition unpacks its operands, computes with `reference` and packs the result. ``lowering="eager"`` interprets a
rewritten graph with the definitions, and every kernel is tested against them. Layouts: `packing`. A kernel accepts any
strides and returns NHWC memory order, as the definitions do.
"""

from . import activation, checks, dequantize, products, programs, quantize, rows, statistics, weight
from .declare import NAMESPACE, OPERATIONS, Arguments, Operation, Results, kernels_of, operation

__all__ = [
    "NAMESPACE",
    "OPERATIONS",
    "Arguments",
    "Operation",
    "Results",
    "activation",
    "checks",
    "dequantize",
    "kernels_of",
    "operation",
    "products",
    "programs",
    "quantize",
    "rows",
    "statistics",
    "weight",
]
