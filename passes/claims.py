"""Which backward nodes are a layer's own: by proof, or not at all.

Autograd numbers the nodes of its graph, and AOTAutograd writes that number (``seq_nr``) on everything a node computes,
forward and backward. A layer's product in the forward is the first thing recorded with its number; what records no
node (frozen operands, ``no_grad``) carries the number of the node before it. A backward node is a site's own if

1. it has the number of the site's forward product,
2. it is a product of the site's weight or input with a gradient of the output's shape (or the sum of that gradient),
3. it is the only such one, and all of the site's own nodes read the same gradient.

A backward node that has the site's number and reads its operands but fits none of this leaves the gradient unproven,
and so does a product without a number where nothing is proven: the site stays in float with the reason.
Layers that share weights, inputs, gradients and shapes differ in their number.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .call import Call
from .graph import CASTS, TRANSPOSES, VIEWS, aten, first, is_backward, is_call, is_tensor, position, root, strip, value
from .local import same
from .sites import Site, factors

PRODUCTS = frozenset({aten.mm.default, aten.convolution_backward.default})
SAME_VALUES = CASTS | {aten.alias.default}
MOVES = (
    CASTS
    | TRANSPOSES
    | VIEWS
    | {aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default}
)
"""Operators whose result is their first operand in another shape."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A backward node that fits a site: what it computes, and from which gradient."""

    role: str
    node: fx.Node
    product: fx.Node
    """What computes ``node``: itself, or the convolution_backward that ``node`` is one result of."""
    gradient: fx.Node
    input_side: int = 1


def claim(graph: fx.Graph, sites: Sequence[Site]) -> None:
    """Fill the gradients of every site whose backward nodes are proven to be its own; refuse what is not proven."""
    numbered: dict[Any, list[fx.Node]] = defaultdict(list)
    first: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and is_backward(node):
            numbered[_number(node)].append(node)
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt):
            first.setdefault(_number(node), node)
    taken: set[fx.Node] = set()
    for site in sites:
        number = _number(site.output)
        free = [node for node in numbered[number] if node not in taken] if number is not None else []
        problem = _claim(site, free, first[number] is site.output, taken)
        if problem is None and not site.trained:
            everything = [node for nodes in numbered.values() for node in nodes]
            problem = _unnumbered(site, everything if number is None else numbered[None])
        site.refusal = site.refusal or problem


def claimed_once(sites: Sequence[Site]) -> str | None:
    """What breaks the rule that every backward node belongs to one site at most; None if nothing does."""
    claimed = [n for s in sites for n in (s.grad_input, s.grad_weight, s.grad_bias) if n is not None]
    twice = [node.name for node, count in Counter(claimed).items() if count > 1]
    return f"backward nodes claimed by several layers: {twice}" if twice else None


def _number(node: fx.Node) -> Any:
    return node.meta.get("seq_nr")


def _unnumbered(site: Site, nodes: Sequence[fx.Node]) -> str | None:
    """Products whose number does not say whether they are the site's (in the backward of a custom Function)."""
    fitting = [node.name for node in nodes if node.target in PRODUCTS and _claims(site, node)]
    return f"its gradient cannot be told from others: no autograd number on {fitting}" if fitting else None


def _claim(site: Site, nodes: Sequence[fx.Node], owner: bool, taken: set[fx.Node]) -> str | None:
    """Give ``site`` what it owns of ``nodes``, all of its number. Returns why nothing can be claimed, if so.

    owner: the number is the site's, and not that of an earlier operator after which the site records no node.
    """
    claims = [fitting for node in nodes for fitting in _claims(site, node)]
    products = {c.product for c in claims}
    if not owner:
        names = [n.name for n in products if n.target in PRODUCTS]
        return f"its gradient is part of a larger operator's: {names}" if names else None
    others = [n for n in nodes if n not in products and n.target not in MOVES and is_tensor(n)]
    unknown = [n.name for n in others if _reads_operands(site, n)]
    if unknown:
        return f"its gradient is computed in a way that is not known: {unknown}"
    roles = Counter(c.role for c in claims)
    if any(count > 1 for count in roles.values()) or len({root(c.gradient) for c in claims}) > 1:
        return f"{len(claims)} backward nodes fit this layer and none can be told apart"
    for fitting in claims:
        setattr(site, fitting.role, fitting.node)
        taken |= {fitting.node, fitting.product}
        if fitting.role == "grad_weight":
            site.input_side = fitting.input_side
    if claims:
        site.backward = min(products, key=position)
        site.reread()
    return None


