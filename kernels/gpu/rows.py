"""Choosing and moving rows on a GPU.

Rows are chosen on the device, so that the host need not wait for the importances. Sorting is counting, for every row,
the rows before it: N**2 comparisons in parallel, which is little for the numbers of rows here. The two sums whose order
is defined run in one program each, one row after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import packing, selection
from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, rows
from ..packing import ceil_div
from .codegen import Spec, spec
from .groups import channel_extremes, group_spec, row_extremes, write_ranges
from .launch import BLOCK, CHANNELS, as_integers, kernel, launch, offset_type, values

RANKED = 32
"""Rows per program that ranks them, each compared with COMPARED others at a time."""
COMPARED = 128


@kernel(rows.row_importance)
def row_importance(a: Arguments, importance: Tensor) -> None:
    samples, size = a.g.shape[0], math.prod(a.g.shape[1:])
    if a.kind == "uniform" or size == 0:
        importance.fill_(1)
    elif a.kind == "range":
        every = torch.arange(samples, dtype=torch.int32, device=a.g.device)
        write_ranges(a.g, *row_extremes(a.g, None, every), importance)
    else:
        made, grid = group_spec(a.g, samples), [ceil_div(samples, 2)]
        launch(made, "row_norms", grid, values(a.g), importance, samples, size, ROWS=2, warps=1)


@kernel(rows.channel_importance)
def channel_importance(a: Arguments, importance: Tensor) -> None:
    channels = a.g.shape[1]
    if a.kind == "uniform":
        importance.fill_(1)
    elif a.kind == "range":
        write_ranges(a.g, *channel_extremes(a.g, a.rows, a.row_scale, None), importance)
    else:
        operands = (values(a.g), a.rows, a.row_scale, importance)
        sizes = (a.g.shape[0], a.rows.shape[0], inner_size(a.g), channels)
        grid, flags = [ceil_div(channels, CHANNELS)], {"SCALED": a.row_scale is not None, "CHANNELS": CHANNELS}
        launch(group_spec(a.g, channels), "channel_norms", grid, *operands, *sizes, **flags)


@kernel(rows.select)
def select(a: Arguments, chosen: Tensor, scale: Tensor) -> None:
    size = a.importance.shape[0]
    count = selection.kept_count(size, a.keep_num, a.keep_den)
    chosen.fill_(-1)
    scale.zero_()
    if a.prune == "none" or count >= size:  # all rows
        chosen[:size] = torch.arange(size, dtype=torch.int32, device=chosen.device)
        scale[:size] = 1
        return
    made, tile = spec("select", prune=a.prune), {"ROWS": RANKED, "BLOCK": COMPARED}
    ranks, turns, taken = (chosen.new_empty(size) for _ in range(3))
    largest_first, rest, p, in_turn = (scale.new_empty(size, dtype=torch.float64) for _ in range(4))
    grid, noise = [ceil_div(size, RANKED)], (a.seed, a.stream)
    launch(made, "rank_rows", grid, a.importance, *noise, ranks, largest_first, turns, size, **tile)
    if a.prune != "topk":
        launch(made, "rest_sums", [1], largest_first, rest, size, warps=1)
        operands = (largest_first, rest, ranks, turns, p, in_turn)
        launch(made, "probabilities", [1], *operands, size, count, BLOCK=COMPARED)
    if a.prune == "systematic":
        launch(made, "walk", [1], in_turn, taken, *noise, size, count, warps=1)
    launch(made, "list_rows", grid, ranks, turns, taken, p, *noise, chosen, scale, size, count, **tile)


# -- moving rows ---------------------------------------------------------------------------------------------


def _row_spec(*tensors: Tensor) -> Spec:
    return spec("rows", offset=offset_type(*(x.numel() for x in tensors)))


def _gather(made: Spec, memory: Tensor, chosen: Tensor, out: Tensor) -> None:
    size = math.prod(memory.shape[1:])
    grid, sizes = (chosen.shape[0], ceil_div(size, BLOCK)), (memory.shape[0], size)
    launch(made, "gather_rows", grid, memory, chosen, out, *sizes, BLOCK=BLOCK)


@kernel(rows.gather_rows)
def gather_rows(a: Arguments, out: Tensor) -> None:
    memory = as_integers(nhwc_memory(a.x))
    _gather(_row_spec(a.x, out), memory, a.rows, as_integers(packing.channels_last(out)))


@kernel(rows.gather_words)
def gather_words(a: Arguments, out: Tensor) -> None:
    _gather(_row_spec(a.words, out), a.words.contiguous(), a.rows, out)


@kernel(rows.scatter_rows)
def scatter_rows(a: Arguments, full: Tensor) -> None:
    full.zero_()
    inner = math.prod(a.kept.shape[1:])
    memory = as_integers(nhwc_memory(a.kept)), a.rows, as_integers(packing.channels_last(full))
    grid = (a.kept.shape[0], ceil_div(inner, BLOCK))
    launch(_row_spec(a.kept, full), "scatter_rows", grid, *memory, a.size, inner, BLOCK=BLOCK)


@kernel(rows.prune_rows)
def prune_rows(a: Arguments, pruned: Tensor) -> None:
    """A row may be stored in any order, since it is scaled as a whole."""
    g, size = a.g, math.prod(a.g.shape[1:])
    pruned.zero_()
    in_order = g.is_contiguous() or packing.channels_last(g).is_contiguous()
    memory = g if in_order else values(g)
    out = pruned if in_order else torch.zeros_like(memory)
    sizes, grid = (g.shape[0], size), (a.rows.shape[0], ceil_div(size, BLOCK))
    launch(_row_spec(g), "prune_rows", grid, memory, a.rows, a.row_scale, out, *sizes, BLOCK=BLOCK)
    if not in_order:
        pruned.copy_(packing.channels_second(out))


@kernel(rows.keep_rows)
def keep_rows(a: Arguments, out: Tensor) -> None:
    size = math.prod(a.g.shape[1:])
    operands = (values(a.g), a.rows, a.row_scale, packing.channels_last(out))
    grid = (a.rows.shape[0], ceil_div(size, BLOCK))
    launch(_row_spec(a.g, out), "keep_rows", grid, *operands, a.g.shape[0], size, BLOCK=BLOCK)
