"""The tables of README.md and docs/, written from the recorded results.

    python benchmarks/tables.py            # names the documents whose tables differ from the results; exit status 1
    python benchmarks/tables.py --write    # writes them

A table stands between two comments, of which the first names a function of `TABLES` and the folders in
benchmarks/results that it reads:

    <!-- table: steps zen5 -->
    ...
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) ([\w ]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
OURS = "fqt1bit"
FLOATS = {"fp32": ("eager float32", "inductor float32"), "bf16": ("eager bf16", "inductor bf16")}
STEPS = ("vgg16-t1", "vgg16-t2", "vgg16-keep1", "resnet18-t1", "resnet18-t2", "resnet18-t1-bf16", "resnet18-t2-bf16")
MODELS = {"vgg16-cifar": "VGG-16", "vgg16": "VGG-16", "resnet18": "ResNet-18"}
NETS = {
    "vgg": "VGG",
    "resnet": "residual",
    "pre-activation": "pre-activation",
    "depthwise": "depthwise mixed",
    "layer norm": "LayerNorm",
    "group norm": "GroupNorm",
}
PRODUCTS = ("output_product", "grad_input_product", "grad_weight_product")

Row = tuple[str, ...]


def overview(speed: Path, quality: Path) -> Iterator[Row]:
    """README's table: speed and memory of one machine, accuracy of another, losses beside wins."""
    yield ("what", "float32", "bfloat16", "fqt1bit", "against float32", "against bfloat16")
    for name, what in (
        ("vgg16-t1", "VGG-16, 128 images of 32 px, ms a step"),
        ("resnet18-t1", "ResNet-18, 16 images of 224 px, ms a step"),
        ("vgg16-keep1", "VGG-16, all gradient rows (`keep=1`, `save_outputs`), ms a step"),
    ):
        yield overview_step(what, read(speed, name))
    least = min(read(speed, "scaling").values(), key=lambda report: report["speedup_bf16"])
    images = f"{MODELS[least['model']]}, {least['batch']} images of {least['size']} px, {least['threads']} threads"
    yield overview_step(f"least gain: {images}, ms a step", least)
    memory = read(speed, "vgg16-memory")
    for key, what in (
        ("saved_bytes", "VGG-16, MB kept for the backward"),
        ("peak_rss", "VGG-16, peak MB of the process, 2 threads"),
    ):
        sizes = [memory[key][variant] for variant in ("inductor float32", "inductor bf16", OURS)]
        less = [f"{size / sizes[2]:.3g}x less" for size in sizes[:2]]
        yield (what, *(f"{megabytes(size):.0f}" for size in sizes), *less)
    found = read(quality, "fashion-small-vgg")["summary"]
    for method, what in (
        ("FQT, keep 1/4", "test accuracy, %: a quarter of the rows (default)"),
        ("FQT, keep 1/2", "test accuracy, %: half of the rows (`keep=0.5`)"),
        ("QAT", 'test accuracy, %: exact gradients (`grad="exact"`)'),
        ("v1, keep 1/4", 'test accuracy, %: version 0.1 (`preset="v1"`)'),
    ):
        points = found[method]["accuracy"] - found["float32"]["accuracy"]
        yield (what, mean(found["float32"]), "-", mean(found[method]), f"{points:+.1f} points", "-")


def overview_step(what: str, report: dict[str, Any]) -> Row:
    times = [*(best(report["steps"], key) for key in FLOATS), report["steps"][OURS]["median_s"]]
    ratios = [f"{report[f'speedup_{key}']:.1f}x faster" for key in FLOATS]
    return (what, *(f"{1e3 * time:.0f}" for time in times), *ratios)


def steps(folder: Path) -> Iterator[Row]:
    """Medians in ms; ratios, and in brackets those of a second run in which all variants keep freed memory."""
    yield ("step", "best float32", "best bfloat16", "fqt1bit (min .. max)", "over float32", "over bfloat16", "saved MB")
    for name in STEPS:
        report = read(folder, name)
        if not report:
            continue
        ours, tuned, saved = report["steps"][OURS], report["allocators"].get("tuned", {}), report["saved_bytes"]
        floats = (best(report["steps"], key) for key in FLOATS)
        yield (
            configuration(report),
            *("-" if time is None else f"{1e3 * time:.0f}" for time in floats),
            "{:.0f} ({:.0f} .. {:.0f})".format(*(1e3 * ours[key] for key in ("median_s", "min_s", "max_s"))),
            *(ratio(report, tuned, f"speedup_{key}") for key in FLOATS),
            f"{megabytes(saved['inductor float32']):.0f} -> {megabytes(saved[OURS]):.1f}",
        )


