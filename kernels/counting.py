"""Which instruction set the products of gradients use on a CPU with a vector popcount.

Popcounts (``templates/tile_popcount.h``) take the planes of a code one after the other; tables (``tile_tables.h``) take
four at once, but are made for every row. Which is faster depends on the processor, so where both run they are timed
once, on one layer, and the answer is kept beside the compiled kernels. Results are the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time

import torch

from . import codegen, packing
from .isa import ISAS, current_isa, force_isa, is_forced

GRADIENT_PRODUCTS = frozenset({"grad_input_product", "grad_weight_product"})
CANDIDATES = ("avx512", "avx512bw")
"""Popcounts, tables."""
BATCH, CHANNELS, SIZE, BITS = 8, 128, 16, 4
REPEATS = 9


def isa_of(template: str) -> str:
    """The instruction set of a template's kernels: the current one, or what counts gradients faster than that.

    One that was asked for, with `force_isa` or ``FQT_COMPILE_ISA``, is used for everything.
    """
    isa = current_isa()
    if isa != CANDIDATES[0] or template not in GRADIENT_PRODUCTS or is_forced():
        return isa
    return _faster()


@functools.cache
def _faster() -> str:
    sources = [codegen.render(template) for template in sorted(GRADIENT_PRODUCTS)]
    flags = [ISAS[isa].compile_flags for isa in CANDIDATES]
    key = hashlib.sha256(repr((codegen.machine_name(), sources, flags)).encode()).hexdigest()[:16]
    path = codegen.cache_directory() / f"counting-{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text())
        return min(CANDIDATES, key=lambda isa: float(known[isa]))
    measured = {isa: _seconds(isa) for isa in CANDIDATES}
    with codegen.replacing(path) as part:
        part.write_text(json.dumps(measured))
    return min(CANDIDATES, key=measured.__getitem__)


def _seconds(isa: str) -> float:
    """The shortest of some calls of grad_input's product of a 3x3 layer: about a millisecond each."""
    from .cpu import OPERATIONS as run  # which calls kernels, whose instruction set is asked for here

    words = packing.ceil_div(CHANNELS, packing.WORD)
    planes = torch.zeros(BITS, BATCH, SIZE, SIZE, words, dtype=torch.int64)
    panels = torch.zeros(packing.ceil_div(CHANNELS, packing.PANEL), 3, 3, words, packing.PANEL, dtype=torch.int64)
    best = float("inf")
    with force_isa(isa):
        for _ in range(REPEATS):
            start = time.perf_counter()
            run["grad_input_product"](planes, panels, CHANNELS, CHANNELS, [SIZE, SIZE], [1, 1], [1, 1])
            best = min(best, time.perf_counter() - start)
    return best
