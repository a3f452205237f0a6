"""Row compaction (``scope="step"``): the backward below the cut computes on the K kept rows only.

Below the cut, rows that are not kept have no gradient. Every value v there is replaced by ``v[rows]`` as far as
the operators allow, float operations included:

    local operators (`local`)        op(v)[rows] = op(v[rows])
    sums over the batch              sum(v) = sum(v[rows]), where the other rows of v are zero
    packed operations                read and write kept rows only (``compact=True``)
    values of the forward pass       gathered; or computed again on the kept rows from what is saved anyway, if a
                                     single product or convolution of the input leads to them
    masks with a longer history      saved as bits

No number changes but the order of float sums: an operator that mixes rows in a way not listed here keeps its full
operands, and the pass records which (`CompactedRows.reasons`).
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .graph import (
    VIEWS,
    Emitter,
    Insertion,
    arguments,
    aten,
    is_backward,
    is_call,
    is_tensor,
    operator_of,
    prims,
    provenance,
    strip,
    value,
)
from .local import SIZED, has_rows, keeps_zero, live_nodes, row_operands

fqt = torch.ops.fqt
READS_ROWS = {fqt.quantize_rows.default: 2, fqt.quantize_channels.default: 1}
"""Packed operations on the kept rows of their first operand, and which argument names these rows."""
COMPACT_ARGUMENT = {fqt.quantize_rows.default: 7, fqt.quantize_channels.default: 8}


@dataclasses.dataclass
class CompactedRows:
    """What the pass did: how many values have a compact form, and where full rows are still computed and why."""

    count: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)


def compact_rows(graph: fx.Graph, rows: fx.Node) -> CompactedRows:
    """Rewrite the backward part of ``graph`` below the choice of ``rows`` (int32 ``[K]``, all of them used)."""
    compaction = _Compaction(graph, rows)
    for node in list(graph.nodes):
        if node.op == "call_function" and is_backward(node):
            compaction.visit(node)
    report = compaction.finish()
    graph.eliminate_dead_code()
    return report


class _Compaction:
    def __init__(self, graph: fx.Graph, rows: fx.Node) -> None:
        self.graph, self.rows = graph, rows
        self.emitter = Emitter(graph, "compact")
        self.kept: dict[fx.Node, fx.Node] = {}
        """v -> v[rows], for values of the backward."""
        self.again: dict[fx.Node, fx.Node] = {}
        """The same for values of the forward."""
        self.zero: set[fx.Node] = set()
        """Values whose rows that are not kept are zero."""

    def at(self, node: fx.Node) -> Insertion:
        made = provenance(node)
        return self.emitter.at(node, made.site if made else "step")

    # -- backward values ---------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Give ``node`` a compact form, or let it read compact operands."""
        if self._packed_operation(node):
            return
        pooled = _max_pool_backward(node)
        if pooled is not None and pooled.gradient in self.kept:
            self._pool(node, pooled)
            return
        if not any(n in self.kept for n in node.all_input_nodes):
            return
        operands = row_operands(node)
        if operands is not None and any(n in self.kept for n in operands):
            masked = self._masked(node)
            self._keep(node, masked or self._rebuild(self.at(node), node, operands), keeps_zero(node, self.zero))
        elif node.target is aten.sum.dim_IntList and arguments(node)[0] in self.zero:
            node.update_arg(0, self.kept[arguments(node)[0]])

    def _keep(self, node: fx.Node, compact: fx.Node, zero: bool) -> None:
        self.kept[node] = compact
        if zero:
            self.zero.add(node)

    def _packed_operation(self, node: fx.Node) -> bool:
        """Operations that know the kept rows themselves. True if ``node`` is one."""
        args = arguments(node)
        if node.target is fqt.prune_rows.default:
            self._keep(node, self.at(node).call("keep", fqt.keep_rows.default, *args), zero=True)
        elif node.target is fqt.scatter_rows.default and args[1] is self.rows:
            self._keep(node, args[0], zero=True)
        elif node.target is fqt.dequantize_grad_input.default and args[4] is self.rows:
            role = provenance(node)
            compact = self.at(node).call(role.role if role else "grad_input", node.target, *args[:6], True)
            self._keep(node, compact, zero=True)
        elif node.target is fqt.gather_rows.default and args[1] is self.rows:
            node.replace_all_uses_with(self._of(self.at(node), args[0]))
        elif node.target in READS_ROWS and args[READS_ROWS[node.target]] is self.rows and args[0] in self.kept:
            position = COMPACT_ARGUMENT[node.target]
            node.args = (self.kept[args[0]], *args[1:position], True)
        else:
            return False
        return True

    def _of(self, at: Insertion, node: fx.Node) -> fx.Node:
        """``node[rows]``."""
        return self.kept[node] if node in self.kept else self._again(at, node)

    def _rebuild(self, at: Insertion, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
        """The same operator on the kept rows of its row operands."""
        replaced = {n: self._of(at, n) for n in operands}
        args: Any = fx.node.map_arg(node.args, lambda n: replaced.get(n, n))
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: replaced.get(n, n))
        if node.target in SIZED:
            args = (args[0], [at.size(self.rows, 0), *args[1][1:]], *args[2:])
        rebuilt: fx.Node = at.call("compact", operator_of(node), *args, **kwargs)
        return rebuilt

    def _masked(self, node: fx.Node) -> fx.Node | None:
        """``where(mask, a, b)`` whose mask has a long history in the forward: the mask is saved as bits."""
        if node.target is not aten.where.self:
            return None
        mask, first, second = arguments(node)
        if mask in self.again or mask in self.kept or not has_rows(mask, node) or value(mask).dim() < 2:
            return None
        if not self._has_long_history(mask):
            return None
        if any(is_backward(n) for n in _sources(mask)):
            return None
        bits = self._save_bits(mask)
        at = self.at(node)
        words = at.call("mask", fqt.gather_words.default, bits, self.rows)
        self.again[mask] = at.call("mask", fqt.unpack_bool.default, words, value(mask).shape[1])
        operands = [n for n in (mask, first, second) if has_rows(n, node)]
        return self._rebuild(at, node, operands)

    def _save_bits(self, mask: fx.Node) -> fx.Node:
        """Bits of a comparison that autograd placed in the backward, made in the forward, right after its operand."""
        source = max(_forward_leaves(mask), key=list(self.graph.nodes).index)
        following = source.next
        while following.op == "placeholder" or is_call(following, operator.getitem):
            following = following.next
        at = self.emitter.at(source, "step")
        at.anchor = following
        moved = _copy_down(self.emitter, at, mask)
        bits: fx.Node = at.call("mask_bits", fqt.pack_bool.default, moved)
        for made in (moved, bits):
            made.meta["partitioner_tag"] = "is_forward"
            made.meta.pop("autograd_backward", None)
        bits.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return bits

    # -- forward values ----------------------------------------------------------------------------------------

    def _again(self, at: Insertion, node: fx.Node) -> fx.Node:
        """``node[rows]`` of a value without gradient, computed again where one product leads to it."""
        if node not in self.again:
            self.again[node] = self._recompute(at, node) or self._gather(at, node)
        return self.again[node]

    def _gather(self, at: Insertion, node: fx.Node) -> fx.Node:
        is_words = value(node).dtype == torch.int64
        gathered: fx.Node = at.call(
            "gather", (fqt.gather_words if is_words else fqt.gather_rows).default, node, self.rows
        )
        return gathered

    def _recompute(self, at: Insertion, node: fx.Node) -> fx.Node | None:
        args = arguments(node)
        if node.target is fqt.output_product.default:
            recomputed: fx.Node = at.call("product", operator_of(node), self._again(at, args[0]), *args[1:])
            return recomputed
        if is_call(node, aten.convolution.default) and has_rows(args[0], node):
            recomputed = at.call("convolution", operator_of(node), self._again(at, args[0]), *args[1:])
            return recomputed
        operands = row_operands(node)
        if operands is None or self._has_long_history(node):
            return None
        return self._rebuild(at, node, operands)

    def _has_long_history(self, node: fx.Node) -> bool:
        """More than one product, convolution or other row value leads to it by local operators."""
        return len(_sources(node)) != 1

    def _pool(self, node: fx.Node, pooled: MaxPoolBackward) -> None:
        at = self.at(node)
        args = (self.kept[pooled.gradient], self._of(at, pooled.x), *pooled.window)
        compact = at.call("max_pool", fqt.max_pool_gradient.default, *args)
        self._keep(node, compact, pooled.gradient in self.zero)

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> CompactedRows:
        """Where full rows are still read, make them from the kept ones if the others are zero; report the rest."""
        report = CompactedRows(len(self.kept))
        live = live_nodes(self.graph)
        for node in self.kept:
            readers = [user for user in node.users if user in live and user not in self.kept]
            if not readers:
                continue
            names = ", ".join(sorted({str(user.target) for user in readers}))
            report.reasons.append(f"full rows of {node.name} for {names}")
            if node in self.zero and node.target is not fqt.scatter_rows.default:
                at = self.at(node)
                at.anchor = node.next
                size = at.size(node, 0)
                full = at.call("scatter", fqt.scatter_rows.default, self.kept[node], self.rows, size)
                for reader in readers:
                    reader.replace_input_with(node, full)
        return report


