"""Capturing a model's joint graphs without training it: what eager FQT, `explain` and `compare` share.

A capture compiles a throw-away function that calls the model, so it neither uses nor fills the caches of the
user's own compiled model, and it restores buffers and the random state afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .backend import FQTPass
from .config import FQTConfig
from .data_parallel import unwrapped
from .errors import CaptureError
from .interpret import compile_interpreted
from .notices import announce, notices
from .origin import names_in_model
from .passes.graph import copied, describe, value
from .passes.names import Names
from .passes.pipeline import ANALYSES, State, is_strict, run_pipeline
from .passes.refusal import NotOptimized
from .passes.region import FusedProgram
from .passes.sites import Site
from .passes.state import Pass

NOTHING = "the model ran without a single tensor operation that torch.compile could capture"
_COUNTER = itertools.count()


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One use of a convolution or linear layer, as decided by the passes.

    ``saved_bytes_before``: its input in the dtype of the graph; ``saved_bytes_after``: its packed bits and
    mask (equal where the layer stays in float). ``macs``: products of one forward pass. ``threshold``: how that of the
    code ``threshold`` is found: ``channel`` (from the BatchNorm before), ``sample`` or ``batch`` (means);
    ``batch_norm``: the arguments of `kernels.reference.batch_norm_threshold` of ``channel``.
    """

    name: str
    kind: str
    decision: str
    reason: str
    activation: str | None
    activation_reason: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    saved_bytes_before: int
    saved_bytes_after: int
    rows_are_tokens: bool
    below_cut: bool
    threshold: str | None = None
    batch_norm: tuple[Any, ...] | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass
class CapturedGraph:
    """One graph of a model (graph breaks make several) with what the passes made of it.

    ``compacted``: how many values of the backward have kept rows only. ``not_optimized``: what the optimizing passes
    left as it was, and why.
    """

    sites: list[SiteReport]
    row_choice: str
    stages: dict[str, str]
    saved_bytes: int
    compacted: int
    fused: list[FusedProgram]
    not_optimized: list[NotOptimized]


