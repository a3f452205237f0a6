"""What a fine-tuning run measures and shows: probe of a compiled step, table, plot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from ..optional import optional_import
from ..results import Step, cache_hits, measure_saved_bytes, write_atomic

LABELS = {"float32": "float32 (Inductor)", "qat": "QAT (packed forward)", "fqt": "FQT (packed both ways)"}
PLOT_SIZE = (10.0, 4.0)  # inches


def probe(step: Step, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Compile and measure ``step`` on one batch, and leave no trace in the model or the random generator.

    Returns ``compile_s`` (first forward and backward minus a later one, seconds), ``compile_cached`` (whether
    Inductor found any graph in its cache, so that the compilation was not a cold one) and ``saved_bytes``.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hits = cache_hits()
    model.train()
    with torch.random.fork_rng(devices=[]):
        first = _timed_backward(step, images)
        later = _timed_backward(step, images)
        saved_bytes = measure_saved_bytes(step, model, images)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return {
        "compile_s": max(0.0, first - later),
        "compile_cached": cache_hits() > hits,
        "saved_bytes": saved_bytes,
    }


def summarize(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per method the figures of the table, from the histories of its stages in order.

    ``accuracy`` (test set, last epoch), ``accuracy_history`` and ``loss_history`` (training) over all epochs,
    ``step_s`` (median seconds of a training step in the method's last stage), ``step_min_s``,
    ``step_max_s``, ``steps_timed``, ``speedup`` (step of float32 / step of this method, None without
    float32), and what `probe` returned.
    """
    summary = {name: _method_summary(stages) for name, stages in methods.items()}
    baseline = summary.get("float32", {}).get("step_s")
    for figures in summary.values():
        figures["speedup"] = baseline / figures["step_s"] if baseline and figures["step_s"] else None
    return summary


def table(results: Mapping[str, Any]) -> Table:
    """The result table. A speed-up below 1 is a slow-down and is shown as it is."""
    shown = Table(title=f"{results['settings']['arch']} on {results['data']['name']}")
    shown.add_column("method", no_wrap=True)
    for column in ("test accuracy", "ms / step", "speed-up", "saved", "compile s"):
        shown.add_column(column, justify="right")
    for name, figures in results["methods"].items():
        step, speedup = figures["step_s"], figures["speedup"]
        cached = " (cached)" if figures["compile_cached"] else ""
        shown.add_row(
            LABELS[name],
            f"{100 * figures['accuracy']:.1f} %",
            "-" if step is None else f"{1000 * step:.1f}",
            "-" if speedup is None else f"{speedup:.2f}x",
            decimal(figures["saved_bytes"]),
            f"{figures['compile_s']:.1f}{cached}",
        )
    return shown


def write_plot(results: Mapping[str, Any], path: Path) -> None:
    """A PNG: test accuracy over epochs (the second stage starts at the dotted line), and time per step."""
    figure = optional_import("matplotlib.figure").Figure(figsize=PLOT_SIZE, layout="constrained")
    accuracy, speed = figure.subplots(1, 2, width_ratios=(2, 1))
    methods = results["methods"]
    for name, figures in methods.items():
        history = [100 * value for value in figures["accuracy_history"]]
        accuracy.plot(range(1, len(history) + 1), history, marker="o", label=LABELS[name])
    if results["settings"]["qat_epochs"]:
        accuracy.axvline(results["settings"]["qat_epochs"] + 0.5, color="gray", linestyle=":")
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)", title=results["data"]["name"])
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend()
    bars = speed.bar(list(methods), [1000 * (figures["step_s"] or 0) for figures in methods.values()])
    speed.bar_label(bars, fmt="%.1f")
    speed.set(ylabel="median ms per training step", title=f"batch {results['settings']['batch']}")
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _timed_backward(step: Step, images: Tensor) -> float:
    start = time.perf_counter()
    step(images).square().mean().backward()  # any scalar: it decides neither the time nor what is saved
    return time.perf_counter() - start


def _method_summary(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    epochs = [epoch for stage in stages for epoch in stage["epochs"]]
    steps = [seconds for epoch in stages[-1]["epochs"] for seconds in epoch["step_s"]]
    same_graph = [stage for stage in stages if stage["config"] == stages[-1]["config"]]
    measured = next(stage["probe"] for stage in same_graph if "probe" in stage)
    return {
        "accuracy": epochs[-1]["accuracy"],
        "accuracy_history": [epoch["accuracy"] for epoch in epochs],
        "loss_history": [epoch["loss"] for epoch in epochs],
        "step_s": statistics.median(steps) if steps else None,
        "step_min_s": min(steps, default=None),
        "step_max_s": max(steps, default=None),
        "steps_timed": len(steps),
        **measured,
    }
