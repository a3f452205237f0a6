"""Do the kernels give the same bits on another architecture? Compiled for aarch64 and run by qemu-user.

    python tests/aarch64.py [operation ...] [--limit N] [--all]

What the ``portable`` kernels of this machine are called with, and what they leave in memory, is recorded over the grid
(the layers of the day, N argument lists of each: 3) and replayed by the same sources compiled for aarch64
(`support/replay.cpp`). Needs aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu and
qemu-user-static). Not part of `make test`: it takes some minutes. Exits with 1 if one byte differs, but for the sign
and payload of a NaN (x86 makes negative ones, ARM positive ones).

Last run: seed 20261128, --limit 2: 589 calls of 29 functions, all equal.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
from support import sample  # noqa: E402
from support.grid import LAYERS, OPERATIONS, sampled  # noqa: E402
from support.grid_calls import calls  # noqa: E402

from fqt_compile.kernels import cpu  # noqa: E402
from fqt_compile.kernels.cpu import codegen, native  # noqa: E402
from fqt_compile.kernels.cpu.functions import argument  # noqa: E402

COMPILER, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
NUMBER = struct.Struct("<q")
Operand = Tensor | int | ctypes.Array | None


def packed(*items: int | bytes) -> bytes:
    """Numbers as int64, bytes with their length in front."""
    parts = [NUMBER.pack(i) if isinstance(i, int) else NUMBER.pack(len(i)) + i for i in items]
    return b"".join(parts)


def memory_of(value: Operand) -> tuple[int, int] | None:
    """Address and size of what a pointer points to; None for a number."""
    if isinstance(value, Tensor):
        return value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    return (ctypes.addressof(value), ctypes.sizeof(value)) if isinstance(value, ctypes.Array) else None


class Recorder:
    """Stands in for `native._kernel`: runs a function and writes down operands, memory before and after, status."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, ""
        self.calls: list[bytes] = []
        self.functions: set[str] = set()

    def __call__(self, template: str, function: str, parameters: codegen.Parameters) -> Any:
        return functools.partial(self.run, template, function, parameters)

    def run(self, template: str, function: str, parameters: codegen.Parameters, *values: Operand) -> None:
        memory = list(dict.fromkeys(filter(None, map(memory_of, values))))
        before = [ctypes.string_at(*m) for m in memory]
        threads = torch.get_num_threads()
        status = native.Kernel(template, function, parameters).on("portable", threads, *values)
        after = [ctypes.string_at(*m) for m in memory]
        library = str(self.library(template, parameters)).encode()
        record = packed(library, function.encode(), self.where.encode(), len(values) + 1)
        for value in values:
            place = memory_of(value)
            record += packed(-1, argument(value)) if place is None else packed(memory.index(place), self.offset(value))
        record += packed(-1, threads, len(memory))
        floats = {memory_of(v) for v in values if isinstance(v, Tensor) and v.dtype == torch.float32}
        for place, *contents in zip(memory, before, after, strict=True):
            record += packed(int(place in floats), *contents)
        self.calls.append(record + packed(status))
        self.functions.add(function)

    @staticmethod
    def offset(value: Operand) -> int:
        return value.storage_offset() * value.element_size() if isinstance(value, Tensor) else 0

    def library(self, template: str, parameters: codegen.Parameters) -> Path:
        return _compiled(self.folder, codegen.render(template, parameters))

    def replayed(self, replay: Path) -> subprocess.CompletedProcess[str]:
        """The recorded calls, replayed and forgotten."""
        file = self.folder / "calls"
        file.write_bytes(packed(len(self.calls)) + b"".join(self.calls))
        self.calls.clear()
        command = [EMULATOR, "-L", ROOT, str(replay), str(file)]
        return subprocess.run(command, capture_output=True, text=True)


@functools.cache
def _compiled(folder: Path, source: str) -> Path:
    made = folder / f"{len(list(folder.iterdir()))}.so"
    text = made.with_suffix(".cpp")
    text.write_text(source)
    _compile(text, made, *codegen.FLAGS, codegen.OPENMP)
    return made


def _compile(source: Path, output: Path, *flags: str) -> None:
    subprocess.run([COMPILER, *flags, str(source), "-o", str(output), "-ldl"], check=True)


def chosen(operation: str, layer: Any, limit: int) -> list[int]:
    numbers = sample.shuffled(f"{operation} {layer.name}", range(len(calls(layer)[operation])))
    return sorted(numbers[:limit] if limit else numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=OPERATIONS)
    parser.add_argument("--limit", type=int, default=3, help="argument lists of an operation on a layer; 0: all")
    parser.add_argument("--all", action="store_true", help="all layers and argument lists")
    options = parser.parse_args()
    if options.all:
        os.environ[sample.ENVIRONMENT], options.limit = sample.ALL, 0
    failed, total = False, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replay, recorder = folder / "replay", Recorder(folder)
        _compile(TESTS / "support" / "replay.cpp", replay, "-std=c++17", "-O1")
        native._kernel, native.argument = recorder, lambda value: value
        for operation in options.operations:
            recorded = 0
            for layer in sampled(operation, LAYERS):
                with cpu.force_isa("portable"):
                    for number in chosen(operation, layer, options.limit):
                        recorder.where = f"{operation} {layer.name} {number}"
                        cpu.OPERATIONS[operation](*calls(layer)[operation][number])
                recorded += len(recorder.calls)
                done = recorder.replayed(replay) if recorder.calls else None
                if done is not None and done.returncode:
                    failed = True
                    print(done.stdout + done.stderr, flush=True)
            total += recorded
            print(f"{operation}: {recorded} calls", flush=True)
    print(f"{total} calls of {len(recorder.functions)} functions, aarch64 {'DIFFERS' if failed else 'equals'} portable")
    sys.exit(failed)


if __name__ == "__main__":
    main()
