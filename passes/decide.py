"""Which sites are packed, and why the others stay in float. Every refusal is a reason the user can read."""

from __future__ import annotations

import fnmatch

import torch

from ..config import SKIP_GROUPS, FQTConfig
from ..kernels import cost
from .graph import value
from .names import Names
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
    config, fuel = state.config, state.fuel
    packed = 0
    for site in state.candidates(state.sites):
        reason = (
            state.avoided.sites.get(site.index)
            or unsupported(site, config)
            or site.refusal
            or skipped(site, state)
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


def skipped(site: Site, state: State) -> str | None:
    """What the user, or a default, asked to leave in float."""
    skip, names = state.config.skip, state.names
    if "first" in skip and _is_end(site, state.sites[0], names.first):
        return "first layer (skip='first'): its input is the data, which one bit cannot carry"
    if "last" in skip and _is_end(site, state.sites[-1], names.last):
        return "last layer (skip='last'): its output is the prediction"
    pointwise = bool(site.kernel) and all(k == 1 for k in site.kernel)
    if "downsample" in skip and pointwise and any(s > 1 for s in site.stride):
        return "strided 1x1 convolution (skip='downsample')"
    for pattern in skip:
        if pattern not in SKIP_GROUPS and any(is_named(name, pattern, names) for name in (plain(site), *site.aliases)):
            return f"named by skip={pattern!r}"
    return None


def _is_end(site: Site, end: Site, name: str | None) -> bool:
    """Is ``site`` the layer ``name`` of the model, or where the graph is all of the model, its site ``end``?"""
    return site is end if name is None else name in (plain(site), *site.aliases)


def plain(site: Site) -> str:
    """The name of the layer, whichever of its uses the site is."""
    return site.name.split("#")[0]


def is_named(name: str, pattern: str, names: Names) -> bool:
    """Does a pattern name this layer, or a module that it is in: by its path in the model or in what was compiled?"""
    inside = name.removeprefix(f"{names.base}.") if names.base else name
    return any(fnmatch.fnmatchcase(path, pattern) for whole in {name, inside} for path in _paths(whole))


def _paths(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


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


def unmatched_patterns(state: State) -> list[str]:
    """Entries of ``skip`` that name no layer of the model: probably a typing error."""
    layers = {*state.names.layers, *(name for site in state.sites for name in (plain(site), *site.aliases))}
    patterns = [pattern for pattern in state.config.skip if pattern not in SKIP_GROUPS]
    return [p for p in patterns if not any(fnmatch.fnmatchcase(path, p) for name in layers for path in _inside(name))]


def _inside(name: str) -> list[str]:
    """Every path that a part of the name may be to one who compiles a part of the model."""
    parts = name.split(".")
    return [".".join(parts[i : j + 1]) for i in range(len(parts)) for j in range(i, len(parts))]
