"""Eager FQT against the rewritten graph interpreted with the reference: equal, bit for bit, in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import sample
from support.nets import SmallNet, small_batch, step_gradients
from torch import nn

import fqt_compile
from fqt_compile import FQTConfig
from fqt_compile.capture import plan
from fqt_compile.errors import CaptureError, ConfigError, NonFiniteError

MODES = [
    {},
    {"preset": "paper"},
    {"grad": "exact"},
    {"grad": "psq"},
    {"scope": "layer"},
    {"scope": "layer", "prune": "topk", "importance": "range"},
    {"scope": "layer", "prune": "none"},
    {"bits": 2, "keep": 0.5, "prune": "bernoulli"},
    {"bits": 8, "keep": 1.0},
    {"bits": 1, "importance": "uniform"},
    {"activation": "sign", "weight_scale": "none"},
    {"prune_weight": "channel"},
    {"float_dtype": "bfloat16"},
    {"float_dtype": "bfloat16", "grad": "exact"},
]


def both(model: nn.Module, options: dict, x: torch.Tensor, y: torch.Tensor):
    eager = fqt_compile.eager(copy.deepcopy(model), options)
    compiled = torch.compile(model, backend="fqt1bit", options={**options, "lowering": "eager"})
    return step_gradients(eager, x, y), step_gradients(compiled, x, y)


def assert_equal_steps(a, b) -> None:
    """Bit for bit; gradients of float convolutions up to rounding, of bfloat16 under autocast: on some CPUs the order
    of oneDNN's sums depends on the memory order of the gradient."""
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        if name.startswith(("stem", "down")):
            tolerance = 0.02 if torch.is_autocast_enabled("cpu") else 1e-5
            assert (gradient - b[1][name]).abs().max() <= tolerance * gradient.abs().max(), name
        else:
            assert torch.equal(gradient, b[1][name]), name


@pytest.mark.filterwarnings("ignore:fqt1bit. activation='sign' tells nothing")
@pytest.mark.rotates(2)
@pytest.mark.parametrize(
    ("options", "autocast"),
    [(mode, autocast) for mode in MODES for autocast in sample.some(str(mode), [False, True])],
    ids=str,
)
def test_interpreted_graph_equals_eager_exactly(options, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager, compiled = both(SmallNet(), options, *small_batch())
        assert_equal_steps(eager, compiled)


def test_bfloat16_model_equals_eager_exactly():
    x, y = small_batch()
    eager, compiled = both(SmallNet().bfloat16(), {}, x.bfloat16(), y)
    assert_equal_steps(eager, compiled)


def test_with_batch_norm_only_rounding_differs():
    """Inductor's decomposition of BatchNorm rounds differently from eager's; nothing else may."""
    eager, compiled = both(SmallNet(norm=True), {}, *small_batch())
    assert eager[0] == pytest.approx(compiled[0], rel=1e-6)
    for name, gradient in eager[1].items():
        if name == "conv1.bias":  # in front of BatchNorm its gradient is 0, and so are both but for rounding
            assert max(gradient.abs().max(), compiled[1][name].abs().max()) < 1e-5 * eager[1]["norm1.bias"].abs().max()
            continue
        difference = (gradient - compiled[1][name]).abs().max() / gradient.abs().max()
        assert difference < 1e-4, name


def test_transformer_equals_eager():
    """Attention's in-projection is a functional call, which eager FQT must find too."""
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    eager, compiled = both(model, {}, torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,)))
    assert eager[0] == pytest.approx(compiled[0], rel=1e-5)
    for name, gradient in eager[1].items():
        assert torch.allclose(gradient, compiled[1][name], rtol=1e-3, atol=1e-5), name


