"""Weights: bits, scale and the gradient through them (docs/math.md 2 and 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .values import as_float32, code_values, lane_sum, nhwc_rows, per_row


def weight_bits(weight: Tensor) -> Tensor:
    """bool ``[C_o, C_i, *kernel]``: True where sign(W) = +1, that is, not W < 0."""
    return ~(weight < 0)


def weight_scale(weight: Tensor, mode: str) -> Tensor:
    """``alpha[c_o]`` float32: mean |W| over the channel (``xnor``, XNOR-Net section 3.1) or 1 (``none``)."""
    rows = nhwc_rows(as_float32(weight))
    if mode == "none":
        return torch.ones_like(rows[:, 0])
    return lane_sum(rows.abs()) / rows.shape[1]


def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    """Gradient through ``W_hat = alpha sign(W)`` (XNOR-Net), float32 ``[C_o, C_i, *kernel]``.

    ``alpha [|W| <= 1] grad_W_hat + sign(W) mean over the channel of (grad_W_hat sign(W))``; the second term
    only for ``xnor``.
    """
    w = as_float32(weight)
    inside = per_row(weight_scale, w) * grad_hat
    grad = torch.where(w.abs() <= 1, inside, torch.zeros_like(inside))
    if mode == "none":
        return grad
    sign = code_values(weight_bits(w), "sign")
    mean = lane_sum(nhwc_rows(grad_hat * sign)) / math.prod(w.shape[1:])
    return grad + sign * per_row(mean, w)
