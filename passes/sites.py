"""Matching: find every convolution and linear layer with its forward and backward nodes. Mutates nothing.

Facts about a joint ATen graph this relies on (torch 2.14): ``aten.convolution`` and
``aten.convolution_backward`` stay whole; a linear layer is ``addmm`` or ``mm`` over the transposed weight,
its backward two ``mm`` around transposes and a ``sum``. Forward and backward nodes are paired structurally
(same input, same weight), through dtype casts; ``seq_nr`` only breaks ties, as when a weight is used twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .graph import CASTS, TRANSPOSES, VIEWS, arguments, aten, is_backward, is_call, root, strip, strip_casts, value
from .threshold import BatchNormThreshold

LINEAR = frozenset({aten.addmm.default, aten.mm.default})


@dataclasses.dataclass(eq=False)
class Site:
    """One use of a convolution or linear layer.

    ``weight`` is the parameter itself (casts stripped), ``[C_o, C_i, *kernel]``, or ``[C_i, C_o]`` where
    ``weight_is_transposed`` (a plain ``x @ W``). ``grad_*`` are None where the graph does not compute them.
    ``rows_are_tokens``: a linear layer over more than one leading axis, whose rows attention may mix.
    ``decision``, ``reason``, ``activation``, ``threshold`` (``channel``, ``sample`` or ``batch``; None for the sign
    code) and ``batch_norm`` (what a threshold per channel is made from) are filled by later passes.
    """

    index: int
    name: str
    kind: str
    output: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    weight_is_transposed: bool = False
    rows_are_tokens: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1
    backward: fx.Node | None = None
    grad_output: fx.Node | None = None
    grad_input: fx.Node | None = None
    grad_weight: fx.Node | None = None
    grad_bias: fx.Node | None = None
    refusal: str | None = None
    decision: str = "float"
    reason: str = ""
    activation: str | None = None
    activation_reason: str = ""
    threshold: str | None = None
    batch_norm: BatchNormThreshold | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[C_o, C_i, *kernel]``."""
        shape = tuple(value(self.weight).shape)
        return shape[::-1] if self.weight_is_transposed else shape

    @property
    def in_channels(self) -> int:
        return self.weight_shape[0 if self.transposed else 1]

    @property
    def out_channels(self) -> int:
        return self.weight_shape[1 if self.transposed else 0]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def packed(self) -> bool:
        return self.decision == "packed"

    @property
    def trained(self) -> bool:
        """True if the graph computes a gradient that the backward rewrite replaces."""
        return self.grad_input is not None or self.grad_weight is not None


def match(graph: fx.Graph, names: Sequence[str | None]) -> list[Site]:
    """All sites in forward order. ``names[i]`` is the module path of Dynamo input i, if it is a parameter."""
    backward = [n for n in graph.nodes if n.op == "call_function" and is_backward(n)]
    sites: list[Site] = []
    seen: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_backward(node):
            continue
        site = _match_forward(node, len(sites))
        if site is None:
            continue
        name = _site_name(site, names)
        seen[name] = seen.get(name, 0) + 1
        site.name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        sites.append(site)
    taken: set[fx.Node] = set()
    for site in sites:
        _match_backward(site, backward, taken)
    return sites


def _match_forward(node: fx.Node, index: int) -> Site | None:
    if node.target is aten.convolution.default:
        return _match_convolution(node, index)
    if node.target in LINEAR:
        return _match_linear(node, index)
    return None


def _match_convolution(node: fx.Node, index: int) -> Site:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
    spatial = len(stride)
    return Site(
        index=index,
        name="",
        kind=f"conv{'_transpose' if transposed else ''}{spatial}d",
        output=node,
        x=strip_casts(x),
        weight=strip_casts(weight),
        bias=bias if bias is None else strip_casts(bias),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        transposed=transposed,
        groups=groups,
    )


def _match_linear(node: fx.Node, index: int) -> Site | None:
    """A matrix product whose right operand is a graph input (a parameter), transposed or not."""
    *bias, x, operand = arguments(node)
    plain = strip_casts(operand)
    transposed = plain.op == "call_function" and plain.target in TRANSPOSES
    weight = strip_casts(arguments(plain)[0]) if transposed else plain
    if weight.op != "placeholder" or value(weight).dim() != 2:
        return None
    site = Site(
        index=index,
        name="",
        kind="linear",
        output=node,
        x=strip_casts(x),
        weight=weight,
        bias=strip_casts(bias[0]) if bias else None,
        weight_is_transposed=not transposed,
        rows_are_tokens=_rows_are_tokens(x),
    )
    if node.kwargs:
        site.refusal = f"addmm with {dict(node.kwargs)}: only a plain x @ W + bias is a linear layer"
    elif site.bias is not None and value(site.bias).dim() != 1:
        site.refusal = f"bias of shape {tuple(value(site.bias).shape)}: only one value per output channel is supported"
    return site


