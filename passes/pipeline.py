"""The pipeline: one ordered list of passes over one AOTAutograd graph, each with a checked contract.

A pass is a function of the `State`. It names the facts it requires and the facts it ensures; the pipeline
refuses to run a pass whose requirements are missing, runs the pass's own check afterwards, lints the graph and
names the pass that failed. Passes before "forward" only analyse; those after it never search.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..config import FQTConfig
from ..errors import PassError
from ..kernels import dispatch  # noqa: F401  (declares torch.ops.fqt)
from . import (
    activation,
    backward,
    batch_norm,
    claims,
    compact,
    decide,
    float_layers,
    forward,
    fuse,
    fuse_gradients,
    gradients,
    layout,
    moments,
    region,
    rows,
    save,
    share,
    sites,
)
from .graph import describe, tag_backward

FUEL_VARIABLE = "FQT_COMPILE_FUEL"


@dataclasses.dataclass
class State:
    """A graph on its way through the pipeline."""

    graph: fx.Graph
    config: FQTConfig
    names: Sequence[str | None] = ()
    fuel: int | None = None
    sites: list[sites.Site] = dataclasses.field(default_factory=list)
    choice: rows.RowChoice = rows.NOTHING_PRUNED
    forward: dict[int, forward.PackedForward] = dataclasses.field(default_factory=dict)
    seed: fx.Node | None = None
    step_rows: fx.Node | None = None
    compacted: compact.CompactedRows = dataclasses.field(default_factory=compact.CompactedRows)
    regions: list[tuple[str, fx.Node]] = dataclasses.field(default_factory=list)
    """Layer and call of every operation with a program."""
    facts: set[str] = dataclasses.field(default_factory=lambda: {"graph"})

    @property
    def fused(self) -> list[region.FusedProgram]:
        return [region.FusedProgram.of(node, site) for site, node in self.regions]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step: what it needs, what it does, what holds afterwards."""

    name: str
    run: Callable[[State], object]
    requires: tuple[str, ...]
    ensures: str
    check: Callable[[State], str | None] = lambda state: None


def _match(state: State) -> None:
    tag_backward(state.graph)
    state.sites = sites.match(state.graph, state.names)
    claims.claim(state.graph, state.sites)


def _decide(state: State) -> None:
    decide.decide(state.sites, state.config, state.fuel)


def _activation(state: State) -> None:
    proven = activation.NonNegativity()
    for site in state.sites:
        if site.packed:
            activation.choose(site, state.config, proven)


def _rows(state: State) -> None:
    if not state.config.prunes:
        state.choice = rows.NOTHING_PRUNED
    elif state.config.scope == "layer":
        state.choice = rows.RowChoice((), "asked for by scope='layer'")
    else:
        state.choice = rows.choose_rows(state.graph, state.sites, state.config.cut)


def _forward(state: State) -> None:
    state.forward, state.seed = forward.rewrite_forward(state.graph, state.sites, state.config)


def _backward(state: State) -> None:
    args = (state.graph, state.sites, state.forward, state.seed, state.choice, state.config)
    state.step_rows = backward.rewrite_backward(*args)


def _batch_norm(state: State) -> None:
    if state.step_rows is not None and state.config.batch_norm == "project":
        every = state.config.prune != "bernoulli"
        batch_norm.project(state.graph, state.choice.norms, state.step_rows, every)
    batch_norm.write_out(state.graph)


def _share(state: State) -> None:
    state.graph.eliminate_dead_code()
    share.share(state.graph)


def _kept_rows(state: State) -> fx.Node | None:
    # Bernoulli keeps a random number of rows: its list has N entries, and there is nothing to make smaller.
    return None if state.config.prune == "bernoulli" else state.step_rows


def _gradients(state: State) -> None:
    if any(site.packed for site in state.sites):
        gradients.rewrite_gradients(state.graph, on_kept_rows=_kept_rows(state) is not None)


def _compact(state: State) -> None:
    kept = _kept_rows(state)
    if kept is not None:
        state.compacted = compact.compact_rows(state.graph, kept)


def _float_layers(state: State) -> None:
    if state.config.float_dtype == "bfloat16":
        packed = {site.name for site in state.sites if site.packed}
        nodes = [(s.output, s.backward, s.grad_input, s.grad_weight) for s in state.sites if not s.packed]
        own = {node for of_site in nodes for node in of_site if node is not None}
        float_layers.cast_float_products(state.graph, torch.bfloat16, packed, own)


def _moments(state: State) -> None:
    moments.exact_moments(state.graph)
    moments.exact_gradient_moments(state.graph)
    moments.float_moments(state.graph)


def _fuse(state: State) -> None:
    state.regions += fuse.fuse_activations(state.graph)
    fuse.fuse_weight_gradients(state.graph)


