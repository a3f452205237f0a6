"""BatchNorm whose backward runs on the rows kept once per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from .step import Step
from .tensors import cast, gather, scatter


class BatchNormLayer(torch.autograd.Function):
    """BatchNorm in training mode; its backward on rows kept once per step is a projection (math.md 8)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        step: Step,
    ) -> Tensor:
        output, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.layer = eps, step, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        eps, step, bias_dtype = ctx.layer
        rows = step.kept_rows(ctx, x.shape[0]) if step.config.batch_norm == "project" else None
        dtypes = x.dtype, None if weight is None else weight.dtype, bias_dtype
        if rows is None:
            wanted = [True, weight is not None, bias_dtype is not None]
            grads = torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, mean, invstd, True, eps, wanted)
        else:
            used = None if bool((rows >= 0).all()) else rows >= 0
            kept = (gather(g, rows), gather(x, rows))
            grad, *parameters = reference.batch_norm_gradient(*kept, weight, mean, invstd, eps, used)
            grads = (scatter(grad, rows, x.shape[0]), *parameters)
        present = [grad if dtype is not None else None for grad, dtype in zip(grads, dtypes, strict=True)]
        return *cast(present, dtypes), None, None, None, None