def _rows_are_tokens(x: fx.Node) -> bool:
    """Was the 2-D operand made by flattening several leading axes (and not by flattening features)?"""
    before = strip(x, CASTS | VIEWS)
    shape, flat = value(before).shape, value(x).shape
    return len(shape) > 2 and _same(shape[-1], flat[-1])


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


def _site_name(site: Site, names: Sequence[str | None]) -> str:
    desc = site.weight.meta.get("desc")
    position = getattr(desc, "idx", None)
    if position is not None and position < len(names) and names[position]:
        return str(names[position])
    stack = site.output.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else site.weight.name


# -- backward ------------------------------------------------------------------------------------------------


def _match_backward(site: Site, backward: list[fx.Node], taken: set[fx.Node]) -> None:
    if site.output.target is aten.convolution.default:
        _match_convolution_backward(site, backward, taken)
    else:
        _match_linear_backward(site, backward, taken)


def _choose(site: Site, candidates: list[fx.Node], taken: set[fx.Node]) -> fx.Node | None:
    """The one candidate; the forward node's ``seq_nr`` breaks ties. Records a refusal if it cannot."""
    free = [n for n in candidates if n not in taken]
    if len(free) > 1:
        free = [n for n in free if n.meta.get("seq_nr") == site.output.meta.get("seq_nr")]
        if len(free) != 1:
            site.refusal = f"{len(candidates)} backward nodes fit this layer and none can be told apart"
            return None
    if not free:
        return None
    taken.add(free[0])
    return free[0]


def _match_convolution_backward(site: Site, backward: list[fx.Node], taken: set[fx.Node]) -> None:
    x, weight = arguments(site.output)[0], arguments(site.output)[1]
    fits = [
        n
        for n in backward
        if is_call(n, aten.convolution_backward.default)
        and strip_casts(arguments(n)[1]) is strip_casts(x)
        and strip_casts(arguments(n)[2]) is strip_casts(weight)
    ]
    node = _choose(site, fits, taken)
    if node is None:
        return
    site.backward, site.grad_output = node, arguments(node)[0]
    for item in node.users:
        if item.users:
            setattr(site, ("grad_input", "grad_weight", "grad_bias")[arguments(item)[1]], item)


def _match_linear_backward(site: Site, backward: list[fx.Node], taken: set[fx.Node]) -> None:
    x, weight = arguments(site.output)[-2], site.weight
    products = [n for n in backward if n.target is aten.mm.default]
    to_input = [n for n in products if root(arguments(n)[1]) is weight and _fits(n, value(site.x))]
    site.grad_input = _choose(site, to_input, taken)
    to_weight = [n for n in products if _weight_operand(n, x) is not None]
    if site.grad_input is not None:
        same = root(arguments(site.grad_input)[0])
        to_weight = [n for n in to_weight if root(arguments(n)[1 - _weight_operand(n, x)]) is same] or to_weight  # type: ignore[operator]
    site.grad_weight = _choose(site, to_weight, taken)
    if site.grad_input is not None:
        site.grad_output = arguments(site.grad_input)[0]
    elif site.grad_weight is not None:
        side = _weight_operand(site.grad_weight, x)
        assert side is not None
        other = arguments(site.grad_weight)[1 - side]
        # grad_weight = g^T x (side 1) or x^T g (side 0): g itself is under the transpose only in the first.
        site.grad_output = strip(other, CASTS | TRANSPOSES) if side == 1 else other
    if site.grad_output is not None and site.bias is not None:
        site.grad_bias = _bias_sum(site, backward)
    site.backward = _earliest(site, backward)


def _fits(node: fx.Node, x: torch.Tensor) -> bool:
    return _same(value(node).shape[-1], x.shape[-1])


def _weight_operand(node: fx.Node, x: fx.Node) -> int | None:
    """Which operand of a backward ``mm`` is the layer's input: 1 in g^T x, 0 in x^T g."""
    target = strip(x, CASTS | VIEWS)
    if strip(arguments(node)[1], CASTS | VIEWS) is target:
        return 1
    left = strip_casts(arguments(node)[0])
    if left.op == "call_function" and left.target in TRANSPOSES and strip(arguments(left)[0], CASTS | VIEWS) is target:
        return 0
    return None


def _bias_sum(site: Site, backward: list[fx.Node]) -> fx.Node | None:
    """The ``sum`` over rows of this site's gradient."""
    assert site.grad_output is not None
    g = strip_casts(site.grad_output)
    sums = [
        n
        for n in backward
        if is_call(n, aten.sum.dim_IntList) and strip_casts(arguments(n)[0]) is g and list(arguments(n)[1]) == [0]
    ]
    return sums[0] if len(sums) == 1 else None


def _earliest(site: Site, backward: list[fx.Node]) -> fx.Node | None:
    """The site's first backward node in graph order: where its replacement is inserted."""
    own = {site.grad_input, site.grad_weight, site.grad_bias} - {None}
    return next((n for n in backward if n in own), None)
