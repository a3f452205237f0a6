"""The pipeline: one ordered list of passes over one AOTAutograd graph, each with a checked contract (`state`).

It refuses to run a pass whose requirements are missing, runs the pass's own check afterwards and lints the graph. What
a pass fails at stays in float, unfused or on full rows, with the reason (`undo`). Passes before `forward` only analyse;
those after it never search.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence

from torch import fx

from ..config import FQTConfig
from ..errors import PassError
from ..kernels import dispatch  # noqa: F401  (declares torch.ops.fqt)
from . import undo
from .activation import activation
from .backward import backward
from .batch_norm import batch_norm
from .compact import compact
from .decide import decide
from .float_layers import float_layers
from .forward import forward
from .fuse import fuse, narrow
from .fuse_gradients import fuse_gradients
from .gradients import gradients
from .graph import Snapshot, describe
from .layout import layout
from .match import match
from .moments import moments
from .names import UNNAMED, Names
from .products import products
from .rows import rows
from .save import save
from .share import share
from .state import Avoided, Pass, State

FUEL_VARIABLE = "FQT_COMPILE_FUEL"
STRICT_VARIABLE = "FQT_COMPILE_STRICT"

ANALYSES = (match, decide, activation, rows)
QUANTIZE = (forward, save, backward, batch_norm, products, share)
OPTIMIZE = (gradients, compact, float_layers, moments, fuse, fuse_gradients, narrow)
FINISH = (layout,)

PIPELINE = ANALYSES + QUANTIZE + OPTIMIZE + FINISH
UNOPTIMIZED = ANALYSES + QUANTIZE + FINISH
"""The same numbers up to float rounding, with every intermediate value of every layer in the graph."""


def run_pipeline(
    graph: fx.Graph,
    config: FQTConfig,
    names: Names = UNNAMED,
    observe: Callable[[str, str], None] | None = None,
    steps: Sequence[Pass] | None = None,
) -> State:
    """Rewrite ``graph`` in place by `PIPELINE` or ``steps``. ``observe(pass name, graph text)`` is called after each.

    A pass that fails is undone: the graph is rewritten anew without what it failed at (`undo`), and the state has the
    reason. Strict (``strict=True``, FQT_COMPILE_STRICT=1), it raises `PassError` with its name, and contracts are
    checked after every pass instead of at the end.
    """
    given = PIPELINE if steps is None else tuple(steps)
    with _without_collection():
        if is_strict(config):
            return _run(given, State(graph, config, names, fuel_from_environment()), observe, strict=True)
        before, avoided = Snapshot(graph), Avoided()
        while True:
            state = State(graph, config, names, fuel_from_environment(), avoided=avoided)
            try:
                return _run(given, state, observe)
            except Exception as error:
                avoided = undo.without(state, error)
                before.restore(graph)


def analyse(graph: fx.Graph, config: FQTConfig, names: Names = UNNAMED) -> State:
    """Only the analyses: sites, decisions, codes and row choice of ``graph``, which stays as it is."""
    return run_pipeline(graph, config, names, steps=ANALYSES)


def is_strict(config: FQTConfig) -> bool:
    """Does a pass that fails stop the compilation?"""
    return config.strict or os.environ.get(STRICT_VARIABLE, "0") not in ("", "0")


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Nearly all that passes make is kept: looking through it for garbage takes a fifth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _run(
    steps: Sequence[Pass], state: State, observe: Callable[[str, str], None] | None, strict: bool = False
) -> State:
    for step in steps:
        missing = [fact for fact in step.requires if fact not in state.facts]
        if missing:
            raise PassError(f"pass {step.name!r} needs {missing}, which no earlier pass ensured; got {state.facts}")
        state.step, state.candidate = step.name, None
        problem = None
        if not undo.is_avoided(state, step):
            step.run(state)
            problem = step.check(state)
        if problem is not None:
            raise undo.BrokenContract(f"pass {step.name!r} broke its contract: {problem}")
        if strict:
            state.graph.lint()
        state.facts.add(step.ensures)
        if observe is not None:
            observe(step.name, describe(state.graph))
    state.graph.lint()
    return state


def fuel_from_environment() -> int | None:
    """``FQT_COMPILE_FUEL=n`` packs only the first n sites: bisects which rewrite breaks a model."""
    text = os.environ.get(FUEL_VARIABLE)
    if text is None:
        return None
    if not text.isdigit():
        raise PassError(f"{FUEL_VARIABLE}: got {text!r}; accepted: the number of sites to pack, 0 or more")
    return int(text)
