"""Fusion: the arithmetic between a product and the packing of the next layer becomes one pass to bits.

    acc -> alpha acc -> BatchNorm -> ReLU (-> max-pool) -> threshold, pack        many float tensors in memory
    acc -> fused_activation(S acc + T, ReLU)                                      none, unless others read them

For every packed activation x the pass walks up from x and collects the pointwise operators that only x needs, up to
tensors that exist anyway: an integer product, a float layer's output, a residual. Scales and shifts per channel in
a row, as BatchNorm has them, are folded into one scale S and one shift T, vectors as long as there are channels
(the result differs by float rounding only). What is left becomes a program
(kernels/program.py), which every target renders into its kernel. x itself is written only if a float operation
(a residual, a layer left in float) reads it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx

from ..kernels.packing import INT16_LIMIT
from ..kernels.program import CHANNEL, FULL, POOL, Program, Statement
from .graph import Emitter, Insertion, arguments, aten, is_backward, is_call, is_tensor, prims, provenance, value
from .local import is_channel_vector, is_zero, live_nodes, same
from .moments import largest_output

fqt = torch.ops.fqt
NAMES: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.relu.default: "relu",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
    aten.where.self: "where",
    aten.gt.Scalar: "gt",
    aten.ge.Scalar: "ge",
    aten.lt.Scalar: "lt",
    aten.le.Scalar: "le",
}
AFFINE = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor})
PASSED_ON = frozenset({aten.alias.default, prims.convert_element_type.default})
CLAMPS = frozenset({aten.hardtanh.default, aten.clamp.default})
SOURCES = (torch.float32, torch.bfloat16, torch.int16, torch.int32)
RESULTS = (torch.float32, torch.bfloat16, torch.bool)
MAX_FULL_OPERANDS = 4


@dataclasses.dataclass(frozen=True)
class FusedActivation:
    """One fused activation: the layer whose input it is, its program, and the dtypes of the program's operands."""

    site: str
    text: str
    dtypes: tuple[torch.dtype, ...]


def fuse_activations(graph: fx.Graph) -> list[FusedActivation]:
    """Fuse what can be fused."""
    emitter = Emitter(graph, "fuse")
    fused: list[tuple[str, fx.Node]] = []
    for pack in list(graph.nodes):
        if is_call(pack, fqt.pack_activation.default) and not is_backward(pack):
            region = _Region(graph, arguments(pack)[0], live_nodes(graph))
            if region.statements:
                made = provenance(pack)
                site = made.site if made else "step"
                fused.append((site, _replace(emitter, pack, region, site)))
    graph.eliminate_dead_code()
    _narrow_products(graph)
    return [
        FusedActivation(site, arguments(node)[1], tuple(value(n).dtype for n in arguments(node)[0]))
        for site, node in fused
    ]


Vector = fx.Node | float | tuple[Any, "Vector", "Vector"]
"""One value per channel: a node, a number, or an operator on two of them."""


@dataclasses.dataclass(frozen=True)
class _Affine:
    """``scale base + shift``, not yet a statement; None for 1 and 0."""

    base: str
    scale: Vector | None = None
    shift: Vector | None = None

    def then(self, target: Any, by: Vector) -> _Affine:
        if target is aten.mul.Tensor:
            scale = by if self.scale is None else _vector_of(target, self.scale, by)
            return _Affine(self.base, scale, None if self.shift is None else _vector_of(target, self.shift, by))
        if target is aten.sub.Tensor and self.shift is None:
            return _Affine(self.base, self.scale, _vector_of(aten.mul.Tensor, by, -1.0))
        return _Affine(self.base, self.scale, by if self.shift is None else _vector_of(target, self.shift, by))


NUMBERS = {aten.mul.Tensor: operator.mul, aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}


def _vector_of(target: Any, a: Vector, b: Vector) -> Vector:
    """``target(a, b)``: a number of two numbers, which no kernel could read as a vector."""
    if isinstance(a, float) and isinstance(b, float):
        return float(NUMBERS[target](a, b))
    return (target, a, b)


