"""The calls that make up a model's layers, whatever form they take, as `LayerCall`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS: dict[Any, tuple[int, bool]] = {
    torch.conv1d: (1, False),
    torch.conv2d: (2, False),
    torch.conv3d: (3, False),
    torch.conv_transpose1d: (1, True),
    torch.conv_transpose2d: (2, True),
    torch.conv_transpose3d: (3, True),
}
BATCH_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
BATCH_NORMS = {
    F.batch_norm: inspect.signature(F.batch_norm),
    torch.batch_norm: inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        ]
        + [inspect.Parameter("cudnn_enabled", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False)]
    ),
}
PRODUCTS = frozenset({torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a layer's weight meets its input; empty tuples for a linear layer."""

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear function; weight ``[C_o, C_i, *kernel]``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


def is_parameter(weight: Any) -> bool:
    base = weight._base if isinstance(weight, Tensor) and weight._base is not None else weight
    return isinstance(base, nn.Parameter) and weight.dim() == 2


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    return LayerCall(input, weight, bias, Geometry(kind="linear"))


def convolution(func: Callable[..., Any], input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> LayerCall:
    spatial, transposed = CONVOLUTIONS[func]
    names = ["bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    padding = given.get("padding", 0)
    dilation = _per_axis(given.get("dilation", 1), spatial)
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, padding, dilation)
    geometry = Geometry(
        kind=f"conv{'_transpose' if transposed else ''}{spatial}d",
        stride=_per_axis(given.get("stride", 1), spatial),
        padding=_per_axis(padding, spatial),
        dilation=dilation,
        transposed=transposed,
        output_padding=_per_axis(given.get("output_padding", 0), spatial),
        groups=given.get("groups", 1),
    )
    return LayerCall(input, weight, given.get("bias"), geometry)


def _per_axis(setting: Any, spatial: int) -> tuple[int, ...]:
    values = (setting,) if isinstance(setting, int) else tuple(setting)
    return values * spatial if len(values) == 1 else values


def _named_padding(x: Tensor, weight: Tensor, padding: str, dilation: tuple[int, ...]) -> tuple[Tensor, Any]:
    """``"valid"`` and ``"same"`` as sizes; an uneven "same" pads the input by one more at the end, as PyTorch does."""
    if padding == "valid":
        return x, 0
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return x, [t // 2 for t in total]
