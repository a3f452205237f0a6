"""BatchNorm(momentum=None): traced in one graph, packed as with a number, and PyTorch's running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from support.nets import SmallNet, small_batch, step_gradients
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.modules.batchnorm import _BatchNorm

import fqt_compile
from fqt_compile.cumulative import INLINED, make_traceable

OPTIONS = {"lowering": "eager"}


class Inheriting(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        assert input.dim() == 4


class Calling(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def sequential() -> nn.Sequential:
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def cumulative(model: nn.Module) -> nn.Module:
    """A copy in which no BatchNorm has a momentum."""
    model = copy.deepcopy(model)
    for norm in norms(model):
        norm.momentum = None
    return model


def assert_same_statistics(got: nn.Module, wanted: nn.Module) -> None:
    for one, other in zip(norms(got), norms(wanted), strict=True):
        torch.testing.assert_close(dict(one.named_buffers()), dict(other.named_buffers()), rtol=1e-6, atol=1e-6)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("make", [sequential, lambda: SmallNet(norm=True)], ids=["sequential", "small net"])
def test_plain_compile_makes_one_graph(make):
    """Packed as with a number, with the same gradients, and the statistics are those of the definition, uncompiled."""
    number = make()
    model = cumulative(number)
    copied = fqt_compile.eager(model)  # its buffers are its own; its norms run PyTorch's forward
    batches = [small_batch() for _ in range(3)]
    compiled, with_number = (torch.compile(m, backend="fqt1bit", options=OPTIONS) for m in (model, number))
    counters.clear()
    steps = [step_gradients(compiled, x, y, seed) for seed, (x, y) in enumerate(batches)]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for seed, (x, y) in enumerate(batches):
        torch.testing.assert_close(steps[seed], step_gradients(with_number, x, y, seed), rtol=0, atol=0)
        assert step_gradients(copied, x, y, seed)[0] == pytest.approx(steps[seed][0], rel=1e-6)
    assert [int(norm.num_batches_tracked) for norm in norms(copied)] == [3, 3]
    assert_same_statistics(compiled, copied)
    for norm in norms(with_number):
        norm.momentum = None  # now it has to compile again
    fqt_compile.recalibrate(with_number, [x for x, _ in batches])
    fqt_compile.recalibrate(compiled, [x for x, _ in batches])
    assert_same_statistics(compiled, with_number)

    counters.clear()
    output = compiled.eval()(x)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(output, with_number.eval()(x))


@pytest.mark.rotates(3)
def test_layers_are_found_under_the_same_names():
    reports = [fqt_compile.explain(m, small_batch()[0]) for m in (SmallNet(norm=True), cumulative(SmallNet(norm=True)))]
    assert [site.name for site in reports[0].sites] == ["stem", "conv1", "conv2", "down", "fc1", "fc2"]
    number, none = ([(site.name, site.decision, site.reason) for site in report.sites] for report in reports)
    assert number == none
    assert sum(decision == "packed" for _, decision, _ in none) == 3


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, Inheriting, Calling])
def test_layers_alone(cls, momentum, inside):
    """As uncompiled: three batches in train mode, one in eval mode, and a last one with the statistics switched off."""
    torch.compiler.reset()
    plain = cls(4, momentum=momentum)
    model = nn.Sequential(copy.deepcopy(plain)) if inside else copy.deepcopy(plain)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for scale in (1, 2, 3):
        x = torch.randn(8, 4, 3, 3) * scale + scale
        assert torch.equal(compiled(x), plain(x))
    assert_same_statistics(model, plain)
    assert plain.num_batches_tracked == 3
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))
    norms(model)[0].track_running_stats = plain.track_running_stats = False
    assert torch.equal(compiled.train()(x + 1), plain.train()(x + 1))
    assert_same_statistics(model, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    torch.compiler.reset()
    plain = nn.BatchNorm1d(4, momentum=None, dtype=dtype)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 4, dtype=dtype) + 1
        assert torch.equal(compiled(x), plain(x))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_without_statistics():
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None, track_running_stats=False))
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 3, 8, 8)
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled.eval()(x), model(x))


@pytest.mark.rotates(3)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_number_is_not_affected(backend, monkeypatch):
    """The same bits as in a process without `make_traceable`."""
    outcomes = []
    start = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        torch.compiler.reset()
        model = copy.deepcopy(start)
        compiled = torch.compile(model, backend=backend)
        outputs = [compiled(x), compiled(x + 1), compiled.eval()(x)]
        outcomes.append((outputs, model.state_dict()))
        monkeypatch.delattr(_BatchNorm.forward, INLINED, raising=False)
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)
    torch.compiler.reset()


def test_once_and_for_tracing_only():
    forward = _BatchNorm.forward
    inlined = getattr(forward, INLINED)
    make_traceable()
    assert _BatchNorm.forward is forward
    assert getattr(forward, INLINED) is inlined
    assert forward.__module__ == _BatchNorm.__module__
    assert not hasattr(nn.modules.instancenorm._InstanceNorm.forward, INLINED)


def test_a_forward_of_somebody_else_is_left_alone(monkeypatch):
    def forward(self, input):
        return input

    vars(forward)[INLINED] = forward
    monkeypatch.setattr(_BatchNorm, "forward", forward)
    make_traceable()
    assert getattr(forward, INLINED) is forward
