"""Choosing rows on the device, so that the host need not wait for the importances. Definition: `selection`.

Sorting is counting, for every row, the rows before it: N**2 comparisons in parallel, which is little for the numbers
of rows here. The two sums whose order is defined run in one program each, one row after the other.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from . import selection
from .cpu_backward import PRUNES
from .gpu_codegen import spec
from .gpu_launch import launch
from .native import choice, vector
from .packing import ceil_div

ROWS = 32
"""Rows per program, each compared with BLOCK others at a time."""
BLOCK = 128


def select(
    importance: Tensor, seed: Tensor, stream: int, prune: str, keep_num: int, keep_den: int
) -> tuple[Tensor, Tensor]:
    choice("prune", prune, PRUNES)
    size = importance.shape[0]
    count = selection.kept_count(size, keep_num, keep_den)
    entries = selection.selected_size(size, prune, Fraction(keep_num, keep_den))
    rows = importance.new_full([entries], -1, dtype=torch.int32)
    scale = importance.new_zeros(entries, dtype=torch.float32)
    if prune == "none" or count >= size:  # all rows
        rows[:size] = torch.arange(size, dtype=torch.int32, device=rows.device)
        scale[:size] = 1
        return rows, scale
    made, tile = spec("select", prune=prune), {"ROWS": ROWS, "BLOCK": BLOCK}
    ranks, turns, taken = (rows.new_empty(size) for _ in range(3))
    largest_first, rest, p, in_turn = (scale.new_empty(size, dtype=torch.float64) for _ in range(4))
    grid, noise = [ceil_div(size, ROWS)], (seed, stream)
    launch(made, "rank_rows", grid, vector(importance), *noise, ranks, largest_first, turns, size, **tile)
    if prune != "topk":
        launch(made, "rest_sums", [1], largest_first, rest, size, warps=1)
        operands = (largest_first, rest, ranks, turns, p, in_turn)
        launch(made, "probabilities", [1], *operands, size, count, BLOCK=BLOCK)
    if prune == "systematic":
        launch(made, "walk", [1], in_turn, taken, *noise, size, count, warps=1)
    launch(made, "list_rows", grid, ranks, turns, taken, p, *noise, rows, scale, size, count, **tile)
    return rows, scale
