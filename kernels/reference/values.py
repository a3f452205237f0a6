"""Values: conversions, shapes that broadcast, sums in a defined order, and the values of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import channels_last

LANES = 64
"""Width of the vector a sum is defined over."""


def as_float32(x: Tensor) -> Tensor:
    """float32 values of a float32, bfloat16 or float16 tensor (exact)."""
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def lane_sum(values: Tensor) -> Tensor:
    """The sum over the last axis, ``[..., n]`` -> ``[...]``, in one defined order.

    The axis is padded with zeros to a multiple of 64 and cut into vectors of 64 lanes; the vectors are
    added one after the other, starting from zero; then the lanes are halved: lane l += lane l + 32, 16, ... 1.
    """
    count = -(-values.shape[-1] // LANES)
    padded = torch.nn.functional.pad(values, (0, count * LANES - values.shape[-1])).unflatten(-1, (count, LANES))
    lanes = torch.zeros_like(padded[..., 0, :]) if count else values.new_zeros(*values.shape[:-1], LANES)
    for k in range(count):
        lanes = lanes + padded[..., k, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def nhwc_rows(x: Tensor) -> Tensor:
    """``[N, C, *S]`` -> ``[N, prod(S) * C]`` in NHWC order."""
    return channels_last(x).flatten(1)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """``[C]`` shaped to broadcast over ``[N, C, *S]``."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """``[N]`` shaped to broadcast over ``[N, C, *S]``."""
    return vector.view(-1, *[1] * (like.dim() - 1))


def code_values(bits: Tensor, code: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """bits -> code values: {-1, +1} for ``sign``, {0, +1} for ``threshold``."""
    values = bits.to(dtype)
    return 2 * values - 1 if code == "sign" else values
