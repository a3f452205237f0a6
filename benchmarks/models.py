"""A sweep over model families: what is packed, and is what runs what is defined?

    python benchmarks/models.py                                     # all of `model_zoo.py` that is installed: hours
    python benchmarks/models.py --only "torchvision/resnet*" --stage oracle
    python benchmarks/models.py --resume                            # only models without a record of these sources

Stages: ``captured`` runs the passes, ``oracle`` compares the rewritten graph with eager FQT, ``native`` also compares
the kernels and the compiled model with it, and compile times with Inductor's (`model_steps.py` says how). Every model
has a process and a time limit of its own. The record is written after each.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from model_steps import STAGES, Measurement
from model_zoo import Case, all_cases

from fqt_compile.backend import source_hash
from fqt_compile.kernels.cache import machine_name
from fqt_compile.results import environment, write_json

ROOT = Path(__file__).parents[1]
SETTINGS = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
"""Of every process: whole compile times, on one core."""
SOURCES = ("model_zoo.py", "model_steps.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names such as 'timm/*'")
    parser.add_argument("--stage", default=STAGES[-1], choices=STAGES)
    parser.add_argument("--resume", action="store_true", help="skip what has a record of these sources and this stage")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model")
    parser.add_argument("--json", type=Path, help="default: models.json in the folder of this processor")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if fnmatch.fnmatchcase(case.name, arguments.only)]
    if arguments.worker is not None:
        work(chosen[0], arguments.stage, arguments.worker)
        return
    path = arguments.json or recorded_here() / "models.json"
    report = json.loads(path.read_text()) if path.exists() else {"models": {}}
    report |= {"command": " ".join(sys.argv), **environment()}
    report["versions"] |= {package: installed(package) for package in sorted({case.package for case in chosen})}
    source = sources()
    for case in chosen:
        if not case.installed:
            continue
        known = report["models"].get(case.name)
        if arguments.resume and known is not None and is_done(known, source, arguments.stage):
            continue
        record = run(case, arguments.stage, arguments.timeout)
        report["models"][case.name] = {"group": case.group, "source": source, **record}
        write_json(report, path)
        print(line(case.name, record), flush=True)
    missing = Counter(case.package for case in chosen if not case.installed)
    for package, count in missing.items():
        print(f"left out: {count} models of {package}, which is not installed")


def recorded_here() -> Path:
    """The folder of results of this processor."""
    for machine in sorted((ROOT / "benchmarks" / "results").glob("*/machine.json")):
        if json.loads(machine.read_text())["cpu"] == machine_name():
            return machine.parent
    sys.exit(f"benchmarks/results has no folder for {machine_name()}: give --json PATH")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def sources() -> str:
    """Digest of the package and of what is measured."""
    digest = hashlib.sha256(source_hash().encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def is_done(known: dict[str, Any], source: str, stage: str) -> bool:
    return known["source"] == source and STAGES.index(known["stage"]) >= STAGES.index(stage)


def run(case: Case, stage: str, timeout: float) -> dict[str, Any]:
    """The record of one model, from a process of its own; what it had found so far if it is killed or crashes."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--only",
            case.name,
            "--stage",
            stage,
            "--worker",
            str(path),
        ]
        with subprocess.Popen(
            [*command, "--worker", str(path)],
            env=os.environ | SETTINGS,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            ended = wait(process, timeout)
        record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stage": stage, "errors": {}}
    if ended is not None:
        record["errors"][record.get("running") or "start"] = {"line": ended, "frame": "none of ours", "last": ""}
    record.pop("running", None)
    record["total_s"] = round(time.perf_counter() - start, 1)
    return record


def wait(process: subprocess.Popen[bytes], timeout: float) -> str | None:
    """Wait for a process; how it ended, if not well. If it does not end in time, it is ended with what it started."""
    try:
        _, said = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            return f"longer than {timeout:g} s"
        raise
    return None if process.returncode == 0 else f"exit status {process.returncode}: {last_line(said)}"


def last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def work(case: Case, stage: str, path: Path) -> None:
    torch.set_num_threads(1)
    Measurement(case, stage, lambda record: write_json(record, path)).run()


def line(name: str, record: dict[str, Any]) -> str:
    """What is printed of a model."""
    parts = [f"{name}: packed {record.get('packed', '?')}/{record.get('layers', '?')}"]
    for key, found in record.items():
        if isinstance(found, dict) and "verdict" in found:
            parts.append(f"{key}: {found['verdict']} {found['largest']:.1e}")
    parts += [f"{part} FAILED: {error['line']} [{error['frame']}]" for part, error in record["errors"].items()]
    return ", ".join([*parts, f"{record['total_s']:.0f} s"])


if __name__ == "__main__":
    main()
