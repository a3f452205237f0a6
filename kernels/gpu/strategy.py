"""How a product is computed on a GPU, and in which tiles.

``popcount``     xor or and of 64-bit words and a population count: 16 counts of 32 bits per clock and
                 multiprocessor (NVIDIA, compute capability 8.0 and 9.0); b bit planes cost b times as much
``tensor-core``  bits and codes are unpacked in registers to int8 and multiplied by `tl.dot`: 2048 products per clock
                 (A100; twice that on H100), whatever the number of bits, but 4 integer operations per unpacked
                 bit (shift, mask, scale or add, and its share of converting and storing), of which 64 are done
                 per clock

The rule (`choose`): the strategy and the tile with the fewest estimated clocks of an A100 for the whole product. Codes
of 8 bits do not fit a signed byte, so they are always counted. ``FQT_COMPILE_GPU_STRATEGY`` or `force_strategy` fix the
strategy. ``FQT_COMPILE_AUTOTUNE=1`` lets Triton time all tiles of the chosen strategy on the first call of every shape.
docs/gpu.md derives the numbers; none has been measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import ConfigError
from ..packing import WORD, ceil_div
from .codegen import interpreted

ENVIRONMENT = "FQT_COMPILE_GPU_STRATEGY"
AUTOTUNE = "FQT_COMPILE_AUTOTUNE"
STRATEGIES = ("popcount", "tensor-core")
AUTO = "auto"
MAX_INT8_BITS = 7
COUNTS_PER_CLOCK = 16
PRODUCTS_PER_CLOCK = 2048
UNPACK_OPERATIONS = 4
OPERATIONS_PER_CLOCK = 64
MULTIPROCESSORS = 108


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that one program computes, with Triton's launch options."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


TILES = {
    ("conv_product", "popcount"): (Tile(64, 32), Tile(32, 32)),
    ("conv_product", "tensor-core"): (Tile(128, 128, 8), Tile(64, 64)),
    ("grad_weight_product", "popcount"): (Tile(64, 32, 8), Tile(32, 32)),
    ("grad_weight_product", "tensor-core"): (Tile(64, 128, 8), Tile(64, 64, 8)),
}
"""Tiles, which are also the autotuning configurations, by kernel and strategy."""

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


def tile_clocks(strategy: str, m: int, n: int, bits: int, products_per_clock: int = PRODUCTS_PER_CLOCK) -> float:
    """Clocks of one multiprocessor for an m x n tile and one word of 64 bits of the packed axis."""
    if strategy == "popcount":
        return bits * m * n * (WORD // 32) / COUNTS_PER_CLOCK
    unpack = (bits * m + n) * WORD * UNPACK_OPERATIONS / OPERATIONS_PER_CLOCK
    return unpack + m * n * WORD / products_per_clock


def _clocks(kernel: str, strategy: str, tile: Tile, rows: int, columns: int, bits: int) -> float:
    """Clocks for one word of the whole product. Tiles are computed whole, in rounds of one per multiprocessor.

    grad_weight_product also cuts the packed axis, so that its rounds are full.
    """
    tiles = ceil_div(rows, tile.m) * ceil_div(columns, tile.n)
    rounds = tiles / MULTIPROCESSORS if kernel == "grad_weight_product" else ceil_div(tiles, MULTIPROCESSORS)
    return rounds * tile_clocks(strategy, tile.m, tile.n, bits)


def choose(kernel: str, rows: int, columns: int, bits: int) -> tuple[str, Tile]:
    """Strategy and tile for a result of ``rows`` x ``columns`` from codes of ``bits`` bits."""
    wanted = _forced or _checked(os.environ.get(ENVIRONMENT) or AUTO, ENVIRONMENT)
    if bits > MAX_INT8_BITS:
        wanted = "popcount"
    candidates = [(s, tile) for s in STRATEGIES if wanted in (s, AUTO) for tile in TILES[kernel, s]]
    return min(candidates, key=lambda made: _clocks(kernel, made[0], made[1], rows, columns, bits))


def autotunes() -> bool:
    """Whether Triton times all tiles; never in the interpreter."""
    return os.environ.get(AUTOTUNE, "0") not in ("", "0") and not interpreted()
