"""The way of the gradient through autograd's nodes, and where it can be cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.autograd.graph import Node

from ..passes.rows import Dominators


class AutogradFlow:
    """The autograd nodes below the outputs, from these on, each with the nodes whose backward comes before it."""

    def __init__(self, roots: Sequence[Node], norms: set[Node], samples: int) -> None:
        self.roots, self.norms, self.samples = list(dict.fromkeys(roots)), norms, samples
        order = _topological(self.roots)
        self.sources: dict[Node, list[Node]] = {node: [] for node in order}
        for node in order:
            for following, _ in node.next_functions:
                if following is not None:
                    self.sources[following].append(node)
        self.dominators = Dominators(order, self.sources, self.roots)

    def has_sample_rows(self, node: Node) -> bool:
        metadata = node._input_metadata
        return len(metadata) == 1 and len(metadata[0].shape) >= 2 and metadata[0].shape[0] == self.samples

    def common(self, nodes: list[Node]) -> Node | None:
        """The nearest node with one gradient through which every path to ``nodes`` goes."""
        cut = self.dominators.common(nodes)
        while cut is not None and len(cut._input_metadata) != 1:
            cut = self.dominators.immediate[cut]
        return cut

    def above_batch_norm(self, cut: Node) -> Node:
        """The nearest node above from which every path to ``cut`` goes through BatchNorm; ``cut`` if there is none."""
        directly = self.above([cut], stop=self.norms)
        if not directly.isdisjoint(self.roots):
            return cut
        above = self.dominators.immediate[cut]
        while above is not None and (above in directly or not self.has_sample_rows(above)):
            above = self.dominators.immediate[above]
        return above or cut

    def where_it_enters(self, cut: Node) -> Node:
        """The node above that hands the gradient of ``cut`` on unchanged, to others as well (a residual sum).

        A graph has one value there, which is pruned for all of its readers.
        """
        while len(self.sources[cut]) == 1:
            (above,) = self.sources[cut]
            place = [following for following, _ in above.next_functions].index(cut)
            unchanged = above.name() == "CloneBackward0" or (
                above.name() == "AddBackward0" and (place == 0 or above._saved_alpha == 1)  # type: ignore[attr-defined]
            )
            mine, its = (node._input_metadata for node in (cut, above))
            if not unchanged or len(its) != 1 or (mine[0].shape, mine[0].dtype) != (its[0].shape, its[0].dtype):
                break
            cut = above
        return cut

    def above(self, nodes: Sequence[Node], stop: Collection[Node] = ()) -> set[Node]:
        """``nodes`` and all whose backward leads to them, without those in ``stop`` and beyond."""
        found: set[Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found and node not in stop:
                found.add(node)
                pending.extend(self.sources[node])
        return found

    def reached_only_through(self, cuts: Sequence[Any]) -> set[Node]:
        """Nodes to which every path from an output goes through one of ``cuts``, these included."""
        around: set[Node] = set()
        for node, sources in self.sources.items():
            if node not in cuts and (node in self.roots or any(n in around for n in sources)):
                around.add(node)
        return set(self.sources) - around


def _topological(roots: list[Node]) -> list[Node]:
    """Every node before those that its backward leads to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    order.reverse()
    return order
