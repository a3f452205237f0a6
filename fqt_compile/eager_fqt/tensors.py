"""What all layers of eager FQT do with tensors: dtypes, memory order, kept rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.packing import channels_last, channels_second


def nhwc(x: Tensor) -> Tensor:
    """The same values in NHWC memory, as the graph's operations return them."""
    return channels_second(channels_last(x).contiguous())


def output_dtype(x: Tensor) -> torch.dtype:
    """What a layer returns: the autocast dtype where autocast is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(grads: Sequence[Tensor | None], dtypes: Sequence[Any]) -> list[Tensor | None]:
    """Each gradient in the dtype of what it is the gradient of."""
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, zero where a row is unused (-1)."""
    gathered = x[rows.long().clamp(min=0)]
    return torch.where(reference.per_row(rows >= 0, gathered), gathered, torch.zeros_like(gathered))


def scatter(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    """Tensor with ``size`` rows that has ``kept`` at ``rows``, where these are used, and zeros elsewhere."""
    full = kept.new_zeros(size, *kept.shape[1:])
    valid = rows >= 0
    full[rows[valid].long()] = kept[valid]
    return full
