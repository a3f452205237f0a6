"""nn.TransformerEncoder and nn.MultiheadAttention in evaluation, in the form that training has.

In ``eval()`` without gradients PyTorch's forward calls one fused operator with all weights, in which no pass finds a
layer: what is packed in training would run in float in evaluation, and the outputs would differ by half of their
range. Whether it may do so it asks `torch.backends.mha`; the answer is no while a graph is traced for us. As in
`cumulative`, Dynamo reads this, and nothing else does: without a compiler, and compiled by Inductor, the fused operator
runs as ever.
"""

from __future__ import annotations

from typing import Any

import torch

from .cumulative import INLINED
from .data_parallel import tracing

_is_enabled = torch.backends.mha.get_fastpath_enabled


def keep_attention_visible() -> None:
    """Let Dynamo trace the layers of attention instead of its fused operator; again does nothing."""
    if not hasattr(_is_enabled, INLINED):
        setattr(_is_enabled, INLINED, _is_enabled_while_traced)


@torch.compiler.assume_constant_result
def _is_enabled_while_traced() -> bool:
    traced: Any = tracing()
    is_inductor = traced is None or getattr(traced.output.compiler_fn, "compiler_name", None) == "inductor"
    return bool(torch.backends.mha._is_fastpath_enabled) and is_inductor
