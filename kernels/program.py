"""Pointwise programs: the arithmetic between two products as a value that every target can run.

A program is a list of statements over operands, each evaluated in float32 exactly as written (no fused
multiply-add), so that the reference and every generated kernel agree bit for bit. As text, which is what a graph
carries:

    full,channel,channel|t0=mul(x0,x1)|t1=sub(t0,x2)|t2=relu(t1)|t3=pool(t2)|t4=add(t3,0.5)

``x0, x1, ...`` are the operands: ``full`` ones have an element for every element of the result, ``channel`` ones a
vector ``[C]``, ``row`` ones a vector ``[N]``, ``map`` ones an image ``[1, C, *S]`` that all rows share, ``bits`` ones a
truth value for every element, packed along channels (packing.py). An argument is an operand, an earlier statement or
a number. ``pool`` is a max-pool over a window given with the call; it occurs at most once, and statements after it
work at the pooled resolution, where only channel operands may be read. The last statement is the result; without
any, the last operand.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from . import packing

FULL, CHANNEL, ROW, MAP, BITS, POOL = "full", "channel", "row", "map", "bits", "pool"
_STATEMENT = re.compile(r"(t\d+)=(\w+)\(([^()]*)\)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kind of statement: its value in PyTorch (the definition) and as an expression of its arguments in C++ and,
    where that reads differently, in Triton."""

    reference: Callable[..., Tensor]
    cpp: str
    triton: str = ""
    is_bool: bool = False


def _relu(a: Tensor) -> Tensor:
    return torch.where(a <= 0, torch.zeros_like(a), a)


def _select(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask, a, b)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a > b) | (a != a), a, b)


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a < b) | (a != a), a, b)


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda a, b: a + b, "{0} + {1}"),
    "sub": Operation(lambda a, b: a - b, "{0} - {1}"),
    "mul": Operation(lambda a, b: a * b, "{0} * {1}"),
    "div": Operation(lambda a, b: a / b, "{0} / {1}", "tl.div_rn({0}, {1})"),
    "neg": Operation(lambda a: -a, "-{0}"),
    "abs": Operation(lambda a: a.abs(), "std::fabs({0})", "tl.abs({0})"),
    "relu": Operation(_relu, "{0} <= 0 ? 0.0f : {0}", "tl.where({0} <= 0, 0.0, {0})"),
    "maximum": Operation(
        _larger, "({0} > {1}) | ({0} != {0}) ? {0} : {1}", "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})"
    ),
    "minimum": Operation(
        _smaller, "({0} < {1}) | ({0} != {0}) ? {0} : {1}", "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})"
    ),
    "where": Operation(_select, "{0} ? {1} : {2}", "tl.where({0}, {1}, {2})"),
    "gt": Operation(lambda a, b: a > b, "{0} > {1}", is_bool=True),
    "ge": Operation(lambda a, b: a >= b, "{0} >= {1}", is_bool=True),
    "lt": Operation(lambda a, b: a < b, "{0} < {1}", is_bool=True),
    "le": Operation(lambda a, b: a <= b, "{0} <= {1}", is_bool=True),
    "bfloat16": Operation(lambda a: a.to(torch.bfloat16).to(torch.float32), "to_bfloat16({0})"),
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """``name = operation(arguments)``."""

    name: str
    operation: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}={self.operation}({','.join(self.arguments)})"


@dataclasses.dataclass(frozen=True)
class Program:
    """operands: ``full``, ``channel``, ``row``, ``map`` or ``bits``, in order; statements in order of evaluation."""

    operands: tuple[str, ...]
    statements: tuple[Statement, ...]

    def __str__(self) -> str:
        return "|".join([",".join(self.operands), *map(str, self.statements)])

    @property
    def before_pool(self) -> tuple[Statement, ...]:
        """Statements at the resolution of the full operands."""
        return self.statements[: self._pool_at]

    @property
    def after_pool(self) -> tuple[Statement, ...]:
        return self.statements[self._pool_at + 1 :]

    @property
    def pool(self) -> Statement | None:
        return self.statements[self._pool_at] if self._pool_at < len(self.statements) else None

    @property
    def before_result(self) -> str:
        """What the statements before the pool, or all of them, lead to."""
        if self.pool is not None:
            return self.pool.arguments[0]
        return self.statements[-1].name if self.statements else f"x{len(self.operands) - 1}"

    @property
    def _pool_at(self) -> int:
        names = [statement.operation for statement in self.statements]
        return names.index(POOL) if POOL in names else len(names)


VALUES, SECOND = "full", "full,full"
"""Programs without statements: the first, or the second operand as it is."""


