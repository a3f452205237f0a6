"""Matching: find every convolution and linear layer with its forward and backward nodes. Mutates nothing.

Facts about a joint ATen graph this relies on (torch 2.14): ``aten.convolution`` and
``aten.convolution_backward`` stay whole; a linear layer is ``addmm`` or ``mm`` over the transposed weight,
its backward two ``mm`` around transposes and a ``sum``. Which backward nodes are a layer's own: `claims`.

A site's operands are what its own nodes read. Rewriting a neighbour replaces such an operand, and with it the
argument of the node that reads it: whoever rewrites calls `Site.reread` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from .graph import CASTS, TRANSPOSES, VIEWS, arguments, aten, is_backward, provenance, strip, value
from .threshold import BatchNormThreshold

LINEAR = frozenset({aten.addmm.default, aten.mm.default})


@dataclasses.dataclass(eq=False)
class Site:
    """One use of a convolution or linear layer.

    ``weight`` is the parameter itself (casts stripped), ``[C_o, C_i, *kernel]``, or ``[C_i, C_o]`` where
    ``weight_is_transposed`` (a plain ``x @ W``). ``grad_*`` are None where the graph does not compute them.
    ``input_side``: which operand of a linear layer's ``grad_weight`` product is the input: 1 in g^T x, 0 in x^T g.
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
    input_side: int = 1
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
        """True if the graph computes a gradient of this layer."""
        return any(grad is not None for grad in (self.grad_input, self.grad_weight, self.grad_bias))

    def reread(self) -> None:
        """Take the operands from the layer's own nodes again: those of neighbours may have been replaced."""
        self.x, self.weight, self.bias = _operands(self.output)
        if self.trained:
            self.grad_output = _gradient(self)


def match(graph: fx.Graph, names: Sequence[str | None]) -> list[Site]:
    """All sites in forward order. ``names[i]`` is the module path of Dynamo input i, if it is a parameter."""
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
    return sites


def _match_forward(node: fx.Node, index: int) -> Site | None:
    if node.target is aten.convolution.default:
        return _match_convolution(node, index)
    if node.target in LINEAR:
        return _match_linear(node, index)
    return None


def _match_convolution(node: fx.Node, index: int) -> Site:
    x, weight, bias = _operands(node)
    stride, padding, dilation, transposed, _, groups = arguments(node)[3:]
    spatial = value(weight).dim() - 2
    return Site(
        index=index,
        name="",
        kind=f"conv{'_transpose' if transposed else ''}{spatial}d",
        output=node,
        x=x,
        weight=weight,
        bias=bias,
        stride=_per_axis(stride, spatial),
        padding=_per_axis(padding, spatial),
        dilation=_per_axis(dilation, spatial),
        transposed=transposed,
        groups=groups,
    )


def _per_axis(sizes: Sequence[int], spatial: int) -> tuple[int, ...]:
    """One entry for each axis, where ATen accepts one for all (``padding="valid"`` is [0])."""
    return tuple(sizes) * spatial if len(sizes) == 1 else tuple(sizes)


def _match_linear(node: fx.Node, index: int) -> Site | None:
    """A matrix product whose right operand is a graph input (a parameter), transposed or not."""
    x, weight, bias = _operands(node)
    if weight.op != "placeholder" or value(weight).dim() != 2:
        return None
    site = Site(
        index=index,
        name="",
        kind="linear",
        output=node,
        x=x,
        weight=weight,
        bias=bias,
        weight_is_transposed=_through_casts(arguments(node)[-1]) is weight,
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


# -- operands ------------------------------------------------------------------------------------------------


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Input, weight and bias of a layer's forward node."""
    if node.target is aten.convolution.default:
        x, weight, bias = arguments(node)[:3]
    else:
        *first, x, weight = arguments(node)
        bias = first[0] if first else None
        plain = _through_casts(weight)
        weight = arguments(plain)[0] if plain.op == "call_function" and plain.target in TRANSPOSES else plain
    return _through_casts(x), _through_casts(weight), None if bias is None else _through_casts(bias)


def _gradient(site: Site) -> fx.Node:
    """The gradient of a trained site's output, as one of its own backward nodes reads it."""
    if site.kind != "linear":
        assert site.backward is not None
        return _first(site.backward)
    if site.grad_input is not None:
        return _first(site.grad_input)
    if site.grad_weight is None:
        assert site.grad_bias is not None
        return _first(site.grad_bias)
    g: fx.Node = arguments(site.grad_weight)[1 - site.input_side]
    return _through(g, CASTS | TRANSPOSES) if site.input_side == 1 else g


def _first(node: fx.Node) -> fx.Node:
    first: fx.Node = arguments(node)[0]
    return first


def _through_casts(node: fx.Node) -> fx.Node:
    return _through(node, CASTS)


def _through(node: fx.Node, targets: Collection[object]) -> fx.Node:
    """Like `strip`, but a cast made by a pass stays: it rounds a replaced value where the model did."""
    while node.op == "call_function" and node.target in targets and provenance(node) is None:
        node = _first(node)
    return node
