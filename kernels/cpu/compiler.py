"""The system's C++ compiler: which one, running it, whether it has threads, and what its failures mean."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...errors import CompilerMissingError, FQTWarning, KernelBuildError
from ..cache import CACHE_ENVIRONMENT, scratch

COMPILERS = ("c++", "g++", "clang++")
OPENMP = "-fopenmp"
PROBE = """
#ifndef _OPENMP
#error "no OpenMP"
#endif
extern "C" int sum(int count) {
  int total = 0;
#pragma omp parallel for reduction(+ : total)
  for (int i = 0; i < count; ++i) total += i;
  return total;
}
"""
OUTPUT_LINES = 12
"""Lines of compiler output in an error message."""
KILLED = ("killed", "terminated with signal", "due to signal", "out of memory", "memory exhausted", "cannot allocate")
"""What compilers say where a part of them was killed or found no memory; their own status is then an ordinary one."""
NO_SPACE = ("no space left", "quota exceeded", "read-only file system")
SIGNALS = range(128 + 1, 128 + 65)
"""What a shell (a wrapper around a compiler) ends with where a signal ended the compiler."""

Command = tuple[str, ...]


def find_compiler() -> list[str]:
    """The compiler's command: ``$CXX``, else the first of c++, g++, clang++ on PATH."""
    given = os.environ.get("CXX", "")
    try:
        wanted = shlex.split(given)
    except ValueError as error:
        raise _missing(f"CXX={given!r}, which is no command ({error})") from error
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise _missing(
        f"CXX={wanted[0]!r}, which is no program that can be run"
        if wanted
        else f"{', '.join(COMPILERS)} on PATH, found none"
    )


def _missing(looked_for: str) -> CompilerMissingError:
    return CompilerMissingError(
        f"native kernels need a C++ compiler: looked for {looked_for}; remedy: install g++, set CXX to a C++ "
        'compiler, or run without native kernels, options={"lowering": "eager"}'
    )


class Result:
    """How a run of the compiler ended. made: it reported success and wrote something."""

    def __init__(self, command: Sequence[str], status: int, output: str, made: bool) -> None:
        self.command, self.status, self.output, self.made = tuple(command), status, output, made

    def says(self, *texts: str) -> bool:
        return any(text in self.output.lower() for text in texts)

    @property
    def killed(self) -> bool:
        """Ended by a signal, mostly for want of memory: says nothing about the source or the flags."""
        return self.status < 0 or self.status in SIGNALS or (self.status != 0 and self.says(*KILLED))

    def error(self, what: str) -> KernelBuildError:
        """The failure in words, with the command and what the compiler wrote."""
        if self.killed:
            reason, remedy = "was killed or found no memory, twice", "free memory and try again"
        elif self.says(*NO_SPACE):
            reason = "found no space to write its files"
            remedy = f"free space there, or set {CACHE_ENVIRONMENT} to another directory"
        else:
            reason = f"failed with status {self.status}" if self.status else "reported success but wrote no library"
            remedy = "set CXX to another C++ compiler"
        lines = self.output.strip().splitlines()[:OUTPUT_LINES] or ["(it wrote no message)"]
        first = f'{what}: the C++ compiler {reason}; remedy: {remedy}, or options={{"lowering": "eager"}}'
        return KernelBuildError("\n".join([first, f"command: {shlex.join(self.command)}", *lines]))


def run(command: Sequence[str], output: Path | None = None) -> Result:
    """Run the compiler; ``output`` is the file that it writes, in a folder that takes its temporary files as well.

    Raises `KernelBuildError` where it cannot be started.
    """
    whole = [*command, "-o", str(output)] if output else list(command)
    # Messages in English, to be understood here, and whatever bytes they have. A compiler that is killed leaves
    # temporary files of megabytes.
    environment = {**os.environ, "LC_ALL": "C"} | ({"TMPDIR": str(output.parent)} if output else {})
    try:
        done = subprocess.run(
            whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise KernelBuildError(
            f"{command[0]}: the C++ compiler cannot be run ({error.strerror or error}); remedy: set CXX to another "
            'C++ compiler, or options={"lowering": "eager"}'
        ) from error
    written = output is None or (output.exists() and output.stat().st_size > 0)
    text = done.stdout if output is None else done.stderr or done.stdout
    return Result(whole, done.returncode, text, done.returncode == 0 and written)


@functools.cache
def version(compiler: Command) -> str:
    """What the compiler says about itself."""
    first = run([*compiler, "--version"])
    return (run(first.command) if first.killed else first).output


_openmp: dict[Command, bool] = {}


def has_openmp(compiler: Command, directory: Path) -> bool:
    """Whether it compiles for several threads, asked once with a source of a few lines; a warning where it does not.

    Only a compiler that does without `OPENMP` what it repeatedly does not do with it has none: one that fails
    otherwise, or was killed, is asked again for the next kernel.
    """
    if compiler not in _openmp:
        found = _probe(compiler, directory)
        if found is None:
            return True  # the kernel itself will tell what is wrong
        _openmp[compiler] = found
        if not found:
            warnings.warn(
                f"{compiler[0]}: this C++ compiler has no OpenMP ({OPENMP}), so kernels run on one thread; "
                "remedy: install its OpenMP library, or set CXX to another compiler",
                FQTWarning,
                stacklevel=2,
            )
    return _openmp[compiler]


def _probe(compiler: Command, directory: Path) -> bool | None:
    results = []
    with scratch(directory / "probe") as folder:
        source, output = folder / "probe.cpp", folder / "probe.so"
        for flags, text in (((OPENMP,), PROBE), ((), ""), ((OPENMP,), PROBE)):
            source.write_text(text)
            results.append(run([*compiler, "-shared", "-fPIC", *flags, str(source)], output))
            if flags and results[-1].made:
                return True
            output.unlink(missing_ok=True)
    unclear = any(result.killed or result.says(*NO_SPACE) for result in results)
    return False if results[1].made and not unclear else None
