"""Every operation of the graph on a GPU: name -> function with the signature of `reference_ops`.

Generated Triton kernels, for CUDA and ROCm tensors; on CPU tensors in Triton's interpreter. Each equals its reference
bit for bit (tests/test_triton.py). Importing this imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import gpu_backward, gpu_float, gpu_forward, gpu_products, gpu_program, gpu_select, reference_ops
from .gpu_strategy import force_strategy

__all__ = ["OPERATIONS", "force_strategy"]

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    reference_ops.draw_seed,
    gpu_forward.check_finite,
    gpu_forward.activation_threshold,
    gpu_forward.pack_activation,
    gpu_forward.unpack_activation,
    gpu_forward.apply_mask,
    gpu_forward.quantize_weight,
    gpu_forward.transpose_weight,
    gpu_forward.unpack_weight,
    gpu_forward.weight_gradient,
    gpu_forward.prune_rows,
    gpu_forward.keep_rows,
    gpu_forward.gather_words,
    gpu_forward.gather_rows,
    gpu_forward.scatter_rows,
    gpu_program.fused_activation,
    gpu_program.fused_gradient,
    gpu_program.gradient_moments,
    gpu_program.max_pool_gradient,
    gpu_float.pack_bool,
    gpu_float.unpack_bool,
    gpu_float.channel_moments,
    gpu_float.float_moments,
    gpu_products.output_product,
    gpu_products.grad_input_product,
    gpu_products.grad_weight_product,
    gpu_products.grad_weight,
    gpu_backward.row_importance,
    gpu_backward.channel_importance,
    gpu_select.select,
    gpu_backward.quantize_rows,
    gpu_backward.quantize_channels,
    gpu_backward.dequantize_rows,
    gpu_backward.dequantize_grad_input,
    gpu_backward.dequantize_grad_weight,
)

OPERATIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in _FUNCTIONS}
