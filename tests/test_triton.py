"""The GPU path without a GPU: kernels and whole models in Triton's interpreter, strategies and launches.

What was covered is printed at the end of the test run (`conftest.pytest_terminal_summary`).
"""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

import pytest
import torch
from support import processes, sample

pytest.importorskip("triton")

from torch._dynamo.exc import BackendCompilerFailed

from fqt_compile.errors import ConfigError, TritonMissingError
from fqt_compile.kernels import gpu, program
from fqt_compile.kernels.gpu import codegen as gpu_codegen
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu import strategy as gpu_strategy
from fqt_compile.kernels.gpu.codegen import spec
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE

HERE = Path(__file__).parent
GROUPS = {
    "activations, programs and statistics": [
        *("check_finite", "activation_threshold", "pack_activation", "unpack_activation", "apply_mask"),
        *("fused_activation", "fused_gradient", "pack_bool", "unpack_bool", "max_pool_gradient"),
        *("channel_moments", "gradient_moments", "float_moments"),
    ],
    "weights, rows and codes": [
        *("quantize_weight", "transpose_weight", "unpack_weight", "weight_gradient"),
        *("row_importance", "channel_importance", "select"),
        *("prune_rows", "keep_rows", "gather_words", "gather_rows", "scatter_rows"),
        *("quantize_rows", "quantize_channels"),
        *("dequantize_rows", "dequantize_grad_input", "dequantize_grad_weight"),
    ],
    "products": ["output_product", "grad_input_product", "grad_weight_product", "grad_weight"],
}
"""Of operations that one process runs: starting it takes as long as most of them."""
COVERED = "triton coverage"


