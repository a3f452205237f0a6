"""Triton kernels compiled ahead of time for three GPUs, bound by Triton's launcher, and as snapshots.

What was covered is printed at the end of the test run (`conftest.pytest_terminal_summary`).
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from support import sample, triton_aot
from support.grid_calls import GRADIENT_PROGRAMS, POOLED, PROGRAMS

from fqt_compile.kernels.gpu import codegen as gpu_codegen
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu import strategy as gpu_strategy
from fqt_compile.kernels.gpu.codegen import spec

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
UPDATE_GOLDEN = "FQT_COMPILE_GOLDEN"
COVERED = "triton coverage"

# -- compiled ahead of time ------------------------------------------------------------------------------

COUNTS = {"sm_80": r"popc\.b64", "sm_90": r"popc\.b64", "gfx942": r"v_bcnt_u32_b32"}
INT8_PRODUCTS = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    "sm_90": r"wgmma\.mma_async\S*\.s32\.s8\.s8",
    "gfx942": r"v_mfma_i32_\w*_i8",
}
# AMD's scalar registers hold comparisons of whole wavefronts and spill into lanes of vector registers, not to memory.
NO_SPILLS = {
    "sm_80": ("STACK", "LOCAL"),
    "sm_90": ("STACK", "LOCAL"),
    "gfx942": ("vgpr_spill_count", "private_segment_fixed_size"),
}


def assert_float_arithmetic_as_written(made: triton_aot.Compiled, target: str) -> None:
    """No contraction, no flushed denormals, divisions and roots correctly rounded, no sum in the order of arrival."""
    assert not re.search(r"atomicrmw f|\b(red|atom)\.\S*\.f(16|32|64)", made.llvm + made.assembly)
    assert not re.search(r"llvm\.fma|fmuladd|\bcontract\b|\bfast\b|\barcp\b", made.llvm)
    if target == "gfx942":
        assert re.search(r"float_denorm_mode_32 3", made.assembly)
        return
    assert not re.search(r"\bfma\.|\.ftz\b", made.assembly)
    assert not re.search(r"\b(div|sqrt|rcp)\.(?!rn\.|s32|u32|s64|u64)", made.assembly)


def assert_expected_instructions(launch: gpu_launch.Launch, made: triton_aot.Compiled, target: str) -> None:
    strategy = dict(launch.spec.options).get("strategy")
    counts, multiplies = re.search(COUNTS[target], made.assembly), re.search(INT8_PRODUCTS[target], made.assembly)
    if launch.kernel == "transpose_taps" or strategy is None:
        assert not multiplies
    else:
        assert bool(multiplies) == (strategy == "tensor-core")
        assert bool(counts) == (strategy == "popcount")
    if target != "gfx942":
        needed = {"make_groups": "div.rn.f32", "row_norms": "sqrt.rn.f32", "mean_of_sums": "div.rn.f64"}
        needed |= {"exact_zero_points": "div.rn.f64", "step_sums": "add.f32"}
        needed |= {
            "moments_of_sums": "div.rn.f64",
            "program_product_sums": "add.f64",
            "square_sums": "add.f64",
            "probabilities": "div.rn.f64",
        }
        if dict(launch.spec.options).get("program") == PROGRAMS["hardtanh"]:
            needed[launch.kernel] = "div.rn.f32"
        assert re.search(needed.get(launch.kernel, "").replace("add", r"add(\.rn)?"), made.assembly)


@pytest.mark.slow
@pytest.mark.parametrize("target", sample.some("targets", ["sm_80", "sm_90", "gfx942"]))
def test_compiles_ahead_of_time(target, record_property):
    launches = compiled_for(target, triton_aot.recorded())
    assert {launch.spec.template for launch in launches} == {path.name.split(".")[0] for path in kernel_templates()}
    for launch in launches:
        made = triton_aot.compile_launch(launch, target)
        where = f"{triton_aot.label(launch)} on {target}"
        assert all(made.resources[name] == 0 for name in NO_SPILLS[target]), f"{where}: {made.resources}"
        assert_float_arithmetic_as_written(made, target)
        assert_expected_instructions(launch, made, target)
    by_kernel = collections.defaultdict(list)
    for launch in launches:
        kernel, _, variant = triton_aot.label(launch).partition(" ")
        by_kernel[kernel].append(variant or "-")
    for kernel, variants in by_kernel.items():
        record_property(COVERED, f"{target} | {kernel} | {'; '.join(variants)}")
    record_property(COVERED, f"{target} | {len(launches)} kernels compiled, none spills")


def compiled_for(target: str, launches: list[gpu_launch.Launch]) -> list[gpu_launch.Launch]:
    """Each template, half of the kernels, one of twenty launches: others every day."""
    if sample.everything():
        return launches
    place = int(target == "gfx942")
    chosen = [launch for launch in launches if sample.number(triton_aot.label(launch)) % 20 == place]
    templates = {launch.spec.template for launch in chosen}
    kernels = {(launch.spec.template, launch.kernel) for launch in chosen}
    for launch in sample.shuffled(target, launches):
        template, kernel = launch.spec.template, (launch.spec.template, launch.kernel)
        mine = sample.number(f"{kernel}") % 2 == place
        if template not in templates or (mine and kernel not in kernels):
            templates.add(template)
            kernels.add(kernel)
            chosen.append(launch)
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("option", sample.some("launcher", ["--plain", "--autotune"]))
def test_the_launcher_binds_every_kernel(option, record_property):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    env.pop(gpu_codegen.INTERPRET, None)
    command = [sys.executable, str(HERE / "support" / "triton_bind.py"), option]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    bound = json.loads(done.stdout)
    kernels = {"conv_product", "grad_weight_product", "transpose_taps"}
    if option == "--plain":
        kernels = {launch.kernel for launch in triton_aot.recorded()}
    assert set(bound) == kernels
    record_property(COVERED, f"sm_90, Triton's launcher, {option[2:]} | {sum(bound.values())} launches bound: {bound}")


def kernel_templates() -> list[Path]:
    """Templates that are files of their own, not parts of others."""
    return [path for path in gpu_codegen.TEMPLATES.glob("*.jinja") if "head.py.jinja" in path.read_text()]


# -- snapshots -----------------------------------------------------------------------------------------------


def snapshots() -> list[gpu_codegen.Spec]:
    conv = {"planes": 1, "shape": "convolution", "transposed": False, "epilogue": "none", "offset": "tl.int32"}
    plain = {"autotune": False, "tiles": ()}
    made = [spec("activation", code=code, offset="tl.int32") for code in ("sign", "threshold")]
    made += [spec("weight", mode=mode, offset="tl.int32") for mode in ("xnor", "none")]
    made += [spec(name, offset="tl.int32") for name in ("rows", "groups", "dequantize", "float")]
    made += [spec("select", prune=prune) for prune in ("systematic", "bernoulli", "topk")]
    made += [spec("quantize", bits=4, offset="tl.int32"), spec("rows", offset="tl.int64")]
    made += [
        spec("fused_activation", program=text, code=code, known=known, values=values, below=True, offset="tl.int32")
        for text, code, known, values in (
            (POOLED, "threshold", False, True),
            (PROGRAMS["batch-norm-relu"], "threshold", True, False),
            (PROGRAMS["prelu"], "sign", False, False),
        )
    ]
    made.append(spec("fused_gradient", program=GRADIENT_PROGRAMS["recomputed-mask"], offset="tl.int32"))
    made.append(spec("gradient_moments", program=GRADIENT_PROGRAMS["dequantized"], offset="tl.int32"))
    made.append(spec("max_pool_gradient", program=PROGRAMS["batch-norm-relu"], offset="tl.int32"))
    for strategy in gpu_strategy.STRATEGIES:
        for code in ("sign", "threshold"):
            made.append(spec("conv_product", strategy=strategy, code=code, **conv, **plain))
            made.append(spec("grad_weight_product", strategy=strategy, bits=4, code=code, offset="tl.int32", **plain))
        made.append(spec("conv_product", strategy=strategy, code="threshold", **{**conv, "epilogue": "int16"}, **plain))
        planes = {**conv, "planes": 4, "transposed": True}
        made.append(spec("conv_product", strategy=strategy, code="planes", **planes, **plain))
    tiles = gpu_strategy.TILES["conv_product", "popcount"]
    matrix = {**conv, "shape": "matrix", "epilogue": "scale+bias", "autotune": True, "tiles": tiles}
    return [*made, spec("conv_product", strategy="popcount", code="sign", **matrix)]


BETWEEN = "\n\n\n"
"""What stands between the functions of a file."""
SHARED = "shared-functions.txt"


def test_generated_sources_equal_their_snapshots():
    """After a change that is meant: FQT_COMPILE_GOLDEN=1 pytest tests/test_triton_compile.py, and read the diff."""
    sources = {f"{_short(wanted)}.txt": gpu_codegen.render(wanted) for wanted in snapshots()}
    for name, source in sources.items():
        compile(source, name, "exec")
    shown = without_shared_functions(sources)
    if os.environ.get(UPDATE_GOLDEN):
        GOLDEN.mkdir(exist_ok=True)
        for path in GOLDEN.glob("*.txt"):
            path.unlink()
        for name, text in shown.items():
            (GOLDEN / name).write_text(text)
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(shown)
    for name, text in shown.items():
        assert (GOLDEN / name).read_text() == text, f"{name} changed; {UPDATE_GOLDEN}=1 accepts it"


def without_shared_functions(sources: dict[str, str]) -> dict[str, str]:
    """Functions that files of several templates have stand in a file of their own, and by name where they were."""
    templates: dict[str, set[str]] = collections.defaultdict(set)
    for name, source in sources.items():
        for function in source.rstrip().split(BETWEEN):
            templates[function].add(re.split(r"[-.]", name)[0])
    shared: dict[str, str] = {}
    for function in (function for function, users in templates.items() if len(users) > 1):
        name = re.findall(r"def (\w+)", function)[0]
        assert name not in shared.values(), f"two functions {name}"
        shared[function] = name
    shown = {SHARED: BETWEEN.join(shared) + "\n"}
    for name, source in sources.items():
        functions = source.rstrip().split(BETWEEN)
        said = [f"# {shared[f]}: {SHARED}" if f in shared else f for f in functions]
        shown[name] = BETWEEN.join(said) + "\n"
    return shown


def _short(wanted: gpu_codegen.Spec) -> str:
    """A file name without what is the same in all: ``conv_product-popcount-sign-1-convolution-none``."""
    shown = [v if k != "program" else triton_aot.NAMED[v] for k, v in wanted.options if k not in ("autotune", "tiles")]
    values = [str(v).removeprefix("tl.") for v in shown]
    return "-".join([wanted.template, *(v for v in values if v not in ("int32", "False"))])
