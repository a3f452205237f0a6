"""One training step, compiled, against eager FQT."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fqt_compile
from fqt_compile.backend import FQTPass
from fqt_compile.config import FQTConfig
from fqt_compile.interpret import NativeInterpreter, compile_interpreted
from fqt_compile.origin import names_in_model
from support import sample
from support.equality import assert_same
from support.grid import REFERENCE
from support.nets import step_gradients

DRAWS = "draw_seed"
"""The one operation that gives something else the second time."""


class CheckedInterpreter(NativeInterpreter):
    """Runs a rewritten graph with the native kernels, each of which has to equal the reference and its fake.

    A result that differs from its fake in dtype, shape or strides is what Inductor would read wrongly: it allocates and
    indexes by the fakes.
    """

    def run_node(self, n: fx.Node) -> Any:
        if getattr(n.target, "namespace", None) != "fqt":
            return super().run_node(n)
        as_faked = all(_strides(self.env[item]) == _strides(item.meta["val"]) for item in _tensor_nodes(n))
        result = super().run_node(n)
        for made, fake in zip(_tensors(result), _tensors(n.meta["val"]), strict=True):
            assert (made.dtype, made.shape) == (fake.dtype, fake.shape), n.format_node()
            if as_faked and made.numel():  # what torch's operators make in between may lie otherwise
                assert _strides(made) == _strides(fake), f"{n.format_node()}: {made.stride()}, {fake.stride()}"
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if getattr(target, "namespace", None) == "fqt":
            name = target._schema.name.removeprefix("fqt::")
            if name != DRAWS:
                assert_same(result, REFERENCE[name](*args, **kwargs), name)
        return result


def _tensors(result: Any) -> list[Tensor]:
    return [item for item in (result if isinstance(result, tuple | list) else [result]) if isinstance(item, Tensor)]


def _tensor_nodes(n: fx.Node) -> list[fx.Node]:
    return [item for item in n.all_input_nodes if isinstance(item.meta["val"], Tensor)]


def _strides(x: Tensor) -> list[int]:
    return [int(stride) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def checked(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model compiled without Inductor: `CheckedInterpreter` runs the graphs that Inductor would get."""
    return interpreted(model, CheckedInterpreter, **options)


def interpreted(
    model: nn.Module, interpreter: type[NativeInterpreter] = NativeInterpreter, **options: Any
) -> Callable[..., Any]:
    """The model compiled without Inductor: native kernels one by one."""
    config = FQTConfig.from_options(options)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        joint_pass = FQTPass(config, names_in_model(gm, inputs))
        return compile_interpreted(gm, inputs, joint_pass, interpreter)

    return torch.compile(model, backend=backend)


def assert_same_step(
    model: nn.Module, x: Tensor, y: Tensor, tolerance: float = 1e-4, *, inductor: bool | None = None, **options: Any
) -> None:
    """Loss and gradients of the optimized graph against eager FQT.

    By native kernels one by one (`checked`), and inside what Inductor makes of the graph: always (True), or in one run
    of eight (None), since that takes three times as long as all the rest.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
    expected = step_gradients(fqt_compile.eager(model, options), x, y)
    if inductor is None:
        inductor = sample.one_in(8, os.environ["PYTEST_CURRENT_TEST"].split(" ")[0])
    ways = {"checked": lambda: checked(model, **options)}
    if inductor:
        ways["inductor"] = lambda: torch.compile(model, backend="fqt1bit", options=options)
    for way, compiled in ways.items():
        torch._dynamo.reset()
        loss, gradients = step_gradients(compiled(), x, y)
        assert loss == pytest.approx(expected[0], rel=1e-5), way
        for name, gradient in expected[1].items():
            # A bias in front of a BatchNorm has the gradient 0, up to rounding.
            limit = tolerance * gradient.abs().max() + 1e-6
            assert (gradients[name] - gradient).abs().max() <= limit, (way, name)
