"""Which operators treat the rows of a batch one by one, and which keep a row of zeros zero.

A row is one index of axis 0. An operator is *local* if row n of its result depends on row n of its operands only:
then ``op(x)[rows] = op(x[rows])``, and `compact` may compute it on the kept rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .call import Call
from .graph import CASTS, aten, first, is_call, is_tensor, value

SIZED = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default})
"""Second operand is the size of the result, whose first entry counts rows."""
ONE_OPERAND = frozenset(
    {
        aten.alias.default,
        aten.avg_pool2d.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
        aten._to_copy.default,
        torch.ops.fqt.check_finite.default,
    }
)
"""Local in the axis 0 of all their row operands."""
PACKED = frozenset({torch.ops.fqt.max_pool_gradient.default, torch.ops.fqt.unpack_bool.default})
"""Packed operations local in the axis 0 of all their tensors."""
REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default})
ONE_AXIS = frozenset(
    {aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten._softmax.default}
)
"""Local unless their ``dim`` is axis 0."""
PASS_ZEROS = (
    SIZED
    | ONE_OPERAND
    | REDUCTIONS
    | CASTS
    | {
        aten.permute.default,
        aten.slice.Tensor,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.neg.default,
        aten.clone.default,
        aten.div.Scalar,
        aten.mul.Scalar,
        torch.ops.fqt.max_pool_gradient.default,
    }
)
"""Zero where their first operand is."""


def is_pointwise(node: fx.Node) -> bool:
    """Element by element, with broadcasting, and without randomness."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def same(a: Any, b: Any) -> bool:
    """Are two sizes known to be equal?"""
    return statically_known_true(a == b)


def has_rows(node: Any, like: fx.Node) -> bool:
    """Is ``node`` a tensor whose axis 0 lines up with that of ``like``, and not broadcast along it?"""
    if not isinstance(node, fx.Node) or not is_tensor(node) or not is_tensor(like):
        return False
    x, y = value(node), value(like)
    return x.dim() > 0 and x.dim() == y.dim() and same(x.shape[0], y.shape[0])


def is_channel_vector(node: Any, x: fx.Node) -> bool:
    """A tensor with one value per channel that broadcasts over ``x``."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or not value(node).is_floating_point():
        return False
    shape, rank = value(node).shape, value(x).dim()
    padded = [1] * (rank - len(shape)) + list(shape)
    channels = value(x).shape[1]
    return len(shape) <= rank and all(same(s, channels if axis == 1 else 1) for axis, s in enumerate(padded))


def row_operands(node: fx.Node) -> list[fx.Node] | None:
    """The operands whose rows a local operator reads one by one; None where it mixes rows or is not known."""
    if node.op != "call_function" or not is_tensor(node) or value(node).dim() == 0:
        return None
    if is_pointwise(node):
        return [n for n in node.all_input_nodes if has_rows(n, node)] or None
    if node.target in PACKED:
        return list(node.all_input_nodes)
    if node.target in ONE_OPERAND:
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        return operands if all(same(value(n).shape[0], value(node).shape[0]) for n in operands) else None
    if node.target in (aten.cat.default, aten.stack.default):
        call = Call(node)
        return list(call.tensors) if call.dim % value(node).dim() else None
    source = first(node) if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or value(source).dim() == 0:
        return None
    return [source] if _keeps_first_axis(node, source) else None


def row_sources(node: fx.Node, ends: Callable[[fx.Node], bool] = lambda node: False) -> Iterator[fx.Node]:
    """Row values from which local operators compute ``node``, not looking behind those that are ``ends``."""
    pending, seen = [node], {node}
    while pending:
        item = pending.pop()
        operands = None if ends(item) else row_operands(item)
        if operands is None:
            yield item
        else:
            pending += [n for n in dict.fromkeys(operands) if n not in seen]
            seen.update(operands)


def sole_row_source(node: fx.Node) -> fx.Node | None:
    """The row value from which local operators compute ``node``; None if there are several."""
    found = list(itertools.islice(row_sources(node), 2))
    return found[0] if len(found) == 1 else None


def _keeps_first_axis(node: fx.Node, source: fx.Node) -> bool:
    x, rank = value(source), value(source).dim()
    if not value(node).dim() or not same(x.shape[0], value(node).shape[0]):
        return False
    if node.target is aten.expand.default:
        return rank == value(node).dim()
    if node.target in SIZED:
        return same(x.numel(), value(node).numel())
    if node.target is aten.permute.default:
        return bool(Call(node).dims[0] % rank == 0)
    if node.target in REDUCTIONS or node.target is aten.squeeze.dims:
        axes = Call(node).dim
        return bool(axes) and all(axis % rank for axis in axes)
    if node.target is aten.unsqueeze.default:
        return bool(Call(node).dim % (rank + 1))
    if node.target in ONE_AXIS:
        return bool(Call(node).dim % rank)
    return node.target in (aten.mm.default, aten.constant_pad_nd.default) and _no_row_padding(node, rank)


def _no_row_padding(node: fx.Node, rank: int) -> bool:
    return node.target is not aten.constant_pad_nd.default or len(Call(node).pad) < 2 * rank


def is_zero(item: Any) -> bool:
    """A constant that is zero everywhere."""
    if isinstance(item, int | float):
        return item == 0
    if not isinstance(item, fx.Node) or item.op != "call_function":
        return False
    if item.target is aten.scalar_tensor.default:
        return bool(Call(item).s == 0)
    if item.target in (aten.full.default, aten.full_like.default):
        return bool(Call(item).fill_value == 0)
    return item.target in (aten.zeros.default, aten.zeros_like.default)


def is_not_positive(node: object) -> bool:
    """``x <= 0``."""
    return is_call(node, aten.le.Scalar) and Call(node).other == 0


def keeps_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    """Is row n of ``node`` zero where row n of every operand in ``zero`` is? (A factor NaN or infinity aside.)"""
    call = Call(node)
    if node.target is aten.mul.Tensor:
        return call.self in zero or call.other in zero
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return call.self in zero and call.other in zero
    if node.target is aten.where.self:
        return all(operand in zero or is_zero(operand) for operand in (call.self, call.other))
    if node.target in PASS_ZEROS or node.target in (aten.div.Tensor, aten.mm.default):
        return first(node) in zero
    return False


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that dead code elimination would keep."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or not live.isdisjoint(node.users) or node.is_impure():
            live.add(node)
    return live
