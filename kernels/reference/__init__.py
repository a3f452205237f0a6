"""Arithmetic of every operation, in plain PyTorch on unpacked values. Kernels must equal it bit for bit.

Notation: N samples (or rows of a linear layer), C_i and C_o channels, ``*S`` spatial axes (0, 1 or 2), all
tensors logical ``[N, C, *S]``; wherever an order matters it is the memory order NHWC. Floating point is
float32, evaluated in the order written, without fused multiply-add. Derivations: docs/math.md.
Source: 1-bit FQT, arXiv 2408.14267; XNOR-Net, arXiv 1603.05279.
"""

from .activation import (
    BLOCK,
    activation_bits,
    activation_mask,
    activation_threshold,
    batch_norm_threshold,
    threshold_of,
    warn_unless_finite,
)
from .dequantize import dequantize_grad_input, dequantize_grad_weight, dequantize_output
from .products import EXACT_FLOAT32, grad_input_product, grad_weight_product, output_product
from .programs import max_pool_gradient
from .quantize import (
    SMALLEST_NORMAL,
    Groups,
    exact_zero_point,
    make_groups,
    quantize_channels,
    quantize_groups,
    quantize_rows,
)
from .rows import importance, kept_gradient, kept_rows
from .statistics import ROW_BLOCK, batch_norm_gradient, channel_moments, float_moments, gradient_moments
from .values import LANES, as_float32, code_values, lane_sum, nhwc_rows, per_channel, per_row
from .weight import weight_bits, weight_gradient, weight_scale

__all__ = [
    "BLOCK",
    "EXACT_FLOAT32",
    "LANES",
    "ROW_BLOCK",
    "SMALLEST_NORMAL",
    "Groups",
    "activation_bits",
    "activation_mask",
    "activation_threshold",
    "as_float32",
    "batch_norm_gradient",
    "batch_norm_threshold",
    "channel_moments",
    "code_values",
    "dequantize_grad_input",
    "dequantize_grad_weight",
    "dequantize_output",
    "exact_zero_point",
    "float_moments",
    "grad_input_product",
    "grad_weight_product",
    "gradient_moments",
    "importance",
    "kept_gradient",
    "kept_rows",
    "lane_sum",
    "make_groups",
    "max_pool_gradient",
    "nhwc_rows",
    "output_product",
    "per_channel",
    "per_row",
    "quantize_channels",
    "quantize_groups",
    "quantize_rows",
    "threshold_of",
    "warn_unless_finite",
    "weight_bits",
    "weight_gradient",
    "weight_scale",
]
