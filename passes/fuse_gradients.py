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
from .emit import Emitter
from .graph import aten, erase_dead, erase_unused, is_backward, is_call, position, site_of, value
from .local import is_pointwise
from .refusal import Refusal, name_of
from .region import Region, are_readable, is_supported, unreadable
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
    emitter = state.emitter()
    for x in state.candidates(list(graph.nodes)):
        readers = [user for user in x.users if user.target in READERS or is_convolution_gradient(user, x)]
        if not readers or not (is_pointwise(x) or is_supported(x, x)):
            continue
        if _is_computed_in_readers(emitter, x):
            continue
        region = _match_gradient(x)
        if isinstance(region, Refusal):
            state.refuse("fuse_gradients", readers[0], region)
        elif region.is_beside_packed() or any(user.target in READERS for user in readers):
            # Of all rows where nothing is pruned, else of the kept ones alone: the ranges that quantizers need.
            measures = (u for u in readers if takes(u, "extremes"))
            measured = [user for user in measures if not state.config.prunes or Call(user).compact]
            if measured or not is_call(x, fqt.dequantize_grad_input.default):
                _replace(emitter, x, region, site_of(readers[0]), measured)
    erase_dead(graph)
    state.regions += [n for n in graph.nodes if takes(n, "operands", "text") and is_backward(n)]


def _is_computed_in_readers(emitter: Emitter, x: fx.Node) -> bool:
    """Let all readers of ``x`` compute it, if they can and if each reads one tensor for it; False if not."""
    regions: dict[fx.Node, _GradientRegion] = {}
    for user, first in _readers_that_compute(x).items():
        region = _match_gradient(x, first)
        if isinstance(region, Refusal) or not region.reads_one_tensor():
            return False
        regions[user] = region
    for user, region in regions.items():
        operands = region.arguments(emitter.at(user, site_of(user)))
        Call(user).replace(operands=operands, text=str(region.program))
    erase_unused(x)
    return bool(regions)


def _readers_that_compute(x: fx.Node) -> dict[fx.Node, fx.Node | None]:
    """Where pointwise operators and operations with a program, which can compute ``x``, are all that reads it.

    Those operations with the first operand that their program must have, if any; else nothing.
    """
    users = [user for user in x.users if is_backward(user)]
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


def _match_gradient(x: fx.Node, first: fx.Node | None = None) -> _GradientRegion | Refusal:
    """What leads to ``x``; ``first``, if given, is the program's first operand whether it is read or not."""
    if not is_supported(x, x):
        return Refusal(f"its gradient is made by {name_of(x)}, which no program says")

    def is_in_memory(node: fx.Node, absorbed: list[fx.Node]) -> bool:
        # Readers in the forward do not count: for the backward the value would have to be saved.
        readers = [user for user in node.users if is_backward(user)]
        return node is not x and any(not is_supported(user, user) for user in readers)

    region = _GradientRegion()
    absorbed, sources = region.absorb(x, is_in_memory)
    if len(sources) > MAX_FULL_OPERANDS:
        return Refusal(f"its gradient is computed from {len(sources)} tensors, at most {MAX_FULL_OPERANDS} are read")
    if len(absorbed) > MAX_STATEMENTS:
        return Refusal(f"its gradient takes {len(absorbed)} operators, a program has at most {MAX_STATEMENTS}")
    if not are_readable(sources, bits=True):
        return unreadable(sources)
    region.first, region.sources = first, sources
    region.emit(absorbed, sources if first is None else [first, *(s for s in sources if s is not first)])
    if not region.says(x) or all(kind != FULL for _, kind in region.operands):
        return Refusal("at most a scale and a shift lead to its gradient")
    return region


class _GradientRegion(Region):
    """The pointwise operators that lead to a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first: fx.Node | None = None
        self.sources: list[fx.Node] = []

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
    at = emitter.at(x.next if is_backward(x) else min(users, key=position), site)
    scales = {Call(user).weight_scale for user in measured if is_call(user, fqt.quantize_rows.default)}
    if len(scales) > 1:
        measured, scales = [], set()
    scale = next(iter(scales), None)
    args = (region.arguments(at), str(region.program), bool(measured), scale)
    values, rows, channels = at.call("fused", fqt.fused_gradient.default, *args)
    for user in measured:
        Call(user).replace(extremes=rows if is_call(user, fqt.quantize_rows.default) else channels)
    new = at.cast("fused", values, value(x).dtype)
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)
    erase_unused(x)
    fused: fx.Node = Call(values).source
    for node in (fused, *fused.users):
        # Some depend on no tangent (a pool's input): the partitioner would compute and save them in the forward.
        node.meta["partitioner_tag"] = "must_be_in_backward"
