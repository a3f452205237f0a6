"""Activations to bits and back on a GPU."""

from __future__ import annotations

from torch import Tensor

from .. import packing
from ..operands import inner_size, nhwc_memory
from ..operations import Arguments, activation
from ..packing import WORD, ceil_div
from .codegen import Spec, spec
from .launch import PIXELS, ROWS, as_integers, kernel, launch, offset_type, pixel_grid, values
from .sums import mean_of_sums, sums_of_groups


@kernel(activation.activation_threshold)
def activation_threshold(a: Arguments, mean: Tensor) -> None:
    sums, sizes = sums_of_groups(a.x, mean.numel(), a.x.numel())
    made = spec("activation", code="threshold", offset=offset_type(a.x.numel(), sums.numel()))
    launch(made, "block_sums", [ceil_div(sums.numel(), ROWS)], values(a.x), sums, *sizes, BLOCKS=ROWS)
    mean_of_sums(sums, mean, *sizes[:3])


def _by_pixel(code: str, x: Tensor) -> tuple[Spec, tuple[int, int], tuple[int, int, int]]:
    """Spec, grid and sizes of a kernel that works on PIXELS pixels x one word of logical ``[N, C, *S]``."""
    pixels, channels = x.shape[0] * inner_size(x), x.shape[1]
    words = ceil_div(channels, WORD)
    made = spec("activation", code=code, offset=offset_type(x.numel(), pixels * words))
    return made, pixel_grid(pixels, channels), (pixels, channels, words)


@kernel(activation.pack_activation)
def pack_activation(a: Arguments, bits: Tensor, mask: Tensor) -> None:
    made, grid, sizes = _by_pixel("sign" if a.threshold is None else "threshold", a.x)
    operands, inner = (values(a.x), a.threshold, bits, mask), sizes[0] // max(a.groups, 1)
    launch(made, "pack_activation", grid, *operands, *sizes, inner, BY_CHANNEL=a.by_channel, PIXELS=PIXELS)


@kernel(activation.unpack_activation)
def unpack_activation(a: Arguments, x: Tensor) -> None:
    made, grid, sizes = _by_pixel(a.code, x)
    launch(made, "unpack_activation", grid, a.x_bits, x, *sizes, PIXELS=PIXELS)


@kernel(activation.apply_mask)
def apply_mask(a: Arguments, out: Tensor) -> None:
    made, grid, sizes = _by_pixel("sign", a.g)
    memory = as_integers(nhwc_memory(a.g)), a.mask, as_integers(packing.channels_last(out))
    launch(made, "apply_mask", grid, *memory, *sizes, PIXELS=PIXELS)


@kernel(activation.pack_bool)
def pack_bool(a: Arguments, words: Tensor) -> None:
    pixels, channels = a.mask.shape[0] * inner_size(a.mask), a.mask.shape[1]
    made = spec("float", offset=offset_type(a.mask.numel(), words.numel()))
    operands, sizes = (as_integers(nhwc_memory(a.mask)), words), (pixels, channels, words.shape[-1])
    launch(made, "pack_bool", pixel_grid(pixels, channels), *operands, *sizes, PIXELS=PIXELS)


@kernel(activation.unpack_bool)
def unpack_bool(a: Arguments, mask: Tensor) -> None:
    count = a.words.shape[-1]
    pixels = a.words.numel() // max(1, count)
    made = spec("float", offset=offset_type(mask.numel(), a.words.numel()))
    operands, sizes = (a.words, as_integers(packing.channels_last(mask))), (pixels, a.channels, count)
    launch(made, "unpack_bool", pixel_grid(pixels, a.channels), *operands, *sizes, PIXELS=PIXELS)
