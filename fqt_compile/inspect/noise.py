"""`gradient_noise`: how far the quantized gradients of every layer are from the exact ones, on the same batch.

Bit equality says that kernels compute what the definition says; this says whether the definition is any good. It takes
seconds and ranks estimators in the same order as their accuracy after training (docs/results.md has both).
"""

from __future__ import annotations

import dataclasses
import io
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..batches import input_of, require_iterable
from ..config import FQTConfig
from ..eager_fqt.model import eager
from ..errors import ConfigError
from ..kernels import selection

SEEDS = 1 << 64
"""Seeds are equal modulo this (`kernels.noise`)."""
ROLES = ("grad_weight", "grad_input")
Call = tuple[Sequence[Any], Mapping[str, Any], Sequence[Any]]
"""Arguments of the model, positional and by name, and those of the loss behind the output."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Of one gradient, relative to the squared norm of the exact one, averaged over batches.

    bias: ``|E g - exact|**2``, estimated without bias from n seeds (``|mean - exact|**2 - variance / n``, which may be
    below 0); bias_error: its standard error, from the spread between seeds, NaN for fewer than 3.
    variance: ``E |g - E g|**2``. cosine: mean cosine between g and exact. NaN where the exact gradient is 0.
    """

    bias: float
    bias_error: float
    variance: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """The packed layer ``name``; grad_input None where the layer has none (its input needs no gradient).

    least_variance: of grad_input, what the best unbiased choice of as many rows has, without rounding (docs/math.md 4).
    """

    name: str
    grad_weight: Noise | None
    grad_input: Noise | None
    least_variance: float | None = None


@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """The result of `gradient_noise`: the packed layers in forward order, and what was averaged over."""

    layers: list[LayerNoise]
    batches: int
    seeds: int

    def largest(self, role: str = "grad_weight") -> tuple[float, float]:
        """Largest squared bias and largest variance of any layer, NaN if none has this gradient."""
        found = [noise for layer in self.layers if (noise := getattr(layer, role)) is not None]
        return max((n.bias for n in found), default=math.nan), max((n.variance for n in found), default=math.nan)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=150, no_color=True)
        console.print(self.render())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def render(self) -> Table:
        """One row a layer, for a rich console."""
        table = Table(
            title="gradients against exact ones of the same forward, relative to their square "
            f"({self.batches} batches, {self.seeds} seeds)"
        )
        table.add_column("layer")
        for role in ROLES:
            for measure in ("bias\N{SUPERSCRIPT TWO}", "variance", "cosine"):
                table.add_column(f"{role}\n{measure}", justify="right")
        table.add_column("grad_input\nleast variance", justify="right")
        for layer in self.layers:
            row = [layer.name]
            for role in ROLES:
                noise = getattr(layer, role)
                row += _numbers(noise)
            table.add_row(*row, "-" if layer.least_variance is None else f"{layer.least_variance:.2f}")
        return table


def gradient_noise(
    model: nn.Module,
    batches: Iterable[Any],
    config: FQTConfig | Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 8,
    *,
    loss: Callable[..., Tensor] | None = None,
) -> GradientNoise:
    """Squared bias, variance and cosine of every packed layer's gradients against ``grad="exact"`` on the same batch.

    model: trains as it is (mode, dropout masks: the same for all runs of a batch); parameters, buffers, gradients and
    the random state are left as they were. batches: inputs ``x``, or tuples ``(x, *rest)``. config: an `FQTConfig` or a
    mapping of its fields. seeds: at least 2 seeds of the gradient noise, or how many. loss: ``loss(output, *rest)`` ->
    scalar; default: cross-entropy with an integer target, else the mean squared difference to ``rest`` or to 0.

    Computed by eager FQT: no compiler needed. Raises `ConfigError` for wrong options, seeds and no batches.
    """
    settings = FQTConfig.from_options(config)
    numbers = _distinct(seeds)
    if settings.grad == "exact":
        raise ConfigError("grad: got 'exact'; accepted: 'fqt' or 'psq', which are compared with it")
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss: got {loss!r}; accepted: a function of the output and the rest of a batch, or None")
    require_iterable(batches)
    calls = [
        (input_of(batch, i), *(batch[1:] if isinstance(batch, tuple | list) else ())) for i, batch in enumerate(batches)
    ]
    if not calls:
        raise ConfigError("batches: got none; accepted: at least one input x, or tuple (x, *rest)")
    plain: list[Call] = [((x,), {}, rest) for x, *rest in calls]
    result = measure(model, plain, settings, numbers, loss or default_loss)
    if not result.layers:
        raise ConfigError("model: no layer is packed and trained; `fqt_compile.explain` has the reason of each")
    return result


def _distinct(seeds: Any) -> list[int]:
    """At least two different seeds; ``n`` means 0 to n - 1."""
    try:
        numbers = (
            list(range(operator.index(seeds))) if not isinstance(seeds, Iterable) else [*map(operator.index, seeds)]
        )
    except TypeError:
        numbers = []
    if len({n % SEEDS for n in numbers}) < max(2, len(numbers)):
        raise ConfigError(f"seeds: got {seeds!r}; accepted: at least 2 different integers, or how many")
    return numbers