def _sources(node: fx.Node) -> set[fx.Node]:
    """Row values from which local operators compute ``node``."""
    sources: set[fx.Node] = set()
    pending, seen = [node], set()
    while pending:
        item = pending.pop()
        if item in seen:
            continue
        seen.add(item)
        operands = row_operands(item)
        if operands is None:
            sources.add(item)
        else:
            pending.extend(operands)
    return sources


def _forward_leaves(mask: fx.Node) -> list[fx.Node]:
    """Forward values that the backward-tagged local operators of ``mask`` start from."""
    if not is_backward(mask):
        return [mask]
    return [leaf for n in row_operands(mask) or [] for leaf in _forward_leaves(n)]


def _copy_down(emitter: Emitter, at: Insertion, node: fx.Node) -> fx.Node:
    """A copy of backward-tagged local operators in the forward part."""
    if not is_backward(node):
        return node
    copies = {n: _copy_down(emitter, at, n) for n in row_operands(node) or []}
    args: Any = fx.node.map_arg(node.args, lambda n: copies.get(n, n))
    copied: fx.Node = at.call("mask", operator_of(node), *args)
    return copied


@dataclasses.dataclass(frozen=True)
class MaxPoolBackward:
    """The gradient of a 2-D max-pool as autograd and Inductor write it: a scatter of g to saved positions."""

    gradient: fx.Node
    x: fx.Node
    window: tuple[list[int], list[int], list[int]]


def _max_pool_backward(node: fx.Node) -> MaxPoolBackward | None:
    """``view(scatter_add(0, 1, view(positions), view(g)))``, without dilation and ceil_mode."""
    scatter = strip(arguments(node)[0], VIEWS) if node.target in VIEWS and value(node).dim() == 4 else None
    if scatter is None or not is_call(scatter, aten.scatter_add.default):
        return None
    _, _, index, source = arguments(scatter)
    to_indices = strip(index, VIEWS)
    if not is_call(to_indices, prims._low_memory_max_pool_offsets_to_indices.default):
        return None
    gradient = source
    while gradient.target in VIEWS and value(gradient).dim() != 4:
        gradient = arguments(gradient)[0]
    pool = arguments(strip(arguments(to_indices)[0], VIEWS))[0]
    x, kernel, stride, padding, dilation, ceil_mode = arguments(pool)
    if ceil_mode or any(d != 1 for d in dilation) or not is_tensor(gradient) or value(gradient).dim() != 4:
        return None
    return MaxPoolBackward(gradient, x, (list(kernel), list(stride), list(padding)))
