"""What a core can do at most, measured: its clock, and the cycles of the three instructions of a packed product."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

from fqt_compile.kernels.cpu import isa
from fqt_compile.kernels.cpu.codegen import find_compiler

UNROLLED = 64  # operations per turn of a loop, whose own instructions run beside them
TURNS = 400_000
REPEATS = 7
# The empty assembly keeps the compiler from merging additions; each waits for the one before and takes one cycle on
# every current processor.
ADD = 'x += y; __asm__ volatile("" : "+r"(x));'
# Eight independent sums of popcount(a ^ b), in registers only.
COUNT = "".join(
    f"vpxorq %%zmm31, %%zmm30, %%zmm{8 + i}\\n vpopcntq %%zmm{8 + i}, %%zmm{8 + i}\\n"
    f"vpaddq %%zmm{8 + i}, %%zmm{i}, %%zmm{i}\\n"
    for i in range(8)
)
REGISTERS = ", ".join(f'"zmm{i}"' for i in range(16))
LOOP = """
extern "C" long run(long turns, long y) {{
  long x = 0;
  for (long i = 0; i < turns; ++i) {{ {body} }}
  return x;
}}
"""


def _best_seconds(body: str, *flags: str) -> float:
    """Seconds of one operation out of `UNROLLED` that make up ``body``, the best of a few tries: what another program
    takes away makes a try longer."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "loop.cpp", Path(folder) / "loop.so"
        source.write_text(LOOP.format(body=body))
        subprocess.run([*find_compiler(), "-O2", *flags, "-shared", "-fPIC", source, "-o", library], check=True)
        run = ctypes.CDLL(str(library)).run
        run.argtypes, run.restype = (ctypes.c_long, ctypes.c_long), ctypes.c_long
        best = float("inf")
        for _ in range(REPEATS):
            start = time.perf_counter()
            run(TURNS, 1)
            best = min(best, time.perf_counter() - start)
        return best / TURNS / UNROLLED


def clock_ghz() -> float:
    """10^9 cycles a second."""
    return 1e-9 / _best_seconds(ADD * UNROLLED)


def counts_per_second() -> float | None:
    """512-bit xor, popcount and addition: how often a second a core makes the three, when nothing waits for memory.

    None without AVX-512 VPOPCNTDQ.
    """
    if "avx512" not in isa.supported_isas():
        return None
    body = f'__asm__ volatile("{COUNT * (UNROLLED // 8)}" : : : {REGISTERS});'
    return 1 / _best_seconds(body, *isa.ISAS["avx512"].compile_flags)
