"""Which sites are packed, and why the others stay in float. Every refusal is a reason the user can read."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from ..config import SKIP_GROUPS, FQTConfig
from ..kernels import cost
from .graph import value
from .sites import Site
from .state import State, graph_pass

SUPPORTED_KINDS = ("conv1d", "conv2d", "linear")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_DEVICES = ("cpu", "cuda")


def _without_reason(state: State) -> str | None:
    silent = [s.name for s in state.sites if not s.reason]
    return f"sites without a reason: {silent}" if silent else None


@graph_pass(requires=("sites",), ensures="decisions", check=_without_reason)
def decide(state: State) -> None:
    """Set ``decision`` and ``reason`` of every site; at most ``fuel`` are packed (to bisect a model)."""
    sites, config, fuel = state.sites, state.config, state.fuel
    packed = 0
    for site in sites:
        reason = (
            unsupported(site, config)
            or site.refusal
            or skipped(site, sites, config.skip)
            or narrow(site, config.min_channels)
            or (slow(site, config) if "slow" in config.skip else None)
        )
        if reason is None and fuel is not None and packed >= fuel:
            reason = f"fuel used up (FQT_COMPILE_FUEL={fuel})"
        site.decision = "packed" if reason is None else "float"
        site.reason = reason or "supported, wide enough and not skipped"
        packed += site.packed


def unsupported(site: Site, config: FQTConfig) -> str | None:
    """What the packed operations cannot express."""
    x, weight = value(site.x), value(site.weight)
    if site.kind not in SUPPORTED_KINDS:
        return f"{site.kind}: packed layers are {', '.join(SUPPORTED_KINDS)}"
    if site.groups != 1:
        depthwise = " (depthwise)" if site.groups == site.in_channels * site.groups else ""
        return f"groups={site.groups}{depthwise}: packed convolutions have one group"
    if any(d != 1 for d in site.dilation):
        return f"dilation={list(site.dilation)}: packed convolutions have dilation 1"
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor.dtype not in SUPPORTED_DTYPES:
            return f"{name} is {tensor.dtype}: packed layers compute in float32 from float32, bfloat16 or float16"
    if config.lowering == "native" and x.device.type not in NATIVE_DEVICES:
        return f"device {x.device.type!r}: native kernels exist for {', '.join(NATIVE_DEVICES)}"
    if x.dim() != len(site.stride) + 2:
        return f"input of {x.dim()} dimensions without a batch axis"
    if any(isinstance(size, int) and size == 0 for size in (*x.shape, *weight.shape)):
        return f"empty operand: input {tuple(x.shape)}, weight {tuple(weight.shape)}"
    return None


def skipped(site: Site, sites: Sequence[Site], skip: Sequence[str]) -> str | None:
    """What the user, or a default, asked to leave in float."""
    if "first" in skip and site is sites[0]:
        return "first layer (skip='first'): its input is the data, which one bit cannot carry"
    if "last" in skip and site is sites[-1]:
        return "last layer (skip='last'): its output is the prediction"
    pointwise = bool(site.kernel) and all(k == 1 for k in site.kernel)
    if "downsample" in skip and pointwise and any(s > 1 for s in site.stride):
        return "strided 1x1 convolution (skip='downsample')"
    name = site.name.split("#")[0]
    for pattern in skip:
        if pattern in SKIP_GROUPS:
            continue
        if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + "."):
            return f"named by skip={pattern!r}"
    return None


def narrow(site: Site, min_channels: int) -> str | None:
    """Layers that would waste most of every 64-bit word."""
    narrowest = min(site.in_channels, site.out_channels)
    if narrowest < min_channels:
        return f"narrow: {site.in_channels} -> {site.out_channels} channels, packed from min_channels={min_channels}"
    return None


def slow(site: Site, config: FQTConfig) -> str | None:
    """Layers that a step in float would compute faster on this machine."""
    macs = cost.macs_of(value(site.output).shape, site.weight_shape)
    dtype = str(value(site.output).dtype).removeprefix("torch.")
    dtype = "bfloat16" if config.float_dtype == "bfloat16" or dtype != "float32" else dtype
    costs = cost.costs()
    packed = costs.packed_seconds(macs, config.gradient_bits, float(config.kept_fraction))
    plain = costs.float_seconds(macs, dtype)
    if packed < plain:
        return None
    return f"slow (skip='slow'): about {1e3 * packed:.2f} ms a step packed, {1e3 * plain:.2f} ms in {dtype}"


def unmatched_patterns(sites: Sequence[Site], skip: Sequence[str]) -> list[str]:
    """Entries of ``skip`` that name no site: probably a typing error."""
    names = [site.name.split("#")[0] for site in sites]
    return [
        pattern
        for pattern in skip
        if pattern not in SKIP_GROUPS
        and not any(fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".") for name in names)
    ]
