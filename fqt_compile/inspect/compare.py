"""`compare`: one training step of a model, layer by layer: compiled FQT against eager FQT and against float.

Runs from the same state of the random generator:

    compiled   torch.compile(model, backend="fqt1bit")           its loss and weight gradients
    eager      fqt_compile.eager(model)                           the same
    native     the rewritten graph, node by node, native kernels  every packed operation's results
    reference  the rewritten graph, node by node, reference       the same: native must equal it bit for bit
    plain      the rewritten graph without its optimizations      every layer's output, grad_input, grad_weight
    float      the model's own graph                              the same, with exact arithmetic
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..backend import FQTPass
from ..config import FQTConfig
from ..data_parallel import unwrapped
from ..errors import CaptureError, ConfigError
from .noise import GradientNoise, measure
from .runs import (
    ROLES,
    Loss,
    MarkPass,
    OperationRecorder,
    PlainPass,
    ReferenceRecorder,
    RoleRecorder,
    Runs,
    Values,
)


@dataclasses.dataclass(frozen=True)
class SiteComparison:
    """Differences at one packed layer.

    native: largest |native - reference| by role, over all operations of the layer in the optimized graph, relative to
        the largest reference value; 0 means bit-equal.
    eager: the same for the compiled model's weight gradient against eager FQT's (None without a gradient).
    float_cosine: cosine between FQT and float by role; binarizing alone makes it smaller than 1.
    """

    name: str
    activation: str
    native: dict[str, float]
    eager: float | None
    float_cosine: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`. ``losses``: by run. ``sites``: the packed layers in forward order.

    noise: the gradients against exact ones (`gradient_noise`); None where they are exact, or with ``seeds=0``.
    """

    losses: dict[str, float]
    sites: list[SiteComparison]
    largest_native_difference: float
    noise: GradientNoise | None = None

    @property
    def native_equals_reference(self) -> bool:
        """Are all integer and float results of all packed operations bit-equal?"""
        return self.largest_native_difference == 0

    @property
    def largest_eager_difference(self) -> float:
        """Largest relative weight gradient difference, compiled against eager FQT."""
        return max((site.eager for site in self.sites if site.eager is not None), default=0.0)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=150, no_color=True)
        console.print(self.render())
        console.print("  ".join(f"loss {run}: {loss:.6f}" for run, loss in self.losses.items()))
        console.print(
            f"native kernels equal the reference bit for bit: {'yes' if self.native_equals_reference else 'NO'}"
        )
        if self.noise is not None:
            console.print(self.noise.render())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def render(self) -> Table:
        """One row a layer, for a rich console."""
        table = Table(title="compiled FQT against the reference, eager FQT and float")
        table.add_column("layer")
        table.add_column("code")
        for role in ROLES:
            table.add_column(f"{role}\nnative - reference", justify="right")
        table.add_column("weight.grad\ncompiled - eager", justify="right")
        for role in ROLES:
            table.add_column(f"{role}\ncosine to float", justify="right")
        for site in self.sites:
            native = [_number(site.native.get(role), ".1e") for role in ROLES]
            cosines = [_number(site.float_cosine.get(role), ".3f") for role in ROLES]
            table.add_row(site.name, site.activation, *native, _number(site.eager, ".1e"), *cosines)
        return table


def compare(
    model: nn.Module,
    *args: Any,
    config: FQTConfig | Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seeds: int = 8,
) -> Comparison:
    """Run one forward and backward of ``loss(model(*args))`` in every way and compare layer by layer.

    seeds: of `gradient_noise`, bias and variance of the gradients on these inputs; 0 leaves it out.

    loss: maps the model's output to a scalar; default: mean of squares of the first tensor. Parameters' ``grad``,
    buffers and the random state are left as they were.

    Raises `ConfigError` for wrong options, `CompilerMissingError` where native kernels cannot be built.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    settings = FQTConfig.from_options(config).replace(lowering="native")
    run = Runs(unwrapped(model), args, kwargs or {}, settings, loss or _mean_square)
    losses: dict[str, float] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    losses["compiled"], gradients["compiled"] = run.compiled()
    losses["eager"], gradients["eager"] = run.eager()
    losses["native"], native = run.recorded(OperationRecorder, FQTPass)
    losses["reference"], reference = run.recorded(ReferenceRecorder, FQTPass)
    losses["plain"], plain = run.recorded(RoleRecorder, PlainPass)
    losses["float"], floats = run.recorded(RoleRecorder, MarkPass)
    differences = {key: relative_difference(native[key], reference[key]) for key in reference}
    sites = [
        _compare_site(name, code, differences, plain, floats, gradients) for name, code in run.packed_sites.items()
    ]
    noise = None
    trains = any(p.requires_grad for p in model.parameters())
    if seeds and sites and trains and settings.grad != "exact":
        noise = measure(model, [(args, kwargs or {}, ())], settings, range(seeds), loss or _mean_square)
    return Comparison(losses, sites, max(differences.values(), default=0.0), noise)


def _compare_site(
    name: str,
    code: str,
    differences: Mapping[tuple[str, str, str], float],
    plain: Values,
    floats: Values,
    gradients: dict[str, dict[str, Tensor]],
) -> SiteComparison:
    native: dict[str, float] = {}
    for (site, role, _), difference in differences.items():
        if site == name:
            native[role] = max(native.get(role, 0.0), difference)
    packed, exact = (
        {role: value for (site, role, _), value in values.items() if site == name} for values in (plain, floats)
    )
    parameter = next((p for p in (f"{name}.weight", name, "weight") if p in gradients["eager"]), None)
    return SiteComparison(
        name=name,
        activation=code,
        native=native,
        eager=None
        if parameter is None
        else relative_difference(gradients["compiled"][parameter], gradients["eager"][parameter]),
        float_cosine={role: cosine(packed[role], exact[role]) for role in ROLES if role in packed and role in exact},
    )


def relative_difference(a: Tensor, b: Tensor) -> float:
    """``max |a - b| / max |b|``; 0 for two zero tensors."""
    if a.shape != b.shape:
        raise CaptureError(f"compare: got shapes {tuple(a.shape)} and {tuple(b.shape)} for the same quantity")
    if b.dtype in (torch.bool, torch.int64):  # bits: either all are equal or nothing is
        return float(not torch.equal(a, b))
    largest = float(b.abs().max()) if b.numel() else 0.0
    difference = float((a.float() - b.float()).abs().max()) if b.numel() else 0.0
    return difference / largest if largest > 0 else difference


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors of the same shape, or NaN if either is zero."""
    b = b.t() if a.shape != b.shape and a.dim() == 2 else b
    norm = float(a.float().norm() * b.float().norm())
    return float((a.float() * b.float()).sum()) / norm if norm > 0 else float("nan")


def _mean_square(output: Any) -> Tensor:
    first = next(t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor))
    return first.float().square().mean()


def _number(number: float | None, form: str) -> str:
    return "-" if number is None else "0" if number == 0 else format(number, form)
