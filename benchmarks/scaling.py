"""Speed-up of fqt1bit over batch, resolution and threads: runs `fqt1bit bench` for every configuration.

    python benchmarks/scaling.py [--quick] [--out runs/scaling.json] [--option keep=1]

VGG-16 at 32 px with batches of 8 to 512, ResNet-18 with 16 images of 32 to 224 px, each with 1 and 2 threads. The file
is written after every configuration; a run that was interrupted goes on where it stopped, and configurations measured
with other versions of the package or of torch, or with other options, are measured again. Beside the file stands the
plot, scaling.png. About 20 minutes on two cores, most of them compilation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fqt_compile import results
from fqt_compile.backend import source_hash
from fqt_compile.bench import BFLOAT16, FLOAT32, OURS
from fqt_compile.cli_options import parse_options
from fqt_compile.optional import optional_import
from fqt_compile.results import write_json

BATCHES, SIZES, THREADS = (8, 32, 128, 512), (32, 64, 128, 224), (1, 2)
VGG_SIZE, RESNET_BATCH = 32, 16
ROUNDS, WARM = 3, 1
OUT = Path("runs/scaling.json")  # recorded results keep theirs: benchmarks/results/MACHINE/scaling.json


class Configuration(NamedTuple):
    """One run of `fqt1bit bench`."""

    model: str
    batch: int
    size: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.size} px, {self.threads} threads"


def configurations(quick: bool) -> Iterator[Configuration]:
    """All of them, or for a look the smallest ones with one thread."""
    for threads in THREADS[:1] if quick else THREADS:
        for batch in BATCHES[:2] if quick else BATCHES:
            yield Configuration("vgg16-cifar", batch, VGG_SIZE, threads)
        for size in SIZES[:2] if quick else SIZES:
            yield Configuration("resnet18", RESNET_BATCH, size, threads)


def measure(configuration: Configuration, options: list[str]) -> dict[str, Any] | None:
    """The report of `fqt1bit bench`; None, with its message on stderr, if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        named = (f"--{name}={value}" for name, value in configuration._asdict().items())
        only = f"--only={','.join((*FLOAT32, *BFLOAT16, OURS))}"
        arguments = [*named, only, f"--rounds={ROUNDS}", f"--warm={WARM}", "--no-memory", f"--json={report}"]
        command = [sys.executable, "-m", "fqt_compile.cli", "bench", *arguments]
        done = subprocess.run([*command, *(f"--option={option}" for option in options)], stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            return None
        figures: dict[str, Any] = json.loads(report.read_text())
        del figures["command"]  # it names the temporary file
        return figures


def is_current(report: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a report was measured with this package, these versions and these options."""
    versions = {**results.environment()["versions"], "source": source_hash()[:12]}
    return report["versions"] == versions and report["options"] == options


def run(quick: bool, out: Path, options: list[str], console: Console) -> dict[str, Any]:
    """Measure what ``out`` does not have yet; returns all reports by configuration."""
    reports: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    wanted = list(configurations(quick))
    config = json.loads(parse_options(options, {}).canonical())
    for number, configuration in enumerate(wanted, 1):
        name = str(configuration)
        if name in reports and is_current(reports[name], config):
            continue
        start = time.perf_counter()
        report = measure(configuration, options)
        if report is None:
            console.print(f"{number}/{len(wanted)} {name}: failed, left out")
            continue
        reports[name] = report
        write_json(reports, out)
        console.print(f"{number}/{len(wanted)} {name}: {time.perf_counter() - start:.0f} s", highlight=False)
    return {str(c): reports[str(c)] for c in wanted if str(c) in reports}


def table(reports: dict[str, Any]) -> Table:
    """One row a configuration; a speed-up below 1 is a loss."""
    shown = Table(title="median step of fqt1bit")
    for column in ("configuration", "ms", "x best fp32", "x best bf16"):
        shown.add_column(column, justify="left" if column == "configuration" else "right")
    for name, report in reports.items():
        quotients = (report["speedup_fp32"], report["speedup_bf16"])
        step = report["steps"][OURS]["median_s"]
        shown.add_row(name, f"{1e3 * step:.1f}", *("-" if q is None else f"{q:.2f}" for q in quotients))
    return shown


def plot(reports: dict[str, Any], path: Path) -> None:
    """Speed-ups over the best float32 (above) and the best bf16 (below), a line for each number of threads."""
    figure = optional_import("matplotlib.figure").Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, (model, over, ticks) in enumerate((("vgg16-cifar", "batch", BATCHES), ("resnet18", "size", SIZES))):
        chosen = [report for report in reports.values() if report["model"] == model]
        for row, key in enumerate(("fp32", "bf16")):
            draw(axes[row, column], chosen, over, f"speedup_{key}")
            axes[row, column].set(ylabel=f"times the best {key}", xticks=ticks, xticklabels=map(str, ticks))
        axes[0, column].set(title=f"{model}, {f'{VGG_SIZE} px' if over == 'batch' else f'batch {RESNET_BATCH}'}")
        axes[1, column].set(xlabel="images a step" if over == "batch" else "pixels along an edge")
    machine = next(iter(reports.values()))
    figure.suptitle(f"training step of fqt1bit, {machine['cpu']}, torch {machine['versions']['torch']}")
    figure.savefig(path)


def draw(axis: Any, reports: list[dict[str, Any]], over: str, key: str) -> None:
    """``key`` of the reports against ``over``; at the dotted line both are equally fast."""
    for threads in THREADS:
        points = sorted((r[over], r[key]) for r in reports if r["threads"] == threads and r[key] is not None)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{threads} thread{'s' * (threads > 1)}")
    if axis.lines:
        axis.legend()
    axis.axhline(1, color="gray", linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only four small configurations")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of FQTConfig; repeatable")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    reports = run(options.quick, options.out, options.option, console)
    if not reports:
        sys.exit("nothing could be measured; the messages above say why")
    console.print(table(reports))
    plot(reports, options.out.with_suffix(".png"))
    console.print(f"written: {options.out}, {options.out.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
