"""Everything to run the first time there is a GPU: are the Triton kernels right, and how fast are training steps?

    python benchmarks/gpu_check.py --json gpu.json
    python benchmarks/gpu_check.py --rehearse     (no GPU: tiny sizes in Triton's interpreter; its times mean nothing)

1. Every operation on large shapes, in both product strategies, against the reference on the CPU, bit for bit.
2. Training steps (zero_grad, forward, cross-entropy, backward, fused Adam; channels_last) of VGG-16, ResNet-18 and
   ViT-B/16: float32, TF32 and bfloat16 autocast, each eager and with Inductor, against fqt1bit, with peak memory.

Ends with an error where a kernel differs or a variant fails. Variants that would not fit into ``--budget`` seconds are
left out and named. A step's time is between device events, one variant after the other; a device's clock is steadier
than a CPU's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
import torchvision
import triton
from gpu_operations import LAYERS, TINY_LAYERS, Layer, operation_calls
from torch import Tensor, nn

from fqt_compile.kernels import gpu
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE

PRODUCTS = ("output_product", "grad_input_product", "grad_weight_product", "grad_weight")
CORRECTNESS_SHARE = 0.35
"""Of the budget; the rest is for timing."""


# -- 1. correctness ------------------------------------------------------------------------------------------


def moved_to(device: torch.device, argument: Any) -> Any:
    if isinstance(argument, list):
        return [moved_to(device, item) for item in argument]
    return argument.to(device) if isinstance(argument, Tensor) else argument


def same(actual: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return all(same(a, w) for a, w in zip(actual, wanted, strict=True))
    actual = actual.cpu()
    if (actual.dtype, actual.shape) != (wanted.dtype, wanted.shape):
        return False
    actual, wanted = (x.contiguous().flatten().view(torch.uint8) for x in (actual, wanted))
    return torch.equal(actual, wanted)


def check_kernels(device: torch.device, layers: tuple[Layer, ...], deadline: float) -> list[dict[str, Any]]:
    """One record for every operation, strategy and layer: whether all its calls equal the reference."""
    records: list[dict[str, Any]] = []
    for layer in layers:
        if time.monotonic() > deadline:
            records.append({"layer": layer.name, "skipped": "out of budget"})
            continue
        for name, arguments in operation_calls(layer):
            wanted = REFERENCE[name](*arguments)
            moved = tuple(moved_to(device, argument) for argument in arguments)
            for strategy in ("popcount", "tensor-core") if name in PRODUCTS else ("auto",):
                with gpu.force_strategy(strategy), gpu_launch.recording() as launches:
                    equal = same(gpu.OPERATIONS[name](*moved), wanted)
                kernels = sorted({f"{made.spec.template}.{made.kernel}" for made in launches})
                records.append(
                    {"layer": layer.name, "operation": name, "strategy": strategy, "kernels": kernels, "equal": equal}
                )
                if not equal:
                    print(f"DIFFERS: {name} ({strategy}) on {layer.name}", flush=True)
        done = [record for record in records if record["layer"] == layer.name]
        print(f"{layer.name}: {sum(r['equal'] for r in done)} of {len(done)} equal the reference", flush=True)
    return records


# -- 2. training steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    model: Callable[[], nn.Module]
    batch: int
    size: int


def tiny_vgg() -> nn.Module:
    def block(channels: int, out_channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]

    layers = [*block(3, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=64, mlp_dim=64, num_classes=10
    )


def tiny_resnet() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    stem = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*stem, block(32, 32), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


TASKS = {
    "VGG-16": Task(torchvision.models.vgg16, 64, 224),
    "ResNet-18": Task(torchvision.models.resnet18, 128, 224),
    "ViT-B/16": Task(torchvision.models.vit_b_16, 64, 224),
}
TINY_TASKS = {
    "tiny VGG": Task(tiny_vgg, 2, 8),
    "tiny ResNet": Task(tiny_resnet, 2, 8),
    "tiny ViT": Task(tiny_vit, 2, 16),
}
VARIANTS = {
    "fqt1bit": ("fqt1bit", "highest", False),
    "fqt1bit bf16": ("fqt1bit", "highest", True),
    "bf16 eager": (None, "highest", True),
    "bf16 Inductor": ("inductor", "highest", True),
    "TF32 eager": (None, "high", False),
    "TF32 Inductor": ("inductor", "high", False),
    "float32 eager": (None, "highest", False),
    "float32 Inductor": ("inductor", "highest", False),
}
"""Name -> backend, float32 precision of products, bfloat16 autocast. The most wanted first."""


def make_step(task: Task, variant: str, device: torch.device) -> Callable[[], Tensor]:
    backend, _, autocast = VARIANTS[variant]
    torch.manual_seed(0)
    model = task.model().to(device, memory_format=torch.channels_last)
    # In the rehearsal the rewritten graph is interpreted with the Triton kernels; on a GPU Inductor calls them.
    options = {"lowering": "triton"} if backend == "fqt1bit" and device.type == "cpu" else None
    run = model if backend is None else torch.compile(model, backend=backend, options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(task.batch, 3, task.size, task.size).to(device, memory_format=torch.channels_last)
    y = torch.randint(0, 10, (task.batch,)).to(device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(run(x).float(), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor], device: torch.device, rounds: int) -> list[float]:
    """Seconds of every step."""
    seconds = []
    for _ in range(rounds):
        if device.type == "cpu":
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return seconds


def measure(task: Task, variant: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Median, spread and peak memory of one variant, in an emptied process."""
    torch._dynamo.reset()
    gc.collect()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = VARIANTS[variant][1] == "high"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        start = time.perf_counter()
        step = make_step(task, variant, device)
        loss = float(step())
        first = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what compiling and choosing algorithms took does not count
        timed(step, device, max(1, rounds // 4))
        seconds = timed(step, device, rounds)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "first_step_s": first,
        "first_loss": loss,
        "peak_bytes": peak,
    }


def time_models(
    tasks: dict[str, Task], device: torch.device, rounds: int, deadline: float
) -> dict[str, dict[str, dict[str, Any]]]:
    """model -> variant -> figures, or what kept a variant from running."""
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in tasks}
    for variant in VARIANTS:
        for name, task in tasks.items():
            if time.monotonic() > deadline:
                results[name][variant] = {"skipped": "out of budget"}
                continue
            try:
                results[name][variant] = measure(task, variant, device, rounds)
            except Exception as error:  # one variant that fails must not hide the others
                results[name][variant] = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{name}, {variant}: {_cell(results[name][variant])}", flush=True)
    return results


