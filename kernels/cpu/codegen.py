"""Kernels from templates: render, compile with the system's C++ compiler, cache, load.

A library is one template rendered with the constants of the Python modules that define them, compiled for one
instruction set. Cached as ``<template>-<isa>-<key>.cpp`` (readable), ``.so`` and ``.sha256``, where the key hashes
source, flags, compiler and machine. A library whose checksum does not match is built again. The standard headers are
compiled once (``headers-<key>.h.gch``, 50 MB). Measurements (`cost`, `counting`) lie beside them.
Nothing here runs at import: the first call of an operation builds what it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import KernelBuildError
from .. import rendering
from ..cache import CACHE_ENVIRONMENT, cache_directory, locked, replacing, scratch
from ..rendering import PARAMETERS, PROGRAM_TEMPLATES
from .compiler import OPENMP, Command, find_compiler, has_openmp, run, version
from .isa import ISAS

TEMPLATES = rendering.TEMPLATES / "cpu"
# IEEE float32 as written: no contraction to fused multiply-add, no -ffast-math. The two -fno- flags only promise
# that nobody reads errno or the floating-point exception flags.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
HEADERS = "headers.h"
LAYOUT = "2"
"""Part of every name: raised when libraries of earlier versions must not be used. Those of 1 may have no threads."""

Parameters = tuple[tuple[str, Any], ...]
"""What a template is rendered with besides `PARAMETERS`; hashable, so that it can name a library."""

_libraries: dict[tuple[str, str, Parameters], ctypes.CDLL] = {}
_lock = threading.Lock()


def render(template: str, parameters: Parameters = ()) -> str:
    """The C++ source of a template; self-contained."""
    return rendering.environment(TEMPLATES).get_template(f"{template}.cpp").render(PARAMETERS | dict(parameters))


def rendered_sources(programs: Iterable[tuple[str, Parameters]] = ()) -> dict[str, str]:
    """Every kernel source by template name; those of pointwise programs are rendered for ``programs``."""
    paths = [path for path in sorted(TEMPLATES.glob("*.cpp")) if path.stem not in PROGRAM_TEMPLATES]
    sources = {path.stem: render(path.stem) for path in paths}
    return sources | {f"{template}-{i}": render(template, p) for i, (template, p) in enumerate(programs, 1)}


def _key(source: str, flags: tuple[str, ...], compiler: Command) -> str:
    parts = (LAYOUT, source, *flags, *compiler, version(compiler), platform.machine(), platform.system())
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:24]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(made: Path) -> bool:
    """Whether what was compiled is there, complete and unchanged; a truncated library would crash the loader.

    A checksum that cannot be read is none.
    """
    with contextlib.suppress(OSError):
        return made.with_suffix(".sha256").read_bytes() == _checksum(made).encode()
    return False


def _publish(part: Path, made: Path) -> None:
    """Move what was compiled to its place; until its checksum is there it counts as broken."""
    checksum = _checksum(part)
    os.replace(part, made)
    with replacing(made.with_suffix(".sha256")) as written:
        written.write_text(checksum)


@functools.cache
def _precompiled_headers(compiler: Command, flags: tuple[str, ...], directory: Path) -> tuple[str, ...]:
    """Flags with which the headers that every kernel includes are read as compiled once: half of a kernel's time.

    No flags where that fails. The compiled kernel is the same byte for byte.
    """
    text = (TEMPLATES / HEADERS).read_text()
    header = directory / f"headers-{_key(text, flags, compiler)}.h"
    precompiled = Path(f"{header}.gch")
    with contextlib.suppress(KernelBuildError), locked(header):
        if not _intact(precompiled):
            with replacing(header) as part:
                part.write_text(text)
            with scratch(header) as folder:
                made = folder / precompiled.name
                if not run([*compiler, *flags, "-x", "c++-header", str(header)], made).made:
                    header.unlink()
                    return ()
                _publish(made, precompiled)
        return ("-include", str(header))
    return ()


def _compile(compiler: Command, flags: tuple[str, ...], headers: tuple[str, ...], source: Path, output: Path) -> None:
    """Compile a source, twice if need be: without what was precompiled, or because the compiler was killed.

    Never without a flag: what a library can do must not depend on what went wrong once. Raises `KernelBuildError`.
    """
    first = run([*compiler, *flags, *headers, str(source)], output)
    if first.made:
        return
    again = run([*compiler, *flags, str(source)], output) if headers or first.killed else first
    if not again.made:
        raise again.error(source.name)
    if headers and not first.killed:  # they are broken; the next process makes them again
        Path(f"{headers[-1]}.gch").unlink(missing_ok=True)


def build(template: str, isa: str, parameters: Parameters = ()) -> Path:
    """The path of a template's library for one instruction set, compiled unless an intact one is cached."""
    compiler, source, directory = tuple(find_compiler()), render(template, parameters), cache_directory()
    flags = (*FLAGS, *ISAS[isa].compile_flags)

    def named(flags: tuple[str, ...]) -> Path:
        return directory / f"{template}-{isa}-{_key(source, flags, compiler)}.so"

    threaded = (*flags, OPENMP)
    if _intact(named(threaded)):
        return named(threaded)
    flags = threaded if has_openmp(compiler, directory) else flags
    library = named(flags)
    if _intact(library):
        return library
    headers = _precompiled_headers(compiler, flags, directory)
    with locked(library):
        if not _intact(library):
            with replacing(library.with_suffix(".cpp")) as part:
                part.write_text(source)
            with scratch(library) as folder:
                made = folder / library.name
                _compile(compiler, flags, headers, library.with_suffix(".cpp"), made)
                _publish(made, library)
    return library


def library(template: str, isa: str, parameters: Parameters = ()) -> ctypes.CDLL:
    """The loaded library of a template for an instruction set."""
    loaded = _libraries.get((template, isa, parameters))
    if loaded is not None:
        return loaded
    with _lock:
        if (template, isa, parameters) not in _libraries:
            _libraries[template, isa, parameters] = _loaded(build(template, isa, parameters))
        return _libraries[template, isa, parameters]


def _loaded(path: Path) -> ctypes.CDLL:
    """Load an intact library. One that cannot be loaded is removed, unless it is its folder that forbids it."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if _runs_no_code(path.parent) or ("failed to map segment" in str(error) and "memory" not in str(error)):
            raise KernelBuildError(
                f"{path}: the system runs no code from this directory ({error}; it may be mounted noexec); remedy: set "
                f"{CACHE_ENVIRONMENT} to a directory on a disk that allows execution"
            ) from error
        for file in (path.with_suffix(".sha256"), path):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        raise KernelBuildError(
            f"{path}: cannot be loaded ({error}) and is removed; remedy: try again, which compiles it anew; if that "
            'does not help, set CXX to another C++ compiler, or options={"lowering": "eager"}'
        ) from error


def _runs_no_code(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0))
    return False
