"""Graphs inside DistributedDataParallel reach this package's backends whole.

Inside DDP, Dynamo cuts a graph where DDP's buckets end, so that the gradients of one piece travel while those of the
next are computed. But what a layer computes depends on what is around it: whether it is the first or the last one,
whether its input is non-negative, which BatchNorm gives its threshold, where rows are chosen for all layers at once. In
pieces, a model would have other layers in bits, and other bits, than without DDP, and than in an evaluation, which
needs no DDP.

Dynamo has one switch for this, ``torch._dynamo.config.optimize_ddp``, of the whole process: it would also take the
overlap from models that other backends compile. So only what cuts the graph is told to leave ours as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._dynamo.backends.distributed import DDPOptimizer

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
        if _is_ours(self.backend_compile_fn):
            return self.backend_compile_fn(gm, example_inputs, **settings)
        return cut(self, gm, example_inputs, **settings)

    compile_fn.__module__ = __name__
    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def _is_ours(backend: Any) -> bool:
    inner = backend
    while inner is not None:
        backend = inner
        inner = next((getattr(backend, name) for name in WRAPPED if hasattr(backend, name)), None)
    return str(getattr(backend, "__module__", "")).partition(".")[0] == PACKAGE
