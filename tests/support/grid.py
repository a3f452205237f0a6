"""The shapes, gradients and row choices that every kernel is compared on, and the operands made from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fqt_compile.kernels.operands import output_size
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE
from support import sample

OPERATIONS = [name for name in REFERENCE if name != "draw_seed"]
Call = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer where ``size`` is empty."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(output_size(self.size, self.kernel, self.stride, self.padding))  # type: ignore[arg-type]


LAYERS = [
    Layer("linear", 37, 130, 65),
    Layer("linear-one-row", 1, 7, 3),
    Layer("linear-large", 100, 130, 400),
    Layer("3x3-odd-channels", 3, 7, 65, (5, 4), (3, 3), (1, 1), (1, 1)),
    Layer("3x3-on-2x2", 37, 130, 7, (2, 2), (3, 3), (1, 1), (1, 1)),
    Layer("3x3-batch-100", 100, 7, 7, (2, 2), (3, 3), (1, 1), (1, 1)),
    Layer("3x3-large", 37, 65, 130, (6, 6), (3, 3), (1, 1), (1, 1)),
    Layer("3x3-many-positions", 3, 7, 9, (56, 56), (3, 3), (1, 1), (1, 1)),  # several pieces in grad_weight_product
    Layer("3x3-stride-2", 3, 65, 20, (7, 6), (3, 3), (2, 2), (1, 1)),
    Layer("3x3-no-padding", 1, 64, 16, (4, 5), (3, 3), (1, 1), (0, 0)),
    Layer("3x3-padding-2", 3, 20, 17, (3, 4), (3, 3), (1, 1), (2, 2)),
    Layer("3x3-padding-4", 3, 7, 16, (3, 3), (3, 3), (1, 1), (4, 4)),
    Layer("1x1", 37, 64, 64, (3, 3), (1, 1), (1, 1), (0, 0)),
    Layer("1x1-stride-2", 3, 65, 130, (5, 5), (1, 1), (2, 2), (0, 0)),
    Layer("5x5-larger-than-image", 3, 7, 9, (2, 3), (5, 5), (1, 1), (4, 4)),
    Layer("7x7-stride-2", 3, 7, 16, (9, 9), (7, 7), (2, 2), (3, 3)),
    Layer("2x2-stride-3", 3, 65, 7, (7, 8), (2, 2), (3, 3), (0, 0)),
    Layer("not-square", 3, 7, 20, (5, 9), (1, 3), (1, 2), (0, 1)),
    Layer("1-d", 3, 7, 65, (9,), (3,), (2,), (1,)),
    Layer("1-d-large-kernel", 37, 20, 7, (3,), (4,), (1,), (2,)),
    Layer("empty-batch", 0, 7, 20, (3, 3), (3, 3), (1, 1), (1, 1)),
    Layer("empty-linear", 0, 7, 20),
]

WIDE = [  # for the products only: output rows that grad_weight_product moves as a whole, or is too wide to
    Layer("8x8-some-taps-dense", 5, 150, 9, (8, 8), (3, 3), (1, 1), (1, 1)),
    Layer("9x14-more-taps-dense", 5, 300, 9, (9, 14), (3, 3), (1, 1), (1, 1)),
    Layer("14x14-pieces-of-dense-taps", 50, 300, 9, (14, 14), (3, 3), (1, 1), (1, 1)),
    Layer("9x14-pieces-of-dense-taps", 90, 300, 9, (9, 14), (3, 3), (1, 1), (1, 1)),
    Layer("no-padding", 3, 70, 9, (10, 13), (3, 3), (1, 1), (0, 0)),
    Layer("padding-4", 3, 150, 9, (8, 8), (3, 3), (1, 1), (4, 4)),
    Layer("stride-2", 5, 150, 9, (17, 18), (3, 3), (2, 2), (1, 1)),
    Layer("stride-3-2x2", 3, 70, 9, (25, 26), (2, 2), (3, 3), (1, 1)),
    Layer("1x1-stride-2", 3, 7, 9, (21, 19), (1, 1), (2, 2), (0, 0)),
    Layer("5x5-stride-1x2", 3, 7, 9, (8, 20), (5, 5), (1, 2), (2, 2)),
    Layer("64-wide", 3, 7, 9, (64, 64), (3, 3), (1, 1), (1, 1)),
    Layer("65-wide", 3, 7, 9, (65, 65), (3, 3), (1, 1), (1, 1)),
    Layer("63-from-65", 3, 7, 9, (65, 65), (3, 3), (1, 1), (0, 0)),
    Layer("1-d-wide", 37, 7, 9, (40,), (3,), (1,), (1,)),
    Layer("1-d-64-taps", 3, 7, 9, (60,), (64,), (1,), (20,)),
    # Blocks of 32 or 64 channels, with something missing, and sums longer than their first accumulators hold.
    Layer("block-and-a-panel", 9, 100, 97, (3, 3), (3, 3), (1, 1), (1, 1)),
    Layer("long-gradients", 9, 33, 4300),
    Layer("long-rows", 3, 32_700, 5),
]

KINDS = [  # of geometry; a run tests one layer of each
    ("linear", "linear-large"),
    ("linear-one-row",),
    ("3x3-odd-channels", "3x3-on-2x2", "3x3-batch-100"),
    ("3x3-large",),
    ("3x3-many-positions",),
    ("3x3-stride-2", "7x7-stride-2", "2x2-stride-3"),
    ("3x3-no-padding", "3x3-padding-2", "3x3-padding-4", "5x5-larger-than-image"),
    ("1x1", "1x1-stride-2"),
    ("not-square",),
    ("1-d", "1-d-large-kernel"),
    ("empty-batch", "empty-linear"),
    ("8x8-some-taps-dense", "9x14-more-taps-dense"),
    ("14x14-pieces-of-dense-taps", "9x14-pieces-of-dense-taps"),
    ("no-padding", "padding-4"),
    ("stride-2", "stride-3-2x2", "1x1-stride-2", "5x5-stride-1x2"),
    ("64-wide", "65-wide", "63-from-65"),
    ("1-d-wide", "1-d-64-taps"),
    ("block-and-a-panel",),
    ("long-gradients",),
    ("long-rows",),
]
PROGRAM_LAYERS = ("linear", "3x3-odd-channels", "3x3-large", "1x1", "1-d", "not-square")
"""Every program is a library to compile; these layers cover all paths."""
WITH_PROGRAMS = ("fused_activation", "fused_gradient", "gradient_moments", "max_pool_gradient")


def sampled(operation: str, layers: Sequence[Layer]) -> list[Layer]:
    """One layer of every kind, another one every day (`sample`), and those with programs for what takes programs."""
    if sample.everything():
        return list(layers)
    chosen = set(PROGRAM_LAYERS if operation in WITH_PROGRAMS else ())
    for kind in KINDS:
        members = [name for name in kind if name in {layer.name for layer in layers}]
        if members:
            chosen.add(sample.pick(" ".join(kind), members))
    return [layer for layer in layers if layer.name in chosen]


def seeded(layer: Layer) -> torch.Generator:
    return torch.Generator().manual_seed(sum(layer.name.encode()))


def gradients(g: Tensor) -> dict[str, Tensor]:
    """The gradient itself and the special ones."""
    made = {"normal": g, "zero": torch.zeros_like(g), "equal": torch.full_like(g, -0.25), "bfloat16": g.bfloat16()}
    made["minus-zero"] = torch.where(g > 0, g, g * 0)  # both +0 and -0
    made["channels-last"] = g.movedim(1, -1).contiguous().movedim(-1, 1)
    if g.numel():
        for name, value in (("nan", math.nan), ("inf", math.inf), ("tiny", 1e-42)):
            made[name] = g.clone()
            made[name].view(-1)[g.numel() // 2] = value
        made["subnormal"] = g * 1e-39
        made["huge"] = g * 1e38
        made["positive"], made["negative"] = g.abs() + 0.5, -g.abs() - 0.5
        made["rectified"], made["lopsided"] = g.relu(), torch.where(g > 0, g * 1e-4, g)
        made["one-entry"] = torch.zeros_like(g)
        made["one-entry"].view(-1)[g.numel() // 2] = -3.0
    return made


@dataclass(frozen=True)
class Operands:
    """Reference operands of one layer."""

    x: Tensor
    weight: Tensor
    g: Tensor
    rows: dict[str, tuple[Tensor, Tensor | None]]
    channels: dict[str, tuple[Tensor | None, Tensor | None]]
    seed: Tensor


@functools.cache
def operands(layer: Layer) -> Operands:
    random = seeded(layer)
    x = torch.randn(layer.batch, layer.in_channels, *layer.size, generator=random)
    weight = torch.randn(layer.out_channels, layer.in_channels, *layer.kernel, generator=random)
    weight.view(-1)[:2] = torch.tensor([0.0, -0.0])
    g = torch.randn(layer.batch, layer.out_channels, *layer.output, generator=random)
    seed = torch.tensor(123456789012345)
    importance = REFERENCE["row_importance"](g, "norm")
    by_channel = g.transpose(0, 1).flatten(1).norm(dim=1)
    rows = {p: REFERENCE["select"](importance, seed, 8, p, 1, 4) for p in ("systematic", "bernoulli", "none")}
    rows["unscaled"] = (rows["systematic"][0], None)
    rows["unused"] = (torch.full((2,), -1, dtype=torch.int32), torch.zeros(2))
    channels = {p: REFERENCE["select"](by_channel, seed, 9, p, 1, 2) for p in ("systematic", "bernoulli")}
    return Operands(x, weight, g, rows, {"all": (None, None), **channels}, seed)
