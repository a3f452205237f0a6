"""Activation codes: ``threshold`` where an input is provably non-negative, ``sign`` elsewhere.

The sign of a ReLU output says nothing (it is +1 everywhere), which is why unmodified networks need a second
code. The proof is a walk up the graph with one rule per operator; what no rule covers is not proven. In a part of a
model (graph breaks, blocks compiled one by one) what comes from the other parts may be a ReLU's output: if it had no
negative value when the graph was captured, the code is ``threshold``, since ``sign`` would see nothing of such a one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..config import FQTConfig
from . import batch_norm, threshold
from .call import Call
from .graph import CASTS, TRANSPOSES, VIEWS, aten, first, is_tensor, prims, value
from .sites import Site
from .state import State, graph_pass

Proof = Callable[["NonNegativity", fx.Node], bool]

ALWAYS = {
    aten.relu.default,
    aten.sigmoid.default,
    aten._softmax.default,
    aten.abs.default,
    aten.exp.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.hardsigmoid.default,
    aten.rand.default,
    aten.rand_like.default,
}
FIRST_ARGUMENT = {
    *CASTS,
    *TRANSPOSES,
    *VIEWS,
    aten.expand.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.avg_pool2d.default,
    aten.avg_pool1d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.max_pool2d_with_indices.default,
    aten.native_dropout.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    prims._low_memory_max_pool_with_offsets.default,
    aten.amax.default,
    aten.alias.default,
    aten.detach.default,
}
EVERY_ARGUMENT = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.minimum.default,
    aten.add.Scalar,
    aten.mul.Scalar,
}
COMPARISONS = {aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar}


class NonNegativity:
    """Answers whether a node's value is provably >= 0, remembering what it has proven.

    ``given``: the graph inputs that are taken to be.
    """

    def __init__(self, given: Collection[fx.Node] = ()) -> None:
        self._known: dict[fx.Node, bool] = dict.fromkeys(given, True)

    def __call__(self, item: Any) -> bool:
        if isinstance(item, bool | int | float):
            return item >= 0
        if not isinstance(item, fx.Node):
            return False
        if item not in self._known:
            self._known[item] = item.op == "call_function" and self._prove(item)
        return self._known[item]

    def _prove(self, node: fx.Node) -> bool:
        if isinstance(node.meta.get("val"), torch.Tensor) and value(node).dtype == torch.bool:
            return True
        if node.target in ALWAYS or node.target in COMPARISONS:
            return True
        if node.target in FIRST_ARGUMENT:
            return self(first(node))
        if node.target in EVERY_ARGUMENT:
            return all(self(arg) for arg in node.args) and all(self(arg) for arg in node.kwargs.values())
        rule = RULES.get(node.target)
        return rule is not None and rule(self, node)


def _any_of_two(proven: NonNegativity, node: fx.Node) -> bool:
    return any(proven(arg) for arg in node.args)


def _square(proven: NonNegativity, node: fx.Node) -> bool:
    call = Call(node)
    return (isinstance(call.exponent, int | float) and call.exponent % 2 == 0) or proven(call.self)


def _hardtanh(proven: NonNegativity, node: fx.Node) -> bool:
    return proven(Call(node).min_val)


def _clamp(proven: NonNegativity, node: fx.Node) -> bool:
    call = Call(node)
    return (proven(call.min) or proven(call.self)) and (call.max is None or proven(call.max))


RULES: dict[Any, Proof] = {
    operator.getitem: lambda proven, node: Call(node).index == 0 and proven(Call(node).source),
    aten.clamp_min.default: _any_of_two,
    aten.maximum.default: _any_of_two,
    aten.clamp_max.default: lambda proven, node: proven(Call(node).self) and proven(Call(node).max),
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.pow.Tensor_Scalar: _square,
    aten.cat.default: lambda proven, node: all(proven(part) for part in Call(node).tensors),
    aten.where.self: lambda proven, node: proven(Call(node).self) and proven(Call(node).other),
    aten.constant_pad_nd.default: lambda proven, node: proven(Call(node).self) and proven(Call(node).value),
    aten.full.default: lambda proven, node: proven(Call(node).fill_value),
}


def _without_code(state: State) -> str | None:
    missing = [s.name for s in state.packed if s.activation is None]
    return f"packed sites without an activation code: {missing}" if missing else None


@graph_pass(requires=("decisions",), ensures="codes", check=_without_code)
def activation(state: State) -> None:
    """Choose the activation code of every packed site."""
    proven, possible = NonNegativity(), NonNegativity(_from_outside(state))
    for site in state.candidates(state.packed):
        _choose(site, state.config, proven, proven if site.name == state.names.first else possible)


def _from_outside(state: State) -> list[fx.Node]:
    """Inputs of a part of a model that another part may have made non-negative: no negative value was seen."""
    if state.names.first is None:
        return []
    inputs = [node for node in state.graph.nodes if node.op == "placeholder" and is_tensor(node)]
    known = (state.names.is_parameter, state.names.is_signed)
    return [n for n in inputs if value(n).is_floating_point() and not any(is_known(n) for is_known in known)]


def _choose(site: Site, config: FQTConfig, proven: NonNegativity, possible: NonNegativity) -> None:
    """Set the activation code of a packed site, where its threshold comes from, and why."""
    site.activation, site.activation_reason = choose_code(site.x, config.activation, proven, possible)
    site.is_blind = site.activation == "sign" and proven(site.x)
    if site.is_blind:
        site.activation_reason += f", but its input is non-negative ({_origin(site.x)}): all bits are +1"
    if site.activation == "threshold":
        site.batch_norm = threshold.from_batch_norm(site.x) if config.threshold == "auto" else None
        site.threshold = (
            "channel" if site.batch_norm is not None else "batch" if config.threshold == "batch" else "sample"
        )
        site.activation_reason += f"; {THRESHOLDS[site.threshold]}"


THRESHOLDS = {
    "channel": "threshold of each channel from the BatchNorm before",
    "sample": "threshold: mean of each sample",
    "batch": "threshold: mean of the batch (threshold='batch')",
}


def choose_code(x: fx.Node, setting: str, proven: NonNegativity, possible: NonNegativity) -> tuple[str, str]:
    """The activation code of a site with input ``x``, and why."""
    if setting != "auto":
        return setting, f"asked for by activation={setting!r}"
    if proven(x):
        return "threshold", f"input is non-negative ({_origin(x)})"
    if possible(x):
        return "threshold", f"input is non-negative if another graph of the model made it so ({_origin(x)})"
    return "sign", f"input may be negative ({_origin(x)})"


def _origin(x: fx.Node) -> str:
    """The operator an input comes from, looking through views and casts."""
    while x.op == "call_function" and (x.target in FIRST_ARGUMENT or x.target is operator.getitem):
        if batch_norm.output_of(x) is not None:
            return "batch_norm"
        x = first(x)
    return "graph input" if x.op == "placeholder" else str(x.target).replace("aten.", "").split(".")[0]
