"""Fusion in the backward: what lies between two packed operations becomes one pass over memory.

    g -> ReLU mask -> sums -> BatchNorm's backward -> ranges -> quantize        six passes and as many tensors
    g -> fused_gradient(mask) -> gradient_moments -> fused_gradient(BatchNorm, ranges) -> quantize       four

For every gradient that a packed operation, or a float convolution beside one, reads from memory, the pass collects
the pointwise operators that lead to it (`region`), up to the next tensors that exist in memory anyway. Values of the
forward that are pointwise functions of such tensors (the normalized activation, the mask of a ReLU) are computed
again inside. Where quantizers read the result, the ranges they need are measured on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.program import FULL
from .graph import Emitter, arguments, aten, is_backward, is_call, provenance, value
from .local import live_nodes
from .region import Region, are_readable, is_supported

fqt = torch.ops.fqt
READERS = frozenset(
    {
        fqt.row_importance.default,
        fqt.prune_rows.default,
        fqt.keep_rows.default,
        fqt.quantize_rows.default,
        fqt.quantize_channels.default,
        fqt.gradient_moments.default,
        fqt.float_gradient_moments.default,
        fqt.max_pool_gradient.default,
    }
)
COMPACT_AT: dict[Any, int] = {fqt.quantize_rows.default: 7, fqt.quantize_channels.default: 8}
"""Position of the argument ``compact``; ``extremes`` follows."""
MAX_FULL_OPERANDS, MAX_STATEMENTS = 6, 48


def fuse_gradients(graph: fx.Graph, every_row_is_kept: bool) -> list[tuple[str, fx.Node]]:
    """Fuse what can be fused; returns layer and call of each region.

    every_row_is_kept: nothing is pruned, so that ranges of all rows are those of the kept ones.
    """
    emitter = Emitter(graph, "fuse_gradients")
    fused: list[tuple[str, fx.Node]] = []
    for x in list(graph.nodes):
        readers = [user for user in x.users if user.target in READERS or is_convolution_gradient(user, x)]
        if not readers or x.op != "call_function" or not is_supported(x, x):
            continue
        region = _GradientRegion(graph, x, live_nodes(graph))
        if region.statements and (region.is_beside_packed() or any(user.target in READERS for user in readers)):
            made = provenance(readers[0])
            site = made.site if made else "step"
            fused.append((site, _replace(emitter, x, region, site, every_row_is_kept)))
    graph.eliminate_dead_code()
    return fused


class _GradientRegion(Region):
    def __init__(self, graph: fx.Graph, x: fx.Node, live: set[fx.Node]) -> None:
        super().__init__(graph)

        def is_in_memory(node: fx.Node, absorbed: list[fx.Node]) -> bool:
            # Readers in the forward do not count: for the backward the value would have to be saved.
            readers = [user for user in node.users if user in live and is_backward(user)]
            return node is not x and any(not is_supported(user, user) for user in readers)

        absorbed, sources = self.absorb(x, is_in_memory)
        self.sources = sources
        if len(sources) > MAX_FULL_OPERANDS or len(absorbed) > MAX_STATEMENTS or not are_readable(sources, bits=True):
            return
        self.emit(absorbed, sources)
        is_said = bool(self.statements) and self.argument(x) == self.statements[-1].name
        if not is_said or all(kind != FULL for _, kind in self.operands):
            self.statements.clear()  # not all of x can be said: nothing is fused

    def is_beside_packed(self) -> bool:
        """Does a packed operation make or read a tensor of the region? Then it is in NHWC memory already."""
        made = any(getattr(source.target, "namespace", None) == "fqt" for source in self.sources)
        return made or any(user.target in READERS for source in self.sources for user in source.users)


def is_convolution_gradient(user: fx.Node, x: fx.Node) -> bool:
    """Does ``user`` differentiate a float convolution whose gradient is ``x``?"""
    return is_call(user, aten.convolution_backward.default) and arguments(user)[0] is x


def _replace(emitter: Emitter, x: fx.Node, region: Region, site: str, every_row_is_kept: bool) -> fx.Node:
    users = [user for user in x.users if is_backward(user)]
    order = {node: i for i, node in enumerate(emitter.graph.nodes)}
    at = emitter.at(x.next if is_backward(x) else min(users, key=order.__getitem__), site)
    measured = [user for user in users if _takes_extremes(user, every_row_is_kept)]
    scales = {arguments(user)[1] for user in measured if is_call(user, fqt.quantize_rows.default)}
    if len(scales) > 1:
        measured = []
    scale = next(iter(scales), None)
    args = (region.arguments(at), str(region.program), bool(measured), scale)
    values, rows, channels = at.call("fused", fqt.fused_gradient.default, *args)
    for user in measured:
        _give_extremes(user, rows if is_call(user, fqt.quantize_rows.default) else channels)
    new = at.cast("fused", values, value(x).dtype)
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)
    fused: fx.Node = arguments(values)[0]
    for node in (fused, *fused.users):
        # Some depend on no tangent (a pool's input): the partitioner would compute and save them in the forward.
        node.meta["partitioner_tag"] = "must_be_in_backward"
    return fused


def _takes_extremes(user: fx.Node, every_row_is_kept: bool) -> bool:
    position = COMPACT_AT.get(user.target)
    if position is None:
        return False
    compact = len(user.args) > position and bool(user.args[position])
    return compact or every_row_is_kept


def _give_extremes(user: fx.Node, extremes: fx.Node) -> None:
    position = COMPACT_AT[user.target]
    user.args = (*(*user.args, False)[: position + 1], extremes)
