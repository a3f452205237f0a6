"""What surrounds pointwise programs (program.py): the gradient of a max-pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .values import as_float32


def max_pool_gradient(
    g: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient of a 2-D max-pool of ``x [N, C, H, W]``: g ``[N, C, H', W']`` goes to the first maximum of its window.

    First in row-major order; a NaN counts as larger than everything before it. Overlapping windows add up in
    row-major order of the windows, starting from zero.
    """
    args = (list(kernel), list(stride), list(padding), [1, 1], False)
    x32, g32 = as_float32(x).contiguous(), as_float32(g).contiguous()
    _, index = torch.ops.aten.max_pool2d_with_indices(x32, *args)
    return torch.ops.aten.max_pool2d_with_indices_backward(g32, x32, *args, index).to(g.dtype)
