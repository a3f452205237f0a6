"""What is kept for the backward: packed bits. Tags for the min-cut partitioner (Inductor's own).

Activation bits, masks, weight bits and scales are saved; the integer outputs of the products, from which the
float output is a pointwise function, are computed again from the bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .forward import PackedForward
from .graph import is_training


def tag_saved(graph: fx.Graph, forward: Iterable[PackedForward], seed: fx.Node | None) -> None:
    """Tag every packed site's nodes; inference graphs save nothing."""
    if not is_training(graph):
        return
    for site in forward:
        for node in (site.x_bits, site.mask, site.w_bits, site.weight_scale):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        site.acc.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    if seed is not None:
        seed.meta["recompute"] = CheckpointPolicy.MUST_SAVE
