"""The measuring processes of `bench`: ``python -m fqt_compile.bench_worker TASK SETTINGS VARIANT RESULT``.

Each is a process of its own, since allocator settings are read when a process starts and the peak of its resident
memory belongs to all of it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import re
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .bench import CLASSES, BenchSettings
from .errors import FQTError
from .models import make_model
from .results import measure_saved_bytes

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
    """The variant ``[eager|inductor|fqt1bit] [float32|bf16]``, initialized the same for all."""
    torch.manual_seed(0)
    model = make_model(settings.arch, classes=CLASSES, size=settings.size).to(memory_format=torch.channels_last).train()
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
    from .backend import fqt1bit

    return torch.compile(model, backend=fqt1bit, options=dataclasses.asdict(settings.config), dynamic=False)


def measure_steps(settings: BenchSettings, variant: str = "") -> dict[str, Any]:
    """Steps of every variant in turn (A A B B C C A A ..., the second one timed) after warming up; then saved bytes.

    A variant whose first step raises is left out; ``failed`` has the reason by its name.
    """
    trainees = {name: make_trainee(settings, name) for name in settings.variants}
    first, cached, failed = {}, {}, {}
    for name, trainee in trainees.items():
        hits = _cache_hits()
        try:
            first[name] = trainee.timed_step()
        except Exception as error:  # of a compiler; the other variants go on
            failed[name] = one_line(error)
        cached[name] = _cache_hits() > hits
    trainees = {name: trainee for name, trainee in trainees.items() if name not in failed}
    for _ in range(settings.warm):
        for trainee in trainees.values():
            trainee.step()
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(settings.rounds):
        for name, trainee in trainees.items():
            trainee.step()  # in training a step follows one of its own kind, not seconds of others
            seconds[name].append(trainee.timed_step())
    steps = {name: summary(values) for name, values in seconds.items()}
    compiled = {
        name: {"compile_s": max(0.0, first[name] - steps[name]["median_s"]), "compile_cached": cached[name]}
        for name in trainees
        if not name.startswith("eager")
    }
    saved = {name: measure_saved_bytes(t.forward, t.model, t.images) for name, t in trainees.items()}
    return {"steps": steps, "saved_bytes": saved, "compile": compiled, "failed": failed}


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values, in seconds."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "all_s": values}


def measure_memory(settings: BenchSettings, variant: str) -> dict[str, Any]:
    """Resident memory of a process that trains one variant, in bytes.

    ``start``: before the first step. ``warm``: between two warm steps, without gradients, free memory given back;
    it holds the optimizer's state and what compiling left behind. ``peak``: highest value during warm steps, where the
    system can start the peak anew (``peak_of`` is then "warm steps", else "process", compilation included).
    ``ru_maxrss``: highest value of the whole process up to the end of the first two steps.
    """
    trainee = make_trainee(settings, variant)
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


def phases(settings: BenchSettings, variant: str) -> dict[str, Any]:
    """The phases of one variant."""
    from .bench_phases import measure_phases

    return measure_phases(lambda: make_trainee(settings, variant).timed_step)


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


def _cache_hits() -> int:
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


TASKS: dict[str, Callable[[BenchSettings, str], dict[str, Any]]] = {
    "steps": measure_steps,
    "memory": measure_memory,
    "phases": phases,
}


def main() -> None:
    task, text, variant, result = sys.argv[1:]
    settings = BenchSettings.from_record(json.loads(text))
    torch.set_num_threads(settings.threads)
    try:
        figures = TASKS[task](settings, variant)
    except Exception as error:  # of the model or of a compiler; `bench` shows the last line
        traceback.print_exc()
        sys.exit(one_line(error))
    Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
