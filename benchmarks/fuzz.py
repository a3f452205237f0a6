"""Random small networks: the oracle (the rewritten graph by the reference) against eager FQT, or kernels against it.

    python benchmarks/fuzz.py [--cases 1000] [--native] [--seed 0] [--json FILE]

Convolutions, linear layers, norms, activations, pools, residuals, branches, shared layers, views, in-place operators,
frozen parts, odd shapes, a batch of one, random options. `hypothesis` draws the networks, and makes one that fails
smaller. A failure is a crash, or a gradient that differs by more than `TOLERANCE` of its norm: between two right
computations float operations round differently, which moves a quantized code by one step in some of them. Where eager
FQT itself changes by more than a third of that as soon as its parameters move by their last bits (a channel of integers
whose mean is one of them is on a ReLU's corner behind BatchNorm), the network says nothing; it is counted as
``undecided``, and a fault could hide there. Exits with 1 if a case fails. Needs ``pip install hypothesis``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fqt_compile
from fqt_compile.errors import FQTWarning

TOLERANCE = 0.15
ROUNDED, ROUNDINGS = (1e-7, 1e-6, 1e-5), 8
"""How far, and how often, parameters are moved to see whether rounding decides about a gradient."""
NEGLIGIBLE = 1e-6
"""Gradients below this part of the largest are rounding: of a bias before a BatchNorm, say."""
CHANNELS = st.sampled_from([32, 33, 48, 64])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([1, 2, 4, 8]),
        "keep": st.sampled_from([0.25, 0.5, 1.0]),
        "scope": st.sampled_from(["step", "layer"]),
        "prune": st.sampled_from(["systematic", "bernoulli", "topk", "none"]),
        "prune_weight": st.sampled_from(["sample", "channel"]),
        "grad": st.sampled_from(["fqt", "exact", "psq"]),
        "activation": st.sampled_from(["auto", "sign", "threshold"]),
        "threshold": st.sampled_from(["auto", "sample"]),
        "cut": st.sampled_from(["batch_norm", "layer", "output"]),
        "weight_scale": st.sampled_from(["xnor", "none"]),
        "skip": st.sampled_from([[], ["first"], ["first", "last", "downsample"]]),
    },
)


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """The sum, or the channels side by side, of two ways."""

    def __init__(self, left: nn.Module, right: nn.Module, joined: str) -> None:
        super().__init__()
        self.left, self.right, self.joined = left, right, joined

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        return (
            a * torch.sigmoid(b) if self.joined == "gate" else a + b if self.joined == "sum" else torch.cat([a, b], 1)
        )


class Twice(nn.Module):
    """The same layers two times in a row."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.between = body, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.between(self.body(x)))


class Tokens(nn.Module):
    """Positions as tokens, through a linear layer, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x.flatten(2).transpose(1, 2))).transpose(1, 2).reshape(x.shape)


def activation(draw: Any) -> nn.Module:
    made = (nn.ReLU, nn.GELU, nn.Hardtanh, nn.LeakyReLU, nn.SiLU, nn.ReLU6, lambda: nn.ReLU(inplace=True), nn.Identity)
    return draw(st.sampled_from(made))()  # type: ignore[no-any-return]


def norm(draw: Any, channels: int) -> nn.Module:
    kind = draw(st.sampled_from(["batch", "batch", "none", "group", "instance", "frozen"]))
    if kind == "group":
        return nn.GroupNorm(1, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=draw(st.booleans()))
    if kind == "none":
        return nn.Identity()
    made = nn.BatchNorm2d(channels, affine=draw(st.booleans()) or kind == "frozen")
    if made.affine:
        nn.init.normal_(made.bias, 0, 0.3)  # not on a ReLU's corner
    if kind == "frozen":
        made.eval()
        made.train = lambda mode=True: made  # type: ignore[method-assign, assignment, misc]
    return made


def convolution(draw: Any, channels: int, out: int, stride: int = 1) -> nn.Sequential:
    kernel = draw(st.sampled_from([1, 3]))
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=draw(st.booleans()))
    return nn.Sequential(layer, norm(draw, out), activation(draw))


@st.composite
def networks(draw: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A network, its input and options."""
    number = draw(st.integers(0, 999))
    torch.manual_seed(number)
    channels = draw(CHANNELS)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), norm(draw, channels), activation(draw)]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "down", "residual", "sum", "cat", "gate", "twice", "tokens", "pool"]))
        if kind in ("plain", "down"):
            out = draw(CHANNELS)
            layers.append(convolution(draw, channels, out, 2 if kind == "down" else 1))
            channels = out
        elif kind in ("sum", "cat", "gate"):
            layers.append(Branches(convolution(draw, channels, channels), convolution(draw, channels, channels), kind))
            channels *= 2 if kind == "cat" else 1
        elif kind == "pool":
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1)])))
        else:
            made = {"residual": Residual, "twice": Twice}
            inner = convolution(draw, channels, channels)
            layers.append(Tokens(channels) if kind == "tokens" else made[kind](inner))
    hidden = draw(CHANNELS)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, hidden), activation(draw)]
    layers += [
        nn.Linear(hidden, hidden, bias=draw(st.booleans())),
        nn.ReLU(),
        nn.Linear(hidden, draw(st.sampled_from([1, 10]))),
    ]
    model = nn.Sequential(*layers)
    model.seed = number  # type: ignore[assignment]
    for index in draw(st.sets(st.integers(0, len(layers) - 1), max_size=2)):
        model[index].requires_grad_(False)
    size, options = draw(st.sampled_from([5, 8, 9])), draw(OPTIONS)
    model = without_blind_layers(model, options)
    return model, torch.randn(draw(st.sampled_from([1, 2, 7, 8])), 3, size, size), options


