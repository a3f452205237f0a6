"""Python processes of their own that need not import torch first: forked from one that has done nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.preloaded"])
HERE = Path(__file__).parents[1]


class Process:
    """``python ARGUMENTS`` with an environment, started: ``-c CODE``, or ``-m MODULE`` or a script and their arguments.

    It differs from a new interpreter in what is imported (torch, torchvision, fqt_compile and, to be interpreted,
    Triton) and in what libraries read of the environment when they are loaded.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.arguments = list(arguments)
        self.folder = TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        target = (self.arguments, dict(environment), *map(str, self.outputs))
        self.process = CONTEXT.Process(target=_run, args=target)
        self.process.start()

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What it has printed, and its status. Raises `subprocess.TimeoutExpired`."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        texts = [path.read_text(errors="replace") for path in self.outputs]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


def run(arguments: Sequence[str], environment: Mapping[str, str], timeout: float = 600) -> subprocess.CompletedProcess:
    """Start a `Process` and wait for it."""
    return Process(arguments, environment).wait(timeout)


def _run(arguments: list[str], environment: dict[str, str], *outputs: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.path[:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    kind = arguments[0] if arguments[0] in ("-c", "-m") else "script"
    sys.argv = arguments if kind == "script" else arguments[1:]
    try:
        if kind == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