class _Region:
    """The operators that only the activation ``x`` needs, as program statements over full and channel operands."""

    def __init__(self, graph: fx.Graph, x: fx.Node, live: set[fx.Node]) -> None:
        self.graph, self.live = graph, live
        self.operands: list[tuple[Vector, str]] = []
        self.statements: list[Statement] = []
        self.window: list[int] = []
        self._names: dict[Vector, str] = {}
        self._affine: dict[fx.Node, _Affine] = {}
        absorbed, sources = self._absorb(x)
        if len(sources) == 1 and self._max_pool(sources[0], absorbed, x):
            pooled = sources[0]
            pool = arguments(pooled)[0]
            inner, sources = self._absorb(arguments(pool)[0], only_for=pool)
            if not _are_readable(sources):
                return
            self._emit(inner, sources)
            _, kernel, stride, padding, *_ = arguments(pool)
            self.window = [*kernel, *stride, *padding]
            self._state(pooled, POOL, [self._argument(arguments(pool)[0])])
            sources = []
        full = len(sources) + sum(kind == FULL for _, kind in self.operands)
        if full <= MAX_FULL_OPERANDS and _are_readable(sources):
            self._emit(absorbed, sources)
            if self.statements and self._argument(x) == self.statements[-1].name:
                return
        self.statements.clear()  # not all of x can be said: nothing is fused

    @property
    def program(self) -> Program:
        return Program(tuple(kind for _, kind in self.operands), tuple(self.statements))

    def _absorb(self, x: fx.Node, only_for: fx.Node | None = None) -> tuple[list[fx.Node], list[fx.Node]]:
        """Operators of the shape of ``x`` that nothing outside reads, in graph order, and the tensors they read."""
        wanted, absorbed = {x}, []
        for node in reversed(self.graph.nodes):
            if node not in wanted:
                continue
            outside = [u for u in self._forward_users(node) if u not in absorbed and u is not only_for]
            if _supported(node, x) and not (outside and (node is not x or only_for)):
                absorbed.append(node)
                wanted.update(n for n in node.all_input_nodes if _has_shape(n, x))
        absorbed.reverse()
        return absorbed, [n for n in self.graph.nodes if n in wanted and n not in absorbed]

    def _forward_users(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if u in self.live and not is_backward(u)]

    def _max_pool(self, node: fx.Node, absorbed: list[fx.Node], x: fx.Node) -> bool:
        """Is ``node`` the values of a plain 2-D max-pool that nothing outside the region reads?"""
        if not is_call(node, operator.getitem) or arguments(node)[1] != 0:
            return False
        pool = arguments(node)[0]
        if not is_call(pool, prims._low_memory_max_pool_with_offsets.default):
            return False
        source, _, _, _, dilation, ceil_mode = arguments(pool)
        plain = not ceil_mode and all(d == 1 for d in dilation) and value(source).dim() == 4
        others = [u for u in self._forward_users(pool) if u is not node]
        outside = [] if node is x else [u for u in self._forward_users(node) if u not in absorbed]
        return plain and not others and not outside and value(source).dtype in SOURCES

    def _emit(self, absorbed: list[fx.Node], sources: list[fx.Node]) -> None:
        for source in sources:
            self._operand(source, FULL)
        for node in absorbed:
            self._emit_node(node)

    def _operand(self, node: Vector, kind: str) -> str:
        if node not in self._names:
            self._names[node] = f"x{len(self.operands)}"
            self.operands.append((node, kind))
        return self._names[node]

    def _emit_node(self, node: fx.Node) -> None:
        if node.target in AFFINE and value(node).dtype == torch.float32 and self._extend_affine(node):
            return
        args = [self._argument(a) for a in arguments(node)[: 3 if node.target in CLAMPS else None] if not _is_dtype(a)]
        if node.target in PASSED_ON:
            self._names[node] = args[0]
            if value(node).dtype == torch.bfloat16 and value(arguments(node)[0]).dtype != torch.bfloat16:
                self._state(node, "bfloat16", args)
            return
        if node.target in CLAMPS:
            low, high = ([*args[1:], "-1.0", "1.0"])[:2] if node.target is aten.hardtanh.default else args[1:3]
            self._state(node, "maximum", [args[0], low])
            self._state(node, "minimum", [self._names[node], high])
        else:
            self._state(node, NAMES[node.target], args)
        if value(node).dtype == torch.bfloat16:
            self._state(node, "bfloat16", [self._names[node]])

    def _extend_affine(self, node: fx.Node) -> bool:
        """Is ``node`` a full value scaled or shifted by a channel vector? Then it is remembered, not stated."""
        first, second = arguments(node)[:2]
        full = _has_shape(first, node)
        by = second if full else first
        if full == (isinstance(by, fx.Node) and _has_shape(by, node)) or (not full and node.target is aten.sub.Tensor):
            return False
        source = first if full else second
        base = self._affine.get(source) or _Affine(self._argument(source))
        self._affine[node] = base.then(node.target, by if isinstance(by, fx.Node) else float(by))
        return True

    def _state(self, node: Vector, operation: str, args: list[str]) -> None:
        name = f"t{len(self.statements)}"
        self.statements.append(Statement(name, operation, tuple(args)))
        self._names[node] = name

    def _argument(self, argument: Any) -> str:
        if not isinstance(argument, fx.Node):
            return repr(float(argument))
        if argument in self._affine and argument not in self._names:
            affine = self._affine[argument]
            self._names[argument] = affine.base
            for operation, by in (("mul", affine.scale), ("add", affine.shift)):
                if by is not None:
                    other = repr(by) if isinstance(by, float) else self._operand(by, CHANNEL)
                    self._state(argument, operation, [self._names[argument], other])
        if argument in self._names:
            return self._names[argument]
        return "0.0" if is_zero(argument) else self._operand(argument, CHANNEL)


