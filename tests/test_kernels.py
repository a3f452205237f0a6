"""Every native CPU operation equals its reference bit for bit: all instruction sets, 1 and 2 threads."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import sample
from support.equality import assert_same
from support.grid import LAYERS, OPERATIONS, REFERENCE, WIDE, Call, Layer, operands, sampled
from support.grid_calls import calls, expected, product_calls

from fqt_compile.errors import ConfigError, UnsupportedInputError
from fqt_compile.kernels import cpu, packing
from fqt_compile.kernels.cpu import isa as instruction_sets

# NaN activations are part of the grid; that they are announced is tested in test_backend.py.
pytestmark = pytest.mark.filterwarnings("ignore:fqt1bit. NaN or infinite:fqt_compile.errors.FQTWarning")


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.force_isa(request.param):
        yield request.param


def isas(operation: str) -> list[str]:
    """The best instruction set, which models run, and each day a third of the others."""
    best, *others = cpu.supported_isas()
    return [best, *sample.turn(3, OPERATIONS.index(operation) if operation in OPERATIONS else 0, others)]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def cases(operations: list[str], layers: list[Layer]) -> list[Any]:
    """Instruction set, operation, layer and number of threads: the sample of the day, or all."""
    made = []
    for operation in operations:
        for isa, layer in itertools.product(isas(operation), sampled(operation, layers)):
            name = f"{operation}-{layer.name}"
            for count in (1, 2) if sample.everything() else [sample.pick(name, (1, 2))]:
                made.append(pytest.param(isa, operation, layer, count, id=f"{isa}-{name}-{count}"))
    return made


def test_every_reference_operation_is_native() -> None:
    assert sorted(cpu.OPERATIONS) == sorted(REFERENCE)
    assert sorted(calls(LAYERS[0])) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("isa", "operation", "layer", "threads"), cases(OPERATIONS, LAYERS), indirect=["isa", "threads"]
)
def test_equals_reference(operation: str, layer: Layer, isa: str, threads: int) -> None:
    for number, arguments in enumerate(calls(layer)[operation]):
        actual = cpu.OPERATIONS[operation](*arguments)
        assert_same(actual, expected(layer, operation, number), f"{operation} call {number}")


@functools.cache
def _wide(layer: Layer) -> list[tuple[str, Call, Any]]:
    """Products of a layer, with the reference's results."""
    each = product_calls(layer, operands(layer)).items()
    return [(operation, args, REFERENCE[operation](*args)) for operation, made in each for args in made]


@pytest.mark.parametrize(
    ("isa", "products", "layer", "threads"), cases(["products"], WIDE), indirect=["isa", "threads"]
)
def test_wide_products_equal_reference(products: str, layer: Layer, isa: str, threads: int) -> None:
    for number, (operation, args, wanted) in enumerate(_wide(layer)):
        assert_same(cpu.OPERATIONS[operation](*args), wanted, f"{operation}, {products[:-1]} {number}")


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 8])
def test_largest_sums_equal_reference(bits: int, isa: str) -> None:
    """Every product at its largest: sums leave bytes and 16 bits as early as they can."""
    words, channels = 1030, 17
    rows = torch.full((bits, 3, words), -1, dtype=torch.int64)
    panels = torch.zeros(2, words, packing.PANEL, dtype=torch.int64)
    panels[:, :, 1::2] = -1
    to_input = (rows, panels, channels, 64 * words, [], [], [])
    samples, size = 64 * 70, [1, 1]
    lanes = packing.pack_lanes(torch.full((samples, 9, *size), 2**bits - 1, dtype=torch.uint8), bits)
    x_bits = torch.full((samples, *size, 1), -1, dtype=torch.int64)
    kept = torch.arange(samples, dtype=torch.int32)
    to_weight = (lanes, x_bits, kept, 64, 9, "threshold", size, size, [1, 1], [0, 0])
    for operation, args in (("grad_input_product", to_input), ("grad_weight_product", to_weight)):
        assert_same(cpu.OPERATIONS[operation](*args), REFERENCE[operation](*args), operation)


def test_draws_the_same_seed() -> None:
    torch.manual_seed(3)
    seed = cpu.OPERATIONS["draw_seed"](torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(seed, REFERENCE["draw_seed"](torch.device("cpu")))


def test_wrong_words_are_refused() -> None:
    o = operands(LAYERS[0])
    bits, _ = REFERENCE["pack_activation"](o.x, None)
    w_bits, scale = REFERENCE["quantize_weight"](o.weight, "xnor")
    with pytest.raises(UnsupportedInputError, match=r"x_bits.*accepted"):
        cpu.OPERATIONS["output_product"](bits[:, :1], w_bits, 130, 65, "sign", [], [])
    with pytest.raises(UnsupportedInputError, match=r"w_bits.*accepted"):
        cpu.OPERATIONS["unpack_weight"](w_bits, scale, 64)
    with pytest.raises(UnsupportedInputError, match=r"mask.*accepted"):
        cpu.OPERATIONS["apply_mask"](o.x, bits[:5])
    with pytest.raises(UnsupportedInputError, match=r"torch\.int64; accepted"):
        cpu.OPERATIONS["activation_threshold"](bits, "sample")
    with pytest.raises(ConfigError, match="'none', 'xnor'"):
        cpu.OPERATIONS["quantize_weight"](o.weight, "xnro")


def test_rows_outside_the_tensor_are_refused() -> None:
    o = operands(LAYERS[0])
    rows = torch.tensor([0, o.g.shape[0]], dtype=torch.int32)
    with pytest.raises(UnsupportedInputError, match="index outside"):
        cpu.OPERATIONS["quantize_rows"](o.g, None, rows, None, o.seed, 1, 4)
    with pytest.raises(UnsupportedInputError, match="index outside"):
        cpu.OPERATIONS["quantize_channels"](o.g, rows, None, None, None, o.seed, 1, 4)


def test_int32_overflow_is_refused() -> None:
    word_count = 140_000
    planes = torch.zeros(8, 1, word_count, dtype=torch.int64)
    w_bits_t = torch.zeros(1, word_count, 16, dtype=torch.int64)
    with pytest.raises(UnsupportedInputError, match="exceed int32"):
        cpu.OPERATIONS["grad_input_product"](planes, w_bits_t, 1, 64 * word_count, [], [], [])


def test_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'sse9'.*portable"), cpu.force_isa("sse9"):
        pass
    monkeypatch.setenv("FQT_COMPILE_ISA", "neon")
    instruction_sets._default.cache_clear()
    with pytest.raises(ConfigError, match=r"FQT_COMPILE_ISA: got 'neon'.*portable"):
        cpu.OPERATIONS["activation_threshold"](torch.ones(1, 1), "sample")


def test_operations_of_the_gpu_check_equal_reference(monkeypatch):
    """`benchmarks/gpu_check.py` is for machines that CI has not; its argument lists are run here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu_operations = importlib.import_module("gpu_operations")
    for layer in gpu_operations.TINY_LAYERS:
        for number, (name, arguments) in enumerate(gpu_operations.operation_calls(layer)):
            wanted = REFERENCE[name](*arguments)
            assert_same(cpu.OPERATIONS[name](*arguments), wanted, f"{name} {layer.name} {number}")
