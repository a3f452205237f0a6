"""``float_dtype="bfloat16"``: the products of layers left in float run in bfloat16, everything around them in float32.

    convolution(x, w, b)  ->  float32(convolution(bfloat16 x, bfloat16 w, bfloat16 b))

The same for their gradients. What the packed layers compute is not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .call import Call
from .graph import aten, erase_dead, is_tensor, operator_of, provenance, value
from .state import State, graph_pass

PRODUCTS = frozenset({aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default})


@graph_pass(requires=("kept rows",), ensures="float layers")
def float_layers(state: State) -> None:
    """Let every float32 product of a layer left in float run in bfloat16, if that is asked for.

    Float products of packed layers (QAT) stay as they are; so do matrix products of the model that are no layer's.
    """
    if state.config.float_dtype != "bfloat16":
        return
    graph, dtype = state.graph, torch.bfloat16
    packed = {site.name for site in state.packed}
    nodes = [(s.output, s.backward, s.grad_input, s.grad_weight) for s in state.sites if not s.packed]
    own = {node for of_site in nodes for node in of_site if node is not None}
    emitter = state.emitter()
    for node in state.candidates(list(graph.nodes)):
        if node.op != "call_function" or node.target not in PRODUCTS or node.kwargs:
            continue
        made = provenance(node)
        if (made.site in packed if made is not None else node not in own) or not _is_float32(node):
            continue
        at = emitter.at(node, made.site if made else "float")
        args = [at.cast("cast", a, dtype) if _is_float32(a) else a for a in node.args]
        result = at.call("float_product", operator_of(node), *args)
        for old, new in zip(_results(node), result if isinstance(result, tuple) else (result,), strict=True):
            if old is not None and new is not None and is_tensor(new):
                old.replace_all_uses_with(at.cast("cast", new, torch.float32))
    erase_dead(graph)


def _is_float32(node: Any) -> bool:
    """A float32 tensor, or an operator with several results of which the first that is a tensor is one."""
    if not isinstance(node, fx.Node):
        return False
    result = node.meta.get("val")
    first = next((r for r in result if r is not None), None) if isinstance(result, tuple | list) else result
    return isinstance(first, torch.Tensor) and first.dtype == torch.float32


def _results(node: fx.Node) -> list[fx.Node | None]:
    """The node itself, or its items by position."""
    if is_tensor(node):
        return [node]
    items: list[fx.Node | None] = [None] * len(value(node))
    for item in node.users:
        items[Call(item).index] = item
    return items
