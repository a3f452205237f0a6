"""Fusion in the backward: what lies between two packed operations becomes one pass over memory.

    acc -> dequantize -> ReLU mask -> sums -> BatchNorm's backward -> ranges -> quantize     seven passes over memory
    acc -> gradient_moments(dequantize, mask), fused_gradient(dequantize, mask, BatchNorm, ranges) -> quantize    three

For every gradient that a packed operation, or a float convolution beside one, reads from memory, the pass collects
the pointwise operators that lead to it (`region`), up to the next tensors that exist in memory anyway. Values of the
forward that are pointwise functions of such tensors (the normalized activation, the mask of a ReLU) are computed
again inside. Where quantizers read the result, the ranges they need are measured on the way. What is made from one
tensor and read by BatchNorm's sums, a max-pool's gradient and pointwise operators only is not written: each reader
computes it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..kernels.program import FULL, SECOND, VALUES
from .call import Call, takes
from .graph import Emitter, aten, is_backward, is_call, provenance, value
from .local import live_nodes
from .region import Region, are_readable, is_supported
from .state import State, graph_pass, no_float_left

fqt = torch.ops.fqt
READERS = frozenset(
    {
        fqt.row_importance.default,
        fqt.prune_rows.default,
        fqt.keep_rows.default,
        fqt.quantize_rows.default,
        fqt.quantize_channels.default,
        fqt.gradient_moments.default,
        fqt.max_pool_gradient.default,
    }
)
MAX_FULL_OPERANDS, MAX_STATEMENTS = 6, 48


@graph_pass(requires=("exact statistics",), ensures="fused gradients", check=no_float_left)
def fuse_gradients(state: State) -> None:
    """Fuse what can be fused; programs without a statement are counted among the regions, too."""
    graph = state.graph
    every_row_is_kept = not state.config.prunes  # ranges of all rows are then those of the kept ones
    emitter = Emitter(graph, "fuse_gradients")
    for x in list(graph.nodes):
        readers = [user for user in x.users if user.target in READERS or is_convolution_gradient(user, x)]
        if not readers or x.op != "call_function" or not is_supported(x, x):
            continue
        live = live_nodes(graph)
        inside = _readers_that_compute(x, live)
        regions = {user: _GradientRegion(graph, x, live, first) for user, first in inside.items()}
        if regions and all(region.statements and region.reads_one_tensor() for region in regions.values()):
            for user, made in regions.items():
                _compute_inside(emitter, user, made)
            continue
        region = _GradientRegion(graph, x, live)
        if region.statements and (region.is_beside_packed() or any(user.target in READERS for user in readers)):
            measured = [user for user in readers if _takes_extremes(user, every_row_is_kept)]
            if measured or not is_call(x, fqt.dequantize_grad_input.default):
                _replace(emitter, x, region, _site(readers[0]), measured)
    graph.eliminate_dead_code()
    programs = (n for n in graph.nodes if takes(n, "operands", "text") and is_backward(n))
    state.regions += [(_site(node), node) for node in programs]


def _site(node: fx.Node) -> str:
    """The layer that a node was made for."""
    made = provenance(node)
    return made.site if made else "step"


def _readers_that_compute(x: fx.Node, live: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """Where pointwise operators and operations with a program, which can compute ``x``, are all that reads it.

    Those operations with the first operand that their program must have, if any; else nothing.
    """
    users = [user for user in x.users if user in live and is_backward(user)]
    found = {user: first for user in users for first in _place_for_program(user, x)}
    return found if all(user in found or is_supported(user, user) for user in users) else {}


def _place_for_program(user: fx.Node, x: fx.Node) -> list[fx.Node | None]:
    """``[first operand]`` of the program that can compute ``x`` inside of ``user``; empty if none can."""
    call = Call(user)
    if is_call(user, fqt.gradient_moments.default):
        y = call.operands[0]
        return [y] if call.text == SECOND and y is not x else []
    if is_call(user, fqt.max_pool_gradient.default):
        overlap = any(k > s for k, s in zip(call.kernel, call.stride, strict=True))  # would compute a value for each
        return [] if overlap or call.text != VALUES or call.g is x else [None]
    return []


def _compute_inside(emitter: Emitter, user: fx.Node, region: _GradientRegion) -> None:
    """Let ``user`` compute the values that it reads."""
    operands = region.arguments(emitter.at(user, _site(user)))
    Call(user).replace(operands=operands, text=str(region.program))


class _GradientRegion(Region):
    """What leads to ``x``; ``first``, if given, is the first operand whether it is read or not."""

    def __init__(self, graph: fx.Graph, x: fx.Node, live: set[fx.Node], first: fx.Node | None = None) -> None:
        super().__init__(graph)
        self.first = first

        def is_in_memory(node: fx.Node, absorbed: list[fx.Node]) -> bool:
            # Readers in the forward do not count: for the backward the value would have to be saved.
            readers = [user for user in node.users if user in live and is_backward(user)]
            return node is not x and any(not is_supported(user, user) for user in readers)

        absorbed, sources = self.absorb(x, is_in_memory)
        self.sources = sources
        if len(sources) > MAX_FULL_OPERANDS or len(absorbed) > MAX_STATEMENTS or not are_readable(sources, bits=True):
            return
        self.emit(absorbed, sources if first is None else [first, *(s for s in sources if s is not first)])
        is_said = bool(self.statements) and self.argument(x) == self.statements[-1].name
        if not is_said or all(kind != FULL for _, kind in self.operands):
            self.statements.clear()  # not all of x can be said: nothing is fused

    def reads_one_tensor(self) -> bool:
        """Besides ``first`` and bits, as many bytes as the result or fewer: computing it twice beats writing it."""
        read = [s for s in self.sources if s is not self.first and not is_call(s, fqt.unpack_bool.default)]
        return len(read) <= 1

    def is_beside_packed(self) -> bool:
        """Does a packed operation make or read a tensor of the region? Then it is in NHWC memory already."""
        makers = [Call(s).source if is_call(s, operator.getitem) else s for s in self.sources]
        made = any(getattr(maker.target, "namespace", None) == "fqt" for maker in makers)
        return made or any(user.target in READERS for source in self.sources for user in source.users)


def is_convolution_gradient(user: fx.Node, x: fx.Node) -> bool:
    """Does ``user`` differentiate a float convolution whose gradient is ``x``?"""
    return is_call(user, aten.convolution_backward.default) and Call(user).grad_output is x


def _replace(emitter: Emitter, x: fx.Node, region: Region, site: str, measured: list[fx.Node]) -> None:
    """``x`` by a fused operation, on the way the ranges that the quantizers ``measured`` need."""
    users = [user for user in x.users if is_backward(user)]
    order = {node: i for i, node in enumerate(emitter.graph.nodes)}
    at = emitter.at(x.next if is_backward(x) else min(users, key=order.__getitem__), site)
    scales = {Call(user).weight_scale for user in measured if is_call(user, fqt.quantize_rows.default)}
    if len(scales) > 1:
        measured = []
    scale = next(iter(scales), None)
    args = (region.arguments(at), str(region.program), bool(measured), scale)
    values, rows, channels = at.call("fused", fqt.fused_gradient.default, *args)
    for user in measured:
        Call(user).replace(extremes=rows if is_call(user, fqt.quantize_rows.default) else channels)
    new = at.cast("fused", values, value(x).dtype)
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)
    fused: fx.Node = Call(values).source
    for node in (fused, *fused.users):
        # Some depend on no tangent (a pool's input): the partitioner would compute and save them in the forward.
        node.meta["partitioner_tag"] = "must_be_in_backward"


def _takes_extremes(user: fx.Node, every_row_is_kept: bool) -> bool:
    return takes(user, "extremes") and (every_row_is_kept or Call(user).compact)
