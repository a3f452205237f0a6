"""Triton operations on activations, weights and rows. Definitions: `reference_ops`; layouts: `packing`.

Departures from the CPU: nothing here waits for the device, so a mean that is not finite is not announced (use
``check_finite=True``), and an index of a row outside the tensor counts as unused instead of raising.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError
from . import native, packing, reference, reference_ops
from .cpu_forward import CODES, MODES, RULES, threshold_groups
from .gpu_codegen import Spec, spec
from .gpu_launch import as_integers, launch, offset_type, values
from .native import choice, indices, inner_size, nhwc_memory, vector
from .ops import empty_nhwc
from .packing import PANEL, WORD, ceil_div

PIXELS = 32
"""Pixels per program, of one word of channels each."""
ROWS = 4
"""Sums of 64 lanes per program."""
MEANS = 32
"""Sums of block sums per program."""
BLOCK = 1024
"""Elements per program."""


def check_finite(x: Tensor, where: str) -> Tensor:
    """Waits for the device: it raises."""
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    flat = x.contiguous()
    made = spec("activation", code="sign", offset=offset_type(x.numel()))
    launch(made, "count_non_finite", [ceil_div(x.numel(), BLOCK)], flat, count, x.numel(), BLOCK=BLOCK)
    if int(count):
        raise NonFiniteError(reference_ops.non_finite_message(where, int(count), x.numel()))
    return x.clone()


def activation_threshold(x: Tensor, rule: str) -> Tensor:
    by_sample = bool(choice("rule", rule, RULES))
    mean = x.new_empty([x.shape[0], 1] if by_sample else [], dtype=torch.float32)
    sums, sizes = sums_of_groups(x, mean.numel(), x.numel())
    made = spec("activation", code="threshold", offset=offset_type(x.numel(), sums.numel()))
    launch(made, "block_sums", [ceil_div(sums.numel(), ROWS)], values(x), sums, *sizes, BLOCKS=ROWS)
    mean_of_sums(sums, mean, *sizes[:3])
    return mean


def sums_of_groups(like: Tensor, groups: int, elements: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Memory for the sums of blocks; the number of groups, their blocks, the size of a group and of a block."""
    size = elements // max(groups, 1)
    blocks = ceil_div(size, reference.BLOCK)
    sizes = (groups, blocks, size, min(size, reference.BLOCK))
    return like.new_empty([groups, blocks], dtype=torch.float32), sizes


def mean_of_sums(sums: Tensor, mean: Tensor, groups: int, blocks: int, size: int) -> None:
    """Write the mean of every group of ``size`` elements, 0 of an empty one."""
    if not size:
        mean.zero_()
        return
    made = spec("activation", code="threshold", offset=offset_type(sums.numel()))
    launch(made, "mean_of_sums", [ceil_div(groups, MEANS)], sums, mean, groups, blocks, size, GROUPS=MEANS, warps=1)


def _by_pixel(code: str, x: Tensor) -> tuple[Spec, tuple[int, int], tuple[int, int, int]]:
    """Spec, grid and sizes of a kernel that works on PIXELS pixels x one word of logical ``[N, C, *S]``."""
    pixels, channels = x.shape[0] * inner_size(x), x.shape[1]
    words = ceil_div(channels, WORD)
    made = spec("activation", code=code, offset=offset_type(x.numel(), pixels * words))
    return made, (ceil_div(pixels, PIXELS), words), (pixels, channels, words)


