"""After the first step of a compiled model: layers that ran in no captured graph are announced.

A backend is called for the graphs that Dynamo captures. Where it captures none (an LSTM in ``forward``, hooks of
FSDP2), it runs the model as it is, in float, and no backend hears of it. So the module that `torch.compile` returns
looks once, after its first call, whether there was a graph.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from .data_parallel import is_ours, unwrapped
from .status import record_of


def watch_first_steps() -> None:
    """Let modules that are compiled for a backend of this package look after their first step; again does nothing."""
    build: Any = OptimizedModule.__init__
    if getattr(build, "__module__", None) == __name__:
        return

    @functools.wraps(build)
    def __init__(self: Any, mod: nn.Module, dynamo_ctx: Any) -> None:
        build(self, mod, dynamo_ctx)
        if is_ours(dynamo_ctx.callback):
            _watch(self)

    __init__.__module__ = __name__
    OptimizedModule.__init__ = __init__  # type: ignore[method-assign]


def _watch(compiled: nn.Module) -> None:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        model = unwrapped(module)
        record = record_of(model)
        if not record.graphs:
            record.announce(
                [
                    f"fqt1bit: torch.compile captured no graph of {type(model).__name__}: all of it runs in float. "
                    "Remedy: TORCH_LOGS=graph_breaks says why; compile its blocks one by one, "
                    'block.compile(backend="fqt1bit")'
                ]
            )

    handle = compiled.register_forward_hook(look)
