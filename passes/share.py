"""Pack once, use everywhere: identical quantizations of the same operand become one node."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..kernels.operations import OPERATIONS
from .call import Call
from .graph import erase_dead, provenance
from .state import State, graph_pass, no_float_left

fqt = torch.ops.fqt
SHAREABLE = frozenset(getattr(fqt, name).default for name, made in OPERATIONS.items() if made.shareable)


@graph_pass(requires=("written-out products", "tags"), ensures="shared operands", check=no_float_left)
def share(state: State) -> None:
    """Merge equal quantizations.

    The seed that rides on the first ``pack_activation`` is not part of what it computes.
    """
    erase_dead(state.graph)
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in state.candidates(list(state.graph.nodes)):
        if node.op != "call_function" or provenance(node) is None:
            continue
        if node.target is fqt.pack_activation.default:
            key = (node.target, Call(node).x, Call(node).threshold)
        elif node.target in SHAREABLE or (node.target is operator.getitem and Call(node).source.target in SHAREABLE):
            key = (node.target, *node.args)
        else:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            state.graph.erase_node(node)
