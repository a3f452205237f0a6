"""The way of the gradient through autograd's nodes, and where it can be cut.

The graph passes find the same place by dominators (passes/rows.py). Here it is found by the definition: a place cuts
nodes off if they are out of reach without it. The two share nothing, so that either can be tested against the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch.autograd.graph import Node


class AutogradFlow:
    """The autograd nodes behind the outputs of a model. A node stands for the gradient that enters its backward.

    roots: the nodes of the outputs. norms: those of BatchNorms that mix the samples of a batch. samples: per batch.
    ends: those of the inputs, which belong to what was computed before.
    """

    def __init__(
        self, roots: Sequence[Node], norms: Collection[Node], samples: int, ends: Collection[Node] = ()
    ) -> None:
        self.roots, self.norms, self.samples, self.ends = list(dict.fromkeys(roots)), norms, samples, ends
        self.nodes = self.reached(self.roots)

    def reached(self, starts: Iterable[Node], without: Collection[Node | None] = ()) -> dict[Node, Node | None]:
        """What the gradient of ``starts`` reaches on ways around ``without``, each with the node that it comes from."""
        found: dict[Node, Node | None] = {}
        pending: list[tuple[Node, Node | None]] = [(node, None) for node in starts]
        while pending:
            node, above = pending.pop()
            if node not in found and node not in without and node not in self.ends:
                found[node] = above
                pending.extend((following, node) for following, _ in node.next_functions if following is not None)
        return found

    def reached_only_through(self, cuts: Collection[Node | None]) -> set[Node]:
        """Nodes to which every way from an output leads through one of ``cuts``, these included."""
        return set(self.nodes) - set(self.reached(self.roots, without=cuts))

    def above(self, nodes: Sequence[Node]) -> Iterator[Node]:
        """Nodes through which every way from an output to any of ``nodes`` leads, the nearest first.

        They lie on every way, so those of one way to one of the nodes are all that have to be tried.
        """
        place: Node | None = nodes[0]
        while place is not None:
            if not self.reached(self.roots, without=[place]).keys() & set(nodes):
                yield place
            place = self.nodes[place]

    def has_sample_rows(self, node: Node) -> bool:
        """One gradient, with one row, of more than one number, for every sample?"""
        metadata = node._input_metadata
        return len(metadata) == 1 and len(metadata[0].shape) >= 2 and metadata[0].shape[0] == self.samples

    def common(self, nodes: Sequence[Node]) -> Node | None:
        """The nearest place with one gradient that cuts off all of ``nodes``; None if there is none."""
        return next((place for place in self.above(nodes) if len(place._input_metadata) == 1), None)

    def above_batch_norm(self, cut: Node) -> Node:
        """The nearest place above ``cut`` from which every way to it leads through BatchNorm; else ``cut``."""
        if cut in self.reached(self.roots, without=self.norms):
            return cut
        for place in self.above([cut]):
            if place is not cut and self.has_sample_rows(place) and cut not in self.reached([place], self.norms):
                return place
        return cut

    def where_it_enters(self, cut: Node) -> Node:
        """The node above that hands the gradient of ``cut`` on unchanged, to others as well (a residual sum).

        A graph has one value there, which is pruned for all of its readers.
        """
        while True:
            ways = [(n, i) for n in self.nodes for i, (following, _) in enumerate(n.next_functions) if following is cut]
            if len(ways) != 1:
                return cut
            ((above, place),) = ways
            unchanged = above.name() == "CloneBackward0" or (
                above.name() == "AddBackward0" and (place == 0 or above._saved_alpha == 1)  # type: ignore[attr-defined]
            )
            mine, its = (node._input_metadata for node in (cut, above))
            if not unchanged or len(its) != 1 or (mine[0].shape, mine[0].dtype) != (its[0].shape, its[0].dtype):
                return cut
            cut = above