def configuration(report: dict[str, Any]) -> str:
    options, threads = report["options"], report["threads"]
    parts = [f"{MODELS[report['model']]}, {report['size']} px, batch {report['batch']}"]
    parts.append(f"{threads} thread{'s' * (threads > 1)}")
    if options["keep"] is not None:
        parts.append(f"`keep={options['keep']:g}`")
    if options["save_outputs"]:
        parts.append("`save_outputs`")
    if options["float_dtype"] != "float32":
        parts.append(f'`float_dtype="{options["float_dtype"]}"`')
    return ", ".join(parts)


def best(timed: dict[str, Any], key: str) -> float | None:
    """Seconds of the faster of eager and Inductor; None where neither was measured."""
    return min((timed[name]["median_s"] for name in FLOATS[key] if name in timed), default=None)


def ratio(report: dict[str, Any], tuned: dict[str, Any], key: str) -> str:
    if report[key] is None:
        return "-"
    return f"**{report[key]:.2f}x**" + (f" ({tuned[key]:.2f}x)" if tuned else "")


def memory(folder: Path) -> Iterator[Row]:
    """Of the process, libraries included; and of a step alone: the peak less what stays resident between steps."""
    yield ("peak resident MB (of them the step)", "Inductor float32", "Inductor bfloat16", "fqt1bit")
    for name in ("vgg16-memory", "resnet18-memory"):
        report = read(folder, name)
        if not report:
            continue
        found = [report["memory"][variant] for variant in ("inductor float32", "inductor bf16", OURS)]
        sizes = ((megabytes(one["peak"]), megabytes(one["peak"] - one["warm"])) for one in found)
        yield (configuration(report), *(f"{peak:.0f} ({step:.0f})" for peak, step in sizes))


def scaling(folder: Path) -> Iterator[Row]:
    yield ("step", "fqt1bit, ms", "over float32", "over bfloat16")
    reports = read(folder, "scaling").values()
    for report in sorted(
        reports, key=lambda it: (it["threads"], MODELS[it["model"]] != "VGG-16", it["batch"], it["size"])
    ):
        ratios = (f"{report[f'speedup_{key}']:.2f}x" for key in FLOATS)
        yield (configuration(report), f"{1e3 * report['steps'][OURS]['median_s']:.1f}", *ratios)


def phases(folder: Path) -> Iterator[Row]:
    """Where a step's time goes, in ms, by one profiled run."""
    reports = [read(folder, f"{name}-phases") or read(folder, name) for name in STEPS]
    reports = [report for report in reports if "phases" in report]
    yield ("phase, ms", *(configuration(report) for report in reports))
    found = [report["phases"][OURS] for report in reports]
    for phase in found[0]["phases"]:
        if any(one["phases"][phase] for one in found):
            yield (phase, *(f"{1e3 * one['phases'][phase]:.1f}" for one in found))
    for key, what in (("step_s", "the whole step, profiled"), ("unprofiled_s", "the whole step, not profiled")):
        yield (what, *(f"{1e3 * one[key]:.1f}" for one in found))


def kernel_rates(folder: Path) -> Iterator[Row]:
    """Times as fast as oneDNN's float32, and percent of the popcount bound where the processor has one."""
    yield ("layer", "output", "grad_input", "grad_weight")
    for name, network in read(folder, "kernel_rates-t1")["networks"].items():
        for layer in network["layers"]:
            cells = []
            for product in (layer[key] for key in PRODUCTS):
                percent = "" if product["bound_percent"] is None else f", {product['bound_percent']:.0f} %"
                cells.append(f"{product['float_s'] / product['s']:.1f}x{percent}")
            yield (f"{MODELS[name]}, batch {network['batch']}: {layer['layer']}", *cells)


def in_turn(folder: Path) -> Iterator[Row]:
    """Pairs of steps of two revisions: the median and the quartiles of new over old."""
    yield ("step", "old ms", "new ms", "new / old (quartiles)")
    for name in ("in-turn-vgg16", "in-turn-resnet18"):
        report = read(folder, name)
        where = f"{MODELS[report['model']]}, {report['size']} px, batch {report['batch']}, {report['rounds']} pairs"
        times = (f"{1e3 * report['median_s'][which]:.0f}" for which in ("old", "new"))
        low, high = report["new_over_old"]["quartiles"]
        yield (where, *times, f"{report['new_over_old']['median']:.2f} ({low:.2f} .. {high:.2f})")


