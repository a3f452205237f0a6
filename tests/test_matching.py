"""Which backward nodes are a layer's own, and that rewriting one layer leaves its neighbours' operands right.

The right value everywhere is eager FQT, which knows nothing of graphs: autograd hands every layer its own gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import sites_of
from support.nets import step_gradients
from torch import nn

import fqt_compile
from fqt_compile.errors import FQTWarning
from fqt_compile.passes import claims, pipeline

MODES = [{}, {"keep": 1.0}, {"scope": "layer"}, {"grad": "exact"}]
Shared = Callable[["Net", torch.Tensor], torch.Tensor]


def input_of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"2d": (16, 32), "3d": (4, 3, 32), "conv": (4, 32, 3, 3)}[kind]
    return torch.randn(shape), torch.randint(0, 10, shape[:1])


class Net(nn.Module):
    """``hidden`` between a first and a last layer; every weight has the same shape."""

    def __init__(self, kind: str, hidden: Shared, **options: Any) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        for name in ("i", "a", "b", "c"):
            conv = kind == "conv"
            setattr(self, name, nn.Conv2d(32, 32, 3, padding=1, **options) if conv else nn.Linear(32, 32, **options))
        self.o = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.hidden(self, F.relu(self.i(x))))
        if self.kind != "2d":
            h = h.mean((2, 3) if self.kind == "conv" else 1)
        return self.o(h)


def siblings(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.a(h) * torch.sigmoid(net.b(h)) + net.c(h) ** 2


def matrices(net: Net, h: torch.Tensor) -> torch.Tensor:
    return (h @ net.a.weight) * torch.sigmoid(h @ net.b.weight) + (h @ net.c.weight) ** 2


def without_grad(layer: nn.Module, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(h)


def largest_difference(model: nn.Module, x: torch.Tensor, y: torch.Tensor, options: Mapping[str, Any]) -> float:
    """Of any parameter's gradient to eager FQT's, relative to its norm; all gradients must be there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FQTWarning)
        loss, wanted = step_gradients(fqt_compile.eager(model, options), x, y)
        compiled = torch.compile(model, backend="fqt1bit", options={**options, "lowering": "eager"})
        compiled_loss, got = step_gradients(compiled, x, y)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == wanted.keys()
    return max(((got[n] - g).norm() / g.norm().clamp_min(1e-12)).item() for n, g in wanted.items())


def decisions(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[str, str]]:
    return {site.name: (site.decision, site.reason) for site in sites_of(model, x)}


# -- gradients go to the layer they belong to ----------------------------------------------------------------

FROZEN = [("a",), ("c",), ("b.weight",), ("b.bias",), ("o", "i", "a.weight", "b", "c.weight")]


@pytest.mark.parametrize(("kind", "frozen"), [*(("2d", names) for names in FROZEN), ("conv", ("b",))], ids=str)
def test_layers_beside_frozen_ones(kind, frozen):
    net = Net(kind, siblings)
    for name in frozen:
        part = net.get_parameter(name) if "." in name else net.get_submodule(name)
        part.requires_grad_(False)
    assert largest_difference(net, *input_of(kind), {}) < 1e-5


MODES_OF = [*(("2d", mode) for mode in MODES[1:]), ("3d", {})]


@pytest.mark.rotates(2)
@pytest.mark.parametrize(("kind", "options"), MODES_OF, ids=str)
def test_layers_beside_a_frozen_one_in_every_mode(kind, options):
    net = Net(kind, siblings)
    net.b.requires_grad_(False)
    assert largest_difference(net, *input_of(kind), options) < 1e-5


@pytest.mark.parametrize(("kind", "frozen"), [("2d", "b"), ("3d", "c")])
def test_matrices_beside_a_frozen_one(kind, frozen):
    net = Net(kind, matrices, bias=False)
    net.get_submodule(frozen).requires_grad_(False)
    assert largest_difference(net, *input_of(kind), {}) < 1e-5


SHARED: dict[str, Shared] = {
    "detached first": lambda net, h: net.a(h.detach()) + net.a(h) ** 2,
    "detached last": lambda net, h: net.a(h) + net.a(h.detach()) ** 2,
    "no_grad last": lambda net, h: net.a(h) + without_grad(net.a, h) ** 2,
    "twice": lambda net, h: net.a(h) + net.a(h) ** 2,
    "one gradient for all": lambda net, h: net.a(h) + net.b(h) + net.c(h),
}


@pytest.mark.parametrize(("kind", "name"), [*(("2d", name) for name in SHARED), ("conv", "detached last")])
def test_layers_used_twice(kind, name):
    assert largest_difference(Net(kind, SHARED[name]), *input_of(kind), {}) < 1e-5


def test_a_matrix_used_in_both_directions():
    hidden = lambda net, h: net.a(h) + F.relu(h @ net.a.weight)  # noqa: E731
    assert largest_difference(Net("2d", hidden), *input_of("2d"), {}) < 1e-5