def without_blind_layers(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The sign code of what is never negative is a constant, and BatchNorm of constants is their rounding."""
    if options.get("activation") == "sign":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU | nn.ReLU6):
                    setattr(module, name, nn.LeakyReLU(0.1))
    return model


def is_valid(model: nn.Module, x: Tensor) -> bool:
    """BatchNorm refuses one value per channel."""
    try:
        copy.deepcopy(model)(x)
    except ValueError:
        return False
    return True


def step(call: nn.Module, model: nn.Module, x: Tensor, number: int) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(number)
    call(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(model: nn.Module, x: Tensor, options: dict[str, Any], native: bool) -> tuple[float, str]:
    """The largest relative difference of a gradient, and whose it is."""
    torch._dynamo.reset()
    oracle = torch.compile(model, backend="fqt1bit", options={**options, "lowering": "eager", "report": False})
    other = (
        torch.compile(model, backend="fqt1bit", options={**options, "report": False})
        if native
        else fqt_compile.eager(model, options)
    )
    for call in (oracle, other):  # both look at the model first, which draws numbers
        step(call, model, x, 0)
    return largest_of(step(oracle, model, x, 1), step(other, model, x, 1))


def largest_of(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the norm of what is wanted, and its name."""
    largest = max(gradient.norm() for gradient in wanted.values())
    said = {name: g for name, g in wanted.items() if g.norm() > NEGLIGIBLE * largest}
    return max(((float((found[name] - g).norm() / g.norm()), name) for name, g in said.items()), default=(0.0, ""))


def rounding_decides(model: nn.Module, x: Tensor, options: dict[str, Any], name: str) -> bool:
    """Does eager FQT's gradient of ``name`` change by a third of the tolerance with the last bits of the parameters?"""
    eager = fqt_compile.eager(model, options)
    step(eager, model, x, 0)
    as_drawn = {name: step(eager, model, x, 1)[name]}
    kept = {key: p.detach().clone() for key, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    changed = 0.0
    for size in ROUNDED * ROUNDINGS:
        if changed <= TOLERANCE / 3:
            for key, p in model.named_parameters():
                p.data = kept[key] * (1 + size * torch.randn(p.shape, generator=generator))
            changed = largest_of(as_drawn, step(eager, model, x, 1))[0]
    for key, p in model.named_parameters():
        p.data = kept[key]
    return changed > TOLERANCE / 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--native", action="store_true", help="kernels in Inductor against the oracle")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", FQTWarning)
    begin = time.perf_counter()
    differences: list[float] = []
    undecided: list[float] = []

    @seed(asked.seed)
    @settings(
        max_examples=asked.cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(networks())
    def check(case: tuple[nn.Module, Tensor, dict[str, Any]]) -> None:
        model, x, options = case
        assume(is_valid(model, x))
        found, name = difference(model, x, options, asked.native)
        if found > TOLERANCE and rounding_decides(model, x, options, name):
            undecided.append(found)
            return
        differences.append(found)
        case_text = f"{list(x.shape)}, seed {model.seed}, {options} {model}"
        assert found <= TOLERANCE, f"{name} differs by {found:.2g} of its norm in {case_text}"

    failure = None
    try:
        check()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        print(failure[:3000])
    result = {
        "cases": len(differences) + len(undecided),
        "undecided": len(undecided),
        "seed": asked.seed,
        "native": asked.native,
        "seconds": round(time.perf_counter() - begin),
        "above_1e-3": sum(found > 1e-3 for found in differences),
        "largest": max(differences, default=0.0),
        "failure": failure and failure[:500],
    }
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
