"""What to leave as it is after a pass has failed: the layer, the region, the optimization, in the end all layers.

No failure of ours may stop a user's training. The graph is rewritten anew from its beginning without

1. the layer at which a pass failed that packs it: it stays in float;
2. the region at which an optimizing pass failed: it stays unfused, or on full rows;
3. the whole optimizing pass, where no region is known or several fail;
4. all layers, where a pass fails that packs them and no layer is known.
"""

from __future__ import annotations

import dataclasses

from ..errors import PassError
from .refusal import NotOptimized, layer_of
from .sites import Site
from .state import Avoided, Pass, RowChoice, State

REGIONS = 8
"""So many regions of one pass are left as they are before the pass is."""
ALL_LAYERS = "match"
"""Without this pass there are no layers to pack."""
NEEDED = frozenset({"match", "decide", "activation", "forward", "backward", "batch_norm"})
"""Passes without which a packed layer is not packed; the others only make the graph faster, or choose rows once."""


class BrokenContract(PassError):
    """A pass left the graph in a state that its contract forbids."""


def without(state: State, error: Exception) -> Avoided:
    """What `State.avoided` has to be after ``error`` in the pass `State.step` at `State.candidate`."""
    avoided, step, at = state.avoided, state.step, state.candidate
    reason = f"pass {step!r} cannot handle it, please report ({type(error).__name__}: {_first_line(error)})"
    if step in avoided.steps:
        raise error
    if step in NEEDED:
        if isinstance(at, Site) and at.index not in avoided.sites:
            return dataclasses.replace(avoided, sites={**avoided.sites, at.index: f"{at.name}: {reason}"})
        if ALL_LAYERS in avoided.steps:
            raise error
        return dataclasses.replace(avoided, steps={**avoided.steps, ALL_LAYERS: f"all layers: {reason}"})
    if at is not None and not isinstance(at, Site) and sum(name == step for name, _ in avoided.nodes) < REGIONS:
        return dataclasses.replace(avoided, nodes={**avoided.nodes, (step, at.name): f"{layer_of(at)}: {reason}"})
    return dataclasses.replace(avoided, steps={**avoided.steps, step: f"all layers: {reason}"})


def is_avoided(state: State, step: Pass) -> bool:
    """Is the pass not to run? Then the state says why."""
    reason = state.avoided.steps.get(step.name)
    if reason is None:
        return False
    state.not_optimized.append(NotOptimized("all layers", step.name, reason))
    if step.name == "rows":
        state.choice = RowChoice((), reason)
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
