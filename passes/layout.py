"""NHWC operands: every tensor a packed operation reads is asked for in the memory order its kernel works in.

The operations are tagged ``needs_fixed_stride_order``: Inductor produces an operand in the stride order of its
fake value. Those values were traced before the rewrite, in the memory format of the user's model. Here they get
NHWC strides, so that the fused kernel in front writes NHWC directly instead of a copy being made after it.
"""

from __future__ import annotations

import torch
from torch import fx

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
            with fake_mode:
                fake = value(operand)
                operand.meta["val"] = fake.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_image(node: fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.is_floating_point() and fake.dim() > 2
