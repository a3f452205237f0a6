"""A site: one use of a convolution or linear layer, with its nodes of the forward and of the backward.

A site's operands are what its own nodes read. Rewriting a neighbour replaces such an operand, and with it the
argument of the node that reads it: whoever rewrites calls `Site.reread` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import fx

from .call import Call
from .graph import CASTS, TRANSPOSES, aten, first, provenance, value


@dataclasses.dataclass(frozen=True)
class BatchNormThreshold:
    """The arguments of `reference.batch_norm_threshold`; weight and bias are graph inputs, or None for 1 and 0."""

    weight: fx.Node | None
    bias: fx.Node | None
    channels: int
    window: int
    top: float
    repeat: int


@dataclasses.dataclass(eq=False)
class Site:
    """One use of a convolution or linear layer.

    ``weight`` is the parameter itself (casts stripped), ``[C_o, C_i, *kernel]``, or ``[C_i, C_o]`` where
    ``weight_is_transposed`` (a plain ``x @ W``). ``grad_*`` are None where the graph does not compute them.
    ``input_side``: which operand of a linear layer's ``grad_weight`` product is the input: 1 in g^T x, 0 in x^T g.
    ``rows_are_tokens``: a linear layer over more than one leading axis, whose rows attention may mix.
    ``aliases``: other names of its weight, where several layers share it.
    ``decision``, ``reason``, ``activation``, ``threshold`` (``channel``, ``sample`` or ``batch``; None for the sign
    code), ``batch_norm`` (what a threshold per channel is made from) and ``is_blind`` (the sign code of an input that
    is never negative: all bits are +1) are filled by later passes.
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
    aliases: tuple[str, ...] = ()
    decision: str = "float"
    reason: str = ""
    activation: str | None = None
    activation_reason: str = ""
    threshold: str | None = None
    batch_norm: BatchNormThreshold | None = None
    is_blind: bool = False

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
        self.x, self.weight, self.bias = operands(self.output)
        if self.trained:
            self.grad_output = _gradient(self)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Input, weight and bias of a layer's forward node."""
    call = Call(node)
    if node.target is aten.convolution.default:
        x, weight, bias = call.input, call.weight, call.bias
    else:
        x, weight, bias = factors(node)
        plain = through_casts(weight)
        weight = first(plain) if plain.op == "call_function" and plain.target in TRANSPOSES else plain
    return through_casts(x), through_casts(weight), None if bias is None else through_casts(bias)


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Both factors of a linear layer's product as they stand in the graph, and what is added."""
    call = Call(node)
    return (call.mat1, call.mat2, call.self) if node.target is aten.addmm.default else (call.self, call.mat2, None)


def _gradient(site: Site) -> fx.Node:
    """The gradient of a trained site's output, as one of its own backward nodes reads it."""
    if site.kind != "linear":
        assert site.backward is not None
        return _node(Call(site.backward).grad_output)
    if site.grad_input is not None:
        return _node(Call(site.grad_input).self)
    if site.grad_weight is None:
        assert site.grad_bias is not None
        return _node(Call(site.grad_bias).self)
    product = Call(site.grad_weight)
    return _node(product.mat2) if site.input_side == 0 else _through(product.self, CASTS | TRANSPOSES)


def _node(operand: fx.Node) -> fx.Node:
    """Says the type of an operand."""
    return operand


def through_casts(node: fx.Node) -> fx.Node:
    return _through(node, CASTS)


def _through(node: fx.Node, targets: Collection[object]) -> fx.Node:
    """Like `strip`, but a cast made by a pass stays: it rounds a replaced value where the model did."""
    while node.op == "call_function" and node.target in targets and provenance(node) is None:
        node = first(node)
    return node