def _are_readable(sources: list[fx.Node]) -> bool:
    """Can programs read these tensors? (A mask of type bool they can only compute.)"""
    return all(value(source).dtype in SOURCES for source in sources)


def _is_dtype(argument: Any) -> bool:
    return isinstance(argument, torch.dtype)


def _has_shape(node: Any, x: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != value(x).dim():
        return False
    return all(same(a, b) for a, b in zip(value(node).shape, value(x).shape, strict=True))


def _supported(node: fx.Node, x: fx.Node) -> bool:
    """Can ``node`` be a statement of a program whose results have the shape of ``x``?"""
    if node.op != "call_function" or node.kwargs or not is_tensor(node) or value(node).dtype not in RESULTS:
        return False
    if node.target not in NAMES and node.target not in PASSED_ON and node.target not in CLAMPS:
        return False
    if not _has_shape(node, x) or isinstance(value(x).shape[1], torch.SymInt):
        return False
    if node.target in PASSED_ON and (value(node).dtype == torch.bool) != (
        value(arguments(node)[0]).dtype == torch.bool
    ):
        return False  # a cast to or from bool changes values
    return all(
        _is_number(a)
        or _is_dtype(a)
        or is_zero(a)
        or is_channel_vector(a, x)
        or (isinstance(a, fx.Node) and _has_shape(a, x) and value(a).dtype in (*SOURCES, torch.bool))
        for a in arguments(node)
    )


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float) and not isinstance(argument, bool)


# -- putting it into the graph ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Readers:
    """Who reads an activation besides its packing."""

    masks: list[fx.Node]
    others: list[fx.Node]


def _readers(x: fx.Node, live: set[fx.Node]) -> _Readers:
    readers = _Readers([], [])
    for user in x.users:
        if (
            user not in live
            or is_backward(user)
            or user.target
            in (
                fqt.activation_threshold.default,
                fqt.pack_activation.default,
            )
        ):
            continue
        masks = _negative_masks(user, live)
        if masks is None:
            readers.others.append(user)
        else:
            readers.masks += masks
    return readers


