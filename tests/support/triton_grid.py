"""Runs Triton operations in Triton's interpreter and compares them with the reference.

A script, since the interpreter is chosen before Triton is imported:

    TRITON_INTERPRET=1 python tests/support/triton_grid.py [operation ...] [--limit N] [--layers L ...] [--wide]

Prints one line of JSON for every operation, strategy and layer. ``--limit``: about N argument lists of an operation on
two layers of the day (`sample`), and more until every kernel has run; slow operations on the largest layers only where
marked (0: all lists on all layers).
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

from fqt_compile.kernels import gpu
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu.codegen import interpreted
from support import sample
from support.equality import assert_same
from support.grid import LAYERS, REFERENCE, Layer, sampled
from support.grid_calls import calls, expected

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
SEVERAL_BLOCKS = ("grad_weight_product", *("gradient_moments", "quantize_channels") * 2)
NEEDED = [(name, "3x3-many-positions") for name in sample.some("several blocks", SEVERAL_BLOCKS)]
"""The only product that several programs add up to, each with several words (half a minute: one day in five, in one of
the strategies), and several blocks of a sum: one of them every day."""
COMPLETE = ("linear", "3x3-odd-channels")
"""Layers whose argument lists launch every kernel."""
PRODUCTS = ("output_product", "grad_input_product", "grad_weight_product")
PARTLY = ("grad_weight", "float_moments")
"""Operations whose kernels others have too: every third layer."""
LAYERS_A_DAY = 2
SLOW = (*PRODUCTS, *PARTLY, "max_pool_gradient", "gradient_moments", "quantize_channels")


def strategies(operation: str) -> tuple[str, ...]:
    return ("popcount", "tensor-core") if operation in PRODUCTS else ("auto",)


def chosen(operation: str, layer: Layer, limit: int) -> Iterator[int]:
    """Numbers of argument lists: every ``step``-th, starting at a place that depends on the layer and the day."""
    count = len(calls(layer)[operation])
    step = max(1, count // limit) if limit else 1
    return iter(range((LAYERS.index(layer) + sample.number(operation)) % step, count, step))


def unseen(operation: str, layer: Layer, seen: set[str]) -> Iterator[int]:
    """Numbers of argument lists that launch a kernel that is not in ``seen``, which is looked at anew before each."""
    for number, arguments in enumerate(calls(layer)[operation]):
        with gpu_launch.recording(run=False) as launches:
            gpu.OPERATIONS[operation](*arguments)
        if not names(launches) <= seen:
            yield number


def names(launches: list[gpu_launch.Launch]) -> set[str]:
    return {f"{launch.spec.template}.{launch.kernel}" for launch in launches}


def skipped(operation: str, strategy: str, layer: Layer, limit: int) -> bool:
    if not limit:
        return False
    if operation in PARTLY and LAYERS.index(layer) % 3:
        return True
    if operation not in SLOW or layer.name not in LARGE:
        return False
    return (operation, layer.name) not in NEEDED or sample.pick("strategy", strategies(operation)) != strategy


def check(operation: str, layer: Layer, strategy: str, numbers: Iterator[int]) -> dict[str, object]:
    """Raise unless an operation equals its reference; what was covered."""
    count, start, seen = 0, time.process_time(), set()
    for number in numbers:
        arguments, where = calls(layer)[operation][number], f"{operation} {strategy} {layer.name} {number}"
        with gpu_launch.recording() as launches:
            made = gpu.OPERATIONS[operation](*arguments)
        assert_same(made, expected(layer, operation, number), where)
        seen |= names(launches)
        count += 1
    covered = {"operation": operation, "strategy": strategy, "layer": layer.name, "calls": count}
    return {**covered, "kernels": sorted(seen), "seconds": round(time.process_time() - start, 2)}


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
        layers = [layer for layer in LAYERS if layer.name in options.layers]
        complete = options.limit > 0 and len(layers) == len(LAYERS)
        if complete:
            layers = sampled(operation, layers)
        for strategy in strategies(operation):
            with gpu.force_strategy(strategy):
                run(operation, strategy, layers, options.limit, complete)


def run(operation: str, strategy: str, layers: list[Layer], limit: int, complete: bool) -> None:
    seen: set[str] = set()

    def report(layer: Layer, numbers: Iterator[int]) -> None:
        covered = check(operation, layer, strategy, numbers)
        seen.update(covered["kernels"])  # type: ignore[arg-type]
        print(json.dumps(covered), flush=True)

    chosen_layers = sample.some(f"{operation} {strategy}", layers, LAYERS_A_DAY) if complete else layers
    for layer in layers:
        is_chosen = layer in chosen_layers or (operation, layer.name) in NEEDED
        if is_chosen and not skipped(operation, strategy, layer, limit):
            report(layer, chosen(operation, layer, limit))
    if complete:
        for layer in (layer for layer in LAYERS if layer.name in COMPLETE):
            for number in unseen(operation, layer, seen):
                report(layer, iter([number]))


if __name__ == "__main__":
    main()
