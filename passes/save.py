"""What is kept for the backward: packed bits. Tags for the min-cut partitioner (Inductor's own).

Activation bits and masks are saved; the integer outputs of the products, from which the float output is a
pointwise function, are computed again from the bits. Weight bits are saved unless they are `WEIGHT_SHARE` times the
layer's saved activation bits, and else packed again from the parameter (which costs no memory to keep): a wide linear
layer at a small batch would otherwise save more than float training does.
"""

from __future__ import annotations

from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils.checkpoint import CheckpointPolicy

from .call import Call
from .graph import is_training, value
from .state import State, graph_pass

WEIGHT_SHARE = 8
"""An activation bit stands for 32 bits of float training: saving up to 8 weight bits for it stays far below that."""


@graph_pass(requires=("packed forward",), ensures="tags")
def save(state: State) -> None:
    """Tag every packed site's nodes; inference graphs save nothing.

    ``save_outputs``: the integer outputs are saved where the backward needs them, instead of being computed again.
    """
    if not is_training(state.graph):
        return
    for site in state.forward.values():
        activations = (site.x_bits, site.mask)
        # The operation itself returns a tuple, which cannot be saved: it must be recomputable for its items to be.
        weights = (Call(site.w_bits).source, site.w_bits, site.weight_scale)
        save_weights = _hint(site.w_bits) <= WEIGHT_SHARE * (_hint(site.x_bits) + _hint(site.mask))
        for node in activations:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for node in weights[1:] if save_weights else weights:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if save_weights else CheckpointPolicy.PREFER_RECOMPUTE
        acc = CheckpointPolicy.MUST_SAVE if state.config.save_outputs else CheckpointPolicy.PREFER_RECOMPUTE
        site.acc.meta["recompute"] = acc
    if state.seed is not None:
        state.seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _hint(node: fx.Node) -> int:
    """Number of words; a symbolic batch counts as its current value."""
    return optimization_hint(value(node).numel())
