"""Running a graph node by node, partitioned as for Inductor: by native kernels, by the reference or by Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .kernels import gpu
from .kernels.operations import OPERATIONS
from .passes.batch_norm import decompositions

SWITCHED_OFF = {
    "freezing": "weights become constants, but their bits are made from the parameters in every call",
    "cpp_wrapper": "its code cannot call packed operations",
}
"""Settings of Inductor under which graphs with packed operations do not compile, and why."""


def compile_interpreted(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    joint_pass: CustomGraphPass,
    interpreter: Callable[[fx.GraphModule], fx.Interpreter],
    on_graph: Callable[[fx.GraphModule, bool], None] | None = None,
) -> Callable[..., Any]:
    """Partition as for Inductor, but interpret both graphs node by node."""

    def inner_compile(graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        if on_graph is not None:
            on_graph(graph, bool(kwargs.get("is_backward")))
        running = interpreter(graph)

        def run(args: list[Any]) -> Any:
            return running.boxed_run(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    # Cached artifacts must be Inductor's own; an interpreted graph is none.
    patches = {"joint_custom_pre_pass": joint_pass, "fx_graph_cache": False, **dict.fromkeys(SWITCHED_OFF, False)}
    functorch = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with torch._functorch.config.patch(functorch):
        compiled: Any = compile_fx(
            gm, example_inputs, inner_compile, config_patches=patches, decompositions=decompositions()
        )
    return compiled


class NativeInterpreter(fx.Interpreter):
    """Runs a rewritten graph node by node with the native kernels."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.view.default:
            target = torch.reshape  # packed operations return NHWC memory, where a traced view may need a copy
        return super().call_function(target, args, kwargs)


class ReferenceInterpreter(NativeInterpreter):
    """Runs a rewritten graph with the reference operations: the oracle, which needs no compiler."""

    operations: Mapping[str, Callable[..., Any]] = OPERATIONS

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "namespace", None) == "fqt":
            target = self.operations[target._schema.name.removeprefix("fqt::")]
        return super().call_function(target, args, kwargs)


class TritonInterpreter(ReferenceInterpreter):
    """Runs a rewritten graph with the Triton kernels, on whatever device its tensors are."""

    operations = gpu.OPERATIONS
