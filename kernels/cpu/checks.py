"""The check for values that are not finite, with torch: a debugging aid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operations import Arguments, checks
from .native import kernel


@kernel(checks.check_finite)
def check_finite(a: Arguments, out: Tensor) -> None:
    finite = torch.isfinite(a.x)
    if not bool(finite.all()):
        checks.raise_non_finite(a.where, int((~finite).sum()), a.x.numel())
    out.copy_(a.x)