def _negative_masks(user: fx.Node, live: set[fx.Node]) -> list[fx.Node] | None:
    """The ``pack_bool(x <= 0)`` that ``user`` leads to, if it leads to nothing else."""
    users = [u for u in user.users if u in live]
    if user.target is aten.alias.default:
        found = [_negative_masks(u, live) for u in users]
        return None if any(f is None for f in found) else [mask for f in found for mask in f or []]
    if user.target is aten.le.Scalar and arguments(user)[1] == 0:
        return users if all(is_call(u, fqt.pack_bool.default) for u in users) else None
    return None


def _replace(emitter: Emitter, pack: fx.Node, region: _Region, site: str) -> fx.Node:
    x, threshold, *after = arguments(pack)
    readers = _readers(x, region.live)
    order = {node: i for i, node in enumerate(emitter.graph.nodes)}
    anchor = min((*readers.masks, *readers.others, pack), key=order.__getitem__)
    anchor = min((u for u in (anchor, *readers.others)), key=order.__getitem__)
    if after and order[after[0]] > order[anchor]:
        anchor.prepend(after[0])  # the seed depends on nothing
    at = emitter.at(anchor, site)
    code = "sign" if threshold is None else "threshold"
    operands = [_vector(at, operand) if kind == CHANNEL else operand for operand, kind in region.operands]
    keep = (bool(readers.others), bool(readers.masks))
    args = (operands, str(region.program), code, region.window, *keep, *after)
    bits, mask, values, below = at.call("fused", fqt.fused_activation.default, *args)
    for item in list(pack.users):
        replacement = (bits, mask)[arguments(item)[1]]
        replacement.meta.update({k: item.meta[k] for k in ("recompute",) if k in item.meta})
        item.replace_all_uses_with(replacement)
    for words in readers.masks:
        below.meta["recompute"] = words.meta.get("recompute")
        words.replace_all_uses_with(below)
    if readers.others:
        kept = at.cast("fused", values, value(x).dtype)
        x.replace_all_uses_with(kept, delete_user_cb=lambda user: user in readers.others)
    fused: fx.Node = arguments(bits)[0]
    return fused


def _vector(at: Insertion, vector: Vector) -> Any:
    """``[C]`` node (or number) of a channel vector."""
    if isinstance(vector, tuple):
        target, a, b = vector
        return at.call("fold", target, _vector(at, a), _vector(at, b))
    if isinstance(vector, float) or value(vector).dim() == 1:
        return vector
    return at.call("fold", aten.view.default, vector, [math.prod(value(vector).shape)])


def fuse_weight_gradients(graph: fx.Graph) -> int:
    """``weight_gradient(dequantize_grad_weight(grad_weight_product))`` of all output channels as one operation.

    The integers and the gradient of alpha sign(W) then never leave the cache. Returns how many were fused.
    """
    emitter = Emitter(graph, "fuse")
    fused = 0
    for node in list(graph.nodes):
        if not is_call(node, fqt.weight_gradient.default):
            continue
        grad_hat, weight, alpha, mode = arguments(node)
        if not is_call(grad_hat, fqt.dequantize_grad_weight.default) or arguments(grad_hat)[4] is not None:
            continue
        acc, _, scale, zero_point, *_ = arguments(grad_hat)
        product = arguments(acc)[0]
        lanes, x_bits, rows, _, _, code, size, _, stride, padding = arguments(product)
        at = emitter.at(node, provenance(node).site)  # type: ignore[union-attr]
        args = (lanes, x_bits, rows, scale, zero_point, weight, alpha, mode, code, size, stride, padding)
        node.replace_all_uses_with(at.call("grad_weight", fqt.grad_weight.default, *args))
        fused += 1
    graph.eliminate_dead_code()
    return fused


def _narrow_products(graph: fx.Graph) -> None:
    """int16 for outputs that only integer-reading operations see."""
    live = live_nodes(graph)
    readers = (fqt.fused_activation.default, fqt.channel_moments.default)
    for node in graph.nodes:
        if not is_call(node, fqt.output_product.default) or largest_output(node) > INT16_LIMIT:
            continue
        users = [u for u in node.users if u in live]
        if users and all(u.target in readers for u in users):
            node.args = (*node.args[:7], True)
            node.meta["val"] = value(node).to(torch.int16)
