"""Rates of the native CPU kernels on the packed layers of VGG-16 (32 px) and ResNet-18 (224 px), with their bound.

    python benchmarks/kernel_rates.py [--network vgg16] [--threads 1] [--isa avx512] [--keep 1] [--json out.json]

GMAC/s counts the products of the float layer (all taps, all rows), so that the ratio to float32 is a ratio of times.
Times are minima over the repeats. The float32 baseline is oneDNN on channels_last operands: forward, grad_input alone,
grad_weight alone. Products run as in a training step: int16 outputs where they fit, memory kept between calls (the
option ``reuse_memory``); the baseline has the kept memory too.

Bound. 512 one-bit products are three 512-bit instructions: xor (or and), popcount, add. How many of these threes a core
makes a second is measured, on registers (`clock.counts_per_second`): 1.5 cycles each on Zen 4, which starts two such
instructions a cycle, 0.75 on Zen 5, which starts four. Percent of the bound counts executed products only, exactly:
those whose tap lies inside the image, of the kept rows, once per gradient bit. Loads, stores and everything around the
product are inside the measured time. Without AVX-512 VPOPCNTDQ there is no percentage. Tables (docs/adr/0013) count
codes of 4 bits with fewer instructions, so that products of gradients can exceed this bound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from clock import clock_ghz, counts_per_second
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fqt_compile import results
from fqt_compile.config import FQTConfig
from fqt_compile.kernels import cpu, selection
from fqt_compile.kernels.cpu import counting
from fqt_compile.kernels.cpu.memory import keep_freed_memory

OPS = cpu.OPERATIONS
PRODUCTS = ("output_product", "grad_input_product", "grad_weight_product")
PRODUCTS_AT_ONCE = 512
BATCHES = {"vgg16": 128, "resnet18": 16}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A square convolution with padding ``kernel // 2``; ``count``: how often the network has it."""

    in_channels: int
    out_channels: int
    size: int
    count: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels}-{self.out_channels}@{self.size} {self.kernel}x{self.kernel}{stride}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def nominal_products(self, batch: int) -> int:
        """Multiplications of the float layer as usually counted, padding included."""
        return batch * self.in_channels * self.out_channels * (self.output_size * self.kernel) ** 2

    def inside_products(self, batch: int) -> int:
        """Those whose tap lies inside the image; the same pairs of pixels in all three products."""
        starts = (o * self.stride - self.padding for o in range(self.output_size))
        inside = sum(0 <= start + tap < self.size for start in starts for tap in range(self.kernel))
        return batch * self.in_channels * self.out_channels * inside**2


