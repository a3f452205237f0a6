"""BatchNorm statistics from the exact integers of a product, instead of from the floats made from them.

    var_mean(alpha acc + bias)  ->  channel_moments(acc, alpha, bias)

The sums of acc and acc**2 are integers, exact in any order; only the last step is rounded (reference.channel_moments).
One pass over int16 replaces a two-pass float reduction, and the float output need not exist. The sums of BatchNorm's
backward are taken from the same integers (reference.gradient_moments). Float convolutions between fused activations
get both from one pass over their output (`float_moments`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from ..kernels.program import SECOND
from .call import Call
from .graph import VIEWS, Emitter, aten, is_backward, is_call, prims, provenance, strip, value
from .local import is_channel_vector, is_pointwise
from .region import PASSED_ON
from .state import State, graph_pass

fqt = torch.ops.fqt
POOLED = frozenset({prims._low_memory_max_pool_with_offsets.default, aten.avg_pool2d.default, operator.getitem})


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A float output ``alpha acc + bias`` of a packed product; or acc itself, a float tensor, where alpha is None."""

    acc: fx.Node
    alpha: fx.Node | None
    bias: fx.Node | None


@graph_pass(requires=("kept rows",), ensures="exact statistics")
def moments(state: State) -> None:
    """Batch statistics and the sums of BatchNorm's backward: of packed outputs, then of float convolutions."""
    graph = state.graph
    _exact_moments(graph)
    _replace_pairs(graph, match_dequantized)
    _float_moments(graph)
    _replace_pairs(graph, match_convolution)


def _exact_moments(graph: fx.Graph) -> None:
    """Replace the batch statistics of packed outputs."""
    emitter = Emitter(graph, "moments")
    for node in list(graph.nodes):
        if not is_call(node, aten.var_mean.correction) or not _over_batch(node):
            continue
        output = match_dequantized(Call(node).self)
        if output is None:
            continue
        made = provenance(output.acc)
        at = emitter.at(node, made.site if made else "step")
        args = (output.acc, output.alpha, output.bias, largest_output(output.acc))
        _replace_items(node, at.call("statistics", fqt.channel_moments.default, *args))
    graph.eliminate_dead_code()


def _float_moments(graph: fx.Graph) -> None:
    """The same for float convolutions whose output is packed in the end (a stem, a projection of a skip).

    They are in NHWC memory anyway, and one pass over them replaces Inductor's two.
    """
    emitter = Emitter(graph, "moments")
    for node in list(graph.nodes):
        if not is_call(node, aten.var_mean.correction) or not _over_batch(node):
            continue
        output = match_convolution(Call(node).self)
        if output is None or not (is_backward(node) or _leads_to_packing(output.acc)):
            continue
        _replace_items(node, emitter.at(node, "step").call("statistics", fqt.float_moments.default, output.acc))


