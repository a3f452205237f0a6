"""A measuring process of `bench`: ``python -m fqt_compile.bench.worker SETTINGS VARIANT``.

One process per variant, since allocator settings are read when a process starts, the peak of its resident memory
belongs to all of it, and a step is as fast as the heap it runs in. Every line of the standard input is the name of a
`REQUESTS` function; its value, or the error, is answered with a line of JSON on the standard output.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FQTError
from ..models import make_model
from ..results import cache_hits, measure_saved_bytes
from .settings import CLASSES, OURS, BenchSettings

MEMORY_STEPS = 3
LEARNING_RATE = 1e-4
PROC = Path("/proc/self")
RESET_PEAK = "5"  # what Linux wants written to clear_refs to start the peak of resident memory anew


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A variant ready to train: its own copy of the model, compiled or not, with optimizer and data."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.forward(self.images).float(), self.labels).backward()
        self.optimizer.step()

    def timed_step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def make_trainee(settings: BenchSettings, variant: str) -> Trainee:
    """The variant ``[eager|inductor|fqt1bit] [float32|bf16]``, initialized the same for all.

    Images are channels_last, parameters, too, except those of fqt1bit: torch's fused Adam copies parameters that are
    not in the default order, and only in a step as short as ours that shows.
    """
    torch.manual_seed(0)
    model = make_model(settings.arch, classes=CLASSES, size=settings.size).train()
    if not variant.startswith(OURS):
        model = model.to(memory_format=torch.channels_last)
    images = torch.randn(settings.batch, 3, settings.size, settings.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (settings.batch,))
    run = _compiled(model, variant.split()[0], settings)
    bfloat16 = variant.endswith("bf16")

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return run(x)

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    return Trainee(model, forward, optimizer, images, labels)


def _compiled(model: nn.Module, kind: str, settings: BenchSettings) -> Callable[[Tensor], Tensor]:
    if kind == "eager":
        return model
    if kind == "inductor":
        return torch.compile(model, dynamic=False)
    from ..backend import fqt1bit

    return torch.compile(model, backend=fqt1bit, options=dataclasses.asdict(settings.config), dynamic=False)


class Worker:
    """What a process measures of its variant; `REQUESTS` names the methods that answer."""

    def __init__(self, settings: BenchSettings, variant: str) -> None:
        self.settings = settings
        self.variant = variant

    @functools.cached_property
    def trainee(self) -> Trainee:
        return make_trainee(self.settings, self.variant)

    def first(self) -> dict[str, Any]:
        """``seconds`` of the first step; ``cached``: Inductor's cache had something, None where nothing is compiled."""
        hits, seconds = cache_hits(), self.trainee.timed_step()
        return {"seconds": seconds, "cached": None if self.variant.startswith("eager") else cache_hits() > hits}

    def step(self) -> float:
        """Seconds of a step."""
        return self.trainee.timed_step()

    def step_twice(self) -> float:
        """Seconds of the second of two steps."""
        self.trainee.step()
        return self.trainee.timed_step()

    def saved_bytes(self) -> int:
        """Bytes that autograd holds between forward and backward (`results.measure_saved_bytes`)."""
        return measure_saved_bytes(self.trainee.forward, self.trainee.model, self.trainee.images)

    def memory(self) -> dict[str, Any]:
        return measure_memory(self.trainee)

    def phases(self) -> dict[str, Any]:
        from .phases import measure_phases

        return measure_phases(lambda: make_trainee(self.settings, self.variant).timed_step)


def measure_memory(trainee: Trainee) -> dict[str, Any]:
    """Resident memory of a process that trains one variant, in bytes.

    ``start``: before the first step. ``warm``: between two warm steps, without gradients, free memory given back;
    it holds the optimizer's state and what compiling left behind. ``peak``: highest value during warm steps, where the
    system can start the peak anew (``peak_of`` is then "warm steps", else "process", compilation included).
    ``ru_maxrss``: highest value of the whole process up to the end of the first two steps.
    """
    start = _status("VmRSS")
    for _ in range(2):
        trainee.step()
    everything = _max_rss()
    trainee.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    _give_back()
    warm, renewed = _status("VmRSS"), _renew_peak()
    for _ in range(MEMORY_STEPS):
        trainee.step()
    peak = _status("VmHWM") if renewed else _max_rss()
    of = "warm steps" if renewed else "process"
    return {"start": start, "warm": warm, "peak": peak, "peak_of": of, "ru_maxrss": everything}


def one_line(error: Exception) -> str:
    """Kind and text of an error; of ours the text."""
    kind = "" if isinstance(error, FQTError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split("\n\n")[0].split())


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes; the peak so far where there is no such file."""
    path = PROC / "status"
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else _max_rss()


def _renew_peak() -> bool:
    try:
        (PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Return free memory to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    text, variant = sys.argv[1:]
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a model or a compiler prints is no answer
        settings = BenchSettings.from_record(json.loads(text))
        torch.set_num_threads(settings.threads)
        worker = Worker(settings, variant)
        for request in sys.stdin:
            try:
                answer = {"value": REQUESTS[request.strip()](worker)}
            except Exception as error:  # of the model or of a compiler
                traceback.print_exc()
                answer = {"error": one_line(error)}
            print(json.dumps(answer), file=answers, flush=True)


REQUESTS: dict[str, Callable[[Worker], Any]] = {
    "first": Worker.first,
    "step": Worker.step,
    "step_twice": Worker.step_twice,
    "saved_bytes": Worker.saved_bytes,
    "memory": Worker.memory,
    "phases": Worker.phases,
}


if __name__ == "__main__":
    main()