NETWORKS = {
    "vgg16": [
        *(Layer(64, 64, 32, 1), Layer(64, 128, 16, 1), Layer(128, 128, 16, 1), Layer(128, 256, 8, 1)),
        *(Layer(256, 256, 8, 2), Layer(256, 512, 4, 1), Layer(512, 512, 4, 2), Layer(512, 512, 2, 3)),
    ],
    "resnet18": [
        *(Layer(64, 64, 56, 4), Layer(64, 128, 56, 1, 3, 2), Layer(64, 128, 56, 1, 1, 2), Layer(128, 128, 28, 3)),
        *(Layer(128, 256, 28, 1, 3, 2), Layer(128, 256, 28, 1, 1, 2), Layer(256, 256, 14, 3)),
        *(Layer(256, 512, 14, 1, 3, 2), Layer(256, 512, 14, 1, 1, 2), Layer(512, 512, 7, 3)),
    ],
}


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Minimum wall time of one call; the first call is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def float_convolution(layer: Layer, x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], Any]]:
    """The three products in float32."""
    args = (None, [layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)
    backward = torch.ops.aten.convolution_backward
    return {
        "output_product": lambda: torch.ops.aten.convolution(x, w, *args),
        "grad_input_product": lambda: backward(g, x, w, *args, [True, False, False]),
        "grad_weight_product": lambda: backward(g, x, w, *args, [False, True, False]),
    }


def packed_operations(
    layer: Layer, x: Tensor, w: Tensor, g: Tensor, keep: Fraction, bits: int
) -> dict[str, Callable[[], Any]]:
    """Every native operation of one layer, on the operands a training step gives it."""
    c_in, c_out, size = layer.in_channels, layer.out_channels, [layer.size] * 2
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    seed, threshold = torch.tensor(1), OPS["activation_threshold"](x, "sample")
    x_bits, mask = OPS["pack_activation"](x, threshold)
    w_bits, alpha = OPS["quantize_weight"](w, "xnor")
    w_bits_t = OPS["transpose_weight"](w_bits, c_in, c_out)
    importance = OPS["row_importance"](g, "norm")
    chosen = ("systematic" if keep < 1 else "none", keep.numerator, keep.denominator)
    rows, row_scale = OPS["select"](importance, seed, 8, *chosen)
    planes, s_row, z_row = OPS["quantize_rows"](g, alpha, rows, row_scale, seed, 9, bits)
    lanes, s_channel, z_channel = OPS["quantize_channels"](g, rows, row_scale, None, None, seed, 10, bits)
    to_input = (planes, w_bits_t, c_in, c_out, size, stride, padding)
    acc, weight_sum = OPS["grad_input_product"](*to_input)
    kernel, output = [layer.kernel] * 2, [layer.output_size] * 2
    to_weight = (lanes, x_bits, rows, c_in, c_out, "threshold", output, kernel, stride, padding)
    acc_w, code_sum = OPS["grad_weight_product"](*to_weight)
    grad_hat = OPS["dequantize_grad_weight"](acc_w, code_sum, s_channel, z_channel, None, c_out)
    arguments: dict[str, tuple[Any, ...]] = {
        "output_product": (x_bits, w_bits, c_in, c_out, "threshold", stride, padding, True),
        "grad_input_product": to_input,
        "grad_weight_product": to_weight,
        "activation_threshold": (x, "sample"),
        "pack_activation": (x, threshold),
        "apply_mask": (x, mask),
        "quantize_weight": (w, "xnor"),
        "transpose_weight": (w_bits, c_in, c_out),
        "weight_gradient": (grad_hat, w, alpha, "xnor"),
        "row_importance": (g, "norm"),
        "select": (importance, seed, 8, *chosen),
        "quantize_rows": (g, alpha, rows, row_scale, seed, 9, bits),
        "quantize_channels": (g, rows, row_scale, None, None, seed, 10, bits),
        "dequantize_grad_input": (acc, weight_sum, s_row, z_row, rows, mask),
        "dequantize_grad_weight": (acc_w, code_sum, s_channel, z_channel, None, c_out),
    }
    return {name: (lambda n=name, a=args: OPS[n](*a)) for name, args in arguments.items()}


def measure_layer(layer: Layer, batch: int, options: argparse.Namespace, bound: float | None) -> dict[str, Any]:
    """Seconds of every operation; for the products also GMAC/s, percent of ``bound`` (GMAC/s) and the float ratio."""
    layout = torch.channels_last
    x = torch.randn(batch, layer.in_channels, layer.size, layer.size).relu().contiguous(memory_format=layout)
    g = torch.randn(batch, layer.out_channels, layer.output_size, layer.output_size).contiguous(memory_format=layout)
    w = torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel).contiguous(memory_format=layout)
    keep = FQTConfig(bits=options.bits, keep=options.keep).kept_fraction
    kept_rows = selection.kept_count(batch, keep.numerator, keep.denominator)
    baseline = {} if options.no_float else float_convolution(layer, x, w, g)
    result: dict[str, Any] = {"layer": str(layer), "count": layer.count}
    for name, function in packed_operations(layer, x, w, g, keep, options.bits).items():
        seconds = best_seconds(function, options.repeats)
        result[name] = {"s": seconds}
        if name in PRODUCTS:
            passes = 1 if name == "output_product" else options.bits
            rows = batch if name == "output_product" else kept_rows
            executed = layer.inside_products(rows) * passes / seconds / 1e9
            result[name] |= {"gmac_s": layer.nominal_products(batch) / seconds / 1e9, "executed_gmac_s": executed}
            result[name] |= {"bound_percent": 100 * executed / bound if bound else None}
        if name in baseline:
            result[name]["float_s"] = best_seconds(baseline[name], max(2, options.repeats // 2))
    return result


def product_table(network: str, results_of: list[dict[str, Any]], bound: float | None) -> Table:
    """GMAC/s, percent of the bound and ratio to float32; the last row sums the times of the whole network."""
    known = f"{bound:.0f} GMAC/s" if bound else "unknown here"
    shown = Table(title=f"{network}: GMAC/s, percent of the bound ({known}), x float32")
    shown.add_column("layer (how often)", no_wrap=True)
    for name in PRODUCTS:
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results_of:
        cells = (_cell(result[name]) for name in PRODUCTS)
        shown.add_row(f"{result['layer']} ({result['count']})", *cells)
    shown.add_row("sum of the network", *(_total(results_of, name) for name in PRODUCTS))
    return shown


def _cell(figures: dict[str, Any]) -> str:
    ratio = f"  {figures['float_s'] / figures['s']:4.1f}x" if "float_s" in figures else ""
    return f"{figures['gmac_s']:5.0f}  {_percent(figures['bound_percent'])}{ratio}"


def _percent(value: float | None) -> str:
    return "  - %" if value is None else f"{value:3.0f} %"


def _total(results_of: list[dict[str, Any]], name: str) -> str:
    def total(key: str) -> float:
        return sum(result[name][key] * result["count"] for result in results_of)

    known = results_of[0][name]["bound_percent"] is not None
    at_bound = (
        sum(r[name]["s"] * r["count"] * r[name]["bound_percent"] for r in results_of) / total("s") if known else None
    )
    ratio = f"  {total('float_s') / total('s'):4.1f}x" if "float_s" in results_of[0][name] else ""
    return f"{1e3 * total('s'):.1f} ms  {_percent(at_bound)}{ratio}"


def other_table(network: str, results_of: list[dict[str, Any]]) -> Table:
    """Milliseconds of everything else."""
    shown = Table(title=f"{network}: ms of the other operations")
    shown.add_column("layer", no_wrap=True)
    names = [name for name in results_of[0] if isinstance(results_of[0][name], dict) and name not in PRODUCTS]
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for result in results_of:
        shown.add_row(result["layer"], *(f"{1e3 * result[name]['s']:.2f}" for name in names))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=cpu.supported_isas(), help="default: what a training step uses")
    parser.add_argument("--batch", type=int, help="default: 128 for VGG-16, 16 for ResNet-18")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--keep", type=float, help="kept fraction of the rows; default: 1 / bits")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-float", action="store_true", help="leave out float32")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    clock, counts = clock_ghz(), counts_per_second()
    bound = counts * PRODUCTS_AT_ONCE / 1e9 * options.threads if counts else None
    console = Console(width=200)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        **results.environment(),
        "isa": {name: counting.isa_of(name) for name in PRODUCTS} if options.isa is None else options.isa,
        "clock_ghz": clock,
        "cycles_per_count": clock * 1e9 / counts if counts else None,
        "bound_gmac_s": bound,
    }
    report |= {"bits": options.bits, "keep": options.keep, "repeats": options.repeats, "networks": {}}
    console.print(f"clock {clock:.2f} GHz, {options.threads} threads, {report['isa']}")
    for network in options.network or NETWORKS:
        batch = options.batch or BATCHES[network]
        with cpu.force_isa(options.isa) if options.isa else contextlib.nullcontext():
            layers = [measure_layer(layer, batch, options, bound) for layer in NETWORKS[network]]
        console.print(product_table(f"{network}, batch {batch}", layers, bound), other_table(network, layers))
        report["networks"][network] = {"batch": batch, "layers": layers}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
