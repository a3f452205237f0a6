"""Means of groups of values on a GPU: sums of blocks, then the mean of every group's sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..packing import ceil_div
from .codegen import spec
from .launch import launch, offset_type

MEANS = 32
"""Sums of block sums per program."""


def sums_of_groups(like: Tensor, groups: int, elements: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Memory for the sums of blocks; the number of groups, their blocks, the size of a group and of a block."""
    size = elements // max(groups, 1)
    blocks = ceil_div(size, reference.BLOCK)
    sizes = (groups, blocks, size, min(size, reference.BLOCK))
    return like.new_empty([groups, blocks], dtype=torch.float32), sizes


def mean_of_sums(sums: Tensor, mean: Tensor, groups: int, blocks: int, size: int) -> None:
    """Write the mean of every group of ``size`` elements, 0 of an empty one."""
    if not size:
        mean.zero_()
        return
    made = spec("activation", code="threshold", offset=offset_type(sums.numel()))
    launch(made, "mean_of_sums", [ceil_div(groups, MEANS)], sums, mean, groups, blocks, size, GROUPS=MEANS, warps=1)
