"""Declarations: what is derived from them, how they reach torch, and which kernel modules may import which."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from support.grid import LAYERS
from support.grid_calls import calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fqt_compile.bench import phases
from fqt_compile.inspect.runs import ROLES
from fqt_compile.kernels import cpu, dispatch, gpu
from fqt_compile.kernels.cpu import native
from fqt_compile.kernels.operands import Size
from fqt_compile.kernels.operations import OPERATIONS, Arguments, Operation, operation

KERNELS = Path(__file__).parent.parent / "kernels"
SCHEMAS = Path(__file__).parent / "schemas.txt"
"""What compiled graphs call, in caches too: a change of these is a change of the interface."""


def test_schemas_come_from_the_signatures():
    made = sorted(f"{name}{declared.schema}" for name, declared in OPERATIONS.items())
    assert made == sorted(SCHEMAS.read_text().splitlines())


def test_every_operation_has_kernels_and_a_fake():
    assert cpu.OPERATIONS.keys() == gpu.OPERATIONS.keys() == OPERATIONS.keys()
    for name in OPERATIONS:
        assert getattr(torch.ops.fqt, name).default._schema.name == f"fqt::{name}"


def test_facts_have_known_values():
    assert {made.phase for made in OPERATIONS.values()} == {*phases.PACKED}
    assert {made.role for made in OPERATIONS.values()} <= {"", *ROLES}


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.name in ("linear", "3x3-odd-channels")], ids=str)
@pytest.mark.filterwarnings("ignore:fqt1bit. NaN or infinite")
def test_fakes_are_like_the_results(layer):
    mode = FakeTensorMode()

    def fake(t: Tensor) -> Tensor:
        return mode.from_tensor(t)

    def like(results):
        tensors = results if isinstance(results, tuple) else (results,)
        return [(t.dtype, t.shape, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]) for t in tensors]

    for name, each in calls(layer).items():
        for args in each[:3]:
            with mode:
                faked = OPERATIONS[name].fake(*tree_map_only(Tensor, fake, args))
            assert like(faked) == like(OPERATIONS[name](*args)), name


def test_an_operation_in_three_steps():
    """The walk-through of CONTRIBUTING.md: declaration with definition, CPU kernel, and torch knows it."""
    declared: dict[str, Operation] = {}

    def contract(a: Arguments) -> None:
        if a.scale <= 0:
            raise ValueError(f"scaled_rows: got scale={a.scale}; accepted: positive")

    @operation(
        results=lambda a: a.x.new_empty([a.size, *a.x.shape[1:]]), contract=contract, phase="packing", registry=declared
    )
    def scaled_rows(x: Tensor, size: Size, scale: int = 2) -> Tensor:
        """The first ``size`` rows of x, scaled."""
        return x[:size] * scale

    @native.kernel(scaled_rows)
    def kernel(a: Arguments, out: Tensor) -> None:
        torch.mul(a.x[: a.size], a.scale, out=out)

    assert scaled_rows.schema == "(Tensor x, SymInt size, int scale=2) -> Tensor"
    library = torch.library.Library("fqt_test", "DEF")
    dispatch.define(library, scaled_rows)
    x = torch.arange(6.0).view(3, 2)
    for call in (torch.ops.fqt_test.scaled_rows, torch.compile(torch.ops.fqt_test.scaled_rows, fullgraph=True)):
        assert torch.equal(call(x, 2), x[:2] * 2)
        assert torch.equal(call(x, 2, 3), scaled_rows(x, 2, 3))
    with pytest.raises(ValueError, match="accepted: positive"):
        torch.ops.fqt_test.scaled_rows(x, 2, 0)
    assert "scaled_rows" not in OPERATIONS


# -- rooms -----------------------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """Modules of ``kernels`` that a module imports, anywhere in it: ``cpu.native``, ``packing``."""
    package = list(path.relative_to(KERNELS).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not 1 <= node.level <= len(package) + 1:
            continue
        base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        for alias in node.names:
            parts = [part for part in (*base, alias.name) if part]
            found.add(".".join(parts if is_module(parts) else parts[:-1]))
    return found - {"", name_of(path)}


def is_module(parts: Sequence[str]) -> bool:
    path = KERNELS.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def name_of(path: Path) -> str:
    return ".".join(part for part in path.relative_to(KERNELS).with_suffix("").parts if part != "__init__")


MODULES = {name_of(path): imports(path) for path in KERNELS.rglob("*.py")}


def test_no_module_imports_itself_in_a_circle():
    assert set(TopologicalSorter(MODULES).static_order()) >= MODULES.keys()


def test_rooms_import_downwards():
    rooms: dict[str, set[str]] = {}
    for module, imported in MODULES.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update({name.split(".")[0] for name in imported} - {room})
    assert set(TopologicalSorter(rooms).static_order()) >= rooms.keys()
    for room in ("operations", "reference", "operands"):
        assert not rooms[room] & {"cpu", "gpu", "dispatch", "cost"}, room
    assert not rooms["gpu"] & {"cpu", "cost", "dispatch"}
    assert not rooms["cpu"] & {"gpu", "cost", "dispatch"}


def test_operations_lie_in_the_same_file_everywhere():
    for topic in (KERNELS / "operations").glob("*.py"):
        if topic.stem not in ("__init__", "declare"):
            assert (KERNELS / "cpu" / topic.name).exists(), topic.name
            assert (KERNELS / "gpu" / topic.name).exists(), topic.name