def _replace_items(node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    for item in list(node.users):
        item.replace_all_uses_with(results[Call(item).index])


def _replace_pairs(graph: fx.Graph, match: Callable[[fx.Node], Dequantized | None]) -> None:
    """The two sums of BatchNorm's backward, ``sum g`` and ``sum g (y - center)`` of a y that ``match`` knows."""
    for node in list(graph.nodes):
        _replace_pair(graph, node, match)
    graph.eliminate_dead_code()


def _replace_pair(graph: fx.Graph, node: fx.Node, match: Callable[[fx.Node], Dequantized | None]) -> None:
    """Replace ``sum(g (y - center))`` and the sums of g beside it, if ``match`` knows y."""
    matched = _match_gradient_moment(node, match)
    if matched is None:
        return
    g, output, center = matched
    if output.alpha is None and not _is_float_moment(center):
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    others = [u for u in g.users if u is not node and _is_batch_sum(u)]
    readers = [user for other in others for user in other.users]
    latest = max((n for n in (g, output.acc, output.alpha, output.bias, center) if n), key=order.__getitem__)
    channels = value(output.acc).shape[1]
    if order[latest] > min(order[n] for n in (node, *readers)):
        return  # a sum is read before the integers exist
    origin = provenance(node) or provenance(output.acc)
    at = Emitter(graph, "moments").at(node, origin.site if origin else "step")
    at.anchor = latest.next
    viewed = [] if value(center).dim() == 1 else [at.call("statistics", aten.view.default, center, [channels])]
    center = viewed[0] if viewed else center
    args = ([output.acc, g], SECOND, output.alpha, output.bias, center)
    total, moment = at.call("statistics", fqt.gradient_moments.default, *args)
    for made in (*viewed, Call(total).source, total, moment):  # the last operand may be one of the forward
        made.meta.update(partitioner_tag="is_backward", autograd_backward=True)
    node.replace_all_uses_with(moment)
    for other in others:
        other.replace_all_uses_with(total)


def _leads_to_packing(node: fx.Node) -> bool:
    """Is the packing of a pointwise or pooled function of ``node`` in the forward?"""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if is_call(user, fqt.pack_activation.default):
                return True
            passed_on = is_pointwise(user) or user.target in POOLED or user.target in PASSED_ON
            if passed_on and not is_backward(user) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _is_float_moment(center: fx.Node) -> bool:
    squeezed = strip(center, VIEWS | {aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim})
    return is_call(squeezed, operator.getitem) and is_call(Call(squeezed).source, fqt.float_moments.default)


def _is_batch_sum(node: fx.Node) -> bool:
    """A float32 sum over all axes but the channel's; not that of a bias, which spells keepdim out (`backward`)."""
    if not is_call(node, aten.sum.dim_IntList) or not is_backward(node) or len(node.args) > 2:
        return False
    source = value(Call(node).self)
    axes = sorted(axis % source.dim() for axis in Call(node).dim)
    return bool(source.dtype == torch.float32 and axes == [0, *range(2, source.dim())])


def _match_gradient_moment(
    node: fx.Node, match: Callable[[fx.Node], Dequantized | None]
) -> tuple[fx.Node, Dequantized, fx.Node] | None:
    """``sum(mul(g, sub(y, view(center))))`` of a y that ``match`` knows, as (g, y, center)."""
    if not _is_batch_sum(node) or not is_call(Call(node).self, aten.mul.Tensor):
        return None
    factors = (Call(Call(node).self).self, Call(Call(node).self).other)
    for g, centered in (factors, factors[::-1]):
        if not isinstance(g, fx.Node) or not is_call(centered, aten.sub.Tensor) or centered.kwargs:
            continue
        y, center = Call(centered).self, Call(centered).other
        output = match(y) if isinstance(y, fx.Node) else None
        if output is not None and is_channel_vector(center, centered):
            return g, output, strip(center, VIEWS | {aten.unsqueeze.default})
    return None


def _over_batch(node: fx.Node) -> bool:
    call = Call(node)
    rank = value(call.self).dim()
    axes = sorted(axis % rank for axis in call.dim)
    return call.correction == 0 and call.keepdim is True and axes == [0, *range(2, rank)]


def match_dequantized(node: fx.Node) -> Dequantized | None:
    """``mul(float(acc), view(alpha))``, or ``add`` of a bias to it."""
    bias = None
    if is_call(node, aten.add.Tensor) and not node.kwargs and is_channel_vector(Call(node).other, node):
        node, bias = Call(node).self, strip(Call(node).other, VIEWS)
    if not is_call(node, aten.mul.Tensor) or not is_call(Call(node).self, prims.convert_element_type.default):
        return None
    if not is_channel_vector(Call(node).other, node):
        return None
    acc = Call(Call(node).self).a
    if not is_call(acc, fqt.output_product.default) or (bias is not None and value(bias).dim() != 1):
        return None
    return Dequantized(acc, strip(Call(node).other, VIEWS), bias)


def match_convolution(node: fx.Node) -> Dequantized | None:
    """A float32 convolution, or a bfloat16 one as float32; other casts change values."""
    if is_call(node, prims.convert_element_type.default) and value(node).dtype == torch.float32:
        node = Call(node).a
    known = is_call(node, aten.convolution.default) and value(node).dtype in (torch.float32, torch.bfloat16)
    return Dequantized(node, None, None) if known else None


def largest_output(acc: fx.Node) -> int:
    """A bound of |acc|: how many products +-1 or 0 one output adds up."""
    product = Call(acc)
    return int(product.in_channels * math.prod(value(product.w_bits).shape[1:-2]))
