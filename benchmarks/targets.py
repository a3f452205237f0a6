"""The goals for the CPU step against the recorded results: what is met, what is missed, by how much.

    python benchmarks/targets.py [--results benchmarks/results/zen5]

Reads the files that README.md lists; a file that is not there counts as missed. Exit status 1 if a goal is missed.
Ratios are those of the plain `fqt1bit` variant, under the allocator setting where they are lower; the table of `fqt1bit
bench` has the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

OURS = "fqt1bit"
RESULTS = Path(__file__).parent / "results" / "zen5"
LARGE_CHANNELS = 128  # "large layers": 3x3, stride 1, at least this many channels on both sides


class Goal(NamedTuple):
    """``got`` is None where the result is missing."""

    what: str
    wanted: float
    stretch: float | None
    got: float | None

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not recorded"
        if self.got < self.wanted:
            return f"MISSED by {1 - self.got / self.wanted:.0%}"
        return "met, stretch too" if self.stretch is not None and self.got >= self.stretch else "met"


def goals(folder: Path) -> Iterator[Goal]:
    """All goals, in the order of the table."""
    for name, fp32, bf16, saved in (("vgg16", (10, 14), (5, 7), 12), ("resnet18", (6.5, 8.5), (3.5, 4.5), 8)):
        for threads in (1, 2):
            report = read(folder / f"{name}-t{threads}.json")
            where = f"{name}, {threads} threads"
            yield Goal(f"{where}: times the best float32", *fp32, lowest(report, "speedup_fp32"))
            yield Goal(f"{where}: times the best bf16", *bf16, lowest(report, "speedup_bf16"))
        less = read(folder / f"{name}-t1.json").get("saved_ratio", {}).get(OURS)
        yield Goal(f"{name}: times fewer saved bytes than Inductor float32", saved, None, less)
    keep = lowest(read(folder / "vgg16-keep1.json"), "speedup_fp32")
    yield Goal("vgg16, nothing pruned: times the best float32", 5, None, keep)
    yield from kernel_goals(read(folder / "kernel_rates-t1.json"))
    scaling = [report["ratios"][OURS] for report in read(folder / "scaling.json").values()]
    slowest = min((value for ratios in scaling for value in ratios.values() if value is not None), default=None)
    yield Goal("scaling table: smallest ratio to the best float step", 1, None, slowest)


def lowest(report: dict[str, Any], key: str) -> float | None:
    """The smaller figure of the allocator settings that were measured; None where none was."""
    found = [timed[key] for timed in report.get("allocators", {}).values()]
    return min((figure for figure in found if figure is not None), default=None)


def kernel_goals(report: dict[str, Any]) -> Iterator[Goal]:
    """The lowest percentage of the bound over the large layers, for each product."""
    for name in ("output_product", "grad_input_product", "grad_weight_product"):
        networks = report.get("networks", {}).values()
        large = (layer for network in networks for layer in network["layers"] if is_large(layer["layer"]))
        percents = [layer[name]["bound_percent"] for layer in large]  # None where the CPU has no such instruction
        lowest = min((percent for percent in percents if percent is not None), default=None)
        yield Goal(f"{name}: percent of the bound, lowest large layer", 85, None, lowest)


def is_large(layer: str) -> bool:
    """Of a name such as ``128-256@8 3x3 /2``."""
    channels, kernel, *stride = layer.split()
    return kernel == "3x3" and not stride and min(map(int, channels.split("@")[0].split("-"))) >= LARGE_CHANNELS


def read(path: Path) -> dict[str, Any]:
    """The contents of a result; empty where there is none."""
    contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one machine")
    found = list(goals(parser.parse_args().results))
    table = Table(title="goals of the CPU training step")
    for column in ("goal", "wanted", "stretch", "got", ""):
        table.add_column(column, justify="right" if column in ("wanted", "stretch", "got") else "left")
    for goal in found:
        numbers = (goal.wanted, goal.stretch, goal.got)
        table.add_row(goal.what, *("-" if n is None else f"{n:.4g}" for n in numbers), goal.verdict)
    Console(width=120).print(table)
    sys.exit(any(not goal.verdict.startswith("met") for goal in found))


if __name__ == "__main__":
    main()
