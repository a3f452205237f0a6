"""Rows: their importance, and the kept ones (docs/math.md 4); the selection itself is in selection.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .values import as_float32, lane_sum


def importance(rows: Tensor, kind: str) -> Tensor:
    """float32 ``[N]`` of ``[N, n]`` rows: L2 norm (squares lane-summed), max - min, or 1."""
    if kind == "uniform" or rows.shape[1] == 0:
        return torch.ones_like(rows[:, 0]) if rows.shape[1] else rows.new_ones(rows.shape[0])
    if kind == "norm":
        # Through float64, which rounds correctly to float32: torch's float32 sqrt may be off by one unit.
        return lane_sum(rows * rows).to(torch.float64).sqrt().to(torch.float32)
    return rows.amax(1) - rows.amin(1)


def kept_rows(g: Tensor, rows: Tensor, compact: bool) -> Tensor:
    """The valid rows of ``g``, ``[K_valid, C, *S]``; those it starts with where it holds no others (``compact``)."""
    valid = rows[rows >= 0].to(torch.int64)
    return g[: valid.shape[0]] if compact else g[valid]


def kept_gradient(g: Tensor, rows: Tensor, row_scale: Tensor | None, compact: bool = False) -> Tensor:
    """``g[n] / p_n`` of the valid rows, float32 ``[K_valid, C, *S]``."""
    kept = kept_rows(as_float32(g), rows, compact)
    if row_scale is None:
        return kept
    return kept * row_scale[: kept.shape[0]].view(-1, *[1] * (g.dim() - 1))
