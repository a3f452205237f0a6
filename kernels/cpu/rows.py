"""Choosing and moving rows on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import packing, reference, selection
from ..operands import KINDS, PRUNES, inner_size, nhwc_memory
from ..operations import Arguments, rows
from .native import call, kernel, nhwc, stream_keys


@kernel(rows.row_importance)
def row_importance(a: Arguments, importance: Tensor) -> None:
    count, size = a.g.shape[0], a.g[:1].numel()
    if a.kind == "uniform" or size == 0:
        importance.fill_(1)
    else:
        call("quantize", "row_importance", nhwc(a.g), count, size, KINDS[a.kind], importance)


@kernel(rows.channel_importance)
def channel_importance(a: Arguments, importance: Tensor) -> None:
    sizes, kept = sizes_of(a.g), (a.rows, a.rows.shape[0], a.row_scale)
    call("quantize", "channel_importance", nhwc(a.g), *sizes, *kept, KINDS[a.kind], importance)


def sizes_of(g: Tensor) -> tuple[int, int, int]:
    """Samples, positions per sample and channels."""
    return g.shape[0], inner_size(g), g.shape[1]


@kernel(rows.select)
def select(a: Arguments, chosen: Tensor, scale: Tensor) -> None:
    size, entries = a.importance.shape[0], chosen.shape[0]
    sizes = (size, PRUNES[a.prune], selection.kept_count(size, a.keep_num, a.keep_den))
    keys = stream_keys(a.seed, a.stream)
    # Selection is sequential; the number of threads, which every kernel is passed, is not used.
    call("select", "select_rows", a.importance, *sizes, *keys, chosen, scale, entries)


@kernel(rows.prune_rows)
def prune_rows(a: Arguments, pruned: Tensor) -> None:
    pruned.zero_()
    kept = a.rows[a.rows >= 0].long()
    pruned[kept] = reference.kept_gradient(a.g, a.rows, a.row_scale).to(a.g.dtype)


@kernel(rows.keep_rows)
def keep_rows(a: Arguments, out: Tensor) -> None:
    kept = packing.channels_last(a.g).contiguous().index_select(0, a.rows.clamp(min=0))
    factor = (a.row_scale * (a.rows >= 0)).view(-1, *[1] * (a.g.dim() - 1))
    if bool((a.rows < 0).any()):
        kept[a.rows < 0] = 0  # 0 * inf is not 0
    torch.mul(kept, factor, out=packing.channels_last(out))


def _gather(x: Tensor, indices: Tensor, gathered: Tensor) -> None:
    """Rows of contiguous memory into ``gathered``; zero where an index is -1."""
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    call("pack", "gather_rows", x, x.shape[0], row_bytes, indices, indices.shape[0], gathered)


@kernel(rows.gather_words)
def gather_words(a: Arguments, gathered: Tensor) -> None:
    _gather(a.words.contiguous(), a.rows, gathered)


@kernel(rows.gather_rows)
def gather_rows(a: Arguments, gathered: Tensor) -> None:
    _gather(nhwc_memory(a.x), a.rows, gathered)


@kernel(rows.scatter_rows)
def scatter_rows(a: Arguments, full: Tensor) -> None:
    full.zero_()
    used = a.rows[a.rows >= 0].long()
    full[used] = a.kept[: used.shape[0]]
