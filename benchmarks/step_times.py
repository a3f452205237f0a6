"""Whole training steps, interleaved in one process: float32 and bfloat16 (eager and Inductor) against fqt1bit.

    python benchmarks/step_times.py --model vgg16-cifar --batch 128 --size 32 --threads 1 --json out.json

A step is zero_grad, forward, cross-entropy, backward, fused Adam; channels_last models and images. Reports median,
minimum and maximum seconds a step, and ratios against the best float32 and the best bfloat16 of the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from fqt_compile.models import vgg16_cifar

MODELS = {"vgg16-cifar": vgg16_cifar, "resnet18": torchvision.models.resnet18}
WARM_STEPS = 2


def make_step(model: nn.Module, compile_with: str | None, autocast: bool, x: torch.Tensor, y: torch.Tensor):
    """One training step of a copy of ``model`` as a function without arguments."""
    model = copy.deepcopy(model)
    run = model if compile_with is None else torch.compile(model, backend=compile_with)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(run(x).float(), y)
        loss.backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, one of each in turn, after warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        print(f"{name}: first step with compilation {time.perf_counter() - start:.1f} s", flush=True)
        for _ in range(WARM_STEPS - 1):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cpu_name() -> str:
    """The processor as the system names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vgg16-cifar")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = MODELS[options.model](num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (options.batch,))
    steps = {
        f"{kind} {dtype}": make_step(model, backend, dtype == "bfloat16", x, y)
        for dtype in ("float32", "bfloat16")
        for kind, backend in (("eager", None), ("inductor", "inductor"))
    }
    steps["fqt1bit"] = make_step(model, "fqt1bit", False, x, y)
    seconds = measure(steps, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = {dtype: min(median[f"eager {dtype}"], median[f"inductor {dtype}"]) for dtype in ("float32", "bfloat16")}
    for name, values in seconds.items():
        print(f"{name:18s} median {median[name]:.4f} s  min {min(values):.4f}  max {max(values):.4f}")
    ratios = {dtype: best[dtype] / median["fqt1bit"] for dtype in best}
    print(f"speed-up: {ratios['float32']:.2f} over the best float32, {ratios['bfloat16']:.2f} over the best bfloat16")
    if options.json:
        report = {
            "model": options.model,
            "batch": options.batch,
            "size": options.size,
            "threads": options.threads,
            "steps": {n: {"median_s": median[n], "min_s": min(v), "max_s": max(v)} for n, v in seconds.items()},
            "speedup_fp32": ratios["float32"],
            "speedup_bf16": ratios["bfloat16"],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "cpu": cpu_name(),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