def accuracy(folder: Path) -> Iterator[Row]:
    yield ("training", "method", "test accuracy, %", "BatchNorm recalibrated, %")
    for name, net in (("fashion-small-vgg", "small VGG"), ("fashion-resnet18", "ResNet-18")):
        report = read(folder, name)
        settings = report["settings"]
        where = f"{net}, {settings['size']} px, {settings['limit']} images, {settings['steps']} steps"
        where += f", {settings['seeds']} seed{'s' * (settings['seeds'] > 1)}"
        for method, found in report["summary"].items():
            yield (where, method.replace("v1", "version 0.1"), mean(found), mean(found, "recalibrated"))


def float_dtype(folder: Path) -> Iterator[Row]:
    yield ("method", "float layers in float32, %", "in bfloat16, %", "difference, points")
    report = read(folder, "float_dtype")
    for method in ("qat", "fqt"):
        found = report[method]
        difference = f"{found['difference']:+.2f} ± {found['standard_error']:.2f}"
        yield (method.upper(), f"{found['float32']:.1f}", f"{found['bfloat16']:.1f}", difference)


def gradient_noise(folder: Path) -> Iterator[Row]:
    """Least and greatest over the packed layers of a net, relative to the exact gradient's square."""
    columns = [("grad_weight", "bias"), ("grad_weight", "variance"), ("grad_input", "variance")]
    header = [f"{'squared ' * (figure == 'bias')}{figure}, {of}" for of, figure in columns]
    yield ("net", *(f"{what}: {which}" for what in header for which in ("`v1`", "now")), "least possible, grad_input")
    for net, configs in read(folder, "gradient-noise")["noise"].items():
        layers = [configs["v1"], configs["default"]]
        least = [layer["least_variance"] for layer in configs["default"] if layer["least_variance"] is not None]
        yield (NETS[net], *(spread(one, of, figure) for of, figure in columns for one in layers), between(least))


def gradient_noise_steps(folder: Path) -> Iterator[Row]:
    """The same, one change of the estimator after the other: grad_weight's squared bias and variance."""
    noise = read(folder, "gradient-noise")["noise"]
    names = list(next(iter(noise.values())))
    yield ("net, grad_weight", *names)
    for figure in ("bias", "variance"):
        for net, configs in noise.items():
            what = f"{NETS[net]}, {'squared ' * (figure == 'bias')}{figure}"
            yield (what, *(spread(configs[name], "grad_weight", figure) for name in names))


def spread(layers: list[dict[str, Any]], of: str, figure: str) -> str:
    values = [layer[of][figure] for layer in layers if layer[of] is not None]
    errors = [layer[of]["bias_error"] for layer in layers if layer[of] is not None]
    error = f" (± {digits(max(errors))})" if figure == "bias" else ""
    return between(values) + error


def between(values: list[float]) -> str:
    low, high = (digits(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} .. {high}"


def digits(value: float) -> str:
    return f"{value:z.{2 if abs(value) < 1 else 1 if abs(value) < 20 else 0}f}"


def mean(found: dict[str, Any], key: str = "accuracy") -> str:
    """Mean and standard error; one seed has none."""
    error = found[f"{key}_error"]
    return f"{found[key]:.1f}" + ("" if error is None else f" ± {error:.1f}")


def megabytes(size: float) -> float:
    return size / 1e6


def read(folder: Path, name: str) -> dict[str, Any]:
    """The contents of a result; empty where there is none."""
    path = folder / f"{name}.json"
    contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return contents


TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "overview": overview,
    "steps": steps,
    "memory": memory,
    "scaling": scaling,
    "phases": phases,
    "kernel-rates": kernel_rates,
    "in-turn": in_turn,
    "accuracy": accuracy,
    "float-dtype": float_dtype,
    "gradient-noise": gradient_noise,
    "gradient-noise-steps": gradient_noise_steps,
    "models": lambda folder: model_tables.models(read(folder, "models")),
    "models-summary": lambda folder: model_tables.summary(read(folder, "models")),
    "models-failures": lambda folder: model_tables.failures(read(folder, "models")),
}


def markdown(rows: list[Row]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_tables(text: str) -> str:
    """``text`` with every marked table as the results are now."""

    def replaced(found: re.Match[str]) -> str:
        begin, name, folders, end = found.groups()
        return begin + markdown(list(TABLES[name](*(RESULTS / folder for folder in folders.split())))) + end

    return MARKED.sub(replaced, text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables instead of comparing them")
    write = parser.parse_args().write
    stale = [path for path in documents() if path.read_text() != with_tables(path.read_text())]
    for path in stale:
        print(f"{'written' if write else 'differs'}: {path.relative_to(ROOT)}")
        if write:
            path.write_text(with_tables(path.read_text()))
    sys.exit(bool(stale) and not write)


if __name__ == "__main__":
    main()
