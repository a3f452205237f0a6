"""Where the time of a training step goes: the profiler's events, sorted into phases by their names.

An event belongs to the phase of the outermost event around it that has one, so that what a packed operation allocates
or calls counts as that operation. What no rule claims, between and around the operations, is framework overhead;
phases and overhead add up to the step by construction. Inductor's kernels appear as events because they are compiled
with ``cpp.enable_kernel_profile``, which costs them some microseconds each.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..kernels.operations import NAMESPACE, OPERATIONS

OVERHEAD = "framework overhead"
ANY_PACKED = "other packed operations"
PACKED = (
    *("grad_weight products", "grad_input products", "output products", "fused float"),
    *("weight packing and gradient", "row choice", "quantizing", "packing", ANY_PACKED),
)
"""Of packed operations: each is declared with its phase (kernels/operations)."""
PATTERNS: tuple[tuple[str, str], ...] = (
    # phase, pattern searched for in the name of any other event: the first match decides
    ("optimizer", r"^Optimizer\.|fused_adam|^aten::_foreach"),
    ("float convolution, linear", r"^(aten|mkldnn|onednn|inductor)::.*(conv|linear|matmul|(^|[:_b])mm|addmm)"),
    ("generated float kernels", r"(^|_)cpp_(fused|[A-Z])|(^|_)cpp_\w*gemm"),
    ("loss, other float", r"^aten::(?!empty|new_empty|.*view|as_strided|permute|detach|select|slice|t$|transpose|to$)"),
)
PHASES = (*PACKED, *(phase for phase, _ in PATTERNS))
STEPS = 5
WARM_STEPS = 3
PROFILES = 3
"""The quickest is kept: a profile takes memory of its own, which may move the step's large buffers to fresh pages."""
SHOWN_OPERATIONS = 40


def phase_of(name: str) -> str | None:
    """The phase of an event by its name; None for the framework's own."""
    namespace, _, operation = name.partition("::")
    if namespace == NAMESPACE:
        return OPERATIONS[operation].phase if operation in OPERATIONS else ANY_PACKED
    return next((phase for phase, pattern in PATTERNS if re.search(pattern, name)), None)


def measure_phases(make_step: Callable[[], Callable[[], float]], steps: int = STEPS) -> dict[str, Any]:
    """Break down the step that ``make_step`` compiles; it returns a function that runs it and gives its seconds.

    Returns, in seconds a step: ``phases`` (their sum is ``step_s``), ``operations`` (the largest, by event name),
    ``step_s`` (mean, under the profiler) and ``unprofiled_s`` (median of as many steps without it).
    """
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        step = make_step()
        for _ in range(WARM_STEPS):
            step()
    unprofiled = statistics.median(step() for _ in range(steps))
    total, by_name = min((_profile(step, steps) for _ in range(PROFILES)), key=lambda measured: measured[0])
    operations = {name: seconds / steps for name, seconds in by_name.items()}
    step_s = total / steps
    largest = sorted(operations.items(), key=lambda item: -item[1])[:SHOWN_OPERATIONS]
    return {
        "step_s": step_s,
        "unprofiled_s": unprofiled,
        "phases": breakdown(operations, step_s),
        "operations": dict(largest),
    }


def _profile(step: Callable[[], float], steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of ``steps`` steps under the profiler, and of every operation in them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - start
    return total, operation_seconds(profiler.events() or ())


def operation_seconds(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of the outermost events that have a phase, summed by name, everything inside them included."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU and phase_of(event.name) and not _inside_a_phase(event):
            seconds[event.name] += event.cpu_time_total / 1e6
    return dict(seconds)


def breakdown(operations: dict[str, float], step_s: float) -> dict[str, float]:
    """Seconds per phase in the order of `PHASES`, and last the overhead: what is left of ``step_s``."""
    phases = dict.fromkeys(PHASES, 0.0)
    for name, seconds in operations.items():
        phase = phase_of(name)
        assert phase is not None
        phases[phase] += seconds
    return {**phases, OVERHEAD: step_s - sum(phases.values())}


def _inside_a_phase(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if phase_of(parent.name):
            return True
        parent = parent.cpu_parent
    return False
