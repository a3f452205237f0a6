"""Accuracy after training from scratch, seed by seed: small nets and ResNet-18 on Fashion-MNIST, native kernels.

    python benchmarks/accuracy.py --seeds 5 --json benchmarks/results/zen3/fashion-small-vgg.json
    python benchmarks/accuracy.py --arch resnet18 --size 32 --steps 500 --limit 32000 --seeds 1 --json ...

The setting of the float simulation that the estimator was found with (docs/adr/0015): 14 px, 6000 training and 5000
test images, batch 64, 465 steps of Adam, lr 3e-3 with half a cosine. Accuracy in percent, as it is and with BatchNorm
recalibrated on 8 batches. The file of --json is written after every run; runs that it has are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqt_compile
from fqt_compile.backend import fqt1bit
from fqt_compile.models import make_model
from fqt_compile.results import environment, write_json

METHODS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "QAT": {"grad": "exact"},
    "FQT, keep 1/4": {},
    "FQT, keep 1/2": {"keep": 0.5},
    "FQT, keep 1": {"keep": 1.0},
    "v1, keep 1/4": {"preset": "v1"},
}
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
BATCH = 64


def read(part: str, size: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] ``[N, 1, size, size]`` and labels of ``train`` or ``t10k``."""
    images, labels = (
        _bytes(f"{part}-{kind}-ubyte.gz")[skip:] for kind, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    pixels = images.view(-1, 1, 28, 28).float() / 255
    mode = "area" if size < 28 else "bilinear"
    return nn.functional.interpolate(pixels, size=(size, size), mode=mode), labels.long()


def _bytes(name: str) -> Tensor:
    with gzip.open(FOLDER / name) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


def train(method: str, arguments: argparse.Namespace, seed: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """One run; its options, accuracies and the mean loss of its last epoch's worth of steps."""
    images, labels, test_images, test_labels = data
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = make_model(arguments.arch, classes=10, size=arguments.size).to(memory_format=torch.channels_last)
    options = METHODS[method]
    step: Any = torch.compile(model) if options is None else torch.compile(model, backend=fqt1bit, options=options)
    optimizer = torch.optim.Adam(model.parameters(), arguments.lr, weight_decay=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1234 + seed))[: arguments.limit]
    generator, losses, order = torch.Generator().manual_seed(seed), [], torch.empty(0, dtype=torch.long)
    for _ in range(arguments.steps):
        if len(order) < BATCH:
            order = chosen[torch.randperm(len(chosen), generator=generator)]
        index, order = order[:BATCH], order[BATCH:]
        loss = nn.functional.cross_entropy(step(batch_of(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    plain = accuracy(step, model, test_images, test_labels)
    model.train()
    fqt_compile.recalibrate(step, [batch_of(images[i]) for i in chosen[: 8 * BATCH].split(BATCH)])
    recalibrated = accuracy(step, model, test_images, test_labels)
    last = statistics.fmean(losses[-len(chosen) // BATCH :])
    return {"method": method, "seed": seed, "accuracy": plain, "recalibrated": recalibrated, "loss": last}


def batch_of(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def accuracy(step: Any, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        parts = zip(images.split(100), labels.split(100), strict=True)
        return 100 * sum(int((step(batch_of(x)).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error of each method; one seed has no error."""
    found: dict[str, dict[str, float | None]] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        for measure in ("accuracy", "recalibrated"):
            values = [run[measure] for run in runs if run["method"] == method]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            found.setdefault(method, {}).update({measure: statistics.fmean(values), f"{measure}_error": error})
    return found


def known_runs(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of the file at ``path``, so that an interrupted measurement goes on; none if their setting was another."""
    if path is None or not path.exists():
        return []
    report: dict[str, Any] = json.loads(path.read_text())
    which = ("methods", "seeds")
    same = all(report["settings"].get(k) == v for k, v in settings.items() if k not in which)
    return list(report["runs"]) if same else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="fqt_compile.models:small_vgg")
    parser.add_argument("--methods", nargs="+", default=["float32", "QAT", "FQT, keep 1/4", "FQT, keep 1/2"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--steps", type=int, default=465)
    parser.add_argument("--limit", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (images, labels), (test_images, test_labels) = (read(part, arguments.size) for part in ("train", "t10k"))
    mean, deviation = images.mean(), images.std()
    data = ((images - mean) / deviation, labels, ((test_images - mean) / deviation)[:5000], test_labels[:5000])
    settings = {k: v for k, v in vars(arguments).items() if k != "json"}
    runs = known_runs(arguments.json, settings)
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            if any((run["method"], run["seed"]) == (method, seed) for run in runs):
                continue
            runs.append(train(method, arguments, seed, data))
            print(json.dumps(runs[-1]), flush=True)
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                report = {"settings": settings, "summary": summary(runs), "runs": runs, **environment()}
                write_json(report, arguments.json)
    print(json.dumps(summary(runs), indent=2))


if __name__ == "__main__":
    main()
