"""BatchNorm statistics from the exact integers of a product, instead of from the floats made from them.

    var_mean(alpha acc + bias)  ->  channel_moments(acc, alpha, bias)

The sums of acc and acc**2 are integers, exact in any order; only the last step is rounded (reference.channel_moments).
One pass over int16 replaces a two-pass float reduction, and the float output need not exist.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from .graph import VIEWS, Emitter, arguments, aten, is_backward, is_call, prims, provenance, strip, value

fqt = torch.ops.fqt


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A float output ``alpha acc + bias`` of a packed product."""

    acc: fx.Node
    alpha: fx.Node
    bias: fx.Node | None


def exact_moments(graph: fx.Graph) -> int:
    """Replace the batch statistics of packed outputs; returns how many."""
    emitter = Emitter(graph, "moments")
    replaced = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.var_mean.correction) or is_backward(node) or not _over_batch(node):
            continue
        output = match_dequantized(arguments(node)[0])
        if output is None:
            continue
        made = provenance(output.acc)
        at = emitter.at(node, made.site if made else "step")
        args = (output.acc, output.alpha, output.bias, largest_output(output.acc))
        moments = at.call("statistics", fqt.channel_moments.default, *args)
        for item in list(node.users):
            item.replace_all_uses_with(moments[arguments(item)[1]])
        replaced += 1
    graph.eliminate_dead_code()
    return replaced


def _over_batch(node: fx.Node) -> bool:
    rank = value(arguments(node)[0]).dim()
    axes = sorted(axis % rank for axis in arguments(node)[1])
    plain: bool = node.kwargs.get("correction") in (0, 0.0) and node.kwargs.get("keepdim") is True
    return plain and bool(axes == [0, *range(2, rank)])


def match_dequantized(node: fx.Node) -> Dequantized | None:
    """``mul(float(acc), view(alpha))``, or ``add`` of a bias to it."""
    bias = None
    if is_call(node, aten.add.Tensor) and isinstance(arguments(node)[1], fx.Node):
        node, bias = arguments(node)[0], strip(arguments(node)[1], VIEWS)
    if not is_call(node, aten.mul.Tensor) or not is_call(arguments(node)[0], prims.convert_element_type.default):
        return None
    acc = arguments(arguments(node)[0])[0]
    if not is_call(acc, fqt.output_product.default) or (bias is not None and value(bias).dim() != 1):
        return None
    return Dequantized(acc, strip(arguments(node)[1], VIEWS), bias)


def largest_output(acc: fx.Node) -> int:
    """A bound of |acc|: how many products +-1 or 0 one output adds up."""
    _, w_bits, in_channels = arguments(acc)[:3]
    return int(in_channels * math.prod(value(w_bits).shape[1:-2]))
