"""Which instruction sets kernels are compiled for, and which of them this machine runs.

``avx512``        VPOPCNTDQ counts 512 bits at once; VBMI and GFNI transpose bits (Ice Lake, Zen 4 and later)
``avx512tables``  as ``avx512``, but products by table look-up (docs/adr/0013)
``avx512bw``      products by table look-up in 512-bit registers (Skylake-X, Cascade Lake)
``avx2``          products by table look-up in 256-bit registers
``portable``      no flags: what every compiler targets by default
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

ENVIRONMENT = "FQT_COMPILE_ISA"


@dataclass(frozen=True, kw_only=True)
class Isa:
    """cpu_flags: what ``/proc/cpuinfo`` must list; compile_flags: what the compiler is told."""

    cpu_flags: frozenset[str] = frozenset()
    compile_flags: tuple[str, ...] = ()


_AVX512BW = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "popcnt")
_AVX512 = (*_AVX512BW, "avx512vbmi", "avx512vpopcntdq", "gfni", "bmi2")
_IN_CPUINFO = {"avx512vpopcntdq": "avx512_vpopcntdq"}


def _isa(*flags: str, more: tuple[str, ...] = ()) -> Isa:
    return Isa(
        cpu_flags=frozenset(_IN_CPUINFO.get(flag, flag) for flag in flags),
        compile_flags=(*(f"-m{flag}" for flag in flags), *more),
    )


# Tuned for anything else, GCC 12 keeps pointers of the innermost loops in vector registers (docs/adr/0010).
_WIDE = ("-mprefer-vector-width=512", "-mtune=haswell")

ISAS = {
    "avx512": _isa(*_AVX512, more=_WIDE),
    "avx512tables": _isa(*_AVX512, more=(*_WIDE, "-DFQT_TABLES")),
    "avx512bw": _isa(*_AVX512BW, more=_WIDE),
    "avx2": _isa("avx2", "popcnt"),
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
    return _default()[0] if _forced is None else _forced


def is_forced() -> bool:
    """Whether somebody asked for the instruction set in use."""
    return _forced is not None or _default()[1]


@functools.cache  # every call of a kernel asks
def _default() -> tuple[str, bool]:
    """What is used unless forced, and whether the environment says so."""
    wanted = os.environ.get(ENVIRONMENT)
    return (_checked(wanted, ENVIRONMENT), True) if wanted else (supported_isas()[0], False)


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set inside the block, in all threads (backward runs in another one)."""
    global _forced
    previous, _forced = _forced, _checked(name, "force_isa")
    try:
        yield
    finally:
        _forced = previous
