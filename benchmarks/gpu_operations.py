"""The operations of one training step of a layer, with operands: what `gpu_check.py` compares on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fqt_compile.kernels import program
from fqt_compile.kernels.operands import output_size
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE

Call = tuple[str, tuple[Any, ...]]
BATCH_NORM = "full,channel,channel,channel,channel|t0=mul(x0,x1)|t1=sub(t0,x2)|t2=div(t1,x3)|t3=add(t2,x4)|t4=relu(t3)"
POOLED = "full,channel,channel|t0=mul(x0,x1)|t1=pool(t0)|t2=add(t1,x2)|t3=relu(t2)"
RESIDUAL = "full,full,channel|t0=mul(x0,x2)|t1=add(t0,x1)|t2=bfloat16(t1)|t3=maximum(t2,-1.0)"
DEQUANTIZED = "full,row,map,row,bits|t0=mul(x1,x0)|t1=mul(x3,x2)|t2=add(t0,t1)|t3=where(x4,t2,0.0)"
MASKED = "full,full,channel,channel,bits|t0=mul(x1,x2)|t1=sub(t0,x3)|t2=add(x0,t1)|t3=where(x4,0.0,t2)"


@dataclass(frozen=True)
class Layer:
    name: str
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...] = ()
    kernel: int = 3
    stride: int = 1

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding per spatial axis."""
        spatial = len(self.size)
        return [self.kernel] * spatial, [self.stride] * spatial, [self.kernel // 2] * spatial


LAYERS = (
    Layer("VGG-16 conv2_2", 16, 128, 128, (112, 112)),
    Layer("ResNet-18 layer1", 32, 64, 64, (56, 56)),
    Layer("ResNet-18 layer3 stride 2", 64, 128, 256, (28, 28), stride=2),
    Layer("VGG-16 conv5_1", 64, 512, 512, (14, 14)),
    Layer("odd sizes", 37, 130, 77, (29, 31)),
    Layer("VGG-16 fc2", 256, 4096, 4096),
    Layer("ViT-B/16 mlp", 32 * 197, 768, 3072),
)
TINY_LAYERS = (Layer("tiny convolution", 3, 40, 20, (5, 4), stride=2), Layer("tiny linear", 9, 70, 33))


def operation_calls(layer: Layer, bits: int = 4) -> Iterator[Call]:
    """Operations with the operands of one training step of a layer, made by the reference on the CPU."""
    kernel, stride, padding = layer.geometry
    random = torch.Generator().manual_seed(1)
    x = torch.randn(layer.batch, layer.channels, *layer.size, generator=random)
    weight = torch.randn(layer.out_channels, layer.channels, *kernel, generator=random)
    out_size = output_size(layer.size, kernel, stride, padding)
    g = torch.randn(layer.batch, layer.out_channels, *map(int, out_size), generator=random)
    seed = torch.tensor(987654321)
    yield "check_finite", (x, layer.name)
    for rule in ("sample", "batch"):
        yield "activation_threshold", (x, rule)
    yield "activation_threshold", (x.bfloat16(), "sample")
    threshold = REFERENCE["activation_threshold"](x, "sample")
    for t in (None, threshold, REFERENCE["activation_threshold"](x, "batch"), x.mean((0, *range(2, x.dim())))[None]):
        yield "pack_activation", (x, t)
    x_bits, mask = REFERENCE["pack_activation"](x, threshold)
    yield "unpack_activation", (x_bits, layer.channels, "sign")
    yield "apply_mask", (x, mask)
    for mode in ("xnor", "none"):
        yield "quantize_weight", (weight, mode)
    w_bits, scale = REFERENCE["quantize_weight"](weight, "xnor")
    channels = (layer.channels, layer.out_channels)
    yield "transpose_weight", (w_bits, *channels)
    w_bits_t = REFERENCE["transpose_weight"](w_bits, *channels)
    yield "unpack_weight", (w_bits, scale, layer.channels)
    for mode in ("xnor", "none"):
        yield "weight_gradient", (weight * 0.1, weight, scale, mode)
    for code in ("sign", "threshold"):
        yield "output_product", (x_bits, w_bits, *channels, code, stride, padding)
    yield "output_product", (x_bits, w_bits, *channels, "threshold", stride, padding, True)
    acc = REFERENCE["output_product"](x_bits, w_bits, *channels, "threshold", stride, padding, True)
    yield from between_calls(layer, acc, g, scale)
    importance = REFERENCE["row_importance"](g, "norm")
    rows = REFERENCE["select"](importance, seed, 3, "systematic", 1, 4)
    yield from row_calls(x, g, x_bits, importance, seed, *rows)
    yield from gradient_calls(layer, (x_bits, mask), (weight, scale, w_bits_t), (g, *rows), seed, bits)


def row_calls(
    x: Tensor, g: Tensor, x_bits: Tensor, importance: Tensor, seed: Tensor, rows: Tensor, row_scale: Tensor
) -> Iterator[Call]:
    """Choosing rows and moving them."""
    for kind in ("norm", "range", "uniform"):
        yield "row_importance", (g, kind)
    for prune in ("systematic", "bernoulli", "topk"):
        yield "select", (importance, seed, 3, prune, 1, 4)
    for kind in ("norm", "range"):
        yield "channel_importance", (g, rows, row_scale, kind)
    yield "prune_rows", (g, rows, row_scale)
    yield "keep_rows", (g, rows, row_scale)
    yield "keep_rows", (g.bfloat16(), rows, row_scale)
    yield "gather_words", (x_bits, rows)
    yield "gather_rows", (x, rows)
    kept = REFERENCE["gather_rows"](x, rows)
    yield "scatter_rows", (kept, rows, x.shape[0])


def gradient_calls(
    layer: Layer,
    activation: tuple[Tensor, Tensor],
    packed_weight: tuple[Tensor, Tensor, Tensor],
    gradient: tuple[Tensor, Tensor, Tensor],
    seed: Tensor,
    bits: int,
) -> Iterator[Call]:
    """Quantizing a gradient, the two products, and back to float."""
    kernel, stride, padding = layer.geometry
    channels = (layer.channels, layer.out_channels)
    (x_bits, mask), (weight, scale, w_bits_t), (g, rows, row_scale) = activation, packed_weight, gradient
    by_row = (g, scale, rows, row_scale, seed, 5, bits)
    by_channel = (g, rows, row_scale, None, None, seed, 6, bits)
    yield "quantize_rows", by_row
    yield "quantize_channels", by_channel
    for few in (bits, 1):  # without zero on the grid, and where one bit has no room for it
        yield "quantize_rows", (*by_row[:-1], few, False, None, few == 1)
        yield "quantize_channels", (*by_channel[:-1], few, False, None, few == 1)
    kept_g = REFERENCE["keep_rows"](g, rows, row_scale)
    yield "quantize_rows", (kept_g, scale, rows, None, seed, 5, bits, True)
    yield "quantize_channels", (kept_g, rows, None, None, None, seed, 6, bits, True)
    ranges = REFERENCE["fused_gradient"]([kept_g], "full|t0=mul(x0,1.0)", True, scale)[1:]
    yield "quantize_rows", (kept_g, scale, rows, None, seed, 5, bits, True, ranges[0])
    yield "quantize_channels", (kept_g, rows, None, None, None, seed, 6, bits, True, ranges[1])
    planes, s, z = REFERENCE["quantize_rows"](*by_row)
    yield "dequantize_rows", (planes, s, z, rows, layer.out_channels, layer.batch)
    yield "grad_input_product", (planes, w_bits_t, *channels, list(layer.size), stride, padding)
    acc = REFERENCE["grad_input_product"](planes, w_bits_t, *channels, list(layer.size), stride, padding)
    for compact in (False, True):
        yield "dequantize_grad_input", (*acc, s, z, rows, mask, compact)
    lanes, s, z = REFERENCE["quantize_channels"](*by_channel)
    for code in ("sign", "threshold"):
        sizes = (list(g.shape[2:]), kernel, stride, padding)
        product = (lanes, x_bits, rows, *channels, code, *sizes)
        yield "grad_weight_product", product
        mode = "xnor" if code == "sign" else "none"
        yield "grad_weight", (lanes, x_bits, rows, s, z, weight, scale, mode, code, sizes[0], stride, padding)
    yield "dequantize_grad_weight", (*REFERENCE["grad_weight_product"](*product), s, z, None, layer.out_channels)


def between_calls(layer: Layer, acc: Tensor, g: Tensor, scale: Tensor) -> Iterator[Call]:
    """Operations between two products: statistics, pointwise programs to bits, masks, max-pooling."""
    random = torch.Generator().manual_seed(2)
    bias, center, width, shift = (torch.rand(layer.out_channels, generator=random) + 0.5 for _ in range(4))
    largest = layer.channels * layer.kernel ** len(layer.size)
    for b in (None, bias):
        yield "channel_moments", (acc, scale, b, largest)
        yield "gradient_moments", ([acc, g], program.SECOND, scale, b, center)
    for y in (g, g.bfloat16()):
        yield "float_moments", (y,)
        yield "gradient_moments", ([y, g], program.SECOND, None, None, center)
    operands = [acc, scale, center, width, shift]
    for code, values, below in (("sign", False, True), ("threshold", True, False), ("threshold", False, True)):
        yield "fused_activation", (operands, BATCH_NORM, code, [], values, below)
    for t, rule in ((None, "batch"), (center[None] - 0.5, "sample")):
        yield "fused_activation", (operands, BATCH_NORM, "threshold", [], False, True, None, t, rule)
    yield "fused_activation", ([acc, g.bfloat16(), scale], RESIDUAL, "threshold", [], True, True)
    yield "pack_bool", (g > 0,)
    mask = REFERENCE["pack_bool"](g > 0)
    yield "unpack_bool", (mask, layer.out_channels)
    for measure, factor in ((True, scale), (True, None), (False, None)):
        yield "fused_gradient", ([g, acc, scale, center, mask], MASKED, measure, factor)
    by_row, by_map = [g.flatten(1).mean(1), g.flatten(1).amax(1)], (g[:1] * 7).to(torch.int32)
    dequantized = [acc, by_row[0], by_map, by_row[1], mask]
    yield "fused_gradient", (dequantized, DEQUANTIZED, True, scale)
    yield "gradient_moments", (dequantized, DEQUANTIZED, scale, None, center)
    if len(layer.size) != 2:
        return
    y = (acc.float() * scale.view(1, -1, 1, 1)).relu()  # many ties
    for window in ([2, 2, 2, 2, 0, 0], [3, 3, 2, 2, 1, 1]):
        for t in (None, shift[None]):
            yield "fused_activation", ([acc, scale, shift], POOLED, "threshold", window, False, True, None, t)
        pool = window[:2], window[2:4], window[4:6]
        grad = torch.randn(*y.shape[:2], *output_size(y.shape[2:], *pool), generator=random)
        yield "max_pool_gradient", (grad, [y], program.VALUES, *pool)
        yield "max_pool_gradient", (grad, [acc, scale], "full,channel|t0=mul(x0,x1)|t1=relu(t0)", *pool)
