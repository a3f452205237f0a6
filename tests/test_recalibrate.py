"""`fqt_compile.recalibrate` against `update_bn`, and all that it must leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from support.nets import SmallNet, small_batch, step_gradients
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import update_bn

import fqt_compile
from fqt_compile.errors import ConfigError

MOMENTA = [0.1, None, 0.0, 1.0]


def norms(model: nn.Module) -> dict[str, nn.Module]:
    found = {name.removeprefix("_orig_mod."): module for name, module in model.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


def make_net(momentum: float | None, dropout: float = 0.1) -> nn.Module:
    """Dropout before the first BatchNorm, so that a moved seed would show."""
    net = SmallNet(norm=True)
    net.stem = nn.Sequential(net.stem, nn.Dropout(dropout))
    for norm in norms(net).values():
        norm.momentum = momentum
    return net


def make_batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(8, 3, 8, 8) * (1 + i) + i for i in range(count)]


def expected(model: nn.Module, batches: list) -> nn.Module:
    """`update_bn` on a copy, from the same random state."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        update_bn(batches, model)
    return model


def assert_same_statistics(got: nn.Module, wanted: nn.Module, rtol: float = 1e-5) -> None:
    assert norms(got).keys() == norms(wanted).keys()
    for name, norm in norms(got).items():
        other = norms(wanted)[name]
        torch.testing.assert_close(norm.running_mean, other.running_mean, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(norm.running_var, other.running_var, rtol=rtol, atol=1e-6)
        assert norm.num_batches_tracked == other.num_batches_tracked


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything `recalibrate` must not change, and the statistics."""
    return {
        "modes": [module.training for module in model.modules()],
        "momenta": [norm.momentum for norm in norms(model).values()],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict, after: dict, *, statistics: bool = True) -> None:
    assert before.keys() == after.keys()
    for key in before if statistics else before.keys() - {"buffers"}:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_equals_update_bn(momentum):
    model, batches = make_net(momentum), make_batches()
    wanted = expected(model, batches)
    before = snapshot(model)
    fqt_compile.recalibrate(model, [(images, "label") for images in batches])
    assert_same_statistics(model, wanted)
    assert_same(before, snapshot(model), statistics=False)


def test_modes_gradients_and_grad_mode_stay():
    model, batches = make_net(0.1), make_batches()
    step_gradients(model, *small_batch())
    model.conv1(torch.zeros(1, 32, 8, 8)).sum().backward()
    model.conv2.requires_grad_(False)
    model.eval()
    model.norm1.train()
    wanted, before = expected(model, batches), snapshot(model)
    with torch.no_grad():
        fqt_compile.recalibrate(model, iter(batches))
        assert not torch.is_grad_enabled()
    assert_same(before, snapshot(model), statistics=False)
    assert_same_statistics(model, wanted)


def test_compiled_model_is_not_compiled_again():
    """Also: a compiled model and eager FQT agree with `update_bn` on eager FQT."""
    model, (x, y) = make_net(0.1, dropout=0), small_batch()
    compiled = torch.compile(model, backend="fqt1bit", options={"lowering": "eager"})
    reference = fqt_compile.eager(model)
    step_gradients(reference, x, y)
    step_gradients(compiled, x, y)
    graphs = counters["stats"]["unique_graphs"]
    batches = make_batches(2)
    wanted = expected(reference, batches)
    before = snapshot(compiled.eval())
    fqt_compile.recalibrate(compiled, batches)
    assert counters["stats"]["unique_graphs"] == graphs
    assert_same(before, snapshot(compiled), statistics=False)
    assert_same_statistics(compiled, wanted, rtol=1e-3)  # rounding moves a quantized value now and then
    fqt_compile.recalibrate(reference, batches)
    assert_same_statistics(reference, wanted)


class Odd(nn.Module):
    """A BatchNorm used twice, one never reached, one that its parent keeps frozen, and buffers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        self.calls += 1
        return self.instance(self.untracked(self.frozen(self.twice(2 * self.twice(x) + 1))))


def test_layers_out_of_the_ordinary():
    model = Odd().train()
    for buffer in model.buffers():
        buffer += 3
    before = copy.deepcopy(model)
    x = torch.randn(5, 4, 6)
    fqt_compile.recalibrate(model, [x])
    for name in ("unused", "frozen", "instance"):
        assert torch.equal(getattr(model, name).running_mean, getattr(before, name).running_mean), name
    assert model.calls == 3
    assert model.twice.num_batches_tracked == 2
    # Call 1 sees x, call 2 twice its normalized values plus 1: mean 1; weights m (1 - m) and m, scaled to the sum 1.
    wanted = (0.9 * x.mean((0, 2)) + 1) / 1.9
    torch.testing.assert_close(model.twice.running_mean, wanted, rtol=1e-5, atol=1e-6)


def test_without_batch_norm_nothing_runs():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    fqt_compile.recalibrate(model, (pytest.fail("ran") for _ in range(1)))


class BreaksAtSecond(Exception):
    pass


def breaking_batches():
    yield torch.randn(8, 3, 8, 8)
    raise BreaksAtSecond


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (breaking_batches, BreaksAtSecond, None),
        (lambda: [], ConfigError, "batches: got none; accepted: at least one batch"),
        (lambda: [torch.randn(8, 3, 8, 8), {"x": 1}], ConfigError, "batch 1: got dict; accepted: a tensor"),
        (lambda: [()], ConfigError, "batch 0: got an empty one"),
        (lambda: torch.randn(8, 3, 8, 8), ConfigError, r"batches: got Tensor; accepted: an iterable"),
        (lambda: 3, ConfigError, "batches: got int"),
        (lambda: [torch.randn(8, 5, 8, 8)], RuntimeError, "channels"),
    ],
    ids=["raises", "empty", "dict", "empty batch", "tensor", "int", "shape"],
)
def test_after_an_error_all_is_as_before(momentum, batches, error, message):
    model, given = make_net(momentum), batches()
    model.eval()
    model(small_batch()[0])
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fqt_compile.recalibrate(model, given)
    assert_same(before, snapshot(model))


def test_bad_models():
    with pytest.raises(ConfigError, match=r"model: got function; accepted: a torch\.nn\.Module"):
        fqt_compile.recalibrate(lambda x: x, make_batches())
    with pytest.raises(ConfigError, match="model: 0 has no shape yet"):
        fqt_compile.recalibrate(nn.Sequential(nn.LazyBatchNorm2d()), make_batches())
