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
from .emit import Emitter
from .graph import VIEWS, aten, erase_dead, is_backward, is_call, position, prims, provenance, site_of, strip, value
from .local import is_channel_vector, is_pointwise
from .refusal import Refusal, name_of
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


PACKED_NOWHERE = Refusal("normalizes a float convolution whose output is packed nowhere")
Match = Callable[[fx.Node], Dequantized | Refusal]


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """``moment = sum(g (y - center))`` and other sums of g, of a y whose integers stand before all their readers."""

    moment: fx.Node
    totals: list[fx.Node]
    g: fx.Node
    y: Dequantized
    center: fx.Node
    latest: fx.Node
    """The last operand."""


@graph_pass(requires=("kept rows",), ensures="exact statistics")
def moments(state: State) -> None:
    """Batch statistics and the sums of BatchNorm's backward: of packed outputs, then of float convolutions."""
    _exact_moments(state)
    _gradient_moments(state, match_dequantized)
    refused = [*_float_moments(state), *_gradient_moments(state, match_convolution)]
    for node, refusal in refused if state.packed else ():
        state.refuse("moments", node, refusal)


def _exact_moments(state: State) -> None:
    """Replace the batch statistics of packed outputs."""
    emitter = state.emitter()
    for node in state.candidates(_batch_statistics(state.graph)):
        output = match_dequantized(Call(node).self)
        if isinstance(output, Refusal):
            continue
        at = emitter.at(node, site_of(output.acc))
        args = (output.acc, output.alpha, output.bias, largest_output(output.acc))
        _replace_items(node, at.call("statistics", fqt.channel_moments.default, *args))
    erase_dead(state.graph)


def _float_moments(state: State) -> list[tuple[fx.Node, Refusal]]:
    """The same for float convolutions whose output is packed in the end (a stem, a projection of a skip).

    They are in NHWC memory anyway, and one pass over them replaces Inductor's two. Returns what is left, and why.
    """
    emitter, refused = state.emitter(), []
    for node in state.candidates(_batch_statistics(state.graph)):
        output = match_convolution(Call(node).self)
        if isinstance(output, Refusal):
            refused.append((node, output))
        elif not is_backward(node) and not _leads_to_packing(output.acc):
            refused.append((node, PACKED_NOWHERE))
        else:
            at = emitter.at(node, "step")
            _replace_items(node, at.call("statistics", fqt.float_moments.default, output.acc))
    return refused


