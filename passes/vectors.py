"""Values per channel that are folded before a program reads them, as BatchNorm's scale and shift."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

from torch import fx

from .call import Call
from .emit import Insertion
from .graph import aten, is_call, position, value

Vector = fx.Node | float | tuple[Any, "Vector", "Vector"]
"""One value per channel: a node, a number, or an operator on two of them. Of bits: a node, or `gather_words` of two."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """``scale base + shift``, not yet a statement; None for 1 and 0."""

    base: str
    scale: Vector | None = None
    shift: Vector | None = None

    def then(self, target: Any, by: Vector) -> Affine:
        if target is aten.mul.Tensor:
            scale = by if self.scale is None else _vector_of(target, self.scale, by)
            return Affine(self.base, scale, None if self.shift is None else _vector_of(target, self.shift, by))
        if target is aten.sub.Tensor and self.shift is None:
            return Affine(self.base, self.scale, _vector_of(aten.mul.Tensor, by, -1.0))
        return Affine(self.base, self.scale, by if self.shift is None else _vector_of(target, self.shift, by))


NUMBERS = {aten.mul.Tensor: operator.mul, aten.add.Tensor: operator.add, aten.sub.Tensor: operator.sub}


def _vector_of(target: Any, a: Vector, b: Vector) -> Vector:
    """``target(a, b)``: a number of two numbers, which no kernel could read as a vector."""
    if isinstance(a, float) and isinstance(b, float):
        return float(NUMBERS[target](a, b))
    return (target, a, b)


def channel_vector(at: Insertion, vector: Vector) -> Any:
    """``[C]`` node (or number) of a channel vector."""
    if isinstance(vector, tuple):
        target, a, b = vector
        return at.call("fold", target, channel_vector(at, a), channel_vector(at, b))
    if isinstance(vector, float) or value(vector).dim() == 1:
        return vector
    return at.call("fold", aten.view.default, vector, [math.prod(value(vector).shape)])


def gathered_bits(at: Insertion, bits: Any) -> fx.Node:
    """Words, those of kept rows gathered once for all programs that read them."""
    if isinstance(bits, fx.Node):
        return bits
    gather, mask, rows = bits
    made = [user for user in mask.users if is_call(user, gather) and Call(user).rows is rows]
    known = next((user for user in made if position(user) < position(at.anchor)), None)
    return known or at.call("gather", gather, mask, rows)
