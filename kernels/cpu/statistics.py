"""Statistics for BatchNorm on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, statistics
from .native import call, kernel, nhwc


@kernel(statistics.channel_moments)
def channel_moments(a: Arguments, var: Tensor, mean: Tensor) -> None:
    n, channels, *_ = a.acc.shape
    narrow, count = a.acc.dtype == torch.int16, n * inner_size(a.acc)
    sizes = (narrow, count, channels, a.largest)
    call("float", "channel_moments", nhwc_memory(a.acc), *sizes, a.weight_scale, a.bias, var, mean)


@kernel(statistics.float_moments)
def float_moments(a: Arguments, var: Tensor, mean: Tensor) -> None:
    half = a.x.dtype == torch.bfloat16
    memory, count = nhwc_memory(a.x) if half else nhwc(a.x), a.x.shape[0] * inner_size(a.x)
    call("float", "float_moments", memory, half, count, a.x.shape[1], var, mean)
