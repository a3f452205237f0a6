"""Where rows are chosen (``scope="step"``): one cut of the backward graph that every packed gradient crosses.

1. The nearest common dominator of all packed sites' gradients: the value that every path from the loss to a packed
   site goes through. Pruned there with 1/p, everything below it has zero rows but for the kept ones
   (docs/adr/0002-step-scope.md).
2. If every path to that value goes through BatchNorm, the nearest value above from which that is so: the gradient
   that enters this BatchNorm (docs/adr/0015). Its backward makes sums over the batch zero; rows dropped behind it
   would undo that, rows dropped before it are projected (`batch_norm`).
3. Where several outputs have no such value in common, the gradients of these outputs, with one choice for all.
4. Else, and where rows are tokens, which attention mixes, every site chooses its own rows, and the report says why.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import fx

from . import batch_norm
from .graph import is_backward, is_tensor, value
from .local import same
from .sites import Site
from .state import NOTHING_PRUNED, RowChoice, State, graph_pass

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


@graph_pass(requires=("decisions",), ensures="row choice")
def rows(state: State) -> None:
    """Choose the cut, if rows are chosen once per step."""
    if not state.config.prunes:
        state.choice = NOTHING_PRUNED
    elif state.config.scope == "layer":
        state.choice = RowChoice((), "asked for by scope='layer'")
    else:
        state.choice = _choose_rows(state.graph, state.sites, state.config.cut)


def _choose_rows(graph: fx.Graph, sites: Sequence[Site], cut: str) -> RowChoice:
    """The cuts for the packed sites; ``cut``: option of that name (`FQTConfig`)."""
    packed = [s for s in sites if s.packed and s.trained]
    if not packed:
        return RowChoice((), "no packed site has a backward pass")
    tokens = [s.name for s in packed if s.rows_are_tokens]
    if tokens:
        return RowChoice((), f"the rows of {tokens[0]} are tokens, which are not independent samples")
    gradients = [s.grad_output for s in packed if s.grad_output is not None]
    samples = [value(g).shape[0] for g in gradients]
    if not all(same(n, samples[0]) for n in samples):
        return RowChoice((), f"packed layers have different numbers of rows: {sorted(set(map(str, samples)))}")
    flow = GradientFlow(graph, samples[0])
    cuts, reason = _cuts(flow, gradients, cut)
    if not cuts:
        return RowChoice((), reason)
    sheltered = flow.reached_only_through(cuts)
    below = frozenset(s.index for s in sites if s.grad_output in sheltered)
    norms = tuple(n for n in graph.nodes if n in sheltered and batch_norm.mixes_samples(n, flow.samples))
    return RowChoice(cuts, reason, below, norms)


def _cuts(flow: GradientFlow, gradients: list[fx.Node], cut: str) -> tuple[tuple[fx.Node, ...], str]:
    dominators = Dominators(list(flow.sources), flow.sources, flow.entries)
    common = None if cut == "output" else dominators.common(gradients)
    while common is not None and not is_tensor(common):
        common = dominators.immediate[common]
    if common is None:
        return _outputs(flow, gradients, asked=cut == "output")
    if cut == "batch_norm":
        common = _above_batch_norm(flow, dominators, common)
    shape = value(common).shape
    if not flow.has_sample_rows(common):
        return (), f"the gradient of shape {tuple(shape)} that all share does not have one row per sample"
    return (common,), f"rows are chosen once per step, where the gradient is {common.name}"


def _above_batch_norm(flow: GradientFlow, dominators: Dominators[fx.Node], cut: fx.Node) -> fx.Node:
    """The nearest dominator of ``cut`` from which every path to it goes through BatchNorm; ``cut`` if there is none."""
    directly = flow.without_batch_norm(cut)
    if not directly.isdisjoint(flow.entries):
        return cut
    above = dominators.immediate[cut]
    while above is not None and (above in directly or not is_tensor(above) or not flow.has_sample_rows(above)):
        above = dominators.immediate[above]
    return above or cut


def _outputs(flow: GradientFlow, gradients: list[fx.Node], asked: bool) -> tuple[tuple[fx.Node, ...], str]:
    """All gradients that the graph receives and that reach a packed site, if they have a row per sample."""
    above = flow.above(gradients)
    entries = tuple(n for n in flow.entries if n in above)
    if not all(flow.has_sample_rows(n) for n in entries):
        if asked:
            return (), "the gradient of an output does not have one row per sample"
        return (), "the gradient enters the packed layers on several separate paths"
    return entries, f"rows are chosen once per step, where the gradient enters: {', '.join(n.name for n in entries)}"


class GradientFlow:
    """The backward nodes that depend on a tangent, in graph order, each with those of its operands that do."""

    def __init__(self, graph: fx.Graph, samples: int | torch.SymInt) -> None:
        self.samples = samples
        self.entries = [n for n in graph.nodes if n.op == "placeholder" and is_backward(n)]
        self.sources: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.entries}
        for node in graph.nodes:
            if node.op != "call_function" or not is_backward(node):
                continue
            inputs = [n for n in node.all_input_nodes if n in self.sources]
            if inputs:
                self.sources[node] = inputs

    def has_sample_rows(self, node: fx.Node) -> bool:
        """Is ``node`` a gradient with one row, of more than one number, for every sample?"""
        return is_tensor(node) and value(node).dim() >= 2 and same(value(node).shape[0], self.samples)

    def above(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """``nodes`` and all that they depend on."""
        found: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(self.sources[node])
        return found

    def without_batch_norm(self, node: fx.Node) -> set[fx.Node]:
        """From where a path leads to ``node`` on which no BatchNorm mixes samples; ``node`` itself included."""
        found: set[fx.Node] = set()
        pending = [node]
        while pending:
            item = pending.pop()
            if item not in found and not batch_norm.mixes_samples(item, self.samples):
                found.add(item)
                pending.extend(self.sources[item])
        return found

    def reached_only_through(self, cuts: Sequence[fx.Node]) -> set[fx.Node]:
        """Nodes to which every path from a tangent goes through one of ``cuts``, these included."""
        around: set[fx.Node] = set()
        for node, sources in self.sources.items():
            if node not in cuts and (not sources or any(n in around for n in sources)):
                around.add(node)
        return set(self.sources) - around
