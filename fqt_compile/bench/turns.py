"""Whole training steps of several variants in turn, each variant in a process of its own.

One process per variant, because that is how a model is trained: in a shared process every variant runs in the heap that
the others left behind, and pays for it in page faults and TLB misses (measured: docs/adr/0009). They still take
turns, so that a disturbance of the machine hits all of them; while one steps, the others wait on their standard input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from ..errors import FQTError
from .settings import BenchSettings

REASON_LENGTH = 400  # characters of a process's last words


class BenchError(FQTError, RuntimeError):
    """A measuring process failed."""


@dataclasses.dataclass
class Worker:
    """A process that trains one variant and measures what it is asked for (`worker.REQUESTS`)."""

    process: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, request: str) -> Any:
        """The answer to a request; `BenchError` with the reason if there is none."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; so have its answers
            print(request, file=requests, flush=True)
        answer = answers.readline()
        if not answer:
            status = self.process.wait()
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()] or ["it wrote nothing"]
            raise BenchError(f"its process ended with status {status}: {lines[-1][:REASON_LENGTH]}")
        try:
            result = json.loads(answer)
        except json.JSONDecodeError:  # cut off, or written by somebody else
            raise BenchError(f"its process answered {answer[:REASON_LENGTH]!r}; accepted: a line of JSON") from None
        if "error" in result:
            raise BenchError(result["error"][:REASON_LENGTH])
        return result["value"]


@contextlib.contextmanager
def start_worker(settings: BenchSettings, variant: str, environment: Mapping[str, str]) -> Iterator[Worker]:
    """A `Worker` in a fresh process, which ends with the context."""
    command = [sys.executable, "-m", "fqt_compile.bench.worker", json.dumps(settings.record()), variant]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:  # a pipe that nobody reads could fill up
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            yield Worker(process, errors)
        finally:
            process.kill()
            process.communicate()


def measure_steps(
    settings: BenchSettings, environment: Mapping[str, str], say: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """``steps``, ``compile``, ``saved_bytes`` and ``failed`` of every variant (keys: `measure.bench`).

    Rounds of A A B B C C ..., of which every second step is timed: in training a step follows one of its own kind. A
    variant that cannot take a step is left out; ``failed`` has the reason by its name.
    """
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}

    def ask(name: str, request: str) -> Any:
        try:
            return workers[name].ask(request)
        except BenchError as error:
            failed[name] = str(error)
            workers.pop(name).process.kill()  # its memory is wanted by the others

    first = {}
    with contextlib.ExitStack() as stack:
        for name in settings.variants:
            say(f"compiling {name}")
            workers[name] = stack.enter_context(start_worker(settings, name, environment))
            first[name] = ask(name, "first")
        say(f"steps in turn: {', '.join(workers)}")
        for _ in range(settings.warm):
            for name in list(workers):
                ask(name, "step")
        rounds = [{name: ask(name, "step_twice") for name in list(workers)} for _ in range(settings.rounds)]
        saved = {name: ask(name, "saved_bytes") for name in list(workers)}
    steps = {name: summary([times[name] for times in rounds]) for name in workers}
    compiled = {
        name: {"compile_s": max(0.0, first[name]["seconds"] - steps[name]["median_s"]), "compile_cached": cached}
        for name in workers
        if (cached := first[name]["cached"]) is not None
    }
    return {
        "steps": steps,
        "saved_bytes": {name: saved[name] for name in workers},
        "compile": compiled,
        "failed": failed,
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values, in seconds."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "all_s": values}
