"""NHWC operands: every tensor a packed operation reads is asked for in the memory order its kernel works in.

The operations are tagged ``needs_fixed_stride_order``: Inductor produces an operand in the stride order of its
fake value. Those values were traced before the rewrite, in the memory format of the user's model. Here they get
NHWC strides, so that the fused kernel in front writes NHWC directly instead of a copy being made after it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .emit import fresh
from .graph import fake_mode_of, value
from .state import State, graph_pass


@graph_pass(requires=("shared operands",), ensures="NHWC operands")
def layout(state: State) -> None:
    """Give image-shaped operands of ``fqt`` operations NHWC strides."""
    fake_mode = fake_mode_of(state.graph)
    for node in state.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", None) != "fqt":
            continue
        for operand in node.all_input_nodes:
            # Inputs of the graph arrive as they are; integers are packed layouts and products, NHWC already.
            if operand.op == "placeholder" or not _is_image(operand):
                continue
            operand.meta["val"] = _nhwc(fake_mode, value(operand))


def _nhwc(fake_mode: Any, fake: torch.Tensor) -> torch.Tensor:
    """A fake tensor like ``fake`` in NHWC memory."""
    if not all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        with fake_mode:
            return fake.movedim(1, -1).contiguous().movedim(-1, 1)
    channels, inner = fake.shape[1], math.prod(fake.shape[2:])
    spatial = [channels * math.prod(fake.shape[axis + 1 :]) for axis in range(2, fake.dim())]
    return fresh(fake_mode, fake, [channels * inner, 1, *spatial])


def _is_image(node: fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.is_floating_point() and fake.dim() > 2
