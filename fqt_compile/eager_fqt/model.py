"""Eager FQT: any model with its convolution and linear layers computed by the definition (kernels/reference).

Written independently of the graph passes, in terms of values instead of packed bits, so that either can be
tested against the other. It needs no compiler. Decisions (which layers, which activation code) are the same:
they come from one capture of the model at the first call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..capture import SiteReport, capture
from ..config import FQTConfig
from ..data_parallel import unwrapped
from ..errors import CaptureError, ConfigError
from .calls import (
    BATCH_NORM_ARGUMENTS,
    BATCH_NORMS,
    CONVOLUTIONS,
    PRODUCTS,
    LayerCall,
    convolution,
    is_parameter,
    linear,
)
from .floats import FloatLayer
from .norm import BatchNormLayer
from .packed import PackedLayer
from .step import Step


def eager(model: nn.Module, config: FQTConfig | Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of ``model``, sharing its parameters, whose layers compute eager FQT.

    model: any module `torch.compile` can capture. config: an `FQTConfig` or a mapping of its fields.
    Buffers are copied. Every forward with gradients draws one seed from torch's default generator at its
    first packed layer, as the compiled graph does, so equal generator states give equal noise.

    Exactness: with ``lowering="eager"`` the compiled graph equals this bit for bit wherever the float
    operations between the layers do; where Inductor decomposes one (BatchNorm), it differs by rounding,
    which can move a quantized code by one step.

    Raises `ConfigError` for a wrong type, `CaptureError` if the calls of a forward do not match its capture.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    model = unwrapped(model)
    settings = FQTConfig.from_options(config)
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    copied: Any = copy.deepcopy(model, shared)
    cls = getattr(model, "_fqt_class", type(model))  # of a copy by this function: that of what was copied
    members = {"forward": _eager_forward, "__module__": __name__, "_fqt_class": cls}
    copied.__class__ = type(f"EagerFQT{cls.__name__}", (cls,), members)
    copied._fqt_config = settings
    copied._fqt_plan = copied._fqt_seed = copied._fqt_recorder = None
    return copied


def _eager_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = super(type(self), self).forward
    if self._fqt_plan is None:
        graphs = capture(original, args, kwargs, self._fqt_config)
        self._fqt_plan = [site for graph in graphs for site in graph.sites]
    step = Step(self._fqt_config, self._fqt_seed, self._fqt_recorder)
    mode = _LayerMode(self._fqt_plan, step)
    with mode:
        output = original(*args, **kwargs)
    mode.require_complete()
    return step.place_cut(output)


class _LayerMode(TorchFunctionMode):
    """Sends the k-th convolution or linear call of a forward to the k-th site of the plan."""

    def __init__(self, plan: list[SiteReport], step: Step) -> None:
        super().__init__()
        self.plan, self.step, self.next = plan, step, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return self._run(convolution(func, *args, **kwargs), func, args, kwargs)
        if func is F.linear:
            return self._run(linear(*args, **kwargs), func, args, kwargs)
        if func is torch.addmm and not set(kwargs) - {"mat1", "mat2"}:
            bias, x, weight = (*args, *kwargs.values())[:3]
            if is_parameter(weight):
                return self._run(linear(x, weight.t(), bias), func, args, kwargs)
        if func in PRODUCTS and len(args) == 2 and is_parameter(args[1]):
            return self._run(linear(args[0], args[1].t()), func, args, kwargs)
        if func in PRODUCTS and len(args) == 2 and is_parameter(args[0]) and args[1].dim() > 2:
            # torch folds W @ x of a stack of matrices into one product with W^T from the right.
            return self._run(linear(args[1].mT, args[0]), func, args, kwargs, turned=True)
        if func in BATCH_NORMS:
            return self._batch_norm(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            # Its body asks for overrides before it does anything; only its own linear layers are of interest.
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _run(
        self, call: LayerCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], turned: bool = False
    ) -> Any:
        """``turned``: the function's result has channels and positions the other way round."""
        site = self._site(call)
        layer = PackedLayer if site.decision == "packed" else FloatLayer
        if layer is FloatLayer and not self.step.prunes_once and self.step.config.float_dtype == "float32":
            return func(*args, **kwargs)
        shape = call.x.shape
        flattens = call.geometry.kind == "linear" and call.x.dim() != 2
        x = call.x.reshape(-1, shape[-1]) if flattens else call.x
        output = layer.apply(x, call.weight, call.bias, call.geometry, site, self.next - 1, self.step)
        self.step.record(output, site)
        output = output.unflatten(0, shape[:-1]) if flattens else output
        return output.mT if turned else output

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By `BatchNormLayer` where this batch's statistics are used and kept rows may come back."""
        bound = BATCH_NORMS[func].bind(*args, **kwargs)
        bound.apply_defaults()
        x, mean, var, weight, bias, training, momentum, eps = (bound.arguments[name] for name in BATCH_NORM_ARGUMENTS)
        if not training or not self.step.prunes_once or x.dim() < 2:
            return func(*args, **kwargs)
        output = BatchNormLayer.apply(x, weight, bias, (mean, var), momentum, eps, self.step)
        self.step.record_batch_norm(output)
        return output

    def _site(self, call: LayerCall) -> SiteReport:
        if self.next >= len(self.plan):
            raise CaptureError(
                f"eager FQT: call {self.next + 1} of a layer, but the captured model has {len(self.plan)}"
            )
        site = self.plan[self.next]
        self.next += 1
        if site.kind != call.geometry.kind or site.weight_shape != tuple(call.weight.shape):
            raise CaptureError(
                f"eager FQT: layer call {self.next} is a {call.geometry.kind} with weight {tuple(call.weight.shape)}, "
                f"but the captured model has {site.name}, a {site.kind} with weight {site.weight_shape}. "
                "Remedy: a model whose layers depend on its input needs one eager copy per variant"
            )
        return site

    def require_complete(self) -> None:
        if self.next != len(self.plan):
            raise CaptureError(
                f"eager FQT: a forward called {self.next} layers, but the captured model has {len(self.plan)}"
            )
