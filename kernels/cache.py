"""The directory that generated sources, compiled kernels and measurements are kept in, private to the user."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ..errors import KernelBuildError

CACHE_ENVIRONMENT = "FQT_COMPILE_CACHE"
UNFINISHED = ".building-"
"""How the names of temporary files begin."""


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


def not_kept(path: Path, error: OSError) -> KernelBuildError:
    """What to raise where the system refuses to keep a file of the cache: full, read-only, not ours."""
    return KernelBuildError(
        f"kernel cache {path}: {error.strerror or error}; accepted: a directory that can be written and has space; "
        f"remedy: free space there, or set {CACHE_ENVIRONMENT} to another directory"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that becomes ``path`` at the end; nobody sees a part of it.

    Raises `KernelBuildError` where the system refuses; the temporary file is gone and ``path`` as before.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{UNFINISHED}{path.stem}-", suffix=path.suffix)
        os.close(handle)
        try:
            yield Path(name)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise not_kept(path, error) from error


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, gone at the end with all that is in it. Raises as `replacing` does."""
    try:
        prefix = f"{UNFINISHED}{path.stem}-"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise not_kept(path.parent, error) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time writes ``path`` and its like with other endings; without locks they do so several times.

    What a process that was killed while it wrote them has left is removed. Raises `KernelBuildError` where the lock's
    file cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path.with_suffix(".lock"), "w"))
        except OSError as error:
            raise not_kept(path, error) from error
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            _remove_unfinished(path)
        yield


def _remove_unfinished(path: Path) -> None:
    """Called by who holds the lock: nobody else is writing these."""
    for left in path.parent.glob(f"{UNFINISHED}{path.stem}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def recalled(path: Path) -> Any:
    """What `keep` has written; None where there is nothing that can be read, which is the same as nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text())
    return None


def keep(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; a cache that cannot be written keeps nothing, and the next process finds out again."""
    with contextlib.suppress(OSError, KernelBuildError), replacing(path) as part:
        part.write_text(json.dumps(value, indent=1))
