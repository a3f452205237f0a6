"""Which instruction set the products of gradients use on a CPU with a vector popcount.

Popcounts (``templates/cpu/tile_popcount.h``) take the planes of a code one after the other; tables
(``tile_tables.h``) take four at once, but are made for every row. Which is faster depends on the processor, so where
both run they are timed once, on one layer, and the answer is kept beside the compiled kernels. Results are the same,
bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import time
import warnings
from collections.abc import Callable

import torch

from ...errors import FQTWarning, KernelBuildError
from .. import cache, packing
from . import codegen
from .functions import Function, geometry
from .isa import ISAS, current_isa, is_forced

GRADIENT_PRODUCTS = frozenset({"grad_input_product", "grad_weight_product"})
CANDIDATES = ("avx512", "avx512tables")
"""Popcounts, tables."""
BATCH, CHANNELS, SIZE, BITS = 8, 128, 16, 4
REPEATS = 15

_lock = threading.Lock()


def isa_of(template: str) -> str:
    """The instruction set of a template's kernels: the current one, or what counts gradients faster than that.

    One that was asked for, with `force_isa` or ``FQT_COMPILE_ISA``, is used for everything.
    """
    isa = current_isa()
    if isa != CANDIDATES[0] or template not in GRADIENT_PRODUCTS or is_forced():
        return isa
    return _faster(torch.get_num_threads())


@functools.cache
def _faster(threads: int) -> str:
    """Read from the cache, or measured; popcounts, with a warning, where one cannot be compiled."""
    source, flags = codegen.render("grad_input_product"), [ISAS[isa].compile_flags for isa in CANDIDATES]
    parts = (cache.machine_name(), codegen.find_compiler(), threads, source, flags)
    path = cache.cache_directory() / f"counting-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"
    with _lock:
        known = cache.recalled(path)
        if isinstance(known, dict) and all(_is_duration(known.get(isa)) for isa in CANDIDATES):
            return min(CANDIDATES, key=known.__getitem__)
        try:
            measured = dict(zip(CANDIDATES, _seconds(threads), strict=True))
        except KernelBuildError as error:
            warnings.warn(
                f"products of gradients use popcounts, tables were not compared: {error}", FQTWarning, stacklevel=2
            )
            return CANDIDATES[0]
        cache.keep(path, measured)
    return min(CANDIDATES, key=measured.__getitem__)


def _is_duration(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _seconds(threads: int, isas: tuple[str, ...] = CANDIDATES) -> list[float]:
    """The shortest of some products of grad_input of a 3x3 layer, about a millisecond each, in turn."""
    products = [_product(isa, threads) for isa in isas]
    best = [float("inf")] * len(products)
    for _ in range(REPEATS):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def _product(isa: str, threads: int) -> Callable[[], None]:
    """grad_input's product for one instruction set, whatever others use meanwhile; called once."""
    words, image = packing.ceil_div(CHANNELS, packing.WORD), (SIZE, SIZE)
    integers = functools.partial(torch.zeros, dtype=torch.int64, device="cpu")
    planes = integers(BITS, BATCH, *image, words)
    panels = integers(packing.ceil_div(CHANNELS, packing.PANEL), 3, 3, words, packing.PANEL)
    sums, weight_sum = (torch.zeros(n, *image, CHANNELS, dtype=torch.int32, device="cpu") for n in (BATCH, 1))
    shape = geometry(
        batch=BATCH,
        words=words,
        channels=CHANNELS,
        input_size=image,
        output_size=image,
        kernel=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
    )
    function = Function("grad_input_product", "grad_input_product")

    def run() -> None:
        function.on(isa, threads, planes, BITS, panels, shape, CHANNELS, sums, weight_sum)

    run()
    return run