def _replace_items(node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    for item in list(node.users):
        item.replace_all_uses_with(results[Call(item).index])


def _gradient_moments(state: State, match: Match) -> list[tuple[fx.Node, Refusal]]:
    """Replace the sums of BatchNorm's backward over a y that ``match`` knows. Returns what is left, and why."""
    graph, emitter, refused = state.graph, state.emitter(), []
    for node in state.candidates(list(graph.nodes)):
        found = [_match_gradient_moments(node, g, match(y), center) for g, y, center in _sum_of_products(node)]
        matched = next((m for m in found if isinstance(m, GradientMoments)), None)
        if matched is not None:
            _replace_sums(emitter, matched)
        else:
            refused += [(node, m) for m in found if isinstance(m, Refusal)]
    erase_dead(graph)
    return refused


def _match_gradient_moments(
    node: fx.Node, g: fx.Node, y: Dequantized | Refusal, center: fx.Node
) -> GradientMoments | Refusal:
    if isinstance(y, Refusal):
        return y
    if y.alpha is None and not _is_float_moment(center):
        return PACKED_NOWHERE
    totals = [u for u in g.users if u is not node and _is_batch_sum(u)]
    readers = [user for total in totals for user in total.users]
    latest = max((n for n in (g, y.acc, y.alpha, y.bias, center) if n), key=position)
    if position(latest) > min(map(position, (node, *readers))):
        return Refusal("a sum of its gradient is read before the integers exist")
    return GradientMoments(node, totals, g, y, center, latest)


def _replace_sums(emitter: Emitter, found: GradientMoments) -> None:
    y, center = found.y, found.center
    at = emitter.at(found.moment, site_of(found.moment if provenance(found.moment) else y.acc))
    at.anchor = found.latest.next
    channels = value(y.acc).shape[1]
    viewed = [] if value(center).dim() == 1 else [at.call("statistics", aten.view.default, center, [channels])]
    center = viewed[0] if viewed else center
    args = ([y.acc, found.g], SECOND, y.alpha, y.bias, center)
    total, moment = at.call("statistics", fqt.gradient_moments.default, *args)
    for made in (*viewed, Call(total).source, total, moment):  # the last operand may be one of the forward
        made.meta.update(partitioner_tag="is_backward", autograd_backward=True)
    found.moment.replace_all_uses_with(moment)
    for other in found.totals:
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


def _sum_of_products(node: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """``(g, y, center)`` of ``sum(mul(g, sub(y, view(center))))``; two of them where both factors look like that."""
    if not _is_batch_sum(node) or not is_call(Call(node).self, aten.mul.Tensor):
        return []
    found = []
    factors = (Call(Call(node).self).self, Call(Call(node).self).other)
    for g, centered in (factors, factors[::-1]):
        if not isinstance(g, fx.Node) or not is_call(centered, aten.sub.Tensor) or centered.kwargs:
            continue
        y, center = Call(centered).self, Call(centered).other
        if isinstance(y, fx.Node) and is_channel_vector(center, centered):
            found.append((g, y, strip(center, VIEWS | {aten.unsqueeze.default})))
    return found


def _batch_statistics(graph: fx.Graph) -> list[fx.Node]:
    """Variance and mean over all axes but the channel's, as BatchNorm takes them."""
    found = []
    for node in graph.nodes:
        if not is_call(node, aten.var_mean.correction):
            continue
        call = Call(node)
        rank = value(call.self).dim()
        axes = sorted(axis % rank for axis in call.dim)
        if call.correction == 0 and call.keepdim is True and axes == [0, *range(2, rank)]:
            found.append(node)
    return found


def match_dequantized(node: fx.Node) -> Dequantized | Refusal:
    """``mul(float(acc), view(alpha))``, or ``add`` of a bias to it."""
    refusal = Refusal(f"normalizes what {name_of(node)} makes, which is no packed layer's output")
    bias = None
    if is_call(node, aten.add.Tensor) and not node.kwargs and is_channel_vector(Call(node).other, node):
        node, bias = Call(node).self, strip(Call(node).other, VIEWS)
    if not is_call(node, aten.mul.Tensor) or not is_call(Call(node).self, prims.convert_element_type.default):
        return refusal
    if not is_channel_vector(Call(node).other, node):
        return refusal
    acc = Call(Call(node).self).a
    if not is_call(acc, fqt.output_product.default) or (bias is not None and value(bias).dim() != 1):
        return refusal
    return Dequantized(acc, strip(Call(node).other, VIEWS), bias)


def match_convolution(node: fx.Node) -> Dequantized | Refusal:
    """A float32 convolution, or a bfloat16 one as float32; other casts change values."""
    maker = name_of(strip(node, {fqt.gather_rows.default}))
    refusal = Refusal(f"normalizes what {maker} makes: neither a packed layer nor a float convolution")
    if is_call(node, prims.convert_element_type.default) and value(node).dtype == torch.float32:
        node = Call(node).a
    known = is_call(node, aten.convolution.default) and value(node).dtype in (torch.float32, torch.bfloat16)
    return Dequantized(node, None, None) if known else refusal


def largest_output(acc: fx.Node) -> int:
    """A bound of |acc|: how many products +-1 or 0 one output adds up."""
    product = Call(acc)
    return int(product.in_channels * math.prod(value(product.w_bits).shape[1:-2]))
