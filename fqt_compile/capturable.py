"""BatchNorm with ``momentum=None`` in a form that Dynamo can trace, so that a model stays one graph.

PyTorch's forward reads the number of batches into Python (``1.0 / float(num_batches_tracked)``), at which Dynamo
breaks the graph; inside a container such as ``nn.Sequential`` it gives up the whole model. With
``capture_scalar_outputs`` or ``fullgraph=True`` it stops at the same factor, a number it cannot guard on. A backend
sees nothing of this: it gets the pieces, or is never called.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, FQTWarning


def capturable(model: nn.Module) -> nn.Module:
    """Let ``torch.compile`` capture every BatchNorm1d, 2d and 3d of ``model`` with ``momentum=None``; call it first.

    Replaces the class of these layers, in place, by a subclass with the same outputs, gradients and state dict. The
    running statistics are the same cumulative average, up to rounding: ``running += (batch - running) / n``, in float32
    or wider, with n on the device. Returns ``model``. Other layers, subclasses of these among them, are left alone.

    Raises `ConfigError` for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    for layer in _breaking(model):
        layer.__class__ = CLASSES[type(layer)]
    return model


@contextlib.contextmanager
def captured_as_capturable(model: nn.Module) -> Iterator[None]:
    """`capturable` for the time of a capture, with a warning that the user's own compilation needs the call itself."""
    layers = _breaking(model)
    if any(layer.training for layer in layers):  # in eval mode nothing is counted
        warnings.warn(
            f"fqt1bit: torch.compile breaks the graph at {type(layers[0]).__name__}(momentum=None), so that layers "
            "around it run in float; remedy: fqt_compile.capturable(model) before compiling. "
            "Here the model is captured as if that had been called",
            FQTWarning,
            stacklevel=3,
        )
    before = [(layer, type(layer)) for layer in layers]
    try:
        capturable(model)
        yield
    finally:
        for layer, cls in before:
            layer.__class__ = cls


class _Cumulative(nn.modules.batchnorm._BatchNorm):
    """In training, the batch's statistics go into scratch buffers and from there into the average."""

    def forward(self, input: Tensor) -> Tensor:
        if self.momentum is not None or not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            wide = torch.promote_types(running.dtype, torch.float32)
            factor = self.num_batches_tracked.to(wide).reciprocal()
            running.copy_(torch.lerp(running.to(wide), batch.to(wide), factor))
        return output


class CumulativeBatchNorm1d(_Cumulative, nn.BatchNorm1d):
    """Made by `capturable`."""


class CumulativeBatchNorm2d(_Cumulative, nn.BatchNorm2d):
    """Made by `capturable`."""


class CumulativeBatchNorm3d(_Cumulative, nn.BatchNorm3d):
    """Made by `capturable`."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: CumulativeBatchNorm1d,
    nn.BatchNorm2d: CumulativeBatchNorm2d,
    nn.BatchNorm3d: CumulativeBatchNorm3d,
}


def _breaking(model: nn.Module) -> list[Any]:
    """The layers whose forward would break the graph; exactly these classes, since a subclass may do anything."""
    return [layer for layer in model.modules() if type(layer) in CLASSES and layer.momentum is None]
