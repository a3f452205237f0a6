"""Dequantizing: integers of a product back to float32 (docs/math.md 2 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .values import as_float32, per_channel, per_row


def dequantize_output(acc: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y = alpha[c_o] float(acc) + bias[c_o]``, float32."""
    y = acc.to(torch.float32) * per_channel(weight_scale, acc)
    return y if bias is None else y + per_channel(as_float32(bias), acc)


def dequantize_grad_input(
    acc: Tensor,
    weight_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    mask: Tensor,
    compact: bool = False,
) -> Tensor:
    """``STE_mask (s_n float(acc) + z_n float(weight_sum))``, float32 ``[N, C_i, *S]``; 0 for rows not kept.

    compact: only the kept rows are returned, ``[K, C_i, *S]``, in the order of ``rows``.
    """
    values = per_row(scale, acc) * acc.to(torch.float32) + per_row(zero_point, acc) * weight_sum.to(torch.float32)
    count = int((rows >= 0).sum())
    if compact:
        values[count:] = 0
        return torch.where(mask[rows.long().clamp(min=0)], values, torch.zeros_like(values))
    grad = torch.zeros(mask.shape, dtype=torch.float32, device=acc.device)
    grad[rows[:count].to(torch.int64)] = values[:count]
    return torch.where(mask, grad, torch.zeros_like(grad))


def dequantize_grad_weight(
    acc: Tensor, code_sum: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor | None, out_channels: int
) -> Tensor:
    """``s_c float(acc) + z_c float(code_sum)``, float32 ``[C_o, C_i, *kernel]``; 0 for channels not kept."""
    values = per_row(scale, acc) * acc.to(torch.float32) + per_row(zero_point, acc) * code_sum.to(torch.float32)
    if channels is None:
        return values
    grad = torch.zeros(out_channels, *acc.shape[1:], device=acc.device)
    count = int((channels >= 0).sum())
    grad[channels[:count].to(torch.int64)] = values[:count]
    return grad
