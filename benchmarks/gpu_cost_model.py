"""The cost model of docs/gpu.md: clocks and bytes of packed products on paper, against bfloat16 tensor cores.

    python benchmarks/gpu_cost_model.py

Nothing here is measured. Every kernel is taken to reach the peak of what bounds it, arithmetic or memory, on both
sides; real kernels reach a part of it, and small ones are bound by launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fqt_compile.kernels.gpu_strategy import STRATEGIES, TILES, tile_clocks
from fqt_compile.kernels.packing import WORD, ceil_div

BITS = 4
KEEP = 0.25


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


def products(layer: Layer) -> dict[str, tuple[str, int, int, int, int]]:
    """Of every tap: kernel, rows and columns of the result, packed axis, bits of a code."""
    kept = kept_samples(layer)
    return {
        "output": ("conv_product", layer.samples * layer.out_positions, layer.out_channels, layer.channels, 1),
        "grad_input": ("conv_product", kept * layer.positions, layer.channels, layer.out_channels, BITS),
        "grad_weight": ("grad_weight_product", layer.out_channels, layer.channels, kept * layer.out_positions, BITS),
    }


def kept_samples(layer: Layer) -> int:
    return max(1, round(KEEP * layer.samples))


def product_bytes(layer: Layer) -> dict[str, float]:
    """Bits and codes read and int32 results written by every product."""
    kept = kept_samples(layer)
    kept_inputs, kept_outputs = (kept * size // layer.samples for size in (layer.inputs, layer.outputs))
    return {
        "output": (layer.inputs + layer.weights) / 8 + 4 * layer.outputs,
        "grad_input": (BITS * kept_outputs + layer.weights) / 8 + 4 * kept_inputs,
        "grad_weight": (BITS * kept_outputs + kept_inputs) / 8 + 4 * layer.weights,
    }


def pass_bytes(layer: Layer) -> float:
    """Bytes of packing, quantizing and scaling as passes of their own."""
    kept = kept_samples(layer)
    kept_inputs, kept_outputs = (kept * size // layer.samples for size in (layer.inputs, layer.outputs))
    pack = 2 * layer.inputs + layer.inputs / 4  # read bfloat16, write bits and mask
    quantize = 2 * (2 * 2 * kept_outputs + BITS * kept_outputs / 8)  # range, then codes; by rows and by channels
    scale = (4 + 2) * layer.outputs + 4 * kept_inputs + 4 * layer.inputs + 12 * layer.weights
    return pack + quantize + scale


def packed_seconds(layer: Layer, gpu: Gpu, strategy: str, *, fused: bool) -> float:
    """The same three products packed: arithmetic or memory of every kernel, one after the other.

    ``fused``: as if packing, quantizing and scaling were part of the neighbouring kernels; else as they are today, with
    the int32 products written and read once more.
    """
    total = 0.0
    moved = product_bytes(layer)
    for name, made in products(layer).items():
        arithmetic = layer.taps * product_seconds(strategy, *made, gpu)
        total += max(arithmetic, moved[name] / gpu.bandwidth)
    return total if fused else total + pass_bytes(layer) / gpu.bandwidth


def bfloat16_bytes(layer: Layer) -> int:
    return 2 * (layer.inputs + layer.outputs + layer.weights)


def print_operations() -> None:
    print("Operations and bytes of a training step's three products\n")
    print("| layer | bf16 GMAC | int8 GMAC | 32-bit counts, 10^9 | bf16 MB | packed MB today | packed MB fused |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for layer in LAYERS:
        macs = [layer.taps * m * n * k for _, m, n, k, _ in products(layer).values()]
        counts = sum(layer.taps * m * n * k * bits for _, m, n, k, bits in products(layer).values()) / 32
        fused = sum(product_bytes(layer).values())
        sizes = (3 * bfloat16_bytes(layer), fused + pass_bytes(layer), fused)
        cells = [f"{value / 1e9:.1f}" for value in (3 * layer.products, sum(macs), counts)]
        print(f"| {layer.name} | {' | '.join(cells)} | {' | '.join(f'{size / 1e6:.0f}' for size in sizes)} |")


def winning_channels(gpu: Gpu, taps: int, positions: int, *, fused: bool) -> str:
    """The channels C_i = C_o, powers of two from 32 to 4096, at which the better strategy beats bfloat16; batch 64."""
    wins = []
    for channels in (2**i for i in range(5, 13)):
        layer = Layer("", 64, channels, channels, positions, positions, taps)
        if min(packed_seconds(layer, gpu, s, fused=fused) for s in STRATEGIES) < bfloat16_seconds(layer, gpu):
            wins.append(str(channels))
    return " ".join(wins) or "none"


def main() -> None:
    print_operations()
    for gpu in GPUS:
        print(f"\n{gpu.name}: microseconds of the three products, on paper (b = {BITS}, keep = {KEEP})\n")
        print("| layer | bf16 | popcount | tensor-core | fused | bf16 / better | bf16 / fused |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for layer in LAYERS:
            bf16 = 1e6 * bfloat16_seconds(layer, gpu)
            ours = [1e6 * packed_seconds(layer, gpu, s, fused=False) for s in STRATEGIES]
            fused = 1e6 * min(packed_seconds(layer, gpu, s, fused=True) for s in STRATEGIES)
            cells = [f"{value:.0f}" for value in (bf16, *ours, fused)]
            print(f"| {layer.name} | {' | '.join(cells)} | {bf16 / min(ours):.2f} | {bf16 / fused:.2f} |")
    print("\nChannels C_i = C_o (powers of two, 32 to 4096) at which a layer wins, batch 64\n")
    print("| GPU | kernel, image | as today | fused |\n| --- | --- | --- | --- |")
    for gpu in GPUS:
        for taps, size in ((9, 56), (9, 14), (1, 14)):
            cells = [winning_channels(gpu, taps, size**2, fused=fused) for fused in (False, True)]
            side = math.isqrt(taps)
            print(f"| {gpu.name} | {side}x{side}, {size} px | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
