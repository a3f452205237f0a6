"""Which instruction sets kernels are compiled for, and which of them this machine runs.

``avx512``    VPOPCNTDQ counts 512 bits at once; VBMI and GFNI transpose bits (Ice Lake, Zen 4 and later)
``avx2``      counts by table look-up in 256-bit registers
``portable``  no flags: what every compiler targets by default
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

ENVIRONMENT = "FQT_COMPILE_ISA"


@dataclass(frozen=True, kw_only=True)
class Isa:
    """cpu_flags: what ``/proc/cpuinfo`` must list; compile_flags: what the compiler is told."""

    cpu_flags: frozenset[str] = frozenset()
    compile_flags: tuple[str, ...] = ()


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vpopcntdq", "gfni", "bmi2")
_AVX512_CPU = frozenset(_AVX512) - {"avx512vbmi", "avx512vpopcntdq"} | {"avx512vbmi", "avx512_vpopcntdq"}

ISAS = {
    "avx512": Isa(
        cpu_flags=_AVX512_CPU,
        # Tuned for anything else, GCC 12 keeps pointers of the innermost loops in vector registers (docs/adr/0010).
        compile_flags=(*(f"-m{flag}" for flag in _AVX512), "-mprefer-vector-width=512", "-mtune=haswell"),
    ),
    "avx2": Isa(cpu_flags=frozenset({"avx2", "popcnt"}), compile_flags=("-mavx2", "-mpopcnt")),
    "portable": Isa(),
}
"""Best first."""

_forced: str | None = None


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """CPU features, empty where they cannot be read (not Linux on x86-64): then only ``portable`` is used."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())


def supported_isas() -> list[str]:
    """Names of the instruction sets this CPU runs, best first; ``portable`` is always the last."""
    return [name for name, isa in ISAS.items() if isa.cpu_flags <= _cpu_flags()]


def _checked(name: str, source: str) -> str:
    if name not in supported_isas():
        raise ConfigError(f"{source}: got {name!r}; accepted on this CPU: {', '.join(supported_isas())}")
    return name


def current_isa() -> str:
    """The instruction set in use: `force_isa`, else ``FQT_COMPILE_ISA`` as it was at first, else the best one."""
    return _default() if _forced is None else _forced


@functools.cache  # every call of a kernel asks
def _default() -> str:
    wanted = os.environ.get(ENVIRONMENT)
    return _checked(wanted, ENVIRONMENT) if wanted else supported_isas()[0]


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set inside the block, in all threads (backward runs in another one)."""
    global _forced
    previous, _forced = _forced, _checked(name, "force_isa")
    try:
        yield
    finally:
        _forced = previous
