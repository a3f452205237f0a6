"""Rates of the native CPU kernels on the 3x3 layers of VGG-16 at 32 px, against torch float32 in the same process.

    python benchmarks/kernel_rates.py [--threads 1] [--isa avx512] [--batch 128] [--repeats 7] [--json out.json]

GMAC/s counts the products of the float layer (all taps, all rows), so that the ratio to float32 is a ratio of
times. The gradient products keep 1/4 of the rows at 4 bits. Times are minima over the repeats. The float32
baseline is oneDNN on channels_last operands: forward, grad_input alone, grad_weight alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqt_compile.kernels import cpu
from fqt_compile.kernels.isa import current_isa

# channels in, channels out, image size
VGG16 = [
    *((64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)),
    *((256, 512, 4), (512, 512, 4), (512, 512, 2)),
]
KERNEL, PADDING, STRIDE = [3, 3], [1, 1], [1, 1]
BITS = 4
OPS = cpu.OPERATIONS


def best_ms(function: Callable[[], Any], repeats: int) -> float:
    """Minimum wall time of one call in milliseconds; the first call is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def float_convolution(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], Any]]:
    """The three products in float32."""
    args = (None, STRIDE, PADDING, [1, 1], False, [0, 0], 1)
    backward = torch.ops.aten.convolution_backward
    return {
        "output_product": lambda: torch.ops.aten.convolution(x, w, *args),
        "grad_input_product": lambda: backward(g, x, w, *args, [True, False, False]),
        "grad_weight_product": lambda: backward(g, x, w, *args, [False, True, False]),
    }


def packed_operations(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], Any]]:
    """Every native operation of one layer, on the operands a training step gives it."""
    (_, c_in, *size), c_out = x.shape, w.shape[0]
    seed, threshold = torch.tensor(1), OPS["activation_threshold"](x)
    x_bits, mask = OPS["pack_activation"](x, threshold)
    w_bits, alpha = OPS["quantize_weight"](w, "xnor")
    w_bits_t = OPS["transpose_weight"](w_bits, c_in, c_out)
    importance = OPS["row_importance"](g, "norm")
    rows, row_scale = OPS["select"](importance, seed, 8, "systematic", 1, 4)
    planes, s_row, z_row = OPS["quantize_rows"](g, alpha, rows, row_scale, seed, 9, BITS)
    lanes, s_channel, z_channel = OPS["quantize_channels"](g, rows, row_scale, None, None, seed, 10, BITS)
    to_input = (planes, w_bits_t, c_in, c_out, size, STRIDE, PADDING)
    acc, weight_sum = OPS["grad_input_product"](*to_input)
    to_weight = (lanes, x_bits, rows, c_in, c_out, "threshold", size, KERNEL, STRIDE, PADDING)
    acc_w, code_sum = OPS["grad_weight_product"](*to_weight)
    grad_hat = OPS["dequantize_grad_weight"](acc_w, code_sum, s_channel, z_channel, None, c_out)
    w_nhwc = w.contiguous(memory_format=torch.channels_last)
    arguments: dict[str, tuple[Any, ...]] = {
        "output_product": (x_bits, w_bits, c_in, c_out, "threshold", STRIDE, PADDING),
        "grad_input_product": to_input,
        "grad_weight_product": to_weight,
        "activation_threshold": (x,),
        "pack_activation": (x, threshold),
        "apply_mask": (x, mask),
        "quantize_weight": (w, "xnor"),
        "quantize_weight nhwc": (w_nhwc, "xnor"),
        "transpose_weight": (w_bits, c_in, c_out),
        "weight_gradient": (grad_hat, w, alpha, "xnor"),
        "weight_gradient nhwc": (grad_hat, w_nhwc, alpha, "xnor"),
        "row_importance": (g, "norm"),
        "select": (importance, seed, 8, "systematic", 1, 4),
        "quantize_rows": (g, alpha, rows, row_scale, seed, 9, BITS),
        "quantize_channels": (g, rows, row_scale, None, None, seed, 10, BITS),
        "dequantize_grad_input": (acc, weight_sum, s_row, z_row, rows, mask),
        "dequantize_grad_weight": (acc_w, code_sum, s_channel, z_channel, None, c_out),
    }
    return {name: (lambda n=name, a=args: OPS[n.split()[0]](*a)) for name, args in arguments.items()}


def measure_layer(c_in: int, c_out: int, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """ms of every operation; for the products also GMAC/s and how many times float32 is slower."""
    layout = torch.channels_last
    x = torch.randn(batch, c_in, size, size).relu().contiguous(memory_format=layout)
    g = torch.randn(batch, c_out, size, size).contiguous(memory_format=layout)
    w = torch.randn(c_out, c_in, *KERNEL)
    products = batch * size**2 * c_in * c_out * math.prod(KERNEL)
    baseline = float_convolution(x, w.contiguous(memory_format=layout), g)
    result: dict[str, Any] = {"layer": f"{c_in}-{c_out}@{size}"}
    for name, function in packed_operations(x, w, g).items():
        result[name] = {"ms": best_ms(function, repeats)}
        if name in baseline:
            float_ms = best_ms(baseline[name], max(2, repeats // 2))
            result[name] |= {"gmac_s": products / result[name]["ms"] / 1e6, "ratio": float_ms / result[name]["ms"]}
    return result


def report(results: list[dict[str, Any]]) -> None:
    """Two tables: products, then the milliseconds of everything else."""
    names = [name for name in results[0] if name != "layer"]
    products = [name for name in names if "ratio" in results[0][name]]
    print(f"{'GMAC/s (x float32)':<22}" + "".join(f"{name:>24}" for name in products))
    for result in results:
        cells = (f"{result[p]['gmac_s']:.0f} ({result[p]['ratio']:.1f}x)" for p in products)
        print(f"{result['layer']:<22}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"\n{'ms':<22}" + "".join(f"{result['layer']:>12}" for result in results))
    for name in names:
        print(f"{name:<22}" + "".join(f"{result[name]['ms']:>12.3f}" for result in results))


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of the native CPU kernels on VGG-16's 3x3 layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=cpu.supported_isas(), default=current_isa())
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with cpu.force_isa(options.isa):
        results = [measure_layer(*layer, options.batch, options.repeats) for layer in VGG16]
    report(results)
    if options.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "isa": options.isa}
        settings = {"threads": options.threads, "batch": options.batch, "repeats": options.repeats}
        options.json.write_text(json.dumps({**machine, **settings, "layers": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