def capture(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: FQTConfig,
    *,
    rewrite: bool = False,
    steps: Sequence[Pass] | None = None,
) -> list[CapturedGraph]:
    """Trace ``model(*args, **kwargs)`` with gradients; run the pipeline on every graph, or ``steps`` and say nothing.

    With ``rewrite=False`` the pipeline sees a copy and the model runs, and saves, in float; with True the
    rewritten graphs are partitioned (``saved_bytes`` is then theirs), and the float model is executed.
    """
    graphs: list[CapturedGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = _Analysis(config, names_in_model(gm, example_inputs), rewrite, example_inputs)
        analysis.steps, analysis.quiet = steps, steps is not None
        compiled = compile_interpreted(gm, example_inputs, analysis, fx.Interpreter, analysis.see_partition)
        graphs.append(analysis.result())
        return gm.forward if rewrite else compiled  # real values for what follows a graph break

    run_captured(model, args, kwargs, backend)
    if not graphs:
        raise CaptureError(NOTHING)
    return graphs


def plan(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: FQTConfig
) -> list[list[SiteReport]]:
    """The layers of every graph of ``model(*args, **kwargs)``, which runs in float; much faster than `capture`."""
    found: list[list[SiteReport]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(planned(gm, example_inputs, config))
        return gm.forward

    run_captured(model, args, kwargs, backend)
    if not found:
        raise CaptureError(NOTHING)
    return found


def planned(gm: fx.GraphModule, example_inputs: Sequence[Any], config: FQTConfig) -> list[SiteReport]:
    """The layers of one of Dynamo's graphs, which stays as it is."""
    analysis = _Plan(config, names_in_model(gm, example_inputs), False, example_inputs)
    with contextlib.suppress(_Planned):
        compile_interpreted(copy.deepcopy(gm), example_inputs, analysis, fx.Interpreter)
    return analysis.sites


class _Analysis(FQTPass):
    """The joint pass of a capture: records stages and sites; rewrites the graph itself only if asked to."""

    def __init__(self, config: FQTConfig, names: Names, rewrite: bool, inputs: Sequence[Any] = ()) -> None:
        self.stages: dict[str, str] = {}
        super().__init__(config, names, observe=self.stages.__setitem__)
        self.rewrite, self.inputs = rewrite, inputs
        self.steps: Sequence[Pass] | None = None
        self.quiet = False
        self.state: State | None = None
        self.sites: list[SiteReport] = []
        self.saved_bytes = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.stages["captured"] = describe(graph)
        target = graph if self.rewrite else copied(graph)
        self.state = run_pipeline(target, self.config, self.names, self.observe, self.steps)
        if not self.quiet:
            announce(notices(self.state))
        below = self.state.choice.below
        self.sites = [report(site, site.index in below, self.inputs) for site in self.state.sites]

    def uuid(self) -> Any:
        return None

    def see_partition(self, gm: fx.GraphModule, is_backward: bool) -> None:
        if is_backward:
            self.saved_bytes += saved_bytes(gm)

    def result(self) -> CapturedGraph:
        state = self.state
        if state is None:
            return CapturedGraph([], "", self.stages, self.saved_bytes, 0, [], [])
        made = (state.compacted, state.fused, state.not_optimized)
        return CapturedGraph(self.sites, state.choice.reason, self.stages, self.saved_bytes, *made)


class _Planned(Exception):
    """Ends a compilation of which no more is wanted than which layers are packed."""


class _Plan(_Analysis):
    """Only decides. Where a pass that fails is undone, all of them have to be tried to know what is packed."""

    def __call__(self, graph: fx.Graph) -> None:
        self.steps = ANALYSES if is_strict(self.config) else None
        super().__call__(graph)
        raise _Planned


def run_captured(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> Any:
    """Compile a throw-away call of ``model`` with ``backend``, run it, undo its side effects."""
    with _undone(model):
        return torch.compile(fresh_call(model), backend=backend, dynamic=False)(*args, **kwargs)


def fresh_call(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own, since Dynamo's caches hang on code objects."""
    model = unwrapped(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"fqt_capture_{next(_COUNTER)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


@contextlib.contextmanager
def _undone(model: Any) -> Iterator[None]:
    """Restore buffers and the default generator, and compute with gradients enabled."""
    module = getattr(model, "__self__", model)
    module = module if isinstance(module, nn.Module) else nn.Module()
    buffers = [(b, b.clone()) for b in module.buffers()]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # writing would invalidate what autograd saved
                        buffer.copy_(before)


def saved_bytes(backward: fx.GraphModule) -> int:
    """Bytes of the tensors a backward graph receives from the forward, without the graph's own inputs."""
    total = 0
    for node in backward.graph.nodes:
        if node.op == "placeholder" and not node.name.startswith(("primals", "tangents")):
            fake = node.meta.get("val")
            if isinstance(fake, torch.Tensor):
                total += int(fake.numel()) * fake.element_size()
    return total


def report(site: Site, below_cut: bool, inputs: Sequence[Any] = ()) -> SiteReport:
    """The public view of a matched site; ``inputs``: those of the captured graph, parameters among them."""
    x, output = value(site.x), value(site.output)
    before = int(x.numel()) * x.element_size()
    after = before
    if site.packed:
        words = math.ceil(site.in_channels / 64)
        after = 2 * 8 * words * int(x.numel()) // site.in_channels
    return SiteReport(
        name=site.name,
        kind=site.kind,
        decision=site.decision,
        reason=site.reason,
        activation=site.activation,
        activation_reason=site.activation_reason,
        input_shape=tuple(int(s) for s in x.shape),
        weight_shape=tuple(int(s) for s in site.weight_shape),
        output_shape=tuple(int(s) for s in output.shape),
        macs=int(output.numel()) * math.prod(int(s) for s in site.weight_shape[1:]),
        saved_bytes_before=before,
        saved_bytes_after=after,
        rows_are_tokens=site.rows_are_tokens,
        below_cut=below_cut,
        threshold=site.threshold,
        batch_norm=_batch_norm_parameters(site, inputs),
    )


def _batch_norm_parameters(site: Site, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
    norm = site.batch_norm
    if norm is None:
        return None
    parameters = []
    for node in (norm.weight, norm.bias):
        position = None if node is None else getattr(node.meta.get("desc"), "idx", None)
        parameters.append(None if position is None or position >= len(inputs) else inputs[position])
    return *parameters, norm.channels, norm.window, norm.top, norm.repeat
