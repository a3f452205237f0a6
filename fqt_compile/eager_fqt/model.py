"""Eager FQT: any model with its convolution and linear layers computed by the definition (kernels/reference).

Written independently of the graph passes, in terms of values instead of packed bits, so that either can be
tested against the other. It needs no compiler. Decisions (which layers, which activation code) are the same:
they come from one capture of the model at the first call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..capture import plan
from ..config import FQTConfig
from ..data_parallel import unwrapped
from ..errors import ConfigError
from .mode import LayerMode
from .pieces import Pieces
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
    copied._fqt_plan = copied._fqt_pieces = copied._fqt_seed = copied._fqt_recorder = None
    return copied


def _eager_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = super(type(self), self).forward
    if self._fqt_plan is None:
        graphs = plan(original, args, kwargs, self._fqt_config)
        self._fqt_plan = [site for sites in graphs for site in sites]
        self._fqt_pieces = Pieces(original, self._fqt_config) if len(graphs) > 1 else None
    if self._fqt_pieces is not None:
        return self._fqt_pieces(lambda: _step(self), *args, **kwargs)
    step = _step(self)
    mode = LayerMode(self._fqt_plan, step)
    with mode:
        output = original(*args, **kwargs)
    mode.require_complete()
    return step.place_cut(output)


def _step(self: Any) -> Step:
    return Step(self._fqt_config, self._fqt_seed, self._fqt_recorder)
