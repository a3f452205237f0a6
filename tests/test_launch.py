"""Launches: what is written down for a compiled graph does what the operation itself does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.equality import assert_same
from support.grid import LAYERS, OPERATIONS, Layer, sampled
from support.grid_calls import calls
from support.nets import SmallNet, small_batch, step_gradients
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fqt_compile
from fqt_compile.errors import UnsupportedInputError
from fqt_compile.kernels import cpu
from fqt_compile.kernels.cpu import launch

pytestmark = pytest.mark.filterwarnings("ignore:fqt1bit. NaN or infinite:fqt_compile.errors.FQTWarning")

CALLED = {"check_finite", "prune_rows", "keep_rows", "scatter_rows"}
"""Operations that compute with torch or read values: they are never written down."""


def written(operation: str, args: Any) -> launch.Launch | None:
    mode = FakeTensorMode()

    def fake(t: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    with mode:
        return launch.record(operation, tree_map_only(Tensor, fake, args), {}, "launched")


def run(launched: launch.Launch, args: Any) -> Any:
    names: dict[str, Any] = {"fqt": launch, "torch": torch}
    exec(launched.source, names)
    return names[launched.name](*[leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])


def nhwc(t: Tensor) -> Tensor:
    """As `passes.layout` asks for operands: images in NHWC memory; words and panels, int64, are as they are."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 and t.dtype != torch.int64 else t


@pytest.mark.usefixtures("two_threads")
@pytest.mark.rotates(2)
@pytest.mark.parametrize("layer", sampled("", LAYERS), ids=str)
def test_a_launch_is_the_operation(layer: Layer) -> None:
    done = set()
    for operation, each in calls(layer).items():
        for number, given in enumerate(each):
            args = tree_map_only(Tensor, nhwc, given)
            launched = written(operation, args)
            if launched is not None:
                done.add(operation)
                assert_same(run(launched, args), cpu.OPERATIONS[operation](*args), f"{operation} {number}")
    constant = set() if layer.batch else {"row_importance"}  # of no rows: ones, made by torch
    assert done == {name for name in OPERATIONS if calls(layer)[name]} - CALLED - constant


def test_what_is_not_allocation_and_kernels_is_not_written_down() -> None:
    g = torch.randn(4, 3, 2, 2)
    rows, scale = torch.arange(4, dtype=torch.int32), torch.ones(4)
    assert written("keep_rows", (g, rows, scale)) is None, "computes with torch"
    assert written("row_importance", (g, "norm")) is None, "copies its operand to NHWC memory"
    assert written("row_importance", (g.contiguous(memory_format=torch.channels_last), "norm")) is not None
    wrong = (torch.zeros(1, 2, dtype=torch.int64), rows, 3, 4, "sign", [], [])
    assert written("output_product", wrong) is None, "raises"


def test_a_launch_refuses_an_index_outside() -> None:
    words, rows = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([0, 4], dtype=torch.int32)
    launched = written("gather_words", (words, rows))
    assert launched is not None
    with pytest.raises(UnsupportedInputError, match=r"gather_rows.*index outside"):
        run(launched, (words, rows))


@contextlib.contextmanager
def always_generated() -> Iterator[None]:
    """Inductor writes its code again, which it would else take from its cache; what is compiled stays there."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


@pytest.mark.rotates(2)
def test_compiled_code_launches_without_the_dispatcher() -> None:
    compiled = torch.compile(SmallNet(norm=True), backend="fqt1bit")
    x, _ = small_batch()
    x = x.contiguous(memory_format=torch.channels_last)
    with always_generated():
        _, codes = run_and_get_code(step, compiled, x)
    code = "\n".join(codes)
    assert set(re.findall(r"= torch\.ops\.fqt\.(\w+)\.", code)) <= {"draw_seed", "keep_rows"}
    assert {"output_product", "grad_weight", "quantize_rows"} <= set(re.findall(r"= fqt_(\w+)_\d+\(", code))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(compiled, x)
    assert {"fqt::output_product", "fqt::grad_weight"} <= {event.name for event in profiler.events() or ()}


@pytest.mark.rotates(3)
def test_shapes_not_known_beforehand_go_through_the_dispatcher() -> None:
    """Their gradients are those of eager FQT, for other sizes, too."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    compiled, oracle = torch.compile(model, backend="fqt1bit", dynamic=True), fqt_compile.eager(model)
    with always_generated():
        _, codes = run_and_get_code(step, compiled, small_batch()[0])
    assert "= torch.ops.fqt.output_product.default(" in "\n".join(codes)
    model.zero_grad()
    images, labels = small_batch(6, 12)
    wanted, found = (step_gradients(call, images, labels)[1] for call in (oracle, compiled))
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
