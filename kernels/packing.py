"""The bit convention, the word size and every packed layout. Nothing else defines them.

One convention: **a set bit is the larger of the two code values, a clear bit the smaller.**
``sign`` code: 1 -> +1, 0 -> -1. ``threshold`` code: 1 -> +1, 0 -> 0. Gradient plane p: 1 -> 2**p, 0 -> 0.
Words have 64 bits; bit j of word w holds element 64 w + j of the packed axis; tail bits are clear.

From it follow all popcount formulas (a: operand bits, w: weight bits, |.|: popcount, both tails clear)

    sum sign(x) sign(W)      = K - 2 |a ^ w|               K = number of in-image products
    sum threshold(x) sign(W) = |w| - |a ^ w|               since |a ^ w| = |a| + |w| - 2 |a & w|
    sum plane sign(W)        = |w| - |g ^ w|               the same formula
    sum plane threshold(x)   = |g & x|
    sum plane sign(x)        = 2 |g & x| - |g|             |g| over positions whose tap is in the image

so one xor kernel serves output and grad_input, and one and kernel serves grad_weight. Zero padding cannot
be expressed in bits: taps outside the image are skipped, never encoded.

Layouts (int64, contiguous; S = spatial axes, NHWC order; C_w = ceil(C / 64))

    rows      [N, *S, C_w]                         activations, masks, gradient planes [b, K, *S, C_w]
    panels    [ceil(C_o/16), *kernel, C_w, 16]     weights for the output: 16 output channels side by side
    panels_t  [ceil(C_i/16), *kernel, Co_w, 16]    the same bits along C_o, taps flipped, for grad_input
    lanes     [b, ceil(C/8), W, 8]                 gradient planes along positions m = (k, *S), W = ceil(m/64)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedInputError

WORD = 64
PANEL = 16
LANE_TILE = 8
INT16_LIMIT = 2**15 - 1


def output_dtype(products: int, narrow: bool) -> torch.dtype:
    """dtype of an output product of ``products`` terms +-1: int32, or int16 (``narrow``), half the memory traffic.

    Raises `UnsupportedInputError` where int16 cannot hold every sum.
    """
    if narrow and products > INT16_LIMIT:
        raise UnsupportedInputError(f"narrow output: got {products} products; accepted: at most {INT16_LIMIT}")
    return torch.int16 if narrow else torch.int32


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)``; works on symbolic sizes too."""
    return (a + b - 1) // b


def pack_bits(bits: Tensor) -> Tensor:
    """bool ``[..., C]`` -> int64 ``[..., ceil(C/64)]``."""
    channels = bits.shape[-1]
    words = ceil_div(channels, WORD)
    padded = F.pad(bits.to(torch.int64), (0, words * WORD - channels)).unflatten(-1, (words, WORD))
    return (padded << torch.arange(WORD, device=bits.device)).sum(-1)


def unpack_bits(words: Tensor, channels: int) -> Tensor:
    """int64 ``[..., ceil(C/64)]`` -> bool ``[..., C]``."""
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(-2)[..., :channels].to(torch.bool)


def channels_last(x: Tensor) -> Tensor:
    """Logical ``[N, C, *S]`` -> ``[N, *S, C]`` (a view)."""
    return x.movedim(1, -1)


def channels_second(x: Tensor) -> Tensor:
    """``[N, *S, C]`` -> logical ``[N, C, *S]`` whose memory order stays NHWC."""
    return x.movedim(-1, 1)


def stored_nhwc(x: Tensor) -> Tensor:
    """The same logical tensor, stored in NHWC order, as every operation returns images."""
    return channels_second(channels_last(x).contiguous())


def pack_rows(bits: Tensor) -> Tensor:
    """bool ``[N, C, *S]`` -> rows ``[N, *S, C_w]``."""
    return pack_bits(channels_last(bits))


def unpack_rows(rows: Tensor, channels: int) -> Tensor:
    """rows ``[N, *S, C_w]`` -> bool ``[N, C, *S]``."""
    return channels_second(unpack_bits(rows, channels))


def pack_panels(bits: Tensor) -> Tensor:
    """bool ``[C_o, C_i, *kernel]`` -> panels ``[ceil(C_o/16), *kernel, C_w, 16]``, missing channels clear."""
    words = pack_bits(channels_last(bits))
    count = ceil_div(words.shape[0], PANEL) * PANEL
    padded = torch.cat([words, words.new_zeros(count - words.shape[0], *words.shape[1:])])
    return padded.unflatten(0, (-1, PANEL)).movedim(1, -1).contiguous()


def unpack_panels(panels: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """panels -> bool ``[C_o, C_i, *kernel]``."""
    words = panels.movedim(-1, 1).flatten(0, 1)[:out_channels]
    return channels_second(unpack_bits(words, in_channels))


def pack_panels_t(bits: Tensor) -> Tensor:
    """bool ``[C_o, C_i, *kernel]`` -> panels_t: transposed channels, taps flipped in every spatial axis."""
    spatial = list(range(2, bits.dim()))
    return pack_panels(bits.transpose(0, 1).flip(spatial) if spatial else bits.transpose(0, 1))


def unpack_panels_t(panels_t: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """panels_t -> bool ``[C_o, C_i, *kernel]``."""
    bits = unpack_panels(panels_t, in_channels, out_channels).transpose(0, 1)
    spatial = list(range(2, bits.dim()))
    return bits.flip(spatial) if spatial else bits


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Integer codes ``[K, C, *S]`` -> row planes ``[b, K, *S, C_w]``."""
    return torch.stack([pack_rows((codes >> p) & 1 == 1) for p in range(bits)])


def unpack_planes(planes: Tensor, channels: int) -> Tensor:
    """Row planes -> int64 codes ``[K, C, *S]``."""
    return sum_planes([unpack_rows(plane, channels) for plane in planes])


def pack_lanes(codes: Tensor, bits: int) -> Tensor:
    """Integer codes ``[K, C, *S]`` -> lane planes ``[b, ceil(C/8), W, 8]``, packed along (k, *S)."""
    by_channel = codes.transpose(0, 1).flatten(1)
    count = ceil_div(by_channel.shape[0], LANE_TILE) * LANE_TILE
    padded = F.pad(by_channel, (0, 0, 0, count - by_channel.shape[0]))
    planes = [pack_bits((padded >> p) & 1 == 1).unflatten(0, (-1, LANE_TILE)) for p in range(bits)]
    return torch.stack(planes).transpose(2, 3).contiguous()


def unpack_lanes(lanes: Tensor, channels: int, rows: int, output_size: Sequence[int]) -> Tensor:
    """Lane planes -> int64 codes ``[K, C, *S]``."""
    words = lanes.transpose(2, 3).flatten(1, 2)[:, :channels]
    positions = rows * math.prod(output_size)
    codes = sum_planes([unpack_bits(plane, positions) for plane in words])
    return codes.unflatten(1, (rows, *output_size)).transpose(0, 1)


def sum_planes(planes: Sequence[Tensor]) -> Tensor:
    """``sum 2**p plane_p`` as int64."""
    total = planes[0].to(torch.int64)
    for p, plane in enumerate(planes[1:], start=1):
        total = total + (plane.to(torch.int64) << p)
    return total
