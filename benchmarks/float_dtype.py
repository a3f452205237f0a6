"""The effect of ``float_dtype="bfloat16"`` on accuracy: the same fine-tuning with both, seed by seed.

    python benchmarks/float_dtype.py [--seeds 5] [--runs runs/float_dtype] [--json runs/float_dtype.json]

For every seed and dtype `fqt1bit finetune` on Fashion-MNIST (Debian's dataset-fashion-mnist), 12000 training and all
10000 test images, the small VGG, two epochs of pre-training and three of QAT and of FQT. Runs whose results are in
--runs already are not repeated: remove the folder after a change. About 30 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fqt_compile import results
from fqt_compile.results import write_json

DTYPES = ("float32", "bfloat16")
METHODS = ("qat", "fqt")
SETTINGS = ("--data=fashion-mnist", "--limit=12000", "--size=32", "--methods=qat,fqt", "--qat-epochs=2", "--epochs=3")


def accuracies(folder: Path, seed: int, dtype: str) -> dict[str, float]:
    """Test accuracy of every method after one run, which is made unless its results are there."""
    out = folder / f"run-{seed}-{dtype}"
    if not (out / "results.json").exists():
        options = (f"--seed={seed}", "--threads=1", f"--option=float_dtype={dtype}", f"--out={out}", "--overwrite")
        subprocess.run([sys.executable, "-m", "fqt_compile.cli", "finetune", *SETTINGS, *options], check=True)
    methods = json.loads((out / "results.json").read_text())["methods"]
    return {method: methods[method]["accuracy"] for method in METHODS}


def compare(runs: dict[str, list[dict[str, float]]], method: str) -> dict[str, Any]:
    """Mean accuracy by dtype, and the mean of the paired differences with its standard error, in points."""
    percent = {dtype: [100 * run[method] for run in runs[dtype]] for dtype in DTYPES}
    differences = [b - a for a, b in zip(*(percent[dtype] for dtype in DTYPES), strict=True)]
    return {
        **{dtype: statistics.mean(values) for dtype, values in percent.items()},
        "difference": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/float_dtype"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "float_dtype.json")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: got {options.seeds}; accepted: at least 2, for a standard error")
    runs = {dtype: [accuracies(options.runs, seed, dtype) for seed in range(options.seeds)] for dtype in DTYPES}
    report = {method: compare(runs, method) for method in METHODS}
    command = f"python benchmarks/float_dtype.py --seeds {options.seeds}"
    write_json({"command": command, **results.environment(), "threads": 1, **report, "runs": runs}, options.json)
    for method, figures in report.items():
        shown = ", ".join(f"{dtype} {figures[dtype]:.2f} %" for dtype in DTYPES)
        Console().print(
            f"{method}: {shown}, difference {figures['difference']:+.2f} +- {figures['standard_error']:.2f}"
        )


if __name__ == "__main__":
    main()
