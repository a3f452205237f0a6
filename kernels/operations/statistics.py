"""Statistics for BatchNorm. Arithmetic: `reference.statistics` (docs/math.md 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..operands import require_float, vector
from .declare import Arguments, operation

PHASE = "fused float"


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 ``[1, C, 1, ...]`` for x ``[N, C, *S]``."""
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _check_channels(a: Arguments) -> None:
    a.weight_scale, a.bias = vector(a.weight_scale), vector(a.bias)


@operation(results=lambda a: _moments(a.acc), contract=_check_channels, phase=PHASE)
def channel_moments(acc: Tensor, weight_scale: Tensor, bias: Tensor | None, largest: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of ``alpha acc + bias``, float32 ``[1, C, 1, ...]``; acc int16 or int32 ``[N, C, *S]``.

    largest: a bound of ``|acc|``, which tells a kernel how many squares fit into 32 bits.
    """
    return reference.channel_moments(acc, weight_scale, bias)


@operation(results=lambda a: _moments(a.x), contract=lambda a: require_float(a.x), phase=PHASE)
def float_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of a float ``[N, C, *S]``, float32 ``[1, C, 1, ...]``."""
    return reference.float_moments(x)
