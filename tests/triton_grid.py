"""Runs Triton operations in Triton's interpreter and compares them with the reference.

A script, since the interpreter is chosen before Triton is imported:

    TRITON_INTERPRET=1 python tests/triton_grid.py [operation ...] [--limit N] [--layers L ...] [--wide]

Prints one line of JSON for every operation, strategy and layer. ``--limit``: about N argument lists of an operation per
layer, others on every layer, and slow operations on the largest layers only where marked (0: all lists on all layers).
``--wide``: 64-bit offsets, as for tensors of more than 2**30 elements.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator

import torch
import triton.runtime.interpreter as triton_interpreter
from grid import LAYERS, REFERENCE, Call, Layer, calls, expected
from test_kernels import assert_same

from fqt_compile.kernels import gpu
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu.codegen import interpreted

assert interpreted(), "set TRITON_INTERPRET=1"
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="fqt1bit: NaN or infinite")
torch.set_num_threads(1)
# Conditions that only its debug mode checks; they take 40 % of the time.
triton_interpreter.interpreter_builder.options = dataclasses.replace(
    triton_interpreter.interpreter_builder.options, sanitize_overflow=False
)

LARGE = ("3x3-large", "3x3-many-positions")
"""Layers whose products and pools take the interpreter ten times longer than all others together."""
NEEDED = [(name, "3x3-many-positions") for name in ("grad_weight_product", "gradient_moments")]
"""The only product that several programs add up to, each with several words, and several blocks of a sum."""
PRODUCTS = ("output_product", "grad_input_product", "grad_weight_product")
PARTLY = ("grad_weight", "float_moments")
"""Operations whose kernels others have too: every third layer."""
SLOW = (*PRODUCTS, *PARTLY, "max_pool_gradient", "gradient_moments")


def strategies(operation: str) -> tuple[str, ...]:
    return ("popcount", "tensor-core") if operation in PRODUCTS else ("auto",)


def chosen(operation: str, layer: Layer, limit: int) -> Iterator[tuple[int, Call]]:
    """Numbered argument lists: every ``step``-th, starting at a place that depends on the layer."""
    made = list(enumerate(calls(layer)[operation]))
    step = max(1, len(made) // limit) if limit else 1
    return (made[i] for i in range(LAYERS.index(layer) % step, len(made), step))


def skipped(operation: str, layer: Layer, limit: int) -> bool:
    if not limit:
        return False
    if operation in PARTLY and LAYERS.index(layer) % 3:
        return True
    return operation in SLOW and layer.name in LARGE and (operation, layer.name) not in NEEDED


def check(operation: str, layer: Layer, strategy: str, limit: int) -> dict[str, object]:
    """Raise unless an operation equals its reference; what was covered."""
    count, start = 0, time.process_time()
    with gpu.force_strategy(strategy), gpu_launch.recording() as launches:
        for number, arguments in chosen(operation, layer, limit):
            wanted = expected(layer, operation)[number]
            assert_same(gpu.OPERATIONS[operation](*arguments), wanted, f"{operation} {strategy} {layer.name} {number}")
            count += 1
    kernels = sorted({f"{launch.spec.template}.{launch.kernel}" for launch in launches})
    covered = {"operation": operation, "strategy": strategy, "layer": layer.name, "calls": count, "kernels": kernels}
    return {**covered, "seconds": round(time.process_time() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=[name for name in REFERENCE if name != "draw_seed"])
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--layers", nargs="*", default=[layer.name for layer in LAYERS])
    parser.add_argument("--wide", action="store_true")
    options = parser.parse_args()
    if options.wide:
        gpu_launch.INT32_LIMIT = 0
    for operation in options.operations:
        for strategy in strategies(operation):
            for layer in LAYERS:
                if layer.name not in options.layers or skipped(operation, layer, options.limit):
                    continue
                print(json.dumps(check(operation, layer, strategy, options.limit)), flush=True)


if __name__ == "__main__":
    main()