@functools.cache
def parse(text: str) -> Program:
    """The program of a text; raises `UnsupportedInputError` naming the statement that is wrong."""
    head, *lines = text.split("|")
    operands = tuple(head.split(","))
    known = {f"x{i}" for i in range(len(operands))}
    statements = []
    for line in lines:
        match = _STATEMENT.fullmatch(line)
        if match is None or match[2] not in {*OPERATIONS, POOL}:
            raise UnsupportedInputError(
                f"program: got {line!r}; accepted: tN=operation(a,b) of {', '.join(OPERATIONS)}"
            )
        arguments = tuple(match[3].split(","))
        unknown = [a for a in arguments if a not in known and not _is_number(a)]
        if unknown:
            raise UnsupportedInputError(f"program: {line!r} reads {unknown}; accepted: numbers and {sorted(known)}")
        known.add(match[1])
        statements.append(Statement(match[1], match[2], arguments))
    return Program(operands, tuple(statements))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def evaluate(program: Program, operands: Sequence[Tensor], window: Sequence[int]) -> Tensor:
    """The definition. operands: full ones logical ``[N, C, *S]``, channel ones ``[C]``, row ones ``[N]``, map ones
    ``[1, C, *S]``, bits ones int64 words ``[N, *S, ceil(C/64)]``; float32 result.

    window: ``[kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w]`` of the pool, empty without one.
    """
    full = next(o for o, kind in zip(operands, program.operands, strict=True) if kind == FULL)
    values: dict[str, Tensor] = {}
    for i, (operand, kind) in enumerate(zip(operands, program.operands, strict=True)):
        if kind == BITS:
            values[f"x{i}"] = packing.unpack_rows(operand, full.shape[1])
        else:
            leading = {CHANNEL: (1, -1), ROW: (-1, 1)}.get(kind)
            shaped = operand.view(*leading, *[1] * (full.dim() - 2)) if leading else operand
            values[f"x{i}"] = shaped.to(torch.float32)
    for statement in program.statements:
        arguments = [values[a] if a in values else torch.tensor(float(a)) for a in statement.arguments]
        if statement.operation == POOL:
            result = torch.nn.functional.max_pool2d(
                arguments[0], list(window[:2]), list(window[2:4]), list(window[4:6])
            )
        else:
            result = OPERATIONS[statement.operation].reference(*arguments)
        values[statement.name] = result
    return values[program.statements[-1].name if program.statements else program.before_result]


def cpp_lines(statements: Sequence[Statement]) -> list[str]:
    """The statements as C++ declarations."""
    lines = []
    for statement in statements:
        operation = OPERATIONS[statement.operation]
        arguments = [_cpp_number(a) if _is_number(a) else a for a in statement.arguments]
        kind = "bool" if operation.is_bool else "float"
        lines.append(f"const {kind} {statement.name} = {operation.cpp.format(*arguments)};")
    return lines


def triton_parameters(text: str) -> dict[str, object]:
    """What the Triton template of a program is rendered with: operands, statements and what they read.

    Numbers are blocks of equal values: a constant would be folded by Triton's own rules.
    """
    program = parse(text)
    before, after, pool, first = program.before_pool, program.after_pool, program.pool, program.before_result
    operands = [{"name": f"x{i}", "pointer": f"p{i}", "kind": kind} for i, kind in enumerate(program.operands)]
    return {
        "operands": operands,
        "pointers": ", ".join(f"p{i}" for i in range(len(operands))),
        "before": _triton_lines(before),
        "before_reads": [first, *(a for statement in before for a in statement.arguments)],
        "before_result": first,
        "pooled": pool.name if pool else "",
        "after": _triton_lines(after),
        "after_reads": [a for statement in after for a in statement.arguments],
        "after_result": after[-1].name if after else pool.name if pool else "",
        "rounds": any(statement.operation == "bfloat16" for statement in program.statements),
    }


def _triton_lines(statements: Sequence[Statement]) -> list[str]:
    lines = []
    for statement in statements:
        operation = OPERATIONS[statement.operation]
        arguments = [_triton_number(a) if _is_number(a) else a for a in statement.arguments]
        lines.append(f"{statement.name} = {(operation.triton or operation.cpp).format(*arguments)}")
    return lines


def _triton_number(text: str) -> str:
    value = ctypes.c_float(float(text)).value
    shown = repr(abs(value)) if math.isfinite(value) else f'float("{abs(value)}")'
    sign = "-" if math.copysign(1, value) < 0 else ""  # outside: tl.full makes +0.0 of -0.0
    return f"{sign}tl.full([ROWS, 64], {shown}, tl.float32)"


def _cpp_number(text: str) -> str:
    value = ctypes.c_float(float(text)).value
    if value in (float("inf"), float("-inf")):
        return "-INFINITY" if value < 0 else "INFINITY"
    return f"{value!r}f"