class Clipped(torch.autograd.Function):
    """A linear layer whose backward is the model's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        g = g.clamp(-1e-3, 1e-3)
        return g @ weight, g.t() @ x


def test_what_cannot_be_proven_stays_in_float_with_the_reason():
    """Autograd does not number what a custom Function computes; the layer beside it is proven all the same."""
    net = Net("2d", lambda net, h: Clipped.apply(h, net.a.weight) + net.b(h))
    x, y = input_of("2d")
    chosen = decisions(net, x)
    assert "cannot be told from others" in chosen["a"][1]
    assert [chosen[name][0] for name in ("a", "b")] == ["float", "packed"]
    assert largest_difference(net, x, y, {"scope": "layer"}) < 1e-5


def test_backward_nodes_have_one_owner(monkeypatch):
    states = []
    monkeypatch.setattr("fqt_compile.capture.notices", lambda state: states.append(state) or [])
    sites_of(Net("2d", siblings), input_of("2d")[0])
    sites = states[0].sites
    assert claims.claimed_once(sites) is None
    owned = [n for s in sites for n in (s.grad_input, s.grad_weight, s.grad_bias) if n is not None]
    assert len(owned) == len(set(owned)) == 3 * len(sites) - 1  # the first layer's input is the data
    sites[1].grad_weight = sites[2].grad_weight
    assert "claimed by several layers" in str(claims.claimed_once(sites))
    assert pipeline.PIPELINE[0].check(states[0]) is not None


# -- neighbours that are rewritten ---------------------------------------------------------------------------

NO_GAP: dict[str, Shared] = {
    "two": lambda net, h: net.b(net.a(h)),
    "one layer three times": lambda net, h: net.a(net.a(net.a(h))),
    "one output read by all": lambda net, h: (lambda z: net.b(z) + net.c(z) + z)(net.a(h)),
    "beside a branch": lambda net, h: net.b(net.a(h)) + net.a(h),
}


@pytest.mark.parametrize(("kind", "name"), [*(("2d", name) for name in NO_GAP if name != "two"), ("conv", "two")])
def test_packed_layers_with_nothing_between(kind, name):
    net, (x, y) = Net(kind, NO_GAP[name]), input_of(kind)
    assert largest_difference(net, x, y, {}) < 1e-5
    if kind == "conv":
        assert [decision for decision, _ in decisions(net, x).values()] == ["float", "packed", "packed", "float"]


@pytest.mark.parametrize("options", MODES[2:], ids=str)
def test_packed_layers_with_nothing_between_in_every_mode(options):
    assert largest_difference(Net("2d", NO_GAP["one output read by all"]), *input_of("2d"), options) < 1e-5


def test_packed_layers_with_nothing_between_under_autocast():
    """The second layer, and the first one's gradient, see values rounded to bfloat16, as in eager FQT."""
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(Net("2d", NO_GAP["one output read by all"]), *input_of("2d"), {}) < 0.01


class Adapted(nn.Module):
    """A frozen layer and a trained product of two narrow ones."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down, self.up = nn.Linear(32, rank, bias=False), nn.Linear(rank, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(("rank", "options"), [(4, {}), (4, {"scope": "layer"}), (32, {})], ids=str)
def test_narrow_layers_beside_packed_ones(rank, options):
    layers = (nn.Linear(32, 32), nn.ReLU(), Adapted(rank), nn.ReLU(), Adapted(rank), nn.ReLU(), nn.Linear(32, 10))
    assert largest_difference(nn.Sequential(*layers), *input_of("2d"), options) < 1e-5


def test_narrow_layers_without_bias_between_packed_ones():
    """Their weight's gradient comes before the transposed weight that their input's gradient reads."""
    wide, narrow = (nn.Linear(32, 32) for _ in range(2)), (nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False))
    net = nn.Sequential(next(wide), nn.ReLU(), *narrow, nn.ReLU(), next(wide), nn.ReLU(), nn.Linear(32, 10))
    assert largest_difference(net, *input_of("2d"), {}) < 1e-5


# -- views of NHWC memory ------------------------------------------------------------------------------------


class Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


FLATTENED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "patches": lambda x: x.view(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_images_flattened_before_the_first_layer(name):
    first = (Apply(FLATTENED[name]), nn.Linear(192, 32), nn.ReLU())
    net = nn.Sequential(*first, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    assert largest_difference(net, torch.randn(7, 3, 8, 8), torch.randint(0, 10, (7,)), {}) < 1e-5


def test_channels_reshaped_between_convolutions():
    def conv(**options):
        return nn.Conv2d(32, 32, 3, **{"padding": 1, **options})

    groups = Apply(lambda x: x.unflatten(1, (4, 8)) * x.unflatten(1, (4, 8)).mean(1, keepdim=True))
    body = (conv(), nn.ReLU(), conv(), nn.ReLU(), groups, nn.Flatten(1, 2), conv(padding="valid"), nn.ReLU())
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    assert largest_difference(net, *input_of("conv"), {}) < 1e-5
