"""What a graph carries through the pipeline, and how a pass declares itself. Every pass imports this; it imports none.

    @graph_pass(requires=("sites",), ensures="decisions")
    def decide(state: State) -> None: ...

A pass is a function of the `State`, which it changes. It names the facts it requires and the one it ensures; its name
is the function's. `pipeline` lists the passes in order and checks these contracts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import fx

from ..config import FQTConfig
from .emit import Emitter, Known
from .graph import fake_mode_of, is_erased
from .names import UNNAMED, Names
from .refusal import NotOptimized, Refusal, layer_of
from .region import FusedProgram
from .sites import Site


@dataclasses.dataclass(frozen=True)
class RowChoice:
    """``cuts``: the gradients whose rows are chosen once per step, together; none: at every site, for ``reason``.

    ``below``: indices of the sites, and ``norms``: backward nodes of the BatchNorms, that all of the gradient reaches
    through the cuts.
    """

    cuts: tuple[fx.Node, ...]
    reason: str
    below: frozenset[int] = frozenset()
    norms: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Avoided:
    """What is left as it is, since a pass failed there: the reason by layer, by pass, by pass and name of a node."""

    sites: Mapping[int, str] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nodes: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        return list(dict.fromkeys((*self.sites.values(), *self.steps.values(), *self.nodes.values())))


Candidate = TypeVar("Candidate", fx.Node, Site)
NOTHING_PRUNED = RowChoice((), "nothing is pruned")


@dataclasses.dataclass
class PackedForward:
    """Nodes of a packed forward that its backward reads."""

    x_bits: fx.Node
    mask: fx.Node
    w_bits: fx.Node
    weight_scale: fx.Node
    weight: fx.Node
    acc: fx.Node


@dataclasses.dataclass
class State:
    """A graph on its way through the pipeline."""

    graph: fx.Graph
    config: FQTConfig
    names: Names = UNNAMED
    fuel: int | None = None
    sites: list[Site] = dataclasses.field(default_factory=list)
    choice: RowChoice = NOTHING_PRUNED
    forward: dict[int, PackedForward] = dataclasses.field(default_factory=dict)
    """Of every packed site, by its index."""
    seed: fx.Node | None = None
    step_rows: fx.Node | None = None
    """Rows chosen once per step; None: every site chooses."""
    compacted: int = 0
    """How many values of the backward have kept rows only."""
    not_optimized: list[NotOptimized] = dataclasses.field(default_factory=list)
    regions: list[fx.Node] = dataclasses.field(default_factory=list)
    """Every operation with a program."""
    facts: set[str] = dataclasses.field(default_factory=lambda: {"graph"})
    avoided: Avoided = Avoided()
    step: str = ""
    """The pass that runs."""
    candidate: fx.Node | Site | None = None
    """What it is working on: where it fails, that is left as it is."""
    known: Known | None = None

    def emitter(self, made_by: str = "") -> Emitter:
        """What the pass that runs adds nodes with; ``made_by``: on behalf of another."""
        if self.known is None:
            self.known = Known(fake_mode_of(self.graph))
        return Emitter(self.graph, made_by or self.step, self.known)

    def candidates(self, found: Iterable[Candidate]) -> Iterator[Candidate]:
        """``found`` one by one without those at which this pass failed before, and without erased nodes."""
        for item in found:
            if isinstance(item, fx.Node) and (is_erased(item) or (self.step, item.name) in self.avoided.nodes):
                continue
            self.candidate = item
            yield item
        self.candidate = None

    def refuse(self, step: str, node: fx.Node, refusal: Refusal) -> None:
        """Note why the pass ``step`` leaves ``node`` as it is, once for every layer."""
        noted = NotOptimized(layer_of(node), step, refusal.reason)
        if noted not in self.not_optimized:
            self.not_optimized.append(noted)

    @property
    def packed(self) -> list[Site]:
        return [site for site in self.sites if site.packed]

    @property
    def kept_rows(self) -> fx.Node | None:
        """The rows that are kept, if the rest of the backward can be computed on these alone.

        Bernoulli keeps a random number of rows: its list has N entries, and there is nothing to make smaller.
        """
        return None if self.config.prune == "bernoulli" else self.step_rows

    @property
    def fused(self) -> list[FusedProgram]:
        return [FusedProgram.of(node) for node in self.regions]


Check = Callable[[State], str | None]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step: what it needs, what it does, what holds afterwards. ``check`` says what does not hold, if so."""

    name: str
    run: Callable[[State], object]
    requires: tuple[str, ...]
    ensures: str
    check: Check = lambda state: None


def graph_pass(*, requires: Sequence[str], ensures: str, check: Check | None = None) -> Callable[..., Pass]:
    """Declare a function of the `State` as a pass of its name; the function becomes a `Pass`."""

    def declare(function: Callable[[State], object]) -> Pass:
        return Pass(function.__name__, function, tuple(requires), ensures, check or Pass.check)

    return declare


def no_float_left(state: State) -> str | None:
    """A check: no packed site may still compute, or be differentiated, by its old nodes."""
    present = set(state.graph.nodes)
    for site in state.packed:
        old = (site.output, site.grad_input, site.grad_weight)
        left = [n.name for n in old if n is not None and n in present and n.users]
        if left:
            return f"{site.name}: float nodes still in use: {left}"
    return None