def _reads_operands(site: Site, node: fx.Node) -> bool:
    operands = {strip(site.x, MOVES), strip(site.weight, MOVES)}
    return any(strip(n, MOVES) in operands for n in node.all_input_nodes)


# -- what fits a site ----------------------------------------------------------------------------------------


def _claims(site: Site, node: fx.Node) -> list[Claim]:
    """What ``node`` computes of the site's gradients, going by its operands."""
    if site.kind != "linear":
        return _convolution_claims(site, node)
    if is_call(node, aten.mm.default):
        fitting = _input_claim(site, node) or _weight_claim(site, node)
        return [fitting] if fitting is not None else []
    return _bias_claims(site, node)


def _convolution_claims(site: Site, node: fx.Node) -> list[Claim]:
    if not is_call(node, aten.convolution_backward.default):
        return []
    call = Call(node)
    operands = ((call.input, site.x), (call.weight, site.weight))
    g = call.grad_output
    if not all(strip(a, SAME_VALUES) is strip(b, SAME_VALUES) for a, b in operands) or not _has_shape(g, site.output):
        return []
    roles = ("grad_input", "grad_weight", "grad_bias")
    return [Claim(roles[Call(item).index], item, node, g) for item in node.users if item.users]


def _input_claim(site: Site, node: fx.Node) -> Claim | None:
    """``g @ W``, with the weight turned the other way than in the forward."""
    g = Call(node).self
    turns = _turns(Call(node).mat2, site.weight)
    if turns is None or turns == _turns(factors(site.output)[1], site.weight) or not _has_shape(g, site.output):
        return None
    return Claim("grad_input", node, node, g)


def _weight_claim(site: Site, node: fx.Node) -> Claim | None:
    """``g^T x``, as autograd writes it for a transposed weight, or ``x^T g``."""
    x, left, right = factors(site.output)[0], Call(node).self, Call(node).mat2
    start = strip(x, CASTS | VIEWS)
    fitting = {}
    if _turns(right, start) == 0 and _has_shape(right, x) and _has_shape(left, site.output, turned=True):
        fitting[1] = Claim("grad_weight", node, node, left, 1)
    if _turns(left, start) == 1 and _has_shape(left, x, turned=True) and _has_shape(right, site.output):
        fitting[0] = Claim("grad_weight", node, node, right, 0)
    # Both fit if the gradient is the input itself.
    usual = 0 if site.weight_is_transposed else 1
    return fitting.get(usual, fitting.get(1 - usual))


def _bias_claims(site: Site, node: fx.Node) -> list[Claim]:
    """The ``sum`` over rows."""
    if site.bias is None or not is_call(node, aten.sum.dim_IntList) or list(Call(node).dim) != [0]:
        return []
    g = Call(node).self
    return [Claim("grad_bias", node, node, g)] if _has_shape(g, site.output) else []


def _turns(node: fx.Node, start: fx.Node) -> int | None:
    """How often ``start`` is transposed on the way to ``node``, modulo 2; None if it does not lead there."""
    turns = 0
    while node is not start:
        if node.op != "call_function" or node.target not in CASTS | TRANSPOSES | VIEWS:
            return None
        turns ^= node.target in TRANSPOSES
        node = first(node)
    return turns


def _has_shape(node: fx.Node, like: fx.Node, turned: bool = False) -> bool:
    shape, wanted = value(node).shape, value(like).shape
    wanted = wanted[::-1] if turned else wanted
    return len(shape) == len(wanted) and all(same(a, b) for a, b in zip(shape, wanted, strict=True))
