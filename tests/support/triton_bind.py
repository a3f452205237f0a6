"""Binds the arguments of every launch as on a GPU, and compiles some, with a driver that pretends to be an H100.

Prints the number of launches of every kernel as JSON. What the ahead-of-time tests cannot see: Triton's own launcher
accepts the arguments, their types, the options and, with ``--autotune``, the configurations.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
from typing import Any

import torch
import triton.runtime.autotuner
import triton.runtime.driver
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from fqt_compile.kernels import gpu
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu import strategy as gpu_strategy
from support import sample
from support.grid import LAYERS
from support.grid_calls import calls

LAYER_NAMES = ("linear-one-row", "3x3-stride-2")  # all sizes 1, and none
PROGRAM_OPERATIONS = ("fused_activation", "fused_gradient", "gradient_moments")
PROGRAM_LAYER = "3x3-odd-channels"  # has programs, its last argument lists are those with a pool
ARGUMENT_LISTS = 3
COMPILED = 10
"""One launch of so many is compiled, others every day: what is compiled at all is tested ahead of time."""


class Pretended:
    """What Triton asks of a driver before it loads a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> None:
        return None


def compile_some() -> None:
    """Let Triton stop at most launches when it has bound the arguments and knows what to compile."""
    compile_bound = JITFunction._do_compile

    def compile_or_not(self: JITFunction[Any], key: Any, signature: Any, *rest: Any) -> Any:
        if sample.one_in(COMPILED, f"bound {self.__name__} {key}"):
            return compile_bound(self, key, signature, *rest)
        return None

    JITFunction._do_compile = compile_or_not


def main() -> None:
    bound: collections.Counter[str] = collections.Counter()
    compile_some()

    def bind(kernel: KernelInterface[Any], grid: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            function = kernel if isinstance(kernel, JITFunction) else kernel.fn
            bound[function.__name__] += 1
            kernel.run(*arguments, grid=grid, warmup=True, **options)

        return call

    triton.runtime.driver.set_active(Pretended())
    KernelInterface.__getitem__ = bind
    triton.runtime.autotuner.Autotuner._bench = lambda *arguments, **options: [1.0, 1.0, 1.0]
    gpu_launch.require_triton = lambda device_types: None
    gpu_launch._on = lambda device: contextlib.nullcontext()
    names = set(gpu.OPERATIONS) - {"draw_seed"}
    if "--autotune" in sys.argv:
        os.environ[gpu_strategy.AUTOTUNE] = "1"
        names = {name for name in names if name.endswith("_product")}
    for layer in (layer for layer in LAYERS if layer.name in (*LAYER_NAMES, PROGRAM_LAYER)):
        for strategy in gpu_strategy.STRATEGIES:
            with gpu.force_strategy(strategy):
                if layer.name == PROGRAM_LAYER:
                    made = {n: calls(layer)[n][-ARGUMENT_LISTS:] for n in PROGRAM_OPERATIONS}
                else:
                    made = {name: calls(layer)[name][:ARGUMENT_LISTS] for name in names}
                for name in sorted(made.keys() & names):
                    for arguments in made[name]:
                        gpu.OPERATIONS[name](*arguments)
    print(json.dumps(bound))


if __name__ == "__main__":
    main()
