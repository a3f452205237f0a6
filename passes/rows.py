"""Where rows are chosen (``scope="step"``): one cut of the backward graph that every packed gradient crosses.

NUMERICS 3 chooses rows "at the first packed site that the gradient meets". In a chain that is one node. In a
network with skip connections the gradient also flows around that site, so the choice is made at the nearest
common dominator of all packed sites' gradients: the value that every path from the loss to a packed site goes
through. Pruned there with 1/p, the whole gradient below stays unbiased, and rows not kept are zero everywhere
below (docs/adr/0002-step-scope.md). Where no such value exists, or rows are tokens that attention mixes,
every site chooses its own rows, and the report says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import fx

from .graph import is_backward, is_tensor, value
from .sites import Site

T = TypeVar("T", bound=Hashable)


class Dominators(Generic[T]):
    """Immediate dominators of a DAG given in topological order (Cooper, Harvey, Kennedy 2001, one sweep)."""

    def __init__(self, order: Sequence[T], predecessors: Mapping[T, Sequence[T]], entries: Iterable[T]) -> None:
        """``entries`` are reached from a virtual root, which is written None."""
        self.immediate: dict[T, T | None] = {}
        self.depth: dict[T | None, int] = {None: 0}
        starts = set(entries)
        for node in order:
            reached = [p for p in predecessors[node] if p in self.depth]
            if node in starts:
                common: T | None = None
            elif reached:
                common = self.common(reached)
            else:
                continue
            self.immediate[node] = common
            self.depth[node] = self.depth[common] + 1

    def common(self, nodes: Iterable[T | None]) -> T | None:
        """The nearest node that dominates all of ``nodes`` (each dominates itself); None for the root."""
        first, *others = nodes
        for other in others:
            while first != other:
                if self.depth[first] >= self.depth[other]:
                    first = self.immediate[first]  # type: ignore[index]
                else:
                    other = self.immediate[other]  # type: ignore[index]
        return first

    def dominates(self, upper: T, lower: T) -> bool:
        """True if every path from the root to ``lower`` goes through ``upper``."""
        return lower in self.depth and self.common([upper, lower]) == upper


@dataclasses.dataclass(frozen=True)
class RowChoice:
    """``cut``: where rows are chosen once per step; None means at every site, for ``reason``.

    ``below``: indices of the sites whose gradient passes through the cut.
    """

    cut: fx.Node | None
    reason: str
    below: frozenset[int] = frozenset()


NOTHING_PRUNED = RowChoice(None, "nothing is pruned")


def choose_cut(graph: fx.Graph, sites: Sequence[Site]) -> RowChoice:
    """The nearest common dominator of the packed sites' gradients."""
    packed = [s for s in sites if s.packed and s.trained]
    if not packed:
        return RowChoice(None, "no packed site has a backward pass")
    tokens = [s.name for s in packed if s.rows_are_tokens]
    if tokens:
        return RowChoice(None, f"the rows of {tokens[0]} are tokens, which are not independent samples")
    dominators = gradient_dominators(graph)
    cut = dominators.common([s.grad_output for s in packed])
    while cut is not None and not is_tensor(cut):
        cut = dominators.immediate[cut]
    if cut is None:
        return RowChoice(None, "the gradient enters the packed layers on several separate paths")
    sizes = [value(s.grad_output).shape[0] for s in packed if s.grad_output is not None]
    shape = value(cut).shape
    if len(shape) < 2 or any(size != shape[0] for size in sizes):
        return RowChoice(None, f"the gradient of shape {tuple(shape)} that all share does not have one row per sample")
    below = frozenset(s.index for s in sites if s.grad_output is not None and dominators.dominates(cut, s.grad_output))
    return RowChoice(cut, f"rows are chosen once per step, where the gradient is {cut.name}", below)


def gradient_dominators(graph: fx.Graph) -> Dominators[fx.Node]:
    """Dominators of the gradient flow: the backward nodes that depend on a tangent."""
    entries = [n for n in graph.nodes if n.op == "placeholder" and is_backward(n)]
    flow: dict[fx.Node, list[fx.Node]] = {n: [] for n in entries}
    for node in graph.nodes:
        if node.op != "call_function" or not is_backward(node):
            continue
        inputs = [n for n in node.all_input_nodes if n in flow]
        if inputs:
            flow[node] = inputs
    return Dominators(list(flow), flow, entries)
