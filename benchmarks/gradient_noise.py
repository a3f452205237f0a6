"""Bias and variance of the gradients of six kinds of nets, version 0.1 against the default, on digits.

    python benchmarks/gradient_noise.py --json benchmarks/results/zen3/gradient-noise.json

Each net is trained for 20 steps (``--steps``) with exact gradients first (at initialization gradients say little), then
measured on 2 batches of 64 images with 16 seeds (`fqt_compile.gradient_noise`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

import fqt_compile
from fqt_compile.results import environment, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.noise_nets import NETS, batches, trained

CONFIGS: dict[str, dict[str, Any]] = {
    "v1": {"preset": "v1"},
    "projection": {"preset": "v1", "batch_norm": "project"},
    "+ cut above BatchNorm": {"preset": "v1", "batch_norm": "project", "cut": "batch_norm"},
    "+ zero on the grid, exact sums": {"threshold": "batch"},
    "default": {},
    "default, keep 1/2": {"keep": 0.5},
    "default, rows at the output": {"cut": "output"},
    "default, keep 1": {"keep": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.nets:
        model = trained(NETS[name], arguments.steps)
        for label in arguments.configs:
            noise = fqt_compile.gradient_noise(model, batches(2), CONFIGS[label], arguments.seeds)
            found.setdefault(name, {})[label] = [dataclasses.asdict(layer) for layer in noise.layers]
            print(f"{name}, {label}\n{noise}", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            {"seeds": arguments.seeds, "steps": arguments.steps, "noise": found, **environment()}, arguments.json
        )


if __name__ == "__main__":
    main()
