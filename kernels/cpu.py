"""Every operation of the graph on the CPU: name -> function with the signature of `reference_ops`.

Operands may have any strides and activations bfloat16 or float16; results are laid out as in `ops`. Each equals
its reference bit for bit for every instruction set and number of threads (tests/test_kernels.py). Importing this
compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import cpu_backward, cpu_float, cpu_forward, cpu_program, reference_ops
from .isa import force_isa, supported_isas

__all__ = ["OPERATIONS", "force_isa", "supported_isas"]

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    reference_ops.draw_seed,
    reference_ops.check_finite,
    cpu_forward.activation_threshold,
    cpu_forward.pack_activation,
    cpu_forward.unpack_activation,
    cpu_forward.apply_mask,
    cpu_program.fused_activation,
    cpu_program.fused_gradient,
    cpu_program.gradient_moments,
    cpu_program.max_pool_gradient,
    cpu_float.pack_bool,
    cpu_float.unpack_bool,
    cpu_float.channel_moments,
    cpu_float.float_moments,
    cpu_forward.quantize_weight,
    cpu_forward.transpose_weight,
    cpu_forward.unpack_weight,
    cpu_forward.output_product,
    cpu_forward.weight_gradient,
    cpu_backward.row_importance,
    cpu_backward.channel_importance,
    cpu_backward.select,
    cpu_backward.prune_rows,
    cpu_backward.keep_rows,
    cpu_backward.gather_words,
    cpu_backward.gather_rows,
    cpu_backward.scatter_rows,
    cpu_backward.quantize_rows,
    cpu_backward.dequantize_rows,
    cpu_backward.quantize_channels,
    cpu_backward.grad_input_product,
    cpu_backward.grad_weight_product,
    cpu_backward.grad_weight,
    cpu_backward.dequantize_grad_input,
    cpu_backward.dequantize_grad_weight,
)

OPERATIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in _FUNCTIONS}
