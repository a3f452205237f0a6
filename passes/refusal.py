"""Why something is left as it is: the answer of a matcher that found less than what a pass rewrites."""

from __future__ import annotations

import dataclasses
import re

from torch import fx

from .graph import site_of


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a matcher returns in place of its match."""

    reason: str


@dataclasses.dataclass(frozen=True)
class NotOptimized:
    """A refusal as the user reads it: in which layer, which pass left something as it is, and why."""

    layer: str
    step: str
    reason: str


def layer_of(node: fx.Node) -> str:
    """The layer that a node was made for by a pass, or the module that computes it."""
    if site_of(node) != "step":
        return site_of(node)
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path) or "(model)"


def name_of(node: fx.Node) -> str:
    """What makes a value, in a reason: its operator, or that it is an input."""
    return "an input of the graph" if node.op == "placeholder" else str(node.target).removesuffix(".default")