def pack_activation(x: Tensor, threshold: Tensor | None, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    made, grid, sizes = _by_pixel("sign" if threshold is None else "threshold", x)
    shape = [x.shape[0], *x.shape[2:], sizes[-1]]
    bits, mask = (x.new_empty(shape, dtype=torch.int64) for _ in range(2))
    by_channel, groups = threshold_groups(threshold, x)
    inner = sizes[0] // max(groups, 1)
    operands, flags = (values(x), vector(threshold), bits, mask), {"BY_CHANNEL": by_channel, "PIXELS": PIXELS}
    launch(made, "pack_activation", grid, *operands, *sizes, inner, **flags)
    return bits, mask


def unpack_activation(x_bits: Tensor, channels: int, code: str) -> Tensor:
    choice("code", code, CODES)
    bits = native.words("x_bits", x_bits, channels)
    n, *spatial, _ = bits.shape
    x = empty_nhwc(bits, [n, channels, *spatial], torch.float32)
    made, grid, sizes = _by_pixel(code, x)
    launch(made, "unpack_activation", grid, bits, x, *sizes, PIXELS=PIXELS)
    return x


def apply_mask(g: Tensor, mask: Tensor) -> Tensor:
    n, channels, *spatial = g.shape
    keep = native.words("mask", mask, channels, [n, *spatial])
    out = empty_nhwc(g, g.shape, g.dtype)
    made, grid, sizes = _by_pixel("sign", g)
    memory = as_integers(nhwc_memory(g)), keep, as_integers(packing.channels_last(out))
    launch(made, "apply_mask", grid, *memory, *sizes, PIXELS=PIXELS)
    return out


# -- weights -------------------------------------------------------------------------------------------------


def _strides(weight: Tensor) -> tuple[int, int, int, int]:
    """Strides of output channels, input channels and two spatial axes, those that do not exist 0."""
    o, c, *spatial = weight.stride()
    height, width = [0] * (2 - len(spatial)) + spatial
    return o, c, height, width


def _weight_sizes(weight: Tensor) -> tuple[int, int, int, int]:
    """Output channels, input channels, taps and the width of the kernel."""
    out_channels, channels, *kernel = weight.shape
    return out_channels, channels, math.prod(kernel), native.pair(kernel, 1)[1]


def _extent(x: Tensor) -> int:
    """One more than the largest memory offset of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    choice("mode", mode, MODES)
    out_channels, channels, taps, width = _weight_sizes(weight)
    count, words = ceil_div(out_channels, PANEL), ceil_div(channels, WORD)
    panels = weight.new_empty([count, *weight.shape[2:], words, PANEL], dtype=torch.int64)
    made = spec("weight", mode=mode, offset=offset_type(_extent(weight), panels.numel()))
    places = (*_strides(weight), width)
    launch(made, "quantize_weight", [count, taps, words], weight, panels, out_channels, channels, taps, words, *places)
    if mode == "none":
        return panels, weight.new_ones(out_channels, dtype=torch.float32)
    scale = weight.new_empty(out_channels, dtype=torch.float32)
    sizes = (out_channels, channels, channels * taps)
    launch(made, "weight_scale", [ceil_div(out_channels, ROWS)], weight, scale, *sizes, *places, ROWS=ROWS)
    return panels, scale


def _taps(panels: Tensor) -> int:
    return math.prod(panels.shape[1:-2])


def transpose_weight(w_bits: Tensor, in_channels: int, out_channels: int) -> Tensor:
    panels = native.panels("w_bits", w_bits, out_channels, in_channels)
    words, out_words = ceil_div(in_channels, WORD), ceil_div(out_channels, WORD)
    panels_t = panels.new_empty([ceil_div(in_channels, PANEL), *panels.shape[1:-2], out_words, PANEL])
    made = spec("weight", mode="none", offset=offset_type(panels.numel(), panels_t.numel()))
    grid = (panels_t.shape[0], _taps(panels), out_words)
    launch(made, "transpose_weight", grid, panels, panels_t, out_channels, _taps(panels), words, out_words)
    return panels_t


def unpack_weight(w_bits: Tensor, weight_scale: Tensor, in_channels: int) -> Tensor:
    out_channels, taps, words = weight_scale.shape[0], _taps(w_bits), ceil_div(in_channels, WORD)
    panels = native.panels("w_bits", w_bits, out_channels, in_channels)
    weight = empty_nhwc(panels, [out_channels, in_channels, *panels.shape[1:-2]], torch.float32)
    made = spec("weight", mode="none", offset=offset_type(weight.numel()))
    sizes = (out_channels, in_channels, taps, words)
    grid = (panels.shape[0], taps, words)
    launch(made, "unpack_weight", grid, panels, vector(weight_scale), weight, *sizes)
    return weight


def weight_gradient(grad_hat: Tensor, weight: Tensor, weight_scale: Tensor, mode: str) -> Tensor:
    return _weight_gradient((values(grad_hat), None, None, None), weight, weight_scale, mode)


def weight_gradient_of_product(
    acc: Tensor,
    code_sum: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    mode: str,
) -> Tensor:
    """`weight_gradient` of ``dequantize_grad_weight`` of all channels, which is not written."""
    integers = (nhwc_memory(acc), nhwc_memory(code_sum))
    return _weight_gradient((*integers, vector(scale), vector(zero_point)), weight, weight_scale, mode)


def _weight_gradient(
    grad_hat: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    weight: Tensor,
    weight_scale: Tensor,
    mode: str,
) -> Tensor:
    """grad_hat: float32, or the integer product and code sum with scale and zero point."""
    choice("mode", mode, MODES)
    grad = torch.empty_like(weight, dtype=torch.float32)
    out_channels, channels, taps, width = _weight_sizes(weight)
    made = spec("weight", mode=mode, offset=offset_type(_extent(weight), _extent(grad)))
    operands = (*grad_hat, weight, vector(weight_scale), grad)
    sizes, places = (out_channels, channels, channels * taps), (*_strides(weight), *_strides(grad), width)
    flags = {"PRODUCT": grad_hat[1] is not None, "ROWS": ROWS}
    launch(made, "weight_gradient", [ceil_div(out_channels, ROWS)], *operands, *sizes, *places, **flags)
    return grad


# -- moving rows ---------------------------------------------------------------------------------------------


def _row_spec(*tensors: Tensor) -> Spec:
    return spec("rows", offset=offset_type(*(x.numel() for x in tensors)))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    out, size = empty_nhwc(x, [rows.shape[0], *x.shape[1:]], x.dtype), math.prod(x.shape[1:])
    memory = as_integers(nhwc_memory(x)), indices(rows), as_integers(packing.channels_last(out))
    grid = (rows.shape[0], ceil_div(size, BLOCK))
    launch(_row_spec(x, out), "gather_rows", grid, *memory, x.shape[0], size, BLOCK=BLOCK)
    return out


def gather_words(words: Tensor, rows: Tensor) -> Tensor:
    memory, size = words.contiguous(), math.prod(words.shape[1:])
    out = words.new_empty([rows.shape[0], *words.shape[1:]])
    grid = (rows.shape[0], ceil_div(size, BLOCK))
    operands = (memory, indices(rows), out)
    launch(_row_spec(memory, out), "gather_rows", grid, *operands, words.shape[0], size, BLOCK=BLOCK)
    return out


def scatter_rows(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    full, inner = empty_nhwc(kept, [size, *kept.shape[1:]], kept.dtype).zero_(), math.prod(kept.shape[1:])
    memory = as_integers(nhwc_memory(kept)), indices(rows), as_integers(packing.channels_last(full))
    grid = (kept.shape[0], ceil_div(inner, BLOCK))
    launch(_row_spec(kept, full), "scatter_rows", grid, *memory, size, inner, BLOCK=BLOCK)
    return full


def prune_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    """Returned with the strides of ``g``; a row may be stored in any order, since it is scaled as a whole."""
    pruned, size = torch.zeros_like(g), math.prod(g.shape[1:])
    in_order = g.is_contiguous() or packing.channels_last(g).is_contiguous()
    memory = g if in_order else values(g)
    out = pruned if in_order else torch.zeros_like(memory)
    sizes, grid = (g.shape[0], size), (rows.shape[0], ceil_div(size, BLOCK))
    launch(_row_spec(g), "prune_rows", grid, memory, indices(rows), vector(row_scale), out, *sizes, BLOCK=BLOCK)
    return pruned if in_order else pruned.copy_(packing.channels_second(out))


def keep_rows(g: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    out, size = empty_nhwc(g, [rows.shape[0], *g.shape[1:]], g.dtype), math.prod(g.shape[1:])
    operands = (values(g), indices(rows), vector(row_scale), packing.channels_last(out))
    grid = (rows.shape[0], ceil_div(size, BLOCK))
    launch(_row_spec(g, out), "keep_rows", grid, *operands, g.shape[0], size, BLOCK=BLOCK)
    return out
