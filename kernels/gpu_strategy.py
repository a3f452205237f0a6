"""How a product is computed on a GPU, and in which tiles.

``popcount``     xor or and of 64-bit words and a population count: 16 counts of 32 bits per clock and
                 multiprocessor (NVIDIA, compute capability 8.0 and 9.0); b bit planes cost b times as much
``tensor-core``  bits and codes are unpacked in registers to int8 and multiplied by `tl.dot`: 1024 (A100) or 2048 (H100)
                 products per clock, whatever the number of bits, but 4 integer operations per unpacked
                 element, of which 64 are done per clock

The rule (`choose`): the strategy with fewer estimated clocks for one tile and one word of the packed axis. Codes of
8 bits do not fit a signed byte, so they are always counted. ``FQT_COMPILE_GPU_STRATEGY`` or `force_strategy` override
the rule. docs/gpu.md derives the numbers; none has been measured.

Tiles: the first of `TILES` is used unless ``FQT_COMPILE_AUTOTUNE=1`` lets Triton time all of them on the first call
of every shape.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ConfigError
from .gpu_codegen import interpreted

ENVIRONMENT = "FQT_COMPILE_GPU_STRATEGY"
AUTOTUNE = "FQT_COMPILE_AUTOTUNE"
STRATEGIES = ("popcount", "tensor-core")
AUTO = "auto"
MAX_INT8_BITS = 7
WORD = 64
COUNTS_PER_CLOCK = 16
PRODUCTS_PER_CLOCK = 1024
UNPACK_OPERATIONS = 4
OPERATIONS_PER_CLOCK = 64


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that one program computes, with Triton's launch options."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


TILES = {
    ("conv_product", "popcount"): (Tile(64, 32), Tile(32, 32), Tile(64, 64), Tile(128, 32, 8)),
    ("conv_product", "tensor-core"): (Tile(128, 128, 8), Tile(64, 64), Tile(128, 64), Tile(64, 128), Tile(128, 256, 8)),
    ("grad_weight_product", "popcount"): (Tile(32, 32), Tile(64, 32), Tile(64, 64)),
    ("grad_weight_product", "tensor-core"): (Tile(64, 64), Tile(128, 64), Tile(32, 64)),
}
"""Autotuning configurations by kernel and strategy; the default first."""

_forced: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in (*STRATEGIES, AUTO):
        raise ConfigError(f"{source}: got {name!r}; accepted: {', '.join((*STRATEGIES, AUTO))}")
    return name


@contextlib.contextmanager
def force_strategy(name: str) -> Iterator[None]:
    """Use one strategy inside the block wherever it is possible, in all threads."""
    global _forced
    previous, _forced = _forced, _checked(name, "force_strategy")
    try:
        yield
    finally:
        _forced = previous


def estimated_clocks(strategy: str, m: int, n: int, bits: int, products_per_clock: int = PRODUCTS_PER_CLOCK) -> float:
    """Clocks of one multiprocessor for an m x n tile and one word of 64 bits of the packed axis."""
    if strategy == "popcount":
        return bits * m * n * (WORD // 32) / COUNTS_PER_CLOCK
    unpack = (bits * m + n) * WORD * UNPACK_OPERATIONS / OPERATIONS_PER_CLOCK
    return unpack + m * n * WORD / products_per_clock


def choose(kernel: str, rows: int, columns: int, bits: int) -> str:
    """The strategy for a result of ``rows`` x ``columns`` from codes of ``bits`` bits."""
    if bits > MAX_INT8_BITS:
        return "popcount"
    wanted = _forced or _checked(os.environ.get(ENVIRONMENT) or AUTO, ENVIRONMENT)
    if wanted != AUTO:
        return wanted
    # Rows of a tile that lie outside the result cost as much as those inside.
    clocks = {}
    for strategy in STRATEGIES:
        tile = TILES[kernel, strategy][0]
        tiles = -(-rows // tile.m) * -(-columns // tile.n)
        clocks[strategy] = tiles * estimated_clocks(strategy, tile.m, tile.n, bits)
    return min(STRATEGIES, key=clocks.__getitem__)


def autotunes() -> bool:
    """Whether Triton times all tiles; never in the interpreter."""
    return os.environ.get(AUTOTUNE, "0") not in ("", "0") and not interpreted()
