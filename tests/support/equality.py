"""Equality of results, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(actual: Any, wanted: Any, where: str) -> None:
    """Same dtype, shape, strides (of axes longer than 1) and bits; any NaN equals any NaN."""
    if isinstance(wanted, tuple):
        for item, (a, w) in enumerate(zip(actual, wanted, strict=True)):
            assert_same(a, w, f"{where}[{item}]")
        return
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape), where
    if wanted.numel():
        layouts = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (actual, wanted))
        assert next(layouts) == next(layouts), f"{where}: strides {actual.stride()}, expected {wanted.stride()}"
    if wanted.is_floating_point():
        assert torch.equal(actual.isnan(), wanted.isnan()), f"{where}: NaNs differ"
        actual, wanted = _bits(actual), _bits(wanted)
    assert torch.equal(actual, wanted), f"{where}: {int((actual != wanted).sum())} of {wanted.numel()} differ"


def _bits(x: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), torch.zeros_like(x), x).view(integer)
