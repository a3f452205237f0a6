"""Is a packed layer worth it on this machine? A model of one layer's step, calibrated once and cached.

Forward and both gradients of a layer take ``overhead + work / rate``: packed and in float. The two constants of each
come from timing two layers, a small and a large one, the first time they are asked for; they are kept beside the
compiled kernels, one file per machine, thread count, version and kernel sources. Used by ``skip=("slow",)`` only: what
is packed decides the numbers, and numbers should not depend on the machine unless that is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence

import torch

from .cache import cache_directory, keep, machine_name, recalled
from .cpu import codegen
from .cpu.isa import current_isa

SMALL = (2, 64, 64, 8)
LARGE = (16, 128, 128, 16)
"""Batch, channels in and out, image size of the two 3x3 layers that are timed."""
REPEATS = 15
FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Line:
    """``seconds = overhead + products / rate``."""

    overhead: float
    rate: float

    def seconds(self, products: float) -> float:
        return self.overhead + products / self.rate

    def checked(self) -> Line:
        """Itself; raises where it cannot have been measured."""
        if not (0 <= self.overhead < math.inf and 0 < abs(self.rate) < math.inf):
            raise ValueError("not a measurement")
        return self

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """The line through two (products, seconds) points; no overhead where it would be negative."""
        rate = (large[0] - small[0]) / max(large[1] - small[1], 1e-9)
        return cls(max(0.0, small[1] - small[0] / rate), rate)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a step of one layer with nothing pruned at one bit: three products, as packed bits and in float."""

    packed: Line
    float32: Line
    bfloat16: Line

    def packed_seconds(self, macs: float, bits: int, keep: float) -> float:
        """Forward at one bit, two gradients at ``bits`` on a part ``keep`` of the rows."""
        return self.packed.seconds(macs * (1 + 2 * bits * keep))

    def float_seconds(self, macs: float, dtype: str) -> float:
        line: Line = getattr(self, dtype)
        return line.seconds(3 * macs)


def costs() -> Costs:
    """The constants of this machine, measured the first time (about a second) and read from the cache later."""
    parts = (torch.__version__, current_isa(), torch.get_num_threads(), machine_name(), _sources())
    return _costs(hashlib.sha256(repr(parts).encode()).hexdigest()[:16])


@functools.cache
def _sources() -> str:
    return hashlib.sha256(repr(codegen.rendered_sources()).encode()).hexdigest()


@functools.cache
def _costs(key: str) -> Costs:
    path = cache_directory() / f"costs-{key}.json"
    with contextlib.suppress(TypeError, KeyError, ValueError):  # unreadable is absent
        saved = recalled(path)
        return Costs(**{name: Line(**saved[name]).checked() for name in ("packed", "float32", "bfloat16")})
    measured = Costs(
        packed=Line.through(_packed(SMALL), _packed(LARGE)),
        **{name: Line.through(_float(SMALL, dtype), _float(LARGE, dtype)) for name, dtype in FLOAT_DTYPES.items()},
    )
    keep(path, dataclasses.asdict(measured))
    return measured


def macs_of(output_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Products of one forward pass; a symbolic size counts as its current value."""
    return math.prod(int(s) for s in output_shape) * math.prod(int(s) for s in weight_shape[1:])


def _best(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _operands(layer: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    batch, c_in, c_out, size = layer
    random = torch.Generator().manual_seed(0)
    x = torch.rand(batch, size, size, c_in, generator=random).movedim(-1, 1)
    g = torch.randn(batch, size, size, c_out, generator=random).movedim(-1, 1)
    weight = torch.randn(c_out, 3, 3, c_in, generator=random).movedim(-1, 1)
    return x, g, weight, macs_of(g.shape, weight.shape)


def _packed(layer: tuple[int, int, int, int]) -> tuple[float, float]:
    from .cpu import OPERATIONS as run  # compiles kernels on the first call

    x, g, weight, macs = _operands(layer)
    _, c_in, c_out, size = layer
    geometry, bits, seed = ([1, 1], [1, 1]), 4, torch.tensor(1)
    rows = torch.arange(max(1, x.shape[0] // bits), dtype=torch.int32)

    def step() -> None:
        x_bits, mask = run["pack_activation"](x, run["activation_threshold"](x, "sample"))
        w_bits, alpha = run["quantize_weight"](weight, "xnor")
        run["output_product"](x_bits, w_bits, c_in, c_out, "threshold", *geometry)
        planes, s, z = run["quantize_rows"](g, alpha, rows, None, seed, 1, bits)
        w_bits_t = run["transpose_weight"](w_bits, c_in, c_out)
        acc, weight_sum = run["grad_input_product"](planes, w_bits_t, c_in, c_out, [size, size], *geometry)
        run["dequantize_grad_input"](acc, weight_sum, s, z, rows, mask)
        lanes, s, z = run["quantize_channels"](g, rows, None, None, None, seed, 2, bits)
        operands = (lanes, x_bits, rows, s, z, weight, alpha, "xnor", "threshold", [size, size])
        run["grad_weight"](*operands, *geometry)

    return macs * (1 + 2 * bits * rows.shape[0] / x.shape[0]), _best(step)


def _float(layer: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    x, g, weight, macs = _operands(layer)
    x, g, weight = x.to(dtype), g.to(dtype), weight.to(dtype)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def step() -> None:
        torch.ops.aten.convolution(x, weight, None, *geometry)
        torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [True, True, False])

    return 3 * macs, _best(step)
