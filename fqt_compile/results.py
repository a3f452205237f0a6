"""What a training step keeps in memory, on which machine it ran, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .errors import FQTError
from .kernels.cache import machine_name

TEMPORARY = ".{}.tmp"
"""The name of what becomes a file when it is whole."""
Step = Callable[[Tensor], Tensor]
PACKAGES = ("fqt-compile", "torch", "torchvision")


class OutputError(FQTError, RuntimeError):
    """The output folder cannot be used: locked, already full, or not writable."""


def measure_saved_bytes(step: Step, model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one training step.

    Sum over the distinct storages saved while ``step(images)`` runs, without those of parameters, buffers
    and ``images``, which exist anyway. The same for eager and compiled models: AOTAutograd saves in the same way.
    """
    owned = {owner.untyped_storage().data_ptr() for owner in [*model.parameters(), *model.buffers(), images]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(images)
    return sum(saved.values())


def cache_hits() -> int:
    """How many graphs Inductor has found in its caches in this process."""
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def environment() -> dict[str, Any]:
    """Versions, processor and threads, for the JSON file."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "cpu": machine_name(), "threads": torch.get_num_threads()}


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file, then rename it to ``path``: readers see the old or the new file.

    A link is followed; what is no file (a pipe, ``/dev/stdout``) is written to. Raises `OutputError` when that fails;
    the old file is then unchanged and the temporary one gone. One writer at a time (see the lock).
    """
    path = Path(os.path.realpath(path))
    special = path.exists() and not path.is_file() and not path.is_dir()
    temporary = path if special else path.with_name(TEMPORARY.format(path.name))
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes RuntimeErrors of the system's
        reason = _cause_of(error)
        raise OutputError(
            f"cannot write {path} ({reason}); what was there before is unchanged; remedy: free space there, or choose "
            "a file in a folder that can be written"
        ) from error
    finally:
        if not special:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _cause_of(error: BaseException) -> str:
    """The system's error, where another one hides it, on one line."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__context__
    return str(inner or error).strip().split("\n")[0]


def write_json(results: Mapping[str, Any], path: Path) -> None:
    """Atomically, indented."""
    write_atomic(path, lambda file: file.write((json.dumps(results, indent=2) + "\n").encode()))
