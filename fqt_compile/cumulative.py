"""BatchNorm with ``momentum=None`` in a form that Dynamo can trace, so that a model stays one graph.

PyTorch's forward reads the number of batches into Python (``1.0 / float(num_batches_tracked)``), at which Dynamo
breaks the graph; inside a container such as ``nn.Sequential`` it gives up the whole model. With
``capture_scalar_outputs`` or ``fullgraph=True`` it stops at the same factor, a number it cannot guard on. A backend
sees nothing of this: it gets the pieces, or is never called, and the layers silently run in float.

So this has to happen before Dynamo traces, which is when `fqt_compile.backend` is imported: ``torch.compile(model,
backend="fqt1bit")`` does that by itself. Dynamo inlines ``function._torchdynamo_inline``, where there is one, in place
of ``function``. Nothing but tracing reads that attribute: classes, modules, state dicts and what runs without a
compiler are untouched. It concerns every backend of the process: they also get one graph instead of a break.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

INLINED = "_torchdynamo_inline"


def make_traceable() -> None:
    """Let Dynamo trace BatchNorm1d, 2d and 3d and SyncBatchNorm with ``momentum=None``; again does nothing.

    Subclasses that take over forward or call it are included. SyncBatchNorm is where it has nothing to synchronize.
    Outputs and gradients are the same. The running statistics are the same cumulative average, up to rounding:
    ``running += (batch - running) / n``, in float32 or wider, with n on the device.
    """
    for cls, traced in TRACED.items():
        forward: Any = cls.forward
        if isinstance(forward, types.FunctionType) and not hasattr(forward, INLINED):  # else somebody else's: leave it
            setattr(forward, INLINED, traced)


def _copy(forward: Any) -> Callable[[Any, Tensor], Tensor]:
    """``forward`` without its attributes: called from what Dynamo inlines, the original would lead back there."""
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    return copied


# Functions of the module, without closure or defaults: Dynamo would look for those at the original, for its guards.
_plain = _copy(_BatchNorm.forward)
_plain_sync = _copy(nn.SyncBatchNorm.forward)


def _forward(self: Any, input: Tensor) -> Tensor:
    return _cumulative(self, input) if _averages(self) else _plain(self, input)


def _forward_sync(self: Any, input: Tensor) -> Tensor:
    return _cumulative(self, input) if _averages(self) and not _in_group() else _plain_sync(self, input)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _averages(norm: Any) -> bool:
    """Does this forward read the number of batches?"""
    if norm.momentum is not None or not norm.training or not norm.track_running_stats:
        return False
    return norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None


def _cumulative(norm: Any, input: Tensor) -> Tensor:
    """Put the batch's statistics into scratch buffers and from there into the average."""
    norm._check_input_dim(input)
    mean, var = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
    output = F.batch_norm(input, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    norm.num_batches_tracked.add_(1)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var)):
        wide = torch.promote_types(running.dtype, torch.float32)
        factor = norm.num_batches_tracked.to(wide).reciprocal()
        running.copy_(torch.lerp(running.to(wide), batch.to(wide), factor))
    return output


TRACED: dict[Any, Callable[[Any, Tensor], Tensor]] = {_BatchNorm: _forward, nn.SyncBatchNorm: _forward_sync}