def _fuse_gradients(state: State) -> None:
    everywhere = not state.config.prunes
    state.regions += fuse_gradients.fuse_gradients(state.graph, every_row_is_kept=everywhere)


def _narrow(state: State) -> None:
    fuse.narrow_products(state.graph)


def _save(state: State) -> None:
    save.tag_saved(state.graph, state.forward.values(), state.seed, state.config.save_outputs)


def _layout(state: State) -> None:
    layout.ask_for_nhwc(state.graph)


def _decided(state: State) -> str | None:
    silent = [s.name for s in state.sites if not s.reason]
    return f"sites without a reason: {silent}" if silent else None


def _coded(state: State) -> str | None:
    missing = [s.name for s in state.sites if s.packed and s.activation is None]
    return f"packed sites without an activation code: {missing}" if missing else None


def _no_float_left(state: State) -> str | None:
    """No packed site may still compute, or be differentiated, by its old nodes."""
    present = set(state.graph.nodes)
    for site in state.sites:
        if site.packed:
            old = (site.output, site.grad_input, site.grad_weight)
            left = [n.name for n in old if n is not None and n in present and n.users]
            if left:
                return f"{site.name}: float nodes still in use: {left}"
    return None


ANALYSES = (
    Pass("match", _match, ("graph",), "sites", lambda state: claims.claimed_once(state.sites)),
    Pass("decide", _decide, ("sites",), "decisions", _decided),
    Pass("activation", _activation, ("decisions",), "codes", _coded),
    Pass("rows", _rows, ("decisions",), "row choice"),
)
QUANTIZE = (
    Pass("forward", _forward, ("codes",), "packed forward"),
    Pass("save", _save, ("packed forward",), "tags"),
    Pass("backward", _backward, ("packed forward", "row choice"), "packed backward"),
    Pass("batch_norm", _batch_norm, ("packed backward",), "written-out BatchNorm"),
    Pass("share", _share, ("written-out BatchNorm", "tags"), "shared operands", _no_float_left),
)
OPTIMIZE = (
    Pass("gradients", _gradients, ("shared operands",), "known gradients", _no_float_left),
    Pass("compact", _compact, ("known gradients",), "kept rows", _no_float_left),
    Pass("float_layers", _float_layers, ("kept rows",), "float layers"),
    Pass("moments", _moments, ("kept rows",), "exact statistics"),
    Pass("fuse", _fuse, ("exact statistics",), "fused activations", _no_float_left),
    Pass("fuse_gradients", _fuse_gradients, ("exact statistics",), "fused gradients", _no_float_left),
    Pass("narrow", _narrow, ("fused activations", "fused gradients"), "narrow products"),
)
FINISH = (Pass("layout", _layout, ("shared operands",), "NHWC operands"),)

PIPELINE = ANALYSES + QUANTIZE + OPTIMIZE + FINISH
UNOPTIMIZED = ANALYSES + QUANTIZE + FINISH
"""The same numbers up to float rounding, with every intermediate value of every layer in the graph."""


def run_pipeline(
    graph: fx.Graph,
    config: FQTConfig,
    names: Sequence[str | None] = (),
    observe: Callable[[str, str], None] | None = None,
    steps: Sequence[Pass] | None = None,
) -> State:
    """Rewrite ``graph`` in place by `PIPELINE` or ``steps``. ``observe(pass name, graph text)`` is called after each.

    Raises `PassError` naming the pass whose contract was broken.
    """
    return _run(PIPELINE if steps is None else steps, State(graph, config, names, fuel_from_environment()), observe)


def analyse(graph: fx.Graph, config: FQTConfig, names: Sequence[str | None] = ()) -> State:
    """Only the analyses: sites, decisions, codes and row choice of ``graph``, which stays as it is."""
    return _run(ANALYSES, State(graph, config, names, fuel_from_environment()), None)


def _run(steps: Sequence[Pass], state: State, observe: Callable[[str, str], None] | None) -> State:
    for step in steps:
        missing = [fact for fact in step.requires if fact not in state.facts]
        if missing:
            raise PassError(f"pass {step.name!r} needs {missing}, which no earlier pass ensured; got {state.facts}")
        step.run(state)
        problem = step.check(state)
        if problem is not None:
            raise PassError(f"pass {step.name!r} broke its contract: {problem}")
        state.graph.lint()
        state.facts.add(step.ensures)
        if observe is not None:
            observe(step.name, describe(state.graph))
    return state


def fuel_from_environment() -> int | None:
    """``FQT_COMPILE_FUEL=n`` packs only the first n sites: bisects which rewrite breaks a model."""
    text = os.environ.get(FUEL_VARIABLE)
    if text is None:
        return None
    if not text.isdigit():
        raise PassError(f"{FUEL_VARIABLE}: got {text!r}; accepted: the number of sites to pack, 0 or more")
    return int(text)
