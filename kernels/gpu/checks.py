"""The check for values that are not finite on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operations import Arguments, checks
from ..packing import ceil_div
from .codegen import spec
from .launch import BLOCK, kernel, launch, offset_type


@kernel(checks.check_finite)
def check_finite(a: Arguments, out: Tensor) -> None:
    """Waits for the device: it raises."""
    count, size = torch.zeros((), dtype=torch.int64, device=a.x.device), a.x.numel()
    made = spec("activation", code="sign", offset=offset_type(size))
    launch(made, "count_non_finite", [ceil_div(size, BLOCK)], a.x.contiguous(), count, size, BLOCK=BLOCK)
    if int(count):
        checks.raise_non_finite(a.where, int(count), size)
    out.copy_(a.x)
