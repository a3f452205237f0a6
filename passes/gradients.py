"""The backward's masks and max-pools in the forms that later passes and kernels know.

    where(x <= 0, 0, g), x not computed again       where(unpack_bool(bits), 0, g); the bits are saved, 1/8 of a bool
    where(x <= 0, 0, g) with g zero there           g: the straight-through mask of a packed layer lets 0 < x pass only
    scatter of g to the saved places of a max-pool  max_pool_gradient(g, x), which finds the places again

A value that one product or BatchNorm's input leads to by row-local operators can be computed again from what is saved
anyway: such masks stay as they are, and such pools need no saved places. On kept rows (`compact`) convolutions of the
input are computed again too.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..kernels.program import VALUES
from .call import Call
from .emit import Emitter, Insertion
from .graph import (
    VIEWS,
    aten,
    erase_dead,
    first,
    is_backward,
    is_call,
    is_tensor,
    operator_of,
    position,
    prims,
    site_of,
    strip,
    value,
)
from .local import has_rows, is_not_positive, is_zero, row_operands, row_sources, sole_row_source
from .refusal import Refusal
from .state import State, graph_pass, no_float_left

fqt = torch.ops.fqt


@graph_pass(requires=("shared operands",), ensures="known gradients", check=no_float_left)
def gradients(state: State) -> None:
    """Rewrite the masks and max-pools of the backward."""
    if not state.packed:
        return
    rewriter = _Rewriter(state.emitter(), on_kept_rows=state.kept_rows is not None)
    for node in state.candidates(list(state.graph.nodes)):
        if node.op != "call_function" or not is_backward(node):
            continue
        if _is_scattered(node):
            pooled = rewriter.match_max_pool(node)
            if isinstance(pooled, Refusal):
                state.refuse("gradients", node, pooled)
            else:
                rewriter.rewrite_max_pool(node, pooled)
        elif is_call(node, aten.where.self):
            rewriter.visit_mask(node)
    erase_dead(state.graph)


class _Rewriter:
    """``on_kept_rows``: the backward will be computed on the kept rows only."""

    def __init__(self, emitter: Emitter, on_kept_rows: bool) -> None:
        self.emitter, self.graph, self.on_kept_rows = emitter, emitter.graph, on_kept_rows
        self.masks: dict[fx.Node, fx.Node] = {}

    def at(self, node: fx.Node) -> Insertion:
        return self.emitter.at(node, site_of(node))

    def match_max_pool(self, node: fx.Node) -> MaxPoolBackward | Refusal:
        pooled = _max_pool_backward(node)
        if isinstance(pooled, Refusal) or self.on_kept_rows or self._is_at_hand(pooled.x):
            return pooled
        return Refusal("the max-pool's places stay saved: its input would have to be, to find them again")

    def rewrite_max_pool(self, node: fx.Node, pooled: MaxPoolBackward) -> None:
        args = (pooled.gradient, [pooled.x], VALUES, *pooled.window)
        new = self.at(node).call("max_pool", fqt.max_pool_gradient.default, *args)
        for replaced in (*filter(_is_copied_to_nhwc, node.users), node):
            replaced.replace_all_uses_with(new)

    def visit_mask(self, node: fx.Node) -> None:
        if _is_masked_already(node):
            node.replace_all_uses_with(Call(node).other)  # before its mask is saved for nothing
        elif self._is_worth_saving(Call(node).condition, node):
            mask = Call(node).condition
            if mask not in self.masks:
                bits, at = self._save_bits(mask), self.at(node)
                self.masks[mask] = at.call("mask", fqt.unpack_bool.default, bits, value(mask).shape[1])
            Call(node).replace(condition=self.masks[mask])

    def _is_worth_saving(self, mask: fx.Node, node: fx.Node) -> bool:
        if not has_rows(mask, node) or value(mask).dim() < 2 or isinstance(value(mask).shape[1], torch.SymInt):
            return False
        made_in_backward = row_sources(mask, ends=lambda n: not is_backward(n))  # what is forward depends on such only
        if any(is_backward(n) for n in (*made_in_backward, *_operands_of_copy(mask))):
            return False
        if all(n.op == "placeholder" for n in row_sources(mask)):
            return False
        return sole_row_source(mask) is None if self.on_kept_rows else not self._is_at_hand(mask)

    def _is_at_hand(self, x: fx.Node) -> bool:
        """Can ``x`` be computed again by local operators from one packed product, or from what BatchNorm saves?"""
        source = sole_row_source(x)
        if source is None:
            return False
        normalized = any(is_call(user, aten.var_mean.correction) for user in source.users)
        return is_call(source, fqt.output_product.default) or normalized

    def _save_bits(self, mask: fx.Node) -> fx.Node:
        """Bits of a comparison that autograd placed in the backward, made in the forward, right after its operand."""
        source = max(_operands_of_copy(mask), key=position)
        following = source.next
        while following.op == "placeholder" or is_call(following, operator.getitem):
            following = following.next
        at = self.emitter.at(source, "step")
        at.anchor = following
        moved = _copy_down(self.emitter, at, mask)
        bits: fx.Node = at.call("mask_bits", fqt.pack_bool.default, moved)
        for made in (moved, bits):
            made.meta["partitioner_tag"] = "is_forward"
            made.meta.pop("autograd_backward", None)
        bits.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        return bits


def _operands_of_copy(mask: fx.Node) -> list[fx.Node]:
    """What the backward-tagged local operators of ``mask`` read that is not copied with them (`_copy_down`)."""
    if not is_backward(mask):
        return [mask]
    copied = row_operands(mask) or []
    others = [n for n in mask.all_input_nodes if n not in copied and not is_zero(n)]
    return others + [operand for n in copied for operand in _operands_of_copy(n)]


def _copy_down(emitter: Emitter, at: Insertion, node: fx.Node) -> fx.Node:
    """A copy of backward-tagged local operators in the forward part."""
    if not is_backward(node):
        return node
    copies = {n: _copy_down(emitter, at, n) for n in row_operands(node) or []}
    args: Any = fx.node.map_arg(node.args, lambda n: copies.get(n, n))
    copied: fx.Node = at.call("mask", operator_of(node), *args)
    return copied


def _is_masked_already(node: fx.Node) -> bool:
    """``where(x <= 0, 0, g)`` of a g that is zero there."""
    masked = Call(node)
    if not is_not_positive(masked.condition) or not is_zero(masked.self):
        return False
    return strip(Call(masked.condition).self, {aten.alias.default}) is _positive_input(masked.other)


def _positive_input(g: fx.Node) -> fx.Node | None:
    """The x whose packed layer, perhaps behind a max-pool, has this gradient, zero (or NaN's) where not x > 0.

    The mask of the code ``threshold`` (reference.activation_mask) is inside x > 0, and a max-pool's gradient goes to
    maxima.
    """
    if is_call(g, fqt.dequantize_grad_input.default) and is_call(Call(g).mask, operator.getitem):
        packing = Call(Call(Call(g).mask).source)
        return packing.x if packing.threshold is not None else None
    if is_call(g, fqt.max_pool_gradient.default):
        pooled, x = _positive_input(Call(g).g), Call(g).operands[0]
        is_its_pool = is_call(pooled, operator.getitem) and first(Call(pooled).source) is x
        return x if is_its_pool else None
    return None


def _is_copied_to_nhwc(node: fx.Node) -> bool:
    """A copy that asks for the memory order which every operation of ours has already."""
    return is_call(node, aten.clone.default) and node.kwargs.get("memory_format") is torch.channels_last


@dataclasses.dataclass(frozen=True)
class MaxPoolBackward:
    """The gradient of a 2-D max-pool as autograd and Inductor write it: a scatter of g to saved positions."""

    gradient: fx.Node
    x: fx.Node
    window: tuple[list[int], list[int], list[int]]


def _is_scattered(node: fx.Node) -> bool:
    """Is ``node`` an image made by ``scatter_add`` to the places that a 2-D max-pool saved?"""
    if node.target not in VIEWS or value(node).dim() != 4:
        return False
    scatter = strip(first(node), VIEWS)
    if not is_call(scatter, aten.scatter_add.default):
        return False
    return is_call(strip(Call(scatter).index, VIEWS), prims._low_memory_max_pool_offsets_to_indices.default)


def _max_pool_backward(node: fx.Node) -> MaxPoolBackward | Refusal:
    """``view(scatter_add(0, 1, view(positions), view(g)))``, without dilation and ceil_mode; g may be a copy."""
    scatter = Call(strip(first(node), VIEWS))
    gradient = scatter.src
    while gradient.target in VIEWS and value(gradient).dim() != 4:
        gradient = first(gradient)
    gradient = strip(gradient, {aten.clone.default})
    positions = Call(strip(scatter.index, VIEWS))
    pool = Call(Call(strip(positions.self, VIEWS)).source)
    if pool.ceil_mode or any(d != 1 for d in pool.dilation):
        return Refusal("the gradient of a max-pool with dilation or ceil_mode stays a scatter")
    if not is_tensor(gradient) or value(gradient).dim() != 4:
        return Refusal("the gradient of a max-pool is not an image")
    return MaxPoolBackward(gradient, pool.self, (list(pool.kernel_size), list(pool.stride), list(pool.padding)))
