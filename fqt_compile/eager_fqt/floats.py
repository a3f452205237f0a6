"""A layer left in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture import SiteReport
from ..config import FQTConfig
from .calls import Geometry
from .step import Step
from .tensors import cast, gather, nhwc, output_dtype, scatter

aten = torch.ops.aten


def float_product_dtype(x: Tensor, config: FQTConfig) -> torch.dtype:
    """What the product of a layer left in float computes in; ``float_dtype`` is for float32 ones."""
    dtype = output_dtype(x)
    return torch.bfloat16 if config.float_dtype == "bfloat16" and dtype == torch.float32 else dtype


def float_gradients(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_input, grad_weight and grad_bias of a float layer, in the dtype of its operands even inside autocast."""
    with torch.autocast(g.device.type, enabled=False):
        if geometry.kind == "linear":
            rounded = g.to(x.dtype)
            grads = (rounded @ weight if wanted[0] else None, rounded.t() @ x if wanted[1] else None)
            return *grads, (g.sum(0) if wanted[2] else None)
        args = (geometry.stride, geometry.padding, geometry.dilation, geometry.transposed, geometry.output_padding)
        bias_size = [g.shape[1]] if wanted[2] else None
        output: tuple[Tensor | None, Tensor | None, Tensor | None] = aten.convolution_backward(
            g.to(x.dtype), x, weight, bias_size, *args, geometry.groups, wanted
        )
        return output


class FloatLayer(torch.autograd.Function):
    """A layer left in float whose gradients run on the rows kept once per step (math.md 4)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        site: SiteReport,
        index: int,
        step: Step,
    ) -> Tensor:
        dtype = float_product_dtype(x, step.config)
        ctx.save_for_backward(x.to(dtype), weight.to(dtype))
        ctx.layer = geometry, step
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        operands = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if geometry.kind == "linear":
                return torch.nn.functional.linear(*operands).to(output_dtype(x))
            args = (geometry.stride, geometry.padding, geometry.dilation, geometry.transposed, geometry.output_padding)
            output: Tensor = aten.convolution(*operands, *args, geometry.groups)
        return output.to(output_dtype(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        geometry, step = ctx.layer
        x, weight = ctx.saved_tensors
        rows = step.kept_rows(ctx, x.shape[0])
        size = x.shape[0]
        if rows is not None:
            g, x = nhwc(gather(g, rows)), nhwc(gather(x, rows))
        wanted = [*ctx.needs_input_grad[:2], ctx.dtypes[2] is not None and ctx.needs_input_grad[2]]
        grad_input, grad_weight, grad_bias = float_gradients(g, x, weight, geometry, wanted)
        if grad_input is not None and rows is not None:
            grad_input = scatter(grad_input, rows, size)
        return *cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None