def measure(
    model: nn.Module,
    calls: Sequence[Call],
    config: FQTConfig,
    seeds: Sequence[int],
    loss: Callable[..., Tensor],
) -> GradientNoise:
    """`gradient_noise` of calls ``(args, kwargs, rest)``: ``loss(model(*args, **kwargs), *rest)``."""
    exact, noisy = (_Recorded(eager(model, c)) for c in (config.replace(grad="exact"), config))
    found: dict[str, dict[str, list[Noise]]] = {}
    least: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        state = torch.get_rng_state()
        for call in calls:
            torch.set_rng_state(state)
            wanted = exact.gradients(call, loss, 0)
            for name, norms in exact.row_norms.items():
                least.setdefault(name, []).append(least_variance(norms, config))
            sums = {key: _Sums(value) for key, value in wanted.items()}
            for seed in seeds:
                torch.set_rng_state(state)
                for key, value in noisy.gradients(call, loss, seed).items():
                    sums[key].add(value)
            for (name, role), sum_ in sums.items():
                found.setdefault(name, {}).setdefault(role, []).append(sum_.noise())
    layers = [
        LayerNoise(
            name,
            grad_weight=_mean(found[name].get("grad_weight")),
            grad_input=_mean(found[name].get("grad_input")),
            least_variance=_average(least.get(name)),
        )
        for name in exact.names(found)
    ]
    return GradientNoise(layers, len(calls), len(seeds))


def least_variance(norms: Tensor, config: FQTConfig) -> float:
    """Smallest relative variance of a gradient of rows with these L2 norms ``[N]`` under any unbiased choice of K rows.

    sum r_i**2 (1 / p_i - 1) / sum r_i**2 at the water-filled p; NaN where all rows are 0 (docs/math.md 4).
    """
    square = norms.square()
    if not config.prunes or float(square.sum()) == 0:
        return 0.0 if float(square.sum()) else math.nan
    size, keep = norms.shape[0], config.kept_fraction
    count = selection.kept_count(size, keep.numerator, keep.denominator)
    p = torch.tensor(selection.inclusion_probabilities(norms.tolist(), count), dtype=torch.float64)
    used = p > 0
    return float((square[used] * (1 / p[used] - 1)).sum() / square.sum())


def default_loss(output: Any, *rest: Any) -> Tensor:
    """Cross-entropy with an integer target, else the mean squared difference to the target, or to 0."""
    if rest and not (isinstance(rest[0], Tensor) and rest[0].dtype != torch.bool):
        got = rest[0].dtype if isinstance(rest[0], Tensor) else type(rest[0]).__name__
        raise ConfigError(f"batches: got a target {got}; accepted: an integer or float tensor, or `loss` for others")
    first = next(t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)).float()
    if rest and not rest[0].is_floating_point():
        return nn.functional.cross_entropy(first, rest[0])
    return (first - rest[0] if rest else first).square().mean()


class _Recorded:
    """An eager FQT model that tells the gradients of its packed layers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[tuple[str, str], Tensor] = {}
        self.row_norms: dict[str, Tensor] = {}
        """Of grad_input, float64 ``[N]``."""

    def gradients(self, call: Any, loss: Callable[..., Tensor], seed: int) -> dict[tuple[str, str], Tensor]:
        args, kwargs, rest = call
        self.seen, self.row_norms = {}, {}
        self.model._fqt_seed, self.model._fqt_recorder = seed, self._record
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError("model: no parameter requires a gradient; accepted: a model that trains")
        value = loss(self.model(*args, **kwargs), *rest)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"loss: got {got}; accepted: one number that depends on the model's parameters")
        torch.autograd.grad(value, parameters, allow_unused=True)
        return self.seen

    def names(self, found: Iterable[str]) -> list[str]:
        """In forward order."""
        order = {site.name: i for i, site in enumerate(self.model._fqt_plan)}
        return sorted(found, key=order.__getitem__)

    def _record(self, name: str, role: str, gradient: Tensor) -> None:
        values = gradient.detach().to(torch.float64)
        self.seen[name, role] = values.flatten()
        if role == "grad_input":
            self.row_norms[name] = values.flatten(1).norm(dim=1)


class _Sums:
    """The exact value of one gradient, and those of all seeds."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.values: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        self.values.append(value.to(torch.float32))

    def noise(self) -> Noise:
        square, count = float(self.exact.square().sum()), len(self.values)
        if square == 0:
            return Noise(*[math.nan] * 4)
        values = torch.stack(self.values).to(torch.float64)
        mean = values.mean(0)
        variance = float((values - mean).square().sum()) / (count - 1)
        bias = float((mean - self.exact).square().sum()) - variance / count
        # (mean - exact)**2 - variance / n is the mean of (g_i - exact) (g_j - exact) over pairs; its error by leaving
        # one seed out at a time (jackknife).
        centered = values - self.exact
        products = centered @ centered.t()
        own = products.diagonal()
        pairs = (products.sum() - own.sum() - 2 * (products.sum(1) - own)) / max((count - 1) * (count - 2), 1)
        spread = float((pairs - pairs.mean()).square().sum())
        error = math.sqrt(spread * (count - 1) / count) if count > 2 else math.nan
        cosines = nn.functional.cosine_similarity(values, self.exact[None], dim=1)
        return Noise(bias / square, error / square, variance / square, float(cosines.mean()))


def _numbers(noise: Noise | None) -> list[str]:
    return ["-"] * 3 if noise is None else [f"{noise.bias:.3f}", f"{noise.variance:.2f}", f"{noise.cosine:.2f}"]


def _average(values: list[float] | None) -> float | None:
    return None if values is None else math.fsum(values) / len(values)


def _mean(noises: list[Noise] | None) -> Noise | None:
    if not noises:
        return None
    columns = list(zip(*map(dataclasses.astuple, noises), strict=True))
    bias, error, variance, cosine = (math.fsum(column) / len(noises) for column in columns)
    spread = math.sqrt(math.fsum(e * e for e in columns[1])) / len(noises)
    return Noise(bias, spread if len(noises) > 1 else error, variance, cosine)
