"""The pipeline: one ordered list of passes over one AOTAutograd graph, each with a checked contract (`state`).

It refuses to run a pass whose requirements are missing, runs the pass's own check afterwards, lints the graph and
names the pass that failed. Passes before `forward` only analyse; those after it never search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import fx

from ..config import FQTConfig
from ..errors import PassError
from ..kernels import dispatch  # noqa: F401  (declares torch.ops.fqt)
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
from .graph import describe
from .layout import layout
from .match import match
from .moments import moments
from .rows import rows
from .save import save
from .share import share
from .state import Pass, State

FUEL_VARIABLE = "FQT_COMPILE_FUEL"

ANALYSES = (match, decide, activation, rows)
QUANTIZE = (forward, save, backward, batch_norm, share)
OPTIMIZE = (gradients, compact, float_layers, moments, fuse, fuse_gradients, narrow)
FINISH = (layout,)

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