class Products(nn.Module):
    """A parameter multiplied in its own orientation, a convolution over a sequence, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 48) * 0.1)
        self.b = nn.Parameter(torch.zeros(48))
        self.conv = nn.Conv1d(48, 40, 3, stride=2, padding=2)
        self.twice = nn.Linear(40, 40)

    def forward(self, x):  # [N, T, 64]
        h = torch.relu(x @ self.w + self.b).transpose(1, 2)
        h = torch.relu(self.conv(h)).mean(2)
        return self.twice(torch.tanh(self.twice(h)))


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"grad": "exact"}], ids=str)
def test_other_orientations_sequences_and_shared_weights(options):
    eager, compiled = both(Products(), {"skip": (), **options}, torch.randn(6, 9, 64), torch.randint(0, 40, (6,)))
    assert set(eager[1]) == {"w", "b", "conv.weight", "conv.bias", "twice.weight", "twice.bias"}
    assert eager[0] == pytest.approx(compiled[0], rel=1e-6)
    for name, gradient in eager[1].items():
        assert torch.allclose(gradient, compiled[1][name], rtol=1e-5, atol=1e-7), name


def test_eager_shares_parameters_and_copies_buffers():
    model = SmallNet(norm=True)
    eager = fqt_compile.eager(model)
    assert all(a is b for a, b in zip(model.parameters(), eager.parameters(), strict=True))
    assert eager.state_dict().keys() == model.state_dict().keys()
    before = model.norm1.running_mean.clone()
    eager(small_batch()[0])
    assert torch.equal(model.norm1.running_mean, before)
    assert not torch.equal(eager.norm1.running_mean, before)
    assert isinstance(eager, SmallNet)


def test_eager_needs_no_gradients():
    model = SmallNet().eval()
    x, _ = small_batch()
    eager = fqt_compile.eager(model)
    with torch.no_grad():
        output = eager(x)
        interpreted = torch.compile(model, backend="fqt1bit", options={"lowering": "eager"})(x)
    assert torch.equal(output, interpreted)


def test_step_scope_is_unbiased_through_a_skip_connection():
    """Mean gradient over many seeds = gradient without pruning, 8 bits so that only AGP matters."""
    torch.manual_seed(1)
    model = SmallNet()
    x, y = small_batch(6)
    exact = step_gradients(fqt_compile.eager(model, {"grad": "exact"}), x, y)[1]
    pruned = fqt_compile.eager(model, {"bits": 8, "keep": 0.5})
    names = ["conv1.weight", "conv2.weight", "fc1.weight", "stem.weight"]
    draws = {name: [] for name in names}
    for seed in range(150):
        gradients = step_gradients(pruned, x, y, seed)[1]
        for name in names:
            draws[name].append(gradients[name].flatten())
    for name in names:
        stacked = torch.stack(draws[name]).double()
        # One projection per layer: the component along the exact gradient, whose expectation is its norm.
        along = exact[name].flatten().double() / exact[name].double().norm()
        projected = stacked @ along
        standard_error = projected.std() / len(projected) ** 0.5
        assert abs(projected.mean() - exact[name].double().norm()) < 5 * standard_error, name
        assert standard_error < 0.2 * exact[name].double().norm()


def test_rows_not_kept_have_no_gradient_below_the_cut():
    model = SmallNet(norm=True)
    x, y = small_batch()
    x.requires_grad_()
    step_gradients(fqt_compile.eager(model), x, y)
    norms = x.grad.flatten(1).norm(dim=1)
    assert int((norms > 0).sum()) == 2  # a quarter of 8
    x.grad = None
    step_gradients(torch.compile(model, backend="fqt1bit", options={"lowering": "eager"}), x, y)
    assert torch.equal(x.grad.flatten(1).norm(dim=1) > 0, norms > 0)


def test_check_finite_names_the_layer():
    model = SmallNet()
    x, _ = small_batch()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"conv1 \(input\)"):
        fqt_compile.eager(model, {"check_finite": True})(x)
    with pytest.raises(NonFiniteError, match=r"conv1 \(input\)"):
        torch.compile(model, backend="fqt1bit", options={"check_finite": True, "lowering": "eager"})(x)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="did you mean 'bits'"):
        fqt_compile.eager(SmallNet(), {"bit": 3})
    with pytest.raises(ConfigError, match="accepted: a torch"):
        fqt_compile.eager(lambda x: x)


def test_a_model_that_changes_its_layers_is_refused():
    class Fickle(SmallNet):
        extra = False

        def forward(self, x):
            return super().forward(x) + (self.fc2(torch.zeros(1, 64)) if self.extra else 0)

    eager = fqt_compile.eager(Fickle())
    eager(small_batch()[0])
    eager.extra = True
    with pytest.raises(CaptureError, match="the captured model has 6"):
        eager(small_batch()[0])


def test_config_object_is_accepted():
    assert fqt_compile.eager(SmallNet(), FQTConfig(bits=2))(small_batch()[0]).shape == (8, 10)


class FromTheLeft(nn.Module):
    """``W @ x`` of a stack of matrices, which torch folds into one product with W^T from the right (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64) / 8)
        self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.w @ torch.relu(self.a(x)).mT).mT)))


class Standardized(nn.Conv2d):
    """A weight that is normalized by the function of BatchNorm: its rows are no samples."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, 1, 1)


def standardized() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Standardized(32, 32, 3), nn.ReLU(), Standardized(32, 32, 3)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    ("build", "shape"), [(FromTheLeft, (4, 8, 64)), (standardized, (8, 3, 8, 8)), (standardized, (1, 3, 8, 8))]
)
def test_what_the_model_sweep_found_equals_the_oracle(build, shape):
    model, x = build(), torch.randn(shape)
    gradients = []
    for step in (fqt_compile.eager(model), torch.compile(model, backend="fqt1bit", options={"lowering": "eager"})):
        step(x)
        model.zero_grad()
        torch.manual_seed(3)
        step(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


class Broken(nn.Module):
    """Three graphs, of which the last reads an output of the first, too."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()

        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), norm(64), nn.ReLU())

        self.first, self.second, self.third = block(), block(), block()
        self.head = nn.Linear(128, 10)
        for module in self.modules():  # no normalized output sits exactly on the ReLU's corner
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.bias, 0, 0.3)

    def forward(self, x):
        first = self.first(x)
        torch._dynamo.graph_break()
        second = self.second(first)
        torch._dynamo.graph_break()
        return self.head(torch.cat([self.third(second), first], 1))


@pytest.mark.rotates(2)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_every_graph_of_a_model_with_graph_breaks_is_a_step_of_its_own(norm):
    """Its ReLUs are not seen by the graphs behind: a sign would be +1 everywhere."""
    options = sample.pick(f"options of {norm}", [{}, {"cut": "output"}, {"scope": "layer"}])
    model, x, y = Broken(norm), torch.randn(12, 64), torch.randint(0, 10, (12,))
    graphs = plan(model, (x,), {}, FQTConfig())
    assert [site.activation for sites in graphs for site in sites] == [None, *["threshold"] * 5, None]
    eager, compiled = both(model, options, x, y)
    again = step_gradients(fqt_compile.eager(model, options), x, y, seed=6)[1]
    assert not torch.equal(again["second.0.weight"], eager[1]["second.0.weight"])
    assert eager[0] == pytest.approx(compiled[0], rel=1e-6)
    for name, gradient in eager[1].items():
        if norm is nn.Identity:
            assert torch.equal(gradient, compiled[1][name]), name
        elif not name.endswith(("0.bias", "3.bias")):  # in front of a BatchNorm it is rounding
            assert (gradient - compiled[1][name]).abs().max() <= 1e-4 * gradient.abs().max(), name
