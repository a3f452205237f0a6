"""Regions of pointwise operators as programs (kernels/program.py): what `fuse` and `fuse_gradients` build on.

A region is a set of pointwise operators of one shape. Scales and shifts per channel in a row, as BatchNorm has them,
are folded into one scale and one shift, vectors as long as there are channels (the result differs by float rounding
only); the rest becomes the statements of a program over the tensors that the region reads.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..kernels.program import BITS, CHANNEL, FULL, MAP, ROW, Program, Statement
from .call import Call
from .emit import Insertion
from .graph import aten, first, is_call, is_tensor, position, prims, site_of, value
from .local import is_channel_vector, is_zero, same
from .refusal import Refusal
from .vectors import Affine, Vector, channel_vector, gathered_bits

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


@dataclasses.dataclass(frozen=True)
class FusedProgram:
    """One region in the graph: for which layer, by which kernel template, its program and the operands' dtypes."""

    site: str
    template: str
    text: str
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(node: fx.Node) -> FusedProgram:
        """Of a call that has operands and program among its arguments."""
        template = str(node.target).split(".")[1]
        dtypes = tuple(value(n).dtype for n in Call(node).operands)
        return FusedProgram(site_of(node), template, Call(node).text, dtypes)


class Region:
    """Pointwise operators of one shape, as statements over full, channel and bits operands."""

    def __init__(self) -> None:
        self.operands: list[tuple[Vector, str]] = []
        self.statements: list[Statement] = []
        self._names: dict[Vector, str] = {}
        self._affine: dict[fx.Node, Affine] = {}

    @property
    def program(self) -> Program:
        return Program(tuple(kind for _, kind in self.operands), tuple(self.statements))

    def arguments(self, at: Insertion) -> list[Any]:
        """The operands as nodes, folded vectors and gathered bits added to the graph."""
        made = {CHANNEL: channel_vector, BITS: gathered_bits}
        return [made[kind](at, operand) if kind in made else operand for operand, kind in self.operands]

    def absorb(
        self, x: fx.Node, is_read_outside: Callable[[fx.Node, list[fx.Node]], bool]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """Operators of the shape of ``x`` down to ``x``, in graph order, and the tensors they read.

        ``is_read_outside(node, absorbed)``: must ``node`` exist in memory, given what the region has below it?
        """
        seen: set[fx.Node] = {x}
        pending = [x]  # in graph order
        absorbed: list[fx.Node] = []
        sources: list[fx.Node] = []
        while pending:
            node = pending.pop()
            if not is_supported(node, x) or is_read_outside(node, absorbed):
                sources.append(node)
                continue
            absorbed.append(node)
            for operand in _full_inputs(node, x):
                if operand not in seen:
                    seen.add(operand)
                    bisect.insort(pending, operand, key=position)
        return absorbed[::-1], sources[::-1]

    def emit(self, absorbed: list[fx.Node], sources: list[fx.Node]) -> None:
        for source in sources:
            if is_call(source, fqt.unpack_bool.default):
                self._names[source] = self._operand(Call(source).words, BITS)
            else:
                self._operand(source, FULL)
        for node in absorbed:
            self._emit_node(node)

    def _operand(self, node: Vector, kind: str) -> str:
        if node not in self._names:
            self._names[node] = f"x{len(self.operands)}"
            self.operands.append((node, kind))
        return self._names[node]

    def _emit_node(self, node: fx.Node) -> None:
        if node.target is fqt.dequantize_grad_input.default:
            self._emit_dequantize(node)
            return
        if node.target in AFFINE and value(node).dtype == torch.float32 and self._extend_affine(node):
            return
        if node.target in CLAMPS:
            self._emit_clamp(node)
            return
        args = [self.argument(a) for a in node.args if not _is_dtype(a)]
        if node.target in PASSED_ON:
            self._names[node] = args[0]
            if value(node).dtype == torch.bfloat16 and value(first(node)).dtype != torch.bfloat16:
                self.state(node, "bfloat16", args)
            return
        self.state(node, NAMES[node.target], args)
        self._round(node)

    def _emit_clamp(self, node: fx.Node) -> None:
        call = Call(node)
        low, high = (call.min_val, call.max_val) if node.target is aten.hardtanh.default else (call.min, call.max)
        result = self.argument(call.self)
        for operation, bound in (("maximum", low), ("minimum", high)):
            if bound is not None:
                result = self.state(node, operation, [result, self.argument(bound)])
        self._round(node)

    def _round(self, node: fx.Node) -> None:
        """Results of bfloat16 operators are rounded to it."""
        if value(node).dtype == torch.bfloat16:
            self.state(node, "bfloat16", [self._names[node]])

    def _emit_dequantize(self, node: fx.Node) -> None:
        """``where(mask, s acc + z weight_sum, 0)`` in the order of reference.dequantize_grad_input."""
        call = Call(node)
        every = keeps_every_row(call.rows)
        set_ = self._operand(call.mask if every else (fqt.gather_words.default, call.mask, call.rows), BITS)
        acc, weight_sum = self._operand(call.acc, FULL), self._operand(call.weight_sum, MAP)
        factors = ((call.scale, acc), (call.zero_point, weight_sum))
        terms = [self.state((node, i), "mul", [self._operand(by, ROW), x]) for i, (by, x) in enumerate(factors)]
        self.state(node, "where", [set_, self.state((node, 2), "add", terms), "0.0"])

    def _extend_affine(self, node: fx.Node) -> bool:
        """Is ``node`` a full value scaled or shifted by a channel vector? Then it is remembered, not stated."""
        left, right = Call(node).self, Call(node).other
        full = has_shape(left, node)
        by = right if full else left
        if full == (isinstance(by, fx.Node) and has_shape(by, node)) or (not full and node.target is aten.sub.Tensor):
            return False
        source = left if full else right
        by = 0.0 if is_zero(by) else by
        base = self._affine.get(source) or Affine(self.argument(source))
        self._affine[node] = base.then(node.target, by if isinstance(by, fx.Node) else float(by))
        return True

    def state(self, node: Any, operation: str, args: list[str]) -> str:
        """Add a statement, which ``node`` names; returns its name."""
        name = f"t{len(self.statements)}"
        self.statements.append(Statement(name, operation, tuple(args)))
        self._names[node] = name
        return name

    def says(self, x: fx.Node) -> bool:
        """Is ``x`` the result of the last statement?"""
        return bool(self.statements) and self.argument(x) == self.statements[-1].name

    def argument(self, argument: Any) -> str:
        if not isinstance(argument, fx.Node):
            return repr(float(argument))
        if argument in self._affine and argument not in self._names:
            affine = self._affine[argument]
            self._names[argument] = affine.base
            for operation, by in (("mul", affine.scale), ("add", affine.shift)):
                if by is not None:
                    other = repr(by) if isinstance(by, float) else self._operand(by, CHANNEL)
                    self.state(argument, operation, [self._names[argument], other])
        if argument in self._names:
            return self._names[argument]
        return "0.0" if is_zero(argument) else self._operand(argument, CHANNEL)


def unreadable(sources: list[fx.Node]) -> Refusal:
    """Why `are_readable` says no."""
    dtypes = sorted({str(value(s).dtype) for s in sources if value(s).dtype not in SOURCES})
    return Refusal(f"reads tensors of {', '.join(dtypes)}")


def are_readable(sources: list[fx.Node], bits: bool = False) -> bool:
    """Can programs read these tensors? A mask of type bool they can only compute or, with ``bits``, read as bits."""
    return all(
        value(source).dtype in SOURCES or (bits and is_call(source, fqt.unpack_bool.default)) for source in sources
    )


def _is_dtype(argument: Any) -> bool:
    return isinstance(argument, torch.dtype)


def has_shape(node: Any, x: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != value(x).dim():
        return False
    return all(same(a, b) for a, b in zip(value(node).shape, value(x).shape, strict=True))


def keeps_every_row(rows: fx.Node) -> bool:
    """Are these rows of `select` all there are, in order?"""
    return is_call(rows, operator.getitem) and Call(Call(rows).source).prune == "none"


def _is_dequantized_by_row(node: fx.Node) -> bool:
    """Row k of a packed grad_input made from row k of its integers: only kept rows, or nothing was pruned."""
    if not is_call(node, fqt.dequantize_grad_input.default):
        return False
    return Call(node).compact or keeps_every_row(Call(node).rows)


def _full_inputs(node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """What ``node`` reads element by element."""
    if is_call(node, fqt.dequantize_grad_input.default):
        return [Call(node).acc]
    return [n for n in node.all_input_nodes if has_shape(n, x)]


def is_supported(node: fx.Node, x: fx.Node) -> bool:
    """Can ``node`` be a statement of a program whose results have the shape of ``x``?"""
    if _is_dequantized_by_row(node):
        return has_shape(node, x) and not isinstance(value(x).shape[1], torch.SymInt)
    if node.op != "call_function" or node.kwargs or not is_tensor(node) or value(node).dtype not in RESULTS:
        return False
    if node.target not in NAMES and node.target not in PASSED_ON and node.target not in CLAMPS:
        return False
    if not has_shape(node, x) or value(x).dim() < 2 or isinstance(value(x).shape[1], torch.SymInt):
        return False
    if node.target in PASSED_ON and (value(node).dtype == torch.bool) != (value(first(node)).dtype == torch.bool):
        return False  # a cast to or from bool changes values
    return all(
        _is_number(a)
        or _is_dtype(a)
        or is_zero(a)
        or is_channel_vector(a, x)
        or (isinstance(a, fx.Node) and has_shape(a, x) and value(a).dtype in (*SOURCES, torch.bool))
        for a in node.args
    )


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float) and not isinstance(argument, bool)
