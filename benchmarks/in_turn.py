"""Whole training steps of two checkouts in turn, A B B A ..., one process each: is the new source slower than the old?

    git worktree add ../old REVISION
    python benchmarks/in_turn.py --old ../old --model vgg16-cifar --batch 128 --size 32 --json result.json

A step is that of `fqt1bit bench`. Machines drift, so the ratio of neighbouring steps is what to read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

READY = "ready"


def work(model: str, batch: int, size: int, threads: int) -> None:
    """Time one step for every line of standard input."""
    import torch

    from fqt_compile.bench import MODELS
    from fqt_compile.models import make_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = make_model(MODELS.get(model, model), classes=10, size=size).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    compiled = torch.compile(net, backend="fqt1bit")

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(4):
        step()
    print(READY, flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def start(tree: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A worker that imports the sources of ``tree``."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("model", "batch", "size", "threads")]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--worker", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tree.resolve())},
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != READY:
        raise SystemExit(f"the worker of {tree} did not start; its error stands above")
    return process


def one_step(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    trees = (arguments.old, Path(__file__).resolve().parents[1])
    workers = [start(tree, arguments) for tree in trees]
    seconds: list[list[float]] = [[], []]
    for i in range(arguments.rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            seconds[k].append(one_step(workers[k]))
    for worker in workers:
        worker.communicate()
    ratios = [new / old for old, new in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    settings = {name: getattr(arguments, name) for name in ("model", "batch", "size", "threads", "rounds")}
    revisions = [
        subprocess.run(
            ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        for tree in trees
    ]
    return {
        **settings,
        "revisions": dict(zip(("old", "new"), revisions, strict=True)),
        "median_s": dict(zip(("old", "new"), map(statistics.median, seconds), strict=True)),
        "min_s": dict(zip(("old", "new"), map(min, seconds), strict=True)),
        "new_over_old": {"median": middle, "quartiles": [low, high]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, default=None, help="checkout to compare with")
    parser.add_argument("--model", default="vgg16-cifar")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.model, arguments.batch, arguments.size, arguments.threads)
        return
    if arguments.old is None or not (arguments.old / "fqt_compile").is_dir():
        parser.error(f"--old: got {arguments.old}; accepted: the folder of a checkout, which has fqt_compile in it")
    text = json.dumps(measure(arguments), indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
