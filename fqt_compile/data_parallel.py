"""Models in several processes: graphs inside DistributedDataParallel stay whole, blocks that FSDP2 hides are announced.

Inside DDP, Dynamo cuts a graph where DDP's buckets end, so that the gradients of one piece travel while those of the
next are computed. But what a layer computes depends on what is around it: whether it is the first or the last one,
whether its input is non-negative, which BatchNorm gives its threshold, where rows are chosen for all layers at once. In
pieces, a model would have other layers in bits, and other bits, than without DDP, and than in an evaluation, which
needs no DDP.

Dynamo has one switch for this, ``torch._dynamo.config.optimize_ddp``, of the whole process: it would also take the
overlap from models that other backends compile. So only what cuts the graph is told to leave ours as they are.

FSDP2 (``fully_shard``) hangs hooks on a module that Dynamo does not trace. Compiled from outside, a sharded module is
called as it is, and Dynamo goes on in its ``forward``, but not in one of torch.nn, as nn.Sequential has: its layers
would silently run in float.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.nn.parallel import DistributedDataParallel

from .errors import FQTWarning

PACKAGE = __name__.partition(".")[0]
WRAPPED = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
"""Where Dynamo, torch.compile, functools.partial and functools.wraps keep the backend that they wrap."""


def keep_graphs_whole() -> None:
    """Let graphs inside DDP reach the backends of this package whole; again does nothing."""
    cut: Any = DDPOptimizer.compile_fn
    if getattr(cut, "__module__", None) == __name__:
        return

    @functools.wraps(cut)
    def compile_fn(self: Any, gm: Any, example_inputs: Any, **settings: Any) -> Any:
        if is_ours(self.backend_compile_fn):
            return self.backend_compile_fn(gm, example_inputs, **settings)
        return cut(self, gm, example_inputs, **settings)

    compile_fn.__module__ = __name__
    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def is_ours(backend: Any) -> bool:
    """Is this, inside of its wrappers, a backend of this package?"""
    inner = backend
    while inner is not None:
        backend = inner
        inner = next((getattr(backend, name) for name in WRAPPED if hasattr(backend, name)), None)
    return str(getattr(backend, "__module__", "")).partition(".")[0] == PACKAGE


def tracing() -> InstructionTranslator | None:
    """Dynamo at work, if it calls us."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # in this thread it was never at work
        return None


def unwrapped(model: Any) -> Any:
    """The module inside of the wrappers of torch.compile and DDP, whichever is outside."""
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def announce_hidden_blocks() -> None:
    """Called by a backend: warn of the sharded blocks inside the module being traced that Dynamo does not enter."""
    traced: Any = tracing()
    model = traced.output.root_tx.f_locals.get("self") if traced else None
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    names = [name for name, module in modules if name and _is_hidden(module)]
    if names:
        warnings.warn(
            f"fqt1bit: {type(model).__name__} has sharded blocks that Dynamo does not enter: {', '.join(names)}. "
            "Their layers run in float. Remedy: compile each of them, block.forward = torch.compile(block.forward, "
            'backend="fqt1bit"), or shard the model as a whole only, fully_shard(model)',
            FQTWarning,
            stacklevel=2,
        )


def _is_hidden(module: nn.Module) -> bool:
    """Sharded by FSDP2, with a ``forward`` of torch.nn, that nobody has compiled."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    is_torchs = type(module).forward.__module__.startswith("torch.nn.")
    return isinstance(module, FSDPModule) and is_torchs and "forward" not in vars(module)
