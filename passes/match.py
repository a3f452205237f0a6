"""Matching: find every convolution and linear layer with its forward and backward nodes. Mutates nothing.

Facts about a joint ATen graph this relies on (torch 2.14): ``aten.convolution`` and
``aten.convolution_backward`` stay whole; a linear layer is ``addmm`` or ``mm`` over the transposed weight,
its backward two ``mm`` around transposes and a ``sum``. Which backward nodes are a layer's own: `claims`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import fx, nn

from .call import Call
from .claims import claim, claimed_once
from .graph import CASTS, VIEWS, aten, is_backward, strip, tag_backward, value
from .names import Names
from .sites import Site, factors, operands, through_casts
from .state import State, graph_pass

LINEAR = frozenset({aten.addmm.default, aten.mm.default})


@graph_pass(requires=("graph",), ensures="sites", check=lambda state: claimed_once(state.sites))
def match(state: State) -> None:
    """Find all sites, in forward order, and the backward nodes of each."""
    tag_backward(state.graph)
    state.sites = _sites(state.graph, state.names)
    claim(state.graph, state.sites)


def _sites(graph: fx.Graph, names: Names) -> list[Site]:
    """All sites in forward order."""
    sites: list[Site] = []
    seen: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        site = _match_forward(node, len(sites), names)
        if site is None:
            continue
        name, site.aliases = names.of(site.output, site.weight)
        seen[name] = seen.get(name, 0) + 1
        site.name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        sites.append(site)
    return sites


def _match_forward(node: fx.Node, index: int, names: Names) -> Site | None:
    if node.target is aten.convolution.default:
        return _match_convolution(node, index)
    if node.target in LINEAR:
        return _match_linear(node, index, names)
    return None


def _match_convolution(node: fx.Node, index: int) -> Site:
    x, weight, bias = operands(node)
    call = Call(node)
    spatial = value(weight).dim() - 2
    return Site(
        index=index,
        name="",
        kind=f"conv{'_transpose' if call.transposed else ''}{spatial}d",
        output=node,
        x=x,
        weight=weight,
        bias=bias,
        stride=_per_axis(call.stride, spatial),
        padding=_per_axis(call.padding, spatial),
        dilation=_per_axis(call.dilation, spatial),
        transposed=call.transposed,
        groups=call.groups,
    )


def _per_axis(sizes: Sequence[int], spatial: int) -> tuple[int, ...]:
    """One entry for each axis, where ATen accepts one for all (``padding="valid"`` is [0])."""
    return tuple(sizes) * spatial if len(sizes) == 1 else tuple(sizes)


def _match_linear(node: fx.Node, index: int, names: Names) -> Site | None:
    """A matrix product whose right operand is a parameter, transposed or not, or that a linear layer computes."""
    x, weight, bias = operands(node)
    if value(weight).dim() != 2 or not (names.is_parameter(weight) or _is_linear_call(node)):
        return None
    site = Site(
        index=index,
        name="",
        kind="linear",
        output=node,
        x=x,
        weight=weight,
        bias=bias,
        weight_is_transposed=through_casts(factors(node)[1]) is weight,
        rows_are_tokens=_rows_are_tokens(x),
    )
    if node.kwargs:
        site.refusal = f"addmm with {dict(node.kwargs)}: only a plain x @ W + bias is a linear layer"
    elif site.bias is not None and value(site.bias).dim() != 1:
        site.refusal = f"bias of shape {tuple(value(site.bias).shape)}: only one value per output channel is supported"
    return site


def _is_linear_call(node: fx.Node) -> bool:
    """Does the model call a linear layer here? Its weight may be computed (weight_norm, masks, merged adapters)."""
    calls = node.meta.get("source_fn_stack") or [(None, None)]
    called = calls[-1][1]
    return called is F.linear or (isinstance(called, type) and issubclass(called, nn.Linear))


def _rows_are_tokens(x: fx.Node) -> bool:
    """Was the 2-D operand made by flattening several leading axes (and not by flattening features)?"""
    before = strip(x, CASTS | VIEWS)
    shape, flat = value(before).shape, value(x).shape
    return len(shape) > 2 and isinstance(flat[-1], int) and isinstance(shape[-1], int) and shape[-1] == flat[-1]
