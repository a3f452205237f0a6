"""Small matrix products are kept whole until the layers are found, and written out here as Inductor does.

Inductor turns a product of one row or one column into a multiplication and a sum before any pass sees the graph: a
linear layer would be one for a batch of eight and none for a batch of one.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.decomposition import select_decomp_table

from .call import Call
from .graph import aten, erase_dead, site_of, value
from .local import same
from .state import State, graph_pass

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})


@graph_pass(requires=("written-out BatchNorm",), ensures="written-out products")
def products(state: State) -> None:
    """Replace the small products that are left by Inductor's decomposition, where it has one."""
    emitter, table = state.emitter(), select_decomp_table()
    for node in state.candidates(list(state.graph.nodes)):
        if node.op != "call_function" or node.target not in PRODUCTS or not _is_small(node):
            continue
        decomposed = table[node.target]
        with emitter.fake_mode:
            known: Any = decomposed(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))
        if known is not NotImplemented:
            made = emitter.at(node, site_of(node)).inline("product", decomposed, *node.args, **node.kwargs)
            node.replace_all_uses_with(made)
    erase_dead(state.graph)


def _is_small(node: fx.Node) -> bool:
    call = Call(node)
    left, right = (call.mat1, call.mat2) if node.target is aten.addmm.default else (call.self, call.mat2)
    return any(same(size, 1) for size in (*value(left).shape, *value(right).shape))
