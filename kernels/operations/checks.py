"""The seed of a step, and the check for values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NonFiniteError
from .. import noise
from .declare import Arguments, operation


def raise_non_finite(where: str, bad: int, size: int) -> None:
    """Raise `NonFiniteError` for ``bad`` of ``size`` values."""
    raise NonFiniteError(
        f"{where}: {bad} of {size} values are NaN or infinite; accepted: finite values only, since "
        "check_finite=True. Remedy: lower the learning rate or clip gradients upstream of this layer"
    )


def _seed(a: Arguments) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=a.device)


@operation(results=_seed, phase="row choice", runs_anywhere=True)
def draw_seed(device: torch.device) -> Tensor:
    """int64 ``[]`` from torch's default generator and the rank: the seed of one step's noise and row choices."""
    return noise.draw_seed(device)


@operation(results=lambda a: torch.empty_like(a.x), phase="other packed operations")
def check_finite(x: Tensor, where: str) -> Tensor:
    """A copy of x, any shape and strides; raises `NonFiniteError`, naming ``where``, unless every value is finite."""
    if not bool(torch.isfinite(x).all()):
        raise_non_finite(where, int((~torch.isfinite(x)).sum()), x.numel())
    return x.clone()
