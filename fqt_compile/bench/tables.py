"""The tables of `bench`. A ratio below 1 is a loss and is shown as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

MEGABYTE = 1e6
REASON_LENGTH = 200  # characters of a failure; the JSON file has all
WIDTH = 110  # columns the tables need, where no terminal says how many there are


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """One table of variants for every allocator setting, then the phases of our variants."""
    for allocator, timed in report["allocators"].items():
        yield _variants(report, allocator, timed)
    for variant, figures in report.get("phases", {}).items():
        yield _phases(variant, figures)


def _variants(report: Mapping[str, Any], allocator: str, timed: Mapping[str, Any]) -> Table:
    what = f"{report['model']}, batch {report['batch']}, {report['size']} px, {report['threads']} threads"
    shown = Table(title=f"{what}, {report['cpu']}, {allocator} allocator")
    shown.add_column("variant", no_wrap=True)
    for column in (
        "ms / step (min .. max)",
        "x best fp32",
        "x best bf16",
        "saved MB",
        "x less",
        "peak MB",
        "over start MB",
    ):
        shown.add_column(column, justify="right", no_wrap=column.startswith("ms"))
    memory = report.get("memory", {}) if allocator == report["allocator"] else {}
    for name, step in timed["steps"].items():
        quotients = timed["ratios"][name]
        used = memory.get(name)
        shown.add_row(
            name,
            f"{1e3 * step['median_s']:.1f} ({1e3 * step['min_s']:.1f} .. {1e3 * step['max_s']:.1f})",
            *("-" if quotients[key] is None else f"{quotients[key]:.2f}" for key in ("fp32", "bf16")),
            f"{timed['saved_bytes'][name] / MEGABYTE:.1f}",
            "-" if timed["saved_ratio"][name] is None else f"{timed['saved_ratio'][name]:.2f}",
            "-" if used is None else f"{used['peak'] / MEGABYTE:.0f}",
            "-" if used is None else f"{(used['peak'] - used['start']) / MEGABYTE:.0f}",
        )
    for name, reason in timed["failed"].items():
        shown.add_row(name, "failed")
        shown.caption = f"{shown.caption or ''}{name}: {reason[:REASON_LENGTH]}\n"
    return shown


def _phases(variant: str, figures: Mapping[str, Any]) -> Table:
    step, free = 1e3 * figures["step_s"], 1e3 * figures["unprofiled_s"]
    shown = Table(title=f"phases of {variant}: {step:.1f} ms under the profiler, {free:.1f} ms without")
    shown.add_column("phase", no_wrap=True)
    for column in ("ms / step", "share"):
        shown.add_column(column, justify="right")
    for phase, seconds in figures["phases"].items():
        shown.add_row(phase, f"{1e3 * seconds:.2f}", f"{seconds / figures['step_s']:.1%}")
    return shown
