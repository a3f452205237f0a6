"""Where the threshold of a packed activation comes from: parameters of a BatchNorm, or the mean of each sample.

The bits of a non-negative activation are ``x > t``. A ``t`` taken over the batch would let neighbours move a
prediction. Behind BatchNorm and ReLU the mean of every channel is known from BatchNorm's parameters
(reference.batch_norm_threshold): no data is read for it, and it is the same in training and in evaluation. The walk
from an activation up to such a BatchNorm passes max-pools, means over positions and dropout; what it cannot pass
(sums of two branches, other norms, other activations) gets the mean of each sample.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from torch import fx

from . import batch_norm
from .call import Call
from .graph import CASTS, VIEWS, aten, first, is_call, prims, strip, value
from .local import same
from .sites import BatchNormThreshold

MEANS = frozenset({aten.mean.dim, aten.avg_pool2d.default, aten.avg_pool1d.default, aten._adaptive_avg_pool2d.default})
MAX_POOLS = frozenset({prims._low_memory_max_pool_with_offsets.default, aten.max_pool2d_with_indices.default})
PASSED = CASTS | {aten.alias.default, aten.clone.default, aten.detach.default}


@dataclasses.dataclass
class _Walk:
    """What lies between an activation and the node that the walk has come to."""

    node: fx.Node
    window: int = 1
    top: float = math.inf
    repeat: int = 1
    rectified: bool = False

    def step(self) -> bool:
        """Go on to what the node is made from; False where that says nothing of the mean."""
        node, target = self.node, self.node.target
        if node.op != "call_function":
            return False
        source = first(node)
        if target in PASSED:
            self.node = source
        elif target in VIEWS:
            return self._flatten(node, source)
        elif is_call(node, operator.getitem) and source.target in MAX_POOLS and Call(node).index == 0:
            self.window *= math.prod(Call(source).kernel_size)
            self.node = Call(source).self
        elif target in MEANS:
            # The mean of a mean is the same; but not the mean of what is rectified, or the largest, of means.
            positions_only = target is not aten.mean.dim or all(a % value(source).dim() > 1 for a in Call(node).dim)
            self.node = source
            return positions_only and not self.rectified and self.window == 1
        elif target is aten.mul.Tensor:
            return self._dropout(node)
        else:
            return self._rectifier(node)
        return True

    def _flatten(self, node: fx.Node, source: fx.Node) -> bool:
        """A view of ``[N, C, *S]`` as ``[N, C * prod(S)]``, or as the same shape."""
        shape, before = tuple(value(node).shape), tuple(value(source).shape)
        self.node = source
        if len(shape) == len(before) and all(map(same, shape, before)):
            return True
        inner = math.prod(before[2:])
        if len(before) < 2 or isinstance(inner, torch.SymInt) or shape[2:] or not same(shape[0], before[0]):
            return False
        self.repeat *= inner
        return same(shape[1], before[1] * inner) and self.window == 1

    def _rectifier(self, node: fx.Node) -> bool:
        call, target = Call(node), node.target
        low: object = 0.0
        high: object = None
        if target is aten.hardtanh.default:
            low, high = call.min_val, call.max_val
        elif target is aten.clamp.default:
            low, high = call.min, call.max
        elif target is aten.clamp_min.default:
            low = call.min
        elif target is not aten.relu.default:
            return False
        if low != 0 or not (high is None or isinstance(high, int | float)):
            return False
        self.top = self.top if high is None else min(self.top, float(high))
        self.rectified = True
        self.node = call.self
        return True

    def _dropout(self, node: fx.Node) -> bool:
        """``(rand > p) * x * 1 / (1 - p)``, in whichever order: the mean of x."""
        inner, scale = Call(node).self, Call(node).other
        if not isinstance(scale, float) or not is_call(inner, aten.mul.Tensor):
            return False
        factors = (Call(inner).self, Call(inner).other)
        for mask, x in (factors, factors[::-1]):
            kept = strip(mask, CASTS) if isinstance(mask, fx.Node) else None
            if kept is not None and is_call(kept, aten.gt.Scalar) and is_call(Call(kept).self, aten.rand.default):
                self.node = x
                return bool(abs(scale * (1 - Call(kept).other) - 1) < 1e-6)
        return False


def from_batch_norm(x: fx.Node) -> BatchNormThreshold | None:
    """The threshold of ``x`` by the BatchNorm before it, if there is one."""
    walk = _Walk(x)
    while batch_norm.output_of(walk.node) is None:
        if not walk.step() or not isinstance(walk.node, fx.Node):
            return None
    norm = batch_norm.output_of(walk.node)
    assert norm is not None
    if not walk.rectified or batch_norm.is_instance_norm(norm):
        return None
    source, weight, bias = Call(norm).input, Call(norm).weight, Call(norm).bias
    channels = value(source).shape[1]
    known = all(p is None or p.op == "placeholder" for p in (weight, bias))
    if not known or not isinstance(channels, int) or not same(value(source).shape[0], value(x).shape[0]):
        return None
    return BatchNormThreshold(weight, bias, channels, walk.window, walk.top, walk.repeat)
