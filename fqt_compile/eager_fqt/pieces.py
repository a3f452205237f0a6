"""A model with graph breaks: each of its graphs is a step of its own, as when it is compiled (docs/math.md 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..capture import fresh_call, planned
from ..config import FQTConfig
from .mode import LayerMode
from .step import Step

VARIANTS = 64
"""Of a frame, for other shapes and modes; beyond them Dynamo would run the float function."""


class Pieces:
    """Calls a model whose graphs, as Dynamo finds them, are computed by the definition one by one."""

    def __init__(self, model: Callable[..., Any], config: FQTConfig) -> None:
        self.config = config
        self.call = torch.compile(fresh_call(model), backend=self._compile, dynamic=False)
        self.new_step: Callable[[], Step] = lambda: Step(config)

    def __call__(self, new_step: Callable[[], Step], /, *args: Any, **kwargs: Any) -> Any:
        """``new_step``: makes what the layers of one graph share."""
        self.new_step = new_step
        limits = {"recompile_limit": VARIANTS, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(limits):
            return self.call(*args, **kwargs)

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        plan = planned(gm, example_inputs, self.config)

        def run(*inputs: Any) -> Any:
            step = self.new_step()
            mode = LayerMode(plan, step)
            with mode:
                output = gm(*inputs)
            mode.require_complete()
            return step.place_cut(output, inputs)

        return run
