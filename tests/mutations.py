"""Are wrong kernels and passes caught? Ten small faults, one at a time, against the tests that should see them.

    python tests/mutations.py [number or name ...] [--seed N ...] [--json FILE]

Each fault is one replacement of text in a temporary copy of the tree, where the named tests run as in `make test`, on
the sample of the grids that ``FQT_COMPILE_TEST_SEED`` chooses (``--seed``; several numbers: several days). A fault is
caught when tests fail. Not part of `make test`: it takes some minutes. Exits with 1 if one is not caught.

Each test as `.ci/run` runs it (``--days 3``); `make test`, one day, may leave out the one that catches a fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("passes", "kernels", "operations", "fqt_compile")
"""Where faults are put; links are followed to one place."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """The first ``old`` in ``file`` (found by its name, in whatever folder); ``tests``: arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def kernels(operation: str) -> tuple[str, ...]:
    return "tests/test_kernels.py", "-k", f"test_equals_reference and {operation}"


MUTATIONS = [
    Mutation(
        "sign flipped where a gradient is dequantized (C++)",
        "dequantize.cpp",
        "const float x = scale[k] * float(a[c + i]) + zero[k] * float(sum[c + i]);",
        "const float x = scale[k] * float(a[c + i]) - zero[k] * float(sum[c + i]);",
        kernels("dequantize_grad_input"),
    ),
    Mutation(
        "tail mask dropped where activations are packed (C++)",
        "pack.cpp",
        "bits[p * words + w] = made.larger & used;",
        "bits[p * words + w] = made.larger;",
        kernels("pack_activation"),
    ),
    Mutation(
        "mask of the wrong row (C++)",
        "dequantize.cpp",
        "expand64(mask[(rows[k] * inner + s) * words + w], set);",
        "expand64(mask[(k * inner + s) * words + w], set);",
        kernels("dequantize_grad_input"),
    ),
    Mutation(
        "off by one at the border of a max-pool's gradient (C++)",
        "max_pool_gradient.cpp",
        "th < std::min(g.kernel_h, g.in_h - h); ++th)",
        "th < std::min(g.kernel_h, g.in_h - h - 1); ++th)",
        kernels("max_pool_gradient"),
    ),
    Mutation(
        "planes weighted in the wrong order (C++)",
        "dequantize.cpp",
        "codes[i] |= set[i] & (u32(1) << q);",
        "codes[i] |= set[i] & (u32(1) << (bits - 1 - q));",
        kernels("dequantize_rows"),
    ),
    Mutation(
        "noise of the rows for the channels, too (pass)",
        "schemes.py",
        "(self.layer.g, rows, scale, kept, kept_scale, self.layer.seed, stream, config.gradient_bits)",
        "(self.layer.g, rows, scale, kept, kept_scale, self.layer.seed, stream - 1, config.gradient_bits)",
        ("tests/test_eager.py", "-k", "test_interpreted_graph_equals_eager_exactly"),
    ),
    Mutation(
        "projection dropped in BatchNorm's backward (reference)",
        "statistics.py",
        "    grad = ((g - centered * slope) - per_channel(mean_g, x)) * per_channel(scale, x)",
        "    grad = (g - per_channel(mean_g, x)) * per_channel(scale, x)",
        ("tests/test_reference.py", "-k", "batch_norm_gradient"),
    ),
    Mutation(
        "threshold rule swapped: the batch's mean for the sample's (pass)",
        "activation.py",
        '"batch" if config.threshold == "batch" else "sample"',
        '"sample" if config.threshold == "batch" else "batch"',
        ("tests/test_eager.py", "tests/test_gradients.py", "-k", "equals_eager_exactly or which_threshold"),
    ),
    Mutation(
        "unused channels are not masked where a gradient is quantized (Triton)",
        "quantize.py.jinja",
        "code = tl.where(used, code_of((v - z) * r, zero_code, uniform(index, seed, stream)), 0)",
        "code = code_of((v - z) * r, zero_code, uniform(index, seed, stream))",
        ("tests/test_triton.py", "-k", "test_interpreter_equals_reference and codes"),
    ),
    Mutation(
        "rows chosen one BatchNorm too low (pass)",
        "rows.py",
        "    return above or cut",
        "    return cut",
        ("tests/test_gradients.py", "-k", "test_the_place_of_the_cut"),
    ),
]


def files(tree: Path) -> list[Path]:
    found = {p.resolve() for folder in SOURCES for p in (tree / folder).rglob("*") if p.is_file()}
    return sorted(p for p in found if p.suffix != ".pyc")


def mutate(tree: Path, mutation: Mutation) -> str:
    """Put the fault into its file; the file's name in the tree."""
    named = [path for path in files(tree) if path.name == mutation.file]
    holding = [path for path in named if mutation.old in path.read_text()]
    if len(holding) != 1:
        raise SystemExit(f"{mutation.name}: {len(holding)} files {mutation.file} have the text {mutation.old}")
    holding[0].write_text(holding[0].read_text().replace(mutation.old, mutation.new, 1))
    return str(holding[0].relative_to(tree.resolve()))


def run(mutation: Mutation, seeds: list[str]) -> dict[str, object]:
    """What happened to the tests of one fault, by seed of the sample."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
        path = mutate(tree, mutation)
        caught = {}
        for seed in seeds:
            environment = {**os.environ, "PYTHONPATH": str(tree), "FQT_COMPILE_TEST_SEED": seed}
            environment["FQT_COMPILE_CACHE"] = str(Path(folder) / "cache")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "--days",
                "3",
                *mutation.tests,
            ]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode not in (0, 1):
                raise SystemExit(f"{mutation.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            caught[seed] = failed[0].split(" - ")[0].removeprefix("FAILED ") if done.returncode else None
    return {"mutation": mutation.name, "file": path, "tests": list(mutation.tests), "caught_by": caught}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mutations", nargs="*", help="numbers from 0 on, or parts of names; all of them if none")
    parser.add_argument("--seed", nargs="+", default=["1"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [
        m
        for i, m in enumerate(MUTATIONS)
        if not options.mutations or any(text == str(i) or text in m.name for text in options.mutations)
    ]
    results = []
    for mutation in chosen:
        results.append(run(mutation, options.seed))
        for seed, test in results[-1]["caught_by"].items():  # type: ignore[attr-defined]
            print(f"{'caught' if test else 'NOT CAUGHT':10s} seed {seed}: {mutation.name}: {test}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if any(test is None for result in results for test in result["caught_by"].values()):  # type: ignore[attr-defined]
        sys.exit(1)


if __name__ == "__main__":
    main()
