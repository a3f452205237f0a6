"""Compiling Triton kernels for GPUs that are not there: what is launched, recorded and compiled ahead of time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fqt_compile.kernels import gpu
from fqt_compile.kernels.gpu import codegen as gpu_codegen
from fqt_compile.kernels.gpu import launch as gpu_launch
from fqt_compile.kernels.gpu import products as gpu_products
from fqt_compile.kernels.gpu import strategy as gpu_strategy
from support.grid import LAYERS
from support.grid_calls import GRADIENT_PROGRAMS, POOLED, PROGRAMS, calls

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LAYER_NAMES = ("linear", "3x3-stride-2")
POOLED_LAYER = "3x3-odd-channels"
"""Programs with a max-pool have argument lists on this one."""
NAMED = {text: name for name, text in (PROGRAMS | GRADIENT_PROGRAMS | {"pooled": POOLED}).items()}
COMPILED_PROGRAMS = {
    *((PROGRAMS["batch-norm-relu"], *kind) for kind in (("threshold", False, True), ("sign", False, False))),
    *((PROGRAMS["batch-norm-relu"], "threshold", known, False) for known in (False, True)),
    *((PROGRAMS[name], "threshold", False, False) for name in ("hardtanh", "prelu")),
    *((POOLED, "threshold", known, False) for known in (False, True)),
}
"""Program, code, whether the threshold is known and whether values are kept."""
VARIANTS = ("COMPACT", "PRODUCT", "MEASURE", "GRID", "BY_CHANNEL")
"""Flags that lead to other memory accesses: kernels are compiled with each."""
PLANES = (4, 8, 1)
"""Of gradient codes; single bits only where they are activations or the code 1 of `grad_input_product`."""


def recorded() -> list[gpu_launch.Launch]:
    """One launch of every kernel of every spec that the operations use on two layers.

    Codes of 4 bits, and of 8, which are counted; products with every tile.
    """
    launches: list[gpu_launch.Launch] = []
    for layer in (layer for layer in LAYERS if layer.name in (*LAYER_NAMES, POOLED_LAYER)):
        names = ["fused_activation"] if layer.name == POOLED_LAYER else [n for n in gpu.OPERATIONS if n != "draw_seed"]
        for strategy in ("popcount", "tensor-core"):
            with gpu.force_strategy(strategy), gpu_launch.recording(run=False) as made:
                for name in names:
                    for arguments in calls(layer)[name]:
                        gpu.OPERATIONS[name](*arguments)
                product, scale = calls(layer)["output_product"][0], calls(layer)["unpack_weight"][0][1]
                for bias in (None, scale):
                    gpu_products.scaled_output(product[:7], scale, bias)
            launches += made
    # The most general launch: Triton makes a constant of every argument that is 1.
    launches.sort(key=lambda launch: -launch.types.count("1"))
    most_general = {(launch.spec, launch.kernel, _variant(launch)): launch for launch in launches if _wanted(launch)}
    return sorted((tiled for launch in most_general.values() for tiled in _with_tiles(launch)), key=label)


def _with_tiles(launch: gpu_launch.Launch) -> list[gpu_launch.Launch]:
    """The launch with each of the tiles that `gpu_strategy` may choose for it."""
    constants = dict(launch.constants)
    if "TILE_M" not in constants:
        return [launch]
    options = dict(launch.spec.options)
    tiles = gpu_strategy.TILES[launch.spec.template, options["strategy"]]
    if options.get("epilogue") == "int16":
        tiles = tiles[:1]
    return [
        dataclasses.replace(
            launch,
            constants=tuple((constants | {"TILE_M": tile.m, "TILE_N": tile.n}).items()),
            warps=tile.warps,
            stages=tile.stages,
        )
        for tile in tiles
    ]


def _variant(launch: gpu_launch.Launch) -> str:
    return " ".join(name.lower() for name, value in launch.constants if name in VARIANTS and value)


def _wanted(launch: gpu_launch.Launch) -> bool:
    """Not the same code again where only the number of bits or the end of the kernel differs."""
    options = dict(launch.spec.options)
    if options.get("epilogue") == "scale" or (options.get("epilogue"), options.get("shape")) == (
        "scale+bias",
        "matrix",
    ):
        return False
    if options.get("epilogue") == "int16":
        return (options["shape"], options["code"]) == ("convolution", "threshold")
    if launch.spec.template == "fused_activation":
        return tuple(options[name] for name in ("program", "code", "known", "values")) in COMPILED_PROGRAMS
    if launch.spec.template == "fused_gradient":
        return bool(options["program"] == GRADIENT_PROGRAMS["recomputed-mask"])
    if launch.spec.template == "gradient_moments":
        return bool(options["program"] == GRADIENT_PROGRAMS["dequantized"])  # the other kinds of operands
    if launch.spec.template == "quantize":  # both numbers of bits, and both places of the operand
        flags = dict(launch.constants)
        return bool(options["bits"] == PLANES[not flags["COMPACT"] and flags.get("GRID", True)])
    if "planes" in options:
        return options["planes"] in PLANES
    return options.get("bits", PLANES[0]) in PLANES[:2]


def label(launch: gpu_launch.Launch) -> str:
    """``conv_product.conv_product popcount sign ...``"""
    unsaid = ("offset", "autotune", "tiles", "transposed")
    text = [k * v if isinstance(v, bool) else NAMED.get(v, str(v)) for k, v in launch.spec.options if k not in unsaid]
    tile = [f"{v}" for k, v in launch.constants if k.startswith("TILE_")]
    return " ".join(filter(None, [f"{launch.spec.template}.{launch.kernel}", *text, "x".join(tile), _variant(launch)]))


@dataclass(frozen=True)
class Compiled:
    """Assembly, intermediate code and what the assembler reports."""

    assembly: str
    llvm: str
    resources: dict[str, int]


def compile_launch(launch: gpu_launch.Launch, target: str) -> Compiled:
    kernel = getattr(gpu_codegen.load(launch.spec), launch.kernel)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    for name, kind in zip(kernel.arg_names, launch.types, strict=False):
        if kind in ("1", "None"):
            constants[name] = None if kind == "None" else 1
        else:
            signature[name] = kind
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    # torch's allocations are aligned, which Triton finds out at the launch.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    made = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in made.asm:
        return Compiled(made.asm["ptx"], made.asm["llir"], _cubin_resources(made.asm["cubin"]))
    fields = re.findall(
        r"\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size|vgpr_count):\s+(\d+)", made.asm["amdgcn"]
    )
    return Compiled(made.asm["amdgcn"], made.asm["llir"], {name: int(value) for name, value in fields})


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK``, ``SHARED``, ``LOCAL`` of the kernel, from the machine code's own metadata."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}
