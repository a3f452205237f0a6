"""The cost model of docs/gpu.md: clocks and bytes of packed products on paper, against bfloat16 tensor cores.

    python benchmarks/gpu_cost_model.py

Nothing here is measured. Every kernel is taken to reach the peak of what bounds it, arithmetic or memory, on both
sides; real kernels reach a part of it, and small ones are bound by launches. What both sides do between the products
alike (statistics of BatchNorm, float layers, the optimizer) is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fqt_compile.kernels.gpu.strategy import STRATEGIES, TILES, tile_clocks
from fqt_compile.kernels.packing import WORD, ceil_div

BITS = 4
KEEP = 0.25
LEVELS = ("separate", "today", "ideal")
"""What packing, quantizing and scaling move through memory.

separate    each is a pass of its own over all rows, as without the optimizing passes; the output is computed a second
            time for the backward
today       int16 outputs go straight to the bits of the next layer, read twice where the threshold is their mean (once
            with a threshold of channels, which is known; counted twice);
            below the choice of rows everything has the kept rows only, the output computed again included; one
            epilogue from the integer product to the weight gradient
ideal       only bits, codes and int32 results move, and nothing is computed again
"""


@dataclass(frozen=True)
class Gpu:
    """From the data sheets: multiprocessors, clock, dense products per clock and multiprocessor, bytes per second."""

    name: str
    multiprocessors: int
    clock: float
    bfloat16_products: int
    int8_products: int
    bandwidth: float


GPUS = (Gpu("A100", 108, 1.41e9, 1024, 2048, 2.04e12), Gpu("H100", 132, 1.83e9, 2048, 4096, 3.35e12))


@dataclass(frozen=True)
class Layer:
    """samples (or tokens), C_i, C_o, input and output positions of a sample, taps."""

    name: str
    samples: int
    channels: int
    out_channels: int
    positions: int
    out_positions: int
    taps: int

    @property
    def products(self) -> int:
        return self.samples * self.out_positions * self.taps * self.channels * self.out_channels

    @property
    def inputs(self) -> int:
        return self.samples * self.positions * self.channels

    @property
    def outputs(self) -> int:
        return self.samples * self.out_positions * self.out_channels

    @property
    def weights(self) -> int:
        return self.taps * self.channels * self.out_channels


LAYERS = (
    Layer("VGG-16 conv2_2, batch 64", 64, 128, 128, 112**2, 112**2, 9),
    Layer("VGG-16 conv4_2, batch 64", 64, 512, 512, 28**2, 28**2, 9),
    Layer("VGG-16 fc2, batch 64", 64, 4096, 4096, 1, 1, 1),
    Layer("ResNet-18 layer1, batch 128", 128, 64, 64, 56**2, 56**2, 9),
    Layer("ResNet-18 layer4, batch 128", 128, 512, 512, 7**2, 7**2, 9),
    Layer("ViT-B/16 mlp, batch 64", 64 * 197, 768, 3072, 1, 1, 1),
)


def bfloat16_seconds(layer: Layer, gpu: Gpu) -> float:
    """Output, grad_input and grad_weight, each bound by tensor cores or by its operands in bfloat16."""
    arithmetic = layer.products / (gpu.bfloat16_products * gpu.multiprocessors * gpu.clock)
    return 3 * max(arithmetic, bfloat16_bytes(layer) / gpu.bandwidth)


def product_seconds(strategy: str, kernel: str, rows: int, columns: int, packed: int, bits: int, gpu: Gpu) -> float:
    """Arithmetic of a packed product: whole tiles, words of 64 along the packed axis, the best tile."""
    clocks = min(
        ceil_div(rows, t.m) * ceil_div(columns, t.n) * tile_clocks(strategy, t.m, t.n, bits, gpu.int8_products)
        for t in TILES[kernel, strategy]
    )
    return clocks * ceil_div(packed, WORD) / (gpu.multiprocessors * gpu.clock)


def products(layer: Layer, level: str) -> dict[str, tuple[str, int, int, int, int]]:
    """Of every tap: kernel, rows and columns of the result, packed axis, bits of a code."""
    kept = kept_samples(layer)

    def output(samples: int) -> tuple[str, int, int, int, int]:
        return "conv_product", samples * layer.out_positions, layer.out_channels, layer.channels, 1

    made = {
        "output": output(layer.samples),
        "grad_input": ("conv_product", kept * layer.positions, layer.channels, layer.out_channels, BITS),
        "grad_weight": ("grad_weight_product", layer.out_channels, layer.channels, kept * layer.out_positions, BITS),
    }
    again = {"separate": {"again": output(layer.samples)}, "today": {"again": output(kept)}}
    return made | again.get(level, {})


def kept_samples(layer: Layer) -> int:
    return max(1, round(KEEP * layer.samples))


def kept_sizes(layer: Layer) -> tuple[int, int]:
    """Elements of the input and of the output of the kept rows."""
    kept = kept_samples(layer)
    return kept * layer.inputs // layer.samples, kept * layer.outputs // layer.samples


def product_bytes(layer: Layer, level: str) -> dict[str, float]:
    """Bits and codes read and results written by every product: int32, or int16 for outputs that stay in the graph."""
    kept_inputs, kept_outputs = kept_sizes(layer)
    again = {"separate": (layer.inputs, layer.outputs), "today": (kept_inputs, kept_outputs)}
    made = {
        "output": (layer.inputs + layer.weights) / 8 + (2 if level == "today" else 4) * layer.outputs,
        "grad_input": (BITS * kept_outputs + layer.weights) / 8 + 4 * kept_inputs,
        "grad_weight": (BITS * kept_outputs + kept_inputs) / 8 + 4 * layer.weights,
    }
    if level in again:
        inputs, outputs = again[level]
        made["again"] = (inputs + layer.weights) / 8 + 4 * outputs
    return made


def pass_bytes(layer: Layer, level: str) -> float:
    """Bytes of packing, quantizing and scaling outside the products."""
    kept_inputs, kept_outputs = kept_sizes(layer)
    if level == "ideal":
        return 0.0
    # By rows and by channels: a bfloat16 gradient for its range, for the codes, and by channels for their sums; or,
    # today, a float32 one without the first, since the ranges are measured where it is written.
    quantize = ((3 * 4 if level == "today" else 5 * 2) + 2 * BITS / 8) * kept_outputs
    bits = layer.inputs / 4  # and mask
    if level == "today":
        return 2 * 2 * layer.inputs + bits + quantize + (4 + 4) * kept_inputs + 4 * layer.weights
    scale = (4 + 2) * layer.outputs + 4 * kept_inputs + 4 * layer.inputs + 12 * layer.weights
    return 2 * layer.inputs + bits + quantize + scale


def packed_seconds(layer: Layer, gpu: Gpu, strategy: str, level: str) -> float:
    """The same three products packed: arithmetic or memory of every kernel, one after the other."""
    moved = product_bytes(layer, level)
    total = pass_bytes(layer, level) / gpu.bandwidth
    for name, made in products(layer, level).items():
        arithmetic = layer.taps * product_seconds(strategy, *made, gpu)
        total += max(arithmetic, moved[name] / gpu.bandwidth)
    return total


def better_seconds(layer: Layer, gpu: Gpu, level: str) -> float:
    return min(packed_seconds(layer, gpu, strategy, level) for strategy in STRATEGIES)


def bfloat16_bytes(layer: Layer) -> int:
    return 2 * (layer.inputs + layer.outputs + layer.weights)


def print_operations() -> None:
    print("Operations and bytes of a training step's three products, today\n")
    head = (
        "layer",
        "bf16 GMAC",
        "int8 GMAC",
        "32-bit counts, 10^9",
        "bf16 MB",
        *(f"packed MB {name}" for name in LEVELS),
    )
    print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for layer in LAYERS:
        made = products(layer, "today").values()
        macs = sum(layer.taps * m * n * k for _, m, n, k, _ in made)
        counts = sum(layer.taps * m * n * k * bits for _, m, n, k, bits in made) / 32
        sizes = [3 * bfloat16_bytes(layer)]
        sizes += [sum(product_bytes(layer, level).values()) + pass_bytes(layer, level) for level in LEVELS]
        cells = [f"{value / 1e9:.1f}" for value in (3 * layer.products, macs, counts)]
        print(f"| {layer.name} | {' | '.join(cells)} | {' | '.join(f'{size / 1e6:.0f}' for size in sizes)} |")


def winning_channels(gpu: Gpu, taps: int, positions: int, level: str) -> str:
    """The channels C_i = C_o, powers of two from 32 to 4096, at which the better strategy beats bfloat16; batch 64."""
    wins = []
    for channels in (2**i for i in range(5, 13)):
        layer = Layer("", 64, channels, channels, positions, positions, taps)
        if better_seconds(layer, gpu, level) < bfloat16_seconds(layer, gpu):
            wins.append(str(channels))
    return " ".join(wins) or "none"


def print_times(gpu: Gpu) -> None:
    print(f"\n{gpu.name}: microseconds of the three products, on paper (b = {BITS}, keep = {KEEP})\n")
    head = ("layer", "bf16", "separate", "popcount today", "tensor-core today", "ideal", "bf16 / today", "bf16 / ideal")
    print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for layer in LAYERS:
        bf16 = bfloat16_seconds(layer, gpu)
        separate, today, ideal = (better_seconds(layer, gpu, level) for level in LEVELS)
        ours = [packed_seconds(layer, gpu, strategy, "today") for strategy in STRATEGIES]
        cells = [f"{1e6 * value:.0f}" for value in (bf16, separate, *ours, ideal)]
        print(f"| {layer.name} | {' | '.join(cells)} | {bf16 / today:.2f} | {bf16 / ideal:.2f} |")


def main() -> None:
    print_operations()
    for gpu in GPUS:
        print_times(gpu)
    print("\nChannels C_i = C_o (powers of two, 32 to 4096) at which a layer wins, batch 64\n")
    print(f"| GPU | kernel, image | {' | '.join(LEVELS)} |\n| --- | --- |{' --- |' * len(LEVELS)}")
    for gpu in GPUS:
        for taps, size in ((9, 56), (9, 14), (1, 14)):
            cells = [winning_channels(gpu, taps, size**2, level) for level in LEVELS]
            side = math.isqrt(taps)
            print(f"| {gpu.name} | {side}x{side}, {size} px | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
