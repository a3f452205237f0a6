"""Rewritten graphs and what they consist of."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import nn

from fqt_compile import FQTConfig
from fqt_compile.capture import CapturedGraph, SiteReport, capture, plan
from fqt_compile.models import small_vgg
from support.nets import SmallNet


def operations(text: str) -> collections.Counter:
    """How often each operation is called in a described graph."""
    calls = [line.split(" = ")[1].split("(")[0] for line in text.splitlines() if " = " in line]
    return collections.Counter(call.removesuffix(".default") for call in calls)


def sites_of(model: nn.Module, x: torch.Tensor, **options: Any) -> list[SiteReport]:
    """The layers of a model as the analyses decide about them: a fifth of the time of `captured`."""
    return [site for sites in plan(model, (x,), {}, FQTConfig.from_options(options)) for site in sites]


def captured(model: nn.Module, x: torch.Tensor, **options: Any) -> CapturedGraph:
    """The only graph of a model, rewritten and not run."""
    (graph,) = capture(model, (x,), {}, FQTConfig.from_options(options), rewrite=True)
    return graph


BATCH = 8
NETS = {
    "vgg": (lambda: small_vgg(10), (BATCH, 3, 32, 32)),
    "skips": (lambda: SmallNet(norm=True), (BATCH, 3, 8, 8)),
}
_CAPTURED: dict[tuple[str, str], CapturedGraph] = {}


def captured_once(net: str, **options: Any) -> CapturedGraph:
    """`captured` of one of `NETS`, taken once in a process for all tests that only look at it."""
    key = (net, repr(sorted(options.items())))
    if key not in _CAPTURED:
        build, shape = NETS[net]
        with torch.random.fork_rng(devices=[]):
            _CAPTURED[key] = captured(build(), torch.randn(shape), **options)
    return _CAPTURED[key]


def refusals(graph: CapturedGraph, step: str) -> list[str]:
    """Why a pass left something as it was."""
    return [left.reason for left in graph.not_optimized if left.step == step]


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size)