def run_interpreted(*arguments: str, **environment: str) -> str:
    """Standard output of a Python process that runs Triton kernels in the interpreter."""
    env = {**os.environ, **environment, gpu_codegen.INTERPRET: "1"}
    done = processes.run(arguments, env, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_reference_operation_has_a_gpu_kernel():
    assert sorted(gpu.OPERATIONS) == sorted(REFERENCE)
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(set(gpu.OPERATIONS) - {"draw_seed"})
    for name in set(gpu.OPERATIONS) - {"draw_seed"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fqt::{name}", "CUDA"), name


# -- in the interpreter ----------------------------------------------------------------------------------


@pytest.mark.rotates(3)
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_equals_reference(group, record_property):
    """FQT_COMPILE_TRITON_LIMIT=0 runs all argument lists on all shapes (40 minutes)."""
    limit = os.environ.get("FQT_COMPILE_TRITON_LIMIT") or "1"
    lines = run_interpreted(str(HERE / "support" / "triton_grid.py"), "--limit", limit, *GROUPS[group]).splitlines()
    by_operation = collections.defaultdict(list)
    for run in map(json.loads, lines):
        by_operation[run["operation"], run["strategy"]].append(run)
    assert {operation for operation, _ in by_operation} == set(GROUPS[group])
    for (operation, strategy), runs in by_operation.items():
        kernels = sorted({kernel for run in runs for kernel in run["kernels"]})
        shapes = " ".join(f"{run['layer']}:{run['calls']}" for run in runs)
        record_property(COVERED, f"interpreter | {operation} ({strategy}) | {', '.join(kernels)} | {shapes}")


@pytest.mark.rotates(3)
@pytest.mark.slow
def test_offsets_of_64_bits(record_property):
    """What tensors of more than 2**30 elements use."""
    operations = ["pack_activation", "quantize_weight", "quantize_rows", "output_product", "grad_weight_product"]
    operations += ["activation_threshold", "quantize_channels"]
    operations += ["fused_activation", "max_pool_gradient", "gradient_moments"]
    layers = sample.some("wide", ["linear-one-row", "3x3-odd-channels", "1x1-stride-2"])
    grid = [str(HERE / "support" / "triton_grid.py"), *operations, "--limit", "1", "--wide", "--layers", *layers]
    lines = run_interpreted(*grid).splitlines()
    assert len(lines) == len(layers) * (len(operations) + 2)  # products in two strategies
    record_property(COVERED, f"interpreter, 64-bit offsets | {', '.join(operations)} | {' '.join(layers)}")


def test_offset_type_leaves_room_for_the_last_block():
    assert gpu_launch.offset_type(2**30 - 1) == "tl.int32"
    assert gpu_launch.offset_type(1, 2**30) == "tl.int64"


SCALED_OUTPUT = """
import torch
from support.grid import LAYERS
from support.grid_calls import calls
from fqt_compile.kernels import gpu, reference
from fqt_compile.kernels.gpu import products as gpu_products
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE
for layer in [layer for layer in LAYERS if layer.name in ("linear-one-row", "3x3-odd-channels", "1-d")]:
    product = calls(layer)["output_product"][0]
    alpha, bias = torch.rand(layer.out_channels) + 0.1, torch.randn(layer.out_channels)
    acc = REFERENCE["output_product"](*product)
    for strategy in ("popcount", "tensor-core"):
        for b in (None, bias, bias.bfloat16()):
            with gpu.force_strategy(strategy):
                y = gpu_products.scaled_output(product[:7], alpha, b)
            assert torch.equal(y, reference.dequantize_output(acc, alpha, b))
print("epilogue")
"""


EVERY_STATEMENT = """
import warnings
import torch
torch.set_num_threads(1)
from support.equality import assert_same
from fqt_compile.kernels import gpu, program
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE
warnings.filterwarnings("ignore", message="fqt1bit: NaN or infinite")
nan, inf = float("nan"), float("inf")
special = torch.tensor([0.0, -0.0, nan, -nan, inf, -inf, 1e-40, -1e-40, 3e38, 1.0, -1.0, 0.1, 1 + 2**-9, 1 + 3 * 2**-9])
a, b = special.repeat(len(special), 1), special.view(-1, 1).repeat(1, len(special))
texts = {}
for name, operation in program.OPERATIONS.items():
    if name == "where":
        texts[name] = "full,full|t0=ge(x0,x1)|t1=where(t0,x1,-0.0)"
        continue
    arguments = operation.triton.count("{1}") or operation.cpp.count("{1}")
    statement = f"t0={name}(x0,x1)" if arguments else f"t0={name}(x0)"
    kept = "|t1=where(t0,x0,x1)" if operation.is_bool else ""
    texts[name] = f"full,full|{statement}{kept}"
texts["numbers"] = "full|t0=mul(x0,0.1)|t1=maximum(t0,-inf)|t2=minimum(1e-40,t1)|t3=sub(-0.0,t2)"
texts["nothing before the pool"] = "full|t0=pool(x0)"
for name, text in texts.items():
    pool = "pool" in text
    operands = [x.view(1, 14, 7, 2) if pool else x for x in (a, b)][: text.split("|")[0].count("full")]
    for code, below in (("sign", True), ("threshold", False))[: 1 + (name in ("numbers", "bfloat16"))]:
        call = (operands, text, code, [2, 2, 1, 1, 1, 1] if pool else [], True, below)
        made, wanted = (o["fused_activation"](*call) for o in (gpu.OPERATIONS, REFERENCE))
        assert_same(made, wanted, name)
    print(name)
"""


@pytest.mark.rotates(3)
@pytest.mark.slow
def test_every_statement_of_programs_on_special_values_and_the_epilogue_of_the_output_product(record_property):
    lines = run_interpreted("-c", EVERY_STATEMENT + SCALED_OUTPUT).splitlines()
    assert set(lines) >= {*program.OPERATIONS, "epilogue"}
    record_property(COVERED, "interpreter | output_product with scale and bias (popcount, tensor-core) | 3 shapes")
    record_property(COVERED, f"interpreter | statements of programs, zeros, NaN, infinities | {', '.join(lines)}")


# -- whole models in the interpreter --------------------------------------------------------------------

WHOLE_MODEL = """
import json
import warnings
import torch
from support import sample
from support.nets import SmallNet, small_batch, step_gradients
from torch import nn
from torchvision.models.resnet import BasicBlock
from fqt_compile.kernels.gpu import launch as gpu_launch
torch.set_num_threads(1)
torch.manual_seed(0)
warnings.filterwarnings("ignore", message="fqt1bit: activation='sign' tells nothing")
def block(width, channels):
    return nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
pooled = nn.Sequential(*block(3, 32), nn.MaxPool2d(2), BasicBlock(32, 32), nn.MaxPool2d(3, 2, 1), *block(32, 64),
                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
paper = {"preset": "paper", "activation": "sign", "bits": 2}
for model, options in sample.some("interpreted models", ((pooled, {}), (SmallNet(norm=True), paper))):
    x, y = small_batch(4)
    results = []
    for lowering in ("eager", "triton"):
        torch._dynamo.reset()
        with gpu_launch.recording() as launches:
            step = torch.compile(model, backend="fqt1bit", options={**options, "lowering": lowering})
            results.append(step_gradients(step, x, y))
    (wanted_loss, wanted), (loss, gradients) = results
    assert loss == wanted_loss, (options, loss, wanted_loss)
    for name, gradient in wanted.items():
        assert torch.equal(gradients[name], gradient), (options, name)
    print(json.dumps([not options, sorted({launch.kernel for launch in launches})]))
"""
OF_OPTIMIZED_GRAPHS = {
    *(
        "program_sums",
        "pack_program",
        "integer_sums",
        "moments_of_sums",
        "program_product_sums",
        "gradient_moments_of_sums",
    ),
    *("program_values", "merge_extremes", "max_pool_taps", "max_pool_gradient", "keep_rows", "gather_rows"),
    *("square_sums", "float_moments_of_sums", "walk"),
}


@pytest.mark.rotates(4)
@pytest.mark.slow
def test_whole_model_equals_the_oracle(record_property):
    runs = [json.loads(line) for line in run_interpreted("-c", WHOLE_MODEL).splitlines()]
    assert runs
    for is_optimized, kernels in runs:
        assert set(kernels) >= (OF_OPTIMIZED_GRAPHS if is_optimized else {"conv_product", "grad_weight_product"})
    used = {kernel for _, kernels in runs for kernel in kernels}
    covered = f"equals lowering=eager | {', '.join(sorted(used))}"
    record_property(COVERED, f"interpreter | whole models, forward and backward | {covered}")


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    monkeypatch.delenv(gpu_codegen.INTERPRET, raising=False)
    with pytest.raises(TritonMissingError, match="TRITON_INTERPRET=1 before Python starts"):
        gpu.OPERATIONS["pack_activation"](torch.ones(1, 1), None)
    model = torch.compile(torch.nn.Linear(64, 64), backend="fqt1bit", options={"lowering": "triton", "skip": []})
    with pytest.raises(BackendCompilerFailed, match=r"TritonMissingError.*TRITON_INTERPRET=1 before Python starts"):
        model(torch.ones(2, 64))


# -- strategies and launches ---------------------------------------------------------------------------------


def chosen(kernel: str, rows: int, columns: int, bits: int) -> str:
    return gpu_strategy.choose(kernel, rows, columns, bits)[0]


def test_the_rule_counts_where_little_is_shared_and_multiplies_codes(monkeypatch):
    monkeypatch.delenv(gpu_strategy.ENVIRONMENT, raising=False)
    assert chosen("conv_product", 1024, 512, 1) == "popcount"
    assert chosen("conv_product", 65536, 512, 1) == "tensor-core"
    assert chosen("conv_product", 4096, 512, 4) == "tensor-core"
    assert chosen("grad_weight_product", 512, 512, 4) == "tensor-core"
    assert chosen("grad_weight_product", 512, 512, 8) == "popcount"  # does not fit int8
    assert gpu_strategy.choose("conv_product", 64, 64, 1)[1].m == 32  # small products in small tiles


def test_the_strategy_is_an_option(monkeypatch):
    with gpu.force_strategy("tensor-core"):
        assert chosen("conv_product", 4096, 512, 1) == "tensor-core"
        assert chosen("conv_product", 4096, 512, 8) == "popcount"
    monkeypatch.setenv(gpu_strategy.ENVIRONMENT, "popcount")
    assert chosen("conv_product", 4096, 512, 4) == "popcount"
    monkeypatch.setenv(gpu_strategy.ENVIRONMENT, "wmma")
    with pytest.raises(ConfigError, match="'wmma'; accepted: popcount, tensor-core, auto"):
        gpu_strategy.choose("conv_product", 16, 16, 1)


def test_autotuned_products_are_launched_without_a_tile(monkeypatch):
    monkeypatch.setenv(gpu_strategy.AUTOTUNE, "1")
    monkeypatch.delenv(gpu_codegen.INTERPRET, raising=False)
    bits = torch.zeros(64, 1, dtype=torch.int64)
    panels = torch.zeros(4, 1, 16, dtype=torch.int64)
    with gpu_launch.recording(run=False) as (launches):
        gpu.OPERATIONS["output_product"](bits, panels, 64, 64, "sign", [], [])
    (launch,) = launches
    assert "triton.Config" in gpu_codegen.render(launch.spec)
    assert type(getattr(gpu_codegen.load(launch.spec), launch.kernel)).__name__ == "Autotuner"


def test_generated_files_are_readable_and_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FQT_COMPILE_CACHE", str(tmp_path / "cache"))
    wanted = spec("rows", offset="tl.int32")
    path = gpu_codegen.write(wanted)
    assert path.read_text().startswith("# Generated by fqt_compile from rows.py.jinja (offset=tl.int32).")
    before = path.stat().st_mtime_ns
    assert gpu_codegen.write(wanted) == path
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"\xff truncated")
    assert "def gather_rows" in gpu_codegen.write(wanted).read_text()
