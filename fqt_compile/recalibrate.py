"""New running statistics of BatchNorm, measured with the weights as they are, for an evaluation after fast training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .batches import input_of, require_iterable
from .errors import ConfigError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
STAND_IN_MOMENTUM = 0.5  # a power of two, so that dividing by it loses nothing


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate the running statistics of every BatchNorm of ``model``, in place.

    ``running_mean = 1/B sum_b mean_b`` and ``running_var = 1/B sum_b var_b``, [C] each, with the mean and the unbiased
    variance of batch b at that layer in train mode; ``num_batches_tracked = B``. Sums are in float64, the result has
    the buffers' dtype. Training with quantized activations and a high learning rate moves the statistics faster than
    the running average follows; these belong to the weights as they are.

    model: a module, a compiled one (``torch.compile``, any backend) or a copy by `fqt_compile.eager`, whose buffers are
        its own. A graph compiled for training is used again where shapes and the grad mode are those of training, so
        call this outside ``torch.no_grad()``; each output is dropped at once.
    batches: of inputs, each a tensor, or a tuple or list that begins with the input, as a ``DataLoader`` gives them.

    ``model.train()`` decides which layers normalize by their batch. So a BatchNorm that was put into eval mode by hand
    is recalibrated as well, and one that an overridden ``train()`` keeps in eval mode is not. A layer that no forward
    reaches keeps its statistics. One that a forward calls k times counts k times; the calls of one forward then have
    the weights of its momentum, ``m (1 - m)^(k - i)`` for call i, scaled to the sum 1. Modes, momentum, gradients, all
    other buffers and the random state of the CPU and of the model's GPUs are as before.

    A momentum of 0 leaves no trace of a batch and is replaced during the call: a compiled model compiles once more.

    Raises
    ------
    ConfigError: no module, no batches, a batch of another kind or without rows, a lazy BatchNorm that has not seen its
        first input.
    Whatever the model and ``batches`` raise. After an error all statistics are as before.

    Source: the semantics of ``torch.optim.swa_utils.update_bn``, which sets ``momentum`` to None for the call (compiled
    graphs are guarded by it). Here the statistics are set to 0 before each batch, so that ``running / momentum`` is
    that batch's value.
    """
    _check(model, batches)
    layers = [_Layer(module) for module in model.modules() if isinstance(module, _BatchNorm) and _tracks(module)]
    if not layers:
        return
    with _untouched(model, layers):
        model.train()
        seen = 0
        for batch in batches:
            images = input_of(batch, seen)
            for layer in layers:
                layer.clear()
            model(images)
            for layer in layers:
                layer.accumulate()
            seen += 1
        if not seen:
            raise ConfigError("batches: got none; accepted: at least one batch of inputs; nothing was changed")
        for layer in layers:
            layer.store()


@dataclasses.dataclass
class _Layer:
    """A BatchNorm with the sums of its statistics over the calls so far, float64 [C]."""

    norm: _BatchNorm
    calls: int = 0

    def __post_init__(self) -> None:
        self.before = [buffer.clone() for buffer in self.buffers()]
        self.sums = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self.buffers()[:2]]
        self.momentum = self.norm.momentum

    def buffers(self) -> list[Tensor]:
        return [getattr(self.norm, name) for name in STATISTICS]

    @torch.no_grad()
    def clear(self) -> None:
        """All zero: the running average then holds nothing but the next batch, the cumulative one begins again."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def accumulate(self) -> None:
        mean, var, tracked = self.buffers()
        calls = int(tracked)
        if not calls:  # not reached
            return
        momentum = self.norm.momentum
        weight = 1.0 if momentum is None else momentum if calls == 1 else 1 - (1 - momentum) ** calls
        for total, running in zip(self.sums, (mean, var), strict=True):
            total += running.double() * (calls / weight)
        self.calls += calls

    @torch.no_grad()
    def store(self) -> None:
        """What `restore` will put into the buffers."""
        if self.calls:
            self.before = [total / self.calls for total in self.sums]
            self.before.append(torch.tensor(self.calls))

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in zip(self.buffers(), self.before, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _untouched(model: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Put back at the end, whatever happens: modes, momentum, other buffers, random state, and `_Layer.before`."""
    modes = [(module, module.training) for module in model.modules()]
    measured = {id(buffer) for layer in layers for buffer in layer.buffers()}
    others = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in measured]
    tensors = [*model.parameters(), *model.buffers()]
    gpus = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        try:
            for layer in layers:
                if layer.momentum is not None and not 0 < layer.momentum <= 1:
                    layer.norm.momentum = STAND_IN_MOMENTUM
            yield
        finally:
            for layer in layers:
                layer.restore()
                if layer.norm.momentum != layer.momentum:
                    layer.norm.momentum = layer.momentum
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in others:
                    if not torch.equal(buffer, before):  # writing would invalidate what autograd saved
                        buffer.copy_(before)


def _tracks(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and all(getattr(norm, name) is not None for name in STATISTICS)


def _check(model: Any, batches: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module, compiled or not")
    require_iterable(batches)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and any(is_lazy(buffer) for buffer in module.buffers()):
            raise ConfigError(f"model: {name} has no shape yet; accepted: a model that has run once; call it first")
