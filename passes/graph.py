"""Small helpers over an AOTAutograd graph: what a node is, what it derives from, how one is taken out."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
TRANSPOSES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
VIEWS = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default, aten.clone.default}
)


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Why a node is in the graph: the pass that made it, for which site, in which role."""

    made_by: str
    site: str
    role: str


def provenance(node: fx.Node) -> Provenance | None:
    """The provenance of a node made by a pass, else None."""
    return node.meta.get("fqt")


def site_of(node: fx.Node) -> str:
    """The site that a node was made for; ``step`` for the model's own nodes and for what belongs to no site."""
    made = provenance(node)
    return made.site if made else "step"


def add_call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
) -> fx.Node:
    """A call at the graph's insertion point. With operands from the beginning, ``create_node`` would look through all
    of them for raw symbolic sizes, which takes as long as the rest."""
    node = graph.create_node("call_function", target, name=name)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def mark(node: fx.Node, role: str) -> None:
    """Give a node made by a pass the role by which it is looked up (``output``, ``grad_input``, ...)."""
    node.meta["fqt"] = dataclasses.replace(node.meta["fqt"], role=role)


def is_backward(node: fx.Node) -> bool:
    """True for nodes AOTAutograd placed in the backward part of a joint graph."""
    tag = node.meta.get("partitioner_tag")
    if tag is not None:
        return tag in ("is_backward", "must_be_in_backward")
    return bool(node.meta.get("autograd_backward"))


def tag_backward(graph: fx.Graph) -> None:
    """Tag what reads a gradient as backward: AOTAutograd leaves out the backward of a model's own autograd.Function.

    Such nodes carry the ``seq_nr`` of the last forward node, which is not theirs: it is removed.
    """
    for node in graph.nodes:
        untagged = node.op == "call_function" and node.meta.get("partitioner_tag") is None and not is_backward(node)
        if untagged and any(is_backward(n) for n in node.all_input_nodes):
            node.meta["partitioner_tag"] = "is_backward"
            node.meta.pop("seq_nr", None)


def is_call(node: object, target: object) -> TypeGuard[fx.Node]:
    """True if ``node`` calls exactly this operator overload."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def first(node: fx.Node) -> Any:
    """The first operand, whatever it is called: of operators that have in common what matters of it."""
    return node.args[0]


def operator_of(node: fx.Node) -> Callable[..., Any]:
    """What a ``call_function`` node calls."""
    assert callable(node.target)
    return node.target


def value(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


def is_tensor(node: fx.Node) -> bool:
    """True if the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def strip(node: fx.Node, targets: Iterable[object]) -> fx.Node:
    """Follow first operands upwards while the node calls one of ``targets``."""
    while node.op == "call_function" and node.target in targets and isinstance(first(node), fx.Node):
        node = first(node)
    return node


def root(node: fx.Node) -> fx.Node:
    """The tensor a chain of casts, transposes and views starts from."""
    return strip(node, CASTS | TRANSPOSES | VIEWS)


def position(node: fx.Node) -> Any:
    """Orders nodes as they stand in the graph, also after insertions."""
    return node._sort_key


class Replacements:
    """Nodes to be read instead of others: by the output at the end, all at once, since each change of it looks at all
    that a graph returns."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self._new = graph, dict[fx.Node, fx.Node]()

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let everything but the output read ``new`` instead of ``node``."""
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user.op != "output")
        self._new[node] = new

    def finish(self) -> None:
        """Let the output read what is new, and what that was replaced by later."""

        def newest(node: fx.Node) -> fx.Node:
            while node in self._new:
                node = self._new[node]
            return node

        output = self.graph.output_node()
        output.args = fx.node.map_arg(output.args, newest)


def is_erased(node: fx.Node) -> bool:
    """Has the node been taken out of its graph?"""
    return node._erased


def erase_unused(*nodes: fx.Node) -> None:
    """Take out ``nodes`` that nothing reads, and what only they read: passes that ask who reads a value need it."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if is_erased(node) or node.users or node.op in ("placeholder", "output") or node.is_impure():
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)


def erase_dead(graph: fx.Graph) -> None:
    """Take out every node that nothing reads, as ``Graph.eliminate_dead_code`` does, but in one look at each node."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and not node.is_impure():
            graph.erase_node(node)


def is_training(graph: fx.Graph) -> bool:
    """True for a joint graph: it has tangents, or nodes of the backward part."""
    return any(is_backward(node) for node in graph.nodes)


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode the graph was traced with, or None for a graph without tensors."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)


class Snapshot:
    """A copy of a graph, with which it can be made again as it was."""

    def __init__(self, graph: fx.Graph) -> None:
        self.copy = copied(graph)

    def restore(self, graph: fx.Graph) -> None:
        """Put the copied nodes, under their old names, in place of the nodes of ``graph``."""
        for node in reversed(graph.nodes):
            graph.erase_node(node)
        graph._graph_namespace = type(graph._graph_namespace)()
        _copy_nodes(self.copy, graph)


def copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes, under the same names, in a graph of their own."""
    new = fx.Graph()
    _copy_nodes(graph, new)
    return new


def _copy_nodes(source: fx.Graph, target: fx.Graph) -> None:
    output: Any = target.graph_copy(source, {}, return_output_node=True)
    if output is not None:
        target.output(output[0]).meta = copy.copy(output[1].meta)


def describe(graph: fx.Graph) -> str:
    """The graph as text, one node per line: name, type, call, and the pass and site that made it."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_arguments(node.args)}")
            continue
        made = provenance(node)
        comment = f"  # {made.made_by}: {made.site} {made.role}" if made else ""
        call = "" if node.op == "placeholder" else f" = {_target(node)}({_arguments(node.args)})"
        lines.append(f"{node.name}: {_type(node.meta.get('val'))}{call}{comment}")
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else str(node.target)


def _arguments(args: Sequence[Any]) -> str:
    return ", ".join(str(arg) for arg in args)


def _type(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return f"{str(result.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in result.shape)}]"
    return type(result).__name__
