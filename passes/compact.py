"""Row compaction (``scope="step"``): the backward below the cut computes on the K kept rows only.

Below the cut, rows that are not kept have no gradient. Every value v there is replaced by ``v[rows]`` as far as
the operators allow, float operations included:

    local operators (`local`)        op(v)[rows] = op(v[rows])
    sums over the batch              sum(v) = sum(v[rows]), where the other rows of v are zero
    packed operations                read and write kept rows only (``compact=True``)
    values of the forward pass       gathered; or computed again on the kept rows from what is saved anyway, if a
                                     single product or convolution of the input leads to them

No number changes but the order of float sums: an operator that mixes rows in a way not listed here keeps its full
operands, and the pass says which (`State.not_optimized`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .call import Call, takes
from .emit import REQUIRES_STRIDES, Emitter, Insertion
from .graph import aten, erase_dead, is_backward, is_call, operator_of, provenance, site_of, strip, value
from .local import SIZED, has_rows, keeps_zero, live_nodes, row_operands, sole_row_source
from .refusal import NotOptimized, Refusal
from .state import State, graph_pass, no_float_left

fqt = torch.ops.fqt


@graph_pass(requires=("known gradients",), ensures="kept rows", check=no_float_left)
def compact(state: State) -> None:
    """Rewrite the backward below the choice of rows (int32 ``[K]``, all of them used), if there is one."""
    if state.kept_rows is None:
        if state.step_rows is not None:
            why = "prune='bernoulli' keeps a random number of rows"
            state.not_optimized.append(NotOptimized("all layers", "compact", why))
        return
    compaction = _Compaction(state.emitter(), state.kept_rows)
    for node in state.candidates(list(state.graph.nodes)):
        if node.op == "call_function" and is_backward(node):
            compaction.visit(node)
    for node, refusal in compaction.finish():
        state.refuse("compact", node, refusal)
    state.compacted = len(compaction.kept)
    erase_dead(state.graph)


class _Compaction:
    def __init__(self, emitter: Emitter, rows: fx.Node) -> None:
        self.emitter, self.graph, self.rows = emitter, emitter.graph, rows
        self.kept: dict[fx.Node, fx.Node] = {}
        """v -> v[rows], for values of the backward."""
        self.again: dict[fx.Node, fx.Node] = {}
        """The same for values of the forward."""
        self.zero: set[fx.Node] = set()
        """Values whose rows that are not kept are zero."""

    def at(self, node: fx.Node) -> Insertion:
        return self.emitter.at(node, site_of(node))

    # -- backward values ---------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Give ``node`` a compact form, or let it read compact operands."""
        if self._packed_operation(node):
            return
        if not any(n in self.kept for n in node.all_input_nodes):
            return
        operands = row_operands(node)
        if operands is not None and any(n in self.kept for n in operands):
            self._keep(node, self._rebuild(self.at(node), node, operands), keeps_zero(node, self.zero))
        elif is_call(node, aten.sum.dim_IntList) and Call(node).self in self.zero:
            node.replace_input_with(Call(node).self, self.kept[Call(node).self])

    def _keep(self, node: fx.Node, compact: fx.Node, zero: bool) -> None:
        self.kept[node] = compact
        if zero:
            self.zero.add(node)

    def _packed_operation(self, node: fx.Node) -> bool:
        """Operations that know the kept rows themselves. True if ``node`` is one."""
        if not takes(node, "rows"):
            return False
        call = Call(node)
        if node.target is fqt.prune_rows.default:
            kept = self.at(node).call("keep", fqt.keep_rows.default, call.g, call.rows, call.row_scale)
            self._keep(node, kept, zero=True)
        elif call.rows is not self.rows:
            return False
        elif node.target is fqt.scatter_rows.default:
            self._keep(node, call.kept, zero=True)
        elif node.target is fqt.dequantize_grad_input.default:
            made = provenance(node)
            kept = self.at(node).repeat(made.role if made else "grad_input", node, compact=True)
            self._keep(node, kept, zero=True)
        elif node.target is fqt.gather_rows.default:
            node.replace_all_uses_with(self._of(self.at(node), call.x))
        elif takes(node, "g", "compact") and call.g in self.kept:
            call.replace(g=self.kept[call.g], compact=True)
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
        recomputed: fx.Node
        if is_call(node, fqt.output_product.default):
            recomputed = at.repeat("product", node, x_bits=self._again(at, Call(node).x_bits))
            return recomputed
        if is_call(node, aten.convolution.default) and has_rows(Call(node).input, node):
            recomputed = at.repeat("convolution", node, input=self._again(at, Call(node).input))
            return recomputed
        operands = row_operands(node)
        if operands is None or sole_row_source(node) is None:
            return None
        if node.target in REQUIRES_STRIDES and strip(node, REQUIRES_STRIDES).op == "placeholder":
            return None  # rows of the view as it is, rather than a view of rows gathered into NHWC memory
        return self._rebuild(at, node, operands)

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> list[tuple[fx.Node, Refusal]]:
        """Where full rows are still read, make them from the kept ones if the others are zero; which, and for whom."""
        refused = []
        live = live_nodes(self.graph)
        for node in self.kept:
            readers = [user for user in node.users if user in live and user not in self.kept]
            if not readers:
                continue
            names = ", ".join(sorted({str(user.target) for user in readers}))
            refused.append((node, Refusal(f"full rows of {node.name} for {names}")))
            if node in self.zero and node.target is not fqt.scatter_rows.default:
                at = self.at(node)
                at.anchor = node.next
                size = at.size(node, 0)
                full = at.call("scatter", fqt.scatter_rows.default, self.kept[node], self.rows, size)
                for reader in readers:
                    reader.replace_input_with(node, full)
        return refused
