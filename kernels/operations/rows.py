"""Rows of a gradient: their importance, which are kept, and moving them (docs/math.md 4).

Arithmetic: `reference.rows` and `selection`.

rows: int32 ``[K]``, ascending; -1 at the end where fewer are used. row_scale: float32 ``[K]``, 1 / p of each.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from .. import noise, reference, selection
from ..operands import KINDS, PRUNES, Size, choice, empty_nhwc, indices, require_float, vector
from ..packing import stored_nhwc
from .declare import Arguments, operation

PHASE = "row choice"


def _check_importance(a: Arguments) -> None:
    choice("kind", a.kind, KINDS)
    require_float(a.g)


@operation(results=lambda a: a.g.new_empty(a.g.shape[0], dtype=torch.float32), contract=_check_importance, phase=PHASE)
def row_importance(g: Tensor, kind: str) -> Tensor:
    """`reference.importance` of every row of g ``[N, C, *S]``: float32 ``[N]``."""
    return reference.importance(reference.nhwc_rows(reference.as_float32(g)), kind)


def _check_channels(a: Arguments) -> None:
    choice("kind", a.kind, KINDS)
    _check_rows(a)


def _check_rows(a: Arguments) -> None:
    require_float(a.g)
    a.rows, a.row_scale = indices(a.rows), vector(a.row_scale)


@operation(results=lambda a: a.g.new_empty(a.g.shape[1], dtype=torch.float32), contract=_check_channels, phase=PHASE)
def channel_importance(g: Tensor, rows: Tensor, row_scale: Tensor | None, kind: str) -> Tensor:
    """`reference.importance` of every channel of the kept rows of g ``[N, C, *S]``: float32 ``[C]``."""
    kept = reference.kept_gradient(g, rows, row_scale)
    return reference.importance(kept.transpose(0, 1).flatten(1), kind)


def _check_select(a: Arguments) -> None:
    choice("prune", a.prune, PRUNES)
    a.importance = vector(a.importance)


def _selected(a: Arguments) -> tuple[Tensor, Tensor]:
    size = selection.selected_size(a.importance.shape[0], a.prune, Fraction(a.keep_num, a.keep_den))
    return a.importance.new_empty(size, dtype=torch.int32), a.importance.new_empty(size, dtype=torch.float32)


@operation(results=_selected, contract=_check_select, phase=PHASE)
def select(
    importance: Tensor, seed: Tensor, stream: int, prune: str, keep_num: int, keep_den: int
) -> tuple[Tensor, Tensor]:
    """`selection.select` of importance float32 ``[N]``, keeping ``keep_num / keep_den``: rows and row_scale."""
    keys = noise.stream_keys(int(seed), stream)
    return selection.select(importance, keys, prune, Fraction(keep_num, keep_den))


@operation(results=lambda a: torch.empty_like(a.g), contract=_check_rows, phase=PHASE)
def prune_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    """g ``[N, C, *S]`` with its kept rows scaled, all others 0; dtype and strides of g."""
    pruned = torch.zeros_like(g)
    count = int((rows >= 0).sum())
    pruned[rows[:count].long()] = reference.kept_gradient(g, rows, row_scale).to(g.dtype)
    return pruned


@operation(
    results=lambda a: empty_nhwc(a.g, [a.rows.shape[0], *a.g.shape[1:]], a.g.dtype), contract=_check_rows, phase=PHASE
)
def keep_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    """The kept rows of g, scaled: ``[K, C, *S]`` in the dtype of g, NHWC; 0 where unused."""
    kept = g.new_zeros(rows.shape[0], *g.shape[1:])
    valid = reference.kept_gradient(g, rows, row_scale).to(g.dtype)
    kept[: valid.shape[0]] = valid
    return stored_nhwc(kept)


def _check_indices(a: Arguments) -> None:
    a.rows = indices(a.rows)


@operation(
    results=lambda a: a.words.new_empty([a.rows.shape[0], *a.words.shape[1:]]), contract=_check_indices, phase=PHASE
)
def gather_words(words: Tensor, rows: Tensor) -> Tensor:
    """``words[rows]`` of int64 ``[N, *S, W]``: contiguous ``[K, *S, W]``, 0 where unused."""
    return words[rows.long().clamp(min=0)] * (rows >= 0).long().view(-1, *[1] * (words.dim() - 1))


@operation(
    results=lambda a: empty_nhwc(a.x, [a.rows.shape[0], *a.x.shape[1:]], a.x.dtype),
    contract=_check_indices,
    phase=PHASE,
)
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` of ``[N, C, *S]``, any dtype: ``[K, C, *S]``, NHWC, 0 where unused."""
    gathered = x[rows.long().clamp(min=0)]
    return stored_nhwc(torch.where(reference.per_row(rows >= 0, gathered), gathered, torch.zeros_like(gathered)))


@operation(
    results=lambda a: empty_nhwc(a.kept, [a.size, *a.kept.shape[1:]], a.kept.dtype),
    contract=_check_indices,
    phase=PHASE,
)
def scatter_rows(kept: Tensor, rows: Tensor, size: Size) -> Tensor:
    """``[size, C, *S]`` whose ``rows`` are those of kept ``[K, C, *S]``, all others 0; any dtype, NHWC."""
    full = kept.new_zeros(size, *kept.shape[1:])
    count = int((rows >= 0).sum())
    full[rows[:count].long()] = kept[:count]
    return stored_nhwc(full)
