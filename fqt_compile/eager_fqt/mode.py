"""Sends the calls of a model's layers, and of its BatchNorms, to their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..capture import SiteReport
from ..errors import CaptureError
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


class LayerMode(TorchFunctionMode):
    """Sends the k-th convolution or linear call of a forward to the k-th site of the plan."""

    def __init__(self, plan: Sequence[SiteReport], step: Step) -> None:
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
