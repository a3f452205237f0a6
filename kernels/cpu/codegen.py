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
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import CompilerMissingError, KernelBuildError
from .. import rendering
from ..cache import cache_directory, replacing
from ..rendering import PARAMETERS, PROGRAM_TEMPLATES
from .isa import ISAS

TEMPLATES = rendering.TEMPLATES / "cpu"
COMPILERS = ("c++", "g++", "clang++")
OPENMP = "-fopenmp"
# IEEE float32 as written: no contraction to fused multiply-add, no -ffast-math. The two -fno- flags only promise
# that nobody reads errno or the floating-point exception flags.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
HEADERS = "headers.h"
OUTPUT_LINES = 12
"""Lines of compiler output in an error message."""

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


def find_compiler() -> list[str]:
    """The compiler's command: ``$CXX``, else the first of c++, g++, clang++ on PATH."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    looked_for = f"CXX={wanted[0]!r}, which does not exist" if wanted else f"{', '.join(COMPILERS)} on PATH, found none"
    raise CompilerMissingError(
        f"native kernels need a C++ compiler: looked for {looked_for}; remedy: install g++, set CXX to a C++ "
        'compiler, or run without native kernels, options={"lowering": "eager"}'
    )


@functools.cache
def _compiler_version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


def _key(source: str, flags: tuple[str, ...], compiler: list[str]) -> str:
    parts = (source, *flags, *compiler, _compiler_version(tuple(compiler)), platform.machine(), platform.system())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(library: Path) -> bool:
    """Whether the library is there, complete and unchanged; a truncated one would crash the loader."""
    checksum = library.with_suffix(".sha256")
    with contextlib.suppress(FileNotFoundError):
        return checksum.read_text() == _checksum(library)
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time builds a library; where locks do not exist they build it several times."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Iterable[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), capture_output=True, text=True, check=False)


@functools.cache
def _precompiled_headers(compiler: tuple[str, ...], flags: tuple[str, ...], directory: Path) -> tuple[str, ...]:
    """Flags with which the headers that every kernel includes are read as compiled once: half of a kernel's time.

    No flags where that fails. The compiled kernel is the same byte for byte.
    """
    text = (TEMPLATES / HEADERS).read_text()
    header = directory / f"headers-{_key(text, flags, list(compiler))}.h"
    precompiled = Path(f"{header}.gch")
    with _locked(header.with_suffix(".lock")):
        if not precompiled.exists():
            with replacing(header) as part:
                part.write_text(text)
            with contextlib.suppress(_NotPrecompiled), replacing(precompiled) as part:
                if _run([*compiler, *flags, "-x", "c++-header", str(header), "-o", str(part)]).returncode:
                    raise _NotPrecompiled
    return ("-include", str(header)) if precompiled.exists() else ()


class _NotPrecompiled(Exception):
    """The compiler has no precompiled headers."""


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, output: Path) -> None:
    """Compile, without threads where the compiler has no OpenMP. Raises `KernelBuildError`."""
    headers = _precompiled_headers(tuple(compiler), flags, output.parent)
    if headers and _run([*compiler, *flags, *headers, str(source), "-o", str(output)]).returncode == 0:
        return
    command = [*compiler, *flags, str(source), "-o", str(output)]
    result = _run(command)
    if result.returncode == 0 or _run(part for part in command if part != OPENMP).returncode == 0:
        return
    lines = (result.stderr or result.stdout).strip().splitlines()[:OUTPUT_LINES]
    raise KernelBuildError(
        "\n".join(
            [
                f"{source.name}: the C++ compiler failed with status {result.returncode}; remedy: set CXX to another "
                'compiler, or options={"lowering": "eager"}',
                f"command: {shlex.join(command)}",
                *lines,
            ]
        )
    )


def build(template: str, isa: str, parameters: Parameters = ()) -> Path:
    """The path of a template's library for one instruction set, compiled unless an intact one is cached."""
    compiler, source, directory = find_compiler(), render(template, parameters), cache_directory()
    flags = (*FLAGS, OPENMP, *ISAS[isa].compile_flags)
    library = directory / f"{template}-{isa}-{_key(source, flags, compiler)}.so"
    if _intact(library):
        return library
    readable = library.with_suffix(".cpp")
    with _locked(library.with_suffix(".lock")):
        if _intact(library):
            return library
        with replacing(readable) as part:
            part.write_text(source)
        with replacing(library) as part:
            _compile(compiler, flags, readable, part)
            checksum = _checksum(part)
        with replacing(library.with_suffix(".sha256")) as part:
            part.write_text(checksum)
    return library


def library(template: str, isa: str, parameters: Parameters = ()) -> ctypes.CDLL:
    """The loaded library of a template for an instruction set."""
    loaded = _libraries.get((template, isa, parameters))
    if loaded is not None:
        return loaded
    with _lock:
        if (template, isa, parameters) not in _libraries:
            path = build(template, isa, parameters)
            try:
                _libraries[template, isa, parameters] = ctypes.CDLL(str(path))
            except OSError as error:
                raise KernelBuildError(
                    f"{path}: cannot be loaded ({error}); remedy: delete it and try again"
                ) from error
        return _libraries[template, isa, parameters]
