"""The directory that generated sources, compiled kernels and measurements are kept in, private to the user."""

from __future__ import annotations

import contextlib
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from ..errors import KernelBuildError

CACHE_ENVIRONMENT = "FQT_COMPILE_CACHE"


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
