"""The clock of the processor as a program sees it, from a chain of additions that each wait for the one before."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

from fqt_compile.kernels.codegen import find_compiler

CHAIN = 64  # additions per turn of the loop, whose own instructions run beside them
TURNS = 400_000
REPEATS = 7
# The empty assembly keeps the compiler from merging additions; each takes one cycle on every current processor.
ADD = 'x += y; __asm__ volatile("" : "+r"(x));'
SOURCE = f"""
extern "C" long chain(long turns, long y) {{
  long x = 0;
  for (long i = 0; i < turns; ++i) {{ {ADD * CHAIN} }}
  return x;
}}
"""


def clock_ghz() -> float:
    """10^9 cycles a second, the highest of a few tries; what another program takes away lowers a try."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "chain.cpp", Path(folder) / "chain.so"
        source.write_text(SOURCE)
        subprocess.run([*find_compiler(), "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        chain = ctypes.CDLL(str(library)).chain
        chain.argtypes, chain.restype = (ctypes.c_long, ctypes.c_long), ctypes.c_long
        best = 0.0
        for _ in range(REPEATS):
            start = time.perf_counter()
            chain(TURNS, 1)
            best = max(best, CHAIN * TURNS / (time.perf_counter() - start) / 1e9)
        return best