def _cell(figures: dict[str, Any]) -> str:
    if "median_s" not in figures:
        return figures.get("skipped") or figures["error"].splitlines()[0][:60]
    peak = figures["peak_bytes"]
    memory = f" {peak / 2**30:6.2f} GiB" if peak is not None else ""
    return (
        f"{1000 * figures['median_s']:9.2f} ms [{1000 * figures['min_s']:.2f}, {1000 * figures['max_s']:.2f}]{memory}"
    )


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    for model, variants in results.items():
        print(f"\n{model}: median [min, max] of a step, peak memory, its time over the best of fqt1bit")
        ours = [f["median_s"] for name, f in variants.items() if name.startswith("fqt1bit") and "median_s" in f]
        for variant, figures in variants.items():
            ratio = f"   {figures['median_s'] / min(ours):5.2f}x" if ours and "median_s" in figures else ""
            print(f"  {variant:18s} {_cell(figures)}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False; --rehearse runs tiny sizes without one")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    start = time.monotonic()
    deadline = start + options.budget
    layers, tasks, rounds = (TINY_LAYERS, TINY_TASKS, 1) if options.rehearse else (LAYERS, TASKS, options.rounds)
    name = "Triton's interpreter on a CPU" if options.rehearse else torch.cuda.get_device_name(device)
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}", flush=True)
    checks = check_kernels(device, layers, start + CORRECTNESS_SHARE * options.budget)
    results = time_models(tasks, device, rounds, deadline)
    print_table(results)
    wrong = [record for record in checks if record.get("equal") is False]
    print(f"\n{sum('equal' in r for r in checks)} checks, {len(wrong)} differ; {time.monotonic() - start:.0f} s")
    if options.rehearse:
        print("REHEARSAL: no GPU was used; these times say nothing about one.")
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        report = {
            "device": name,
            "rehearsal": options.rehearse,
            "versions": versions,
            "checks": checks,
            "steps": results,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = [model for model, variants in results.items() if any("error" in f for f in variants.values())]
    if wrong or failed:
        raise SystemExit(f"{len(wrong)} kernels differ from the reference; variants failed in {failed}")


if __name__ == "__main__":
    main()
