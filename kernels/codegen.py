"""Kernels from templates: render, compile with the system's C++ compiler, cache, load.

A library is one template rendered with the constants of the Python modules that define them, compiled for one
instruction set. Cached as ``<template>-<isa>-<key>.cpp`` (readable), ``.so`` and ``.sha256``, where the key hashes
source, flags, compiler and machine. A library whose checksum does not match is built again. Measurements (`cost`,
`counting`) lie beside them.
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
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import platformdirs

from ..errors import CompilerMissingError, KernelBuildError
from . import noise, packing, reference, selection
from .isa import ISAS

CACHE_ENVIRONMENT = "FQT_COMPILE_CACHE"
TEMPLATES = Path(__file__).parent / "templates"
PROGRAM_TEMPLATES = ("fused_activation", "fused_gradient", "gradient_moments", "max_pool_gradient")
COMPILERS = ("c++", "g++", "clang++")
OPENMP = "-fopenmp"
# IEEE float32 as written: no contraction to fused multiply-add, no -ffast-math. The two -fno- flags only promise
# that nobody reads errno or the floating-point exception flags.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"),
)
OUTPUT_LINES = 12
"""Lines of compiler output in an error message."""

GEOMETRY = (
    *("batch", "words", "in_channels", "out_channels", "channels", "in_h", "in_w", "out_h", "out_w"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
)
"""Fields of the C++ struct that describes a convolution, in order; all int64."""

PARAMETERS = {
    "word": packing.WORD,
    "panel": packing.PANEL,
    "lane_tile": packing.LANE_TILE,
    "lanes": reference.LANES,
    "block": reference.BLOCK,
    "row_block": reference.ROW_BLOCK,
    "multipliers": [hex(m) for m in noise.MULTIPLIERS],
    "non_finite_importance": repr(selection.NON_FINITE_IMPORTANCE),
    "geometry": GEOMETRY,
}

Parameters = tuple[tuple[str, Any], ...]
"""What a template is rendered with besides `PARAMETERS`; hashable, so that it can name a library."""

_libraries: dict[tuple[str, str, Parameters], ctypes.CDLL] = {}
_lock = threading.Lock()


def environment(directory: Path) -> jinja2.Environment:
    """Templates of a directory, strict about undefined names."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(template: str, parameters: Parameters = ()) -> str:
    """The C++ source of a template; self-contained."""
    return environment(TEMPLATES).get_template(f"{template}.cpp").render(PARAMETERS | dict(parameters))


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


def cache_directory() -> Path:
    """The cache, created private to the user. Libraries are loaded from it, so nobody else may write there."""
    path = Path(os.environ.get(CACHE_ENVIRONMENT) or platformdirs.user_cache_dir("fqt_compile"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise KernelBuildError(
            f"kernel cache {path}: {error.strerror}; remedy: set {CACHE_ENVIRONMENT} to a writable directory"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelBuildError(
            f"kernel cache {path}: owned by user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; accepted: "
            f"owned by user {os.getuid()} and not writable by group or others; remedy: chmod 700 it, or set "
            f"{CACHE_ENVIRONMENT} to another directory"
        )
    return path


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


def machine_name() -> str:
    """The processor as the system names it; with family and model on Linux, where several may share a name."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        fields = {
            name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())
        }
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that becomes ``path`` at the end; nobody sees a part of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".building-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time builds a library; where locks do not exist they build it several times."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, output: Path) -> None:
    """Compile, without threads where the compiler has no OpenMP. Raises `KernelBuildError`."""
    command = [*compiler, *flags, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    without_openmp = [part for part in command if part != OPENMP]
    if subprocess.run(without_openmp, capture_output=True, text=True, check=False).returncode == 0:
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
