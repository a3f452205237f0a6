"""Fusion: the arithmetic between a product and the packing of the next layer becomes one pass to bits.

    acc -> alpha acc -> BatchNorm -> ReLU (-> max-pool) -> threshold, pack        many float tensors in memory
    acc -> fused_activation(S acc + T, ReLU)                                      none, unless others read them

For every packed activation x the pass walks up from x and collects the pointwise operators that only x needs, up to
tensors that exist anyway: an integer product, a float layer's output, a residual (`region`). What is left becomes a
program (kernels/program.py), which every target renders into its kernel. x itself is written only if a float
operation (a residual, a layer left in float) reads it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch import fx

from ..kernels.packing import INT16_LIMIT
from ..kernels.program import FULL, POOL
from .call import Call
from .emit import Emitter
from .graph import aten, erase_dead, erase_unused, is_backward, is_call, position, prims, site_of, strip, value
from .local import is_not_positive, live_nodes
from .moments import largest_output
from .refusal import Refusal, name_of
from .region import SOURCES, Region, are_readable, is_supported, unreadable
from .state import State, graph_pass, no_float_left

fqt = torch.ops.fqt
MAX_FULL_OPERANDS = 4


@graph_pass(requires=("exact statistics",), ensures="fused activations", check=no_float_left)
def fuse(state: State) -> None:
    """Fuse what can be fused in front of packed activations, and behind the integers of a weight's gradient."""
    for x_of in (_packed_activation, _packed_mask):
        _fuse_activations(state, x_of)
        erase_dead(state.graph)
    _fuse_weight_gradients(state)


def _fuse_activations(state: State, x_of: Callable[[fx.Node], fx.Node | None]) -> None:
    """Fuse what leads to every ``x_of(node)``, a value that ``node`` packs."""
    emitter = state.emitter()
    for pack in state.candidates(list(state.graph.nodes)):
        x = None if is_backward(pack) else x_of(pack)
        if x is None:
            continue
        region = _match_activation(x)
        if isinstance(region, Refusal):
            if is_call(pack, fqt.pack_activation.default):
                state.refuse("fuse", pack, region)
            continue
        state.regions.append(_replace(emitter, x, pack, region))


def _packed_activation(node: fx.Node) -> fx.Node | None:
    """The activation that ``node`` packs."""
    return Call(node).x if is_call(node, fqt.pack_activation.default) else None


def _packed_mask(node: fx.Node) -> fx.Node | None:
    """The x of a ``pack_bool(x <= 0)`` that no packing of x has produced on the way."""
    if not is_call(node, fqt.pack_bool.default):
        return None
    mask = Call(node).mask
    return strip(Call(mask).self, {aten.alias.default}) if is_not_positive(mask) else None


def _match_activation(x: fx.Node) -> _ActivationRegion | Refusal:
    """The program that computes the activation ``x``."""
    region = _ActivationRegion()
    absorbed, sources = region.absorb_private(x)
    if not absorbed and not region.is_max_pool(x, absorbed, x):
        return Refusal(f"its input is made by {name_of(x)}, which no program says")
    if len(sources) == 1 and region.is_max_pool(sources[0], absorbed, x):
        pooled, pool = sources[0], Call(Call(sources[0]).source)
        inner, sources = region.absorb_private(pool.self, only_for=pool.node)
        if not are_readable(sources):
            return unreadable(sources)
        region.emit(inner, sources)
        region.window = [*pool.kernel_size, *pool.stride, *pool.padding]
        region.state(pooled, POOL, [region.argument(pool.self)])
        sources = []
    full = len(sources) + sum(kind == FULL for _, kind in region.operands)
    if full > MAX_FULL_OPERANDS:
        return Refusal(f"its input is computed from {full} tensors, at most {MAX_FULL_OPERANDS} are read")
    if not are_readable(sources):
        return unreadable(sources)
    region.emit(absorbed, sources)
    return region if region.says(x) else Refusal("at most a scale and a shift lead to its input")


class _ActivationRegion(Region):
    """The operators that only the activation needs; a max-pool may stand between two parts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.window: list[int] = []

    def absorb_private(self, x: fx.Node, only_for: fx.Node | None = None) -> tuple[list[fx.Node], list[fx.Node]]:
        """`absorb` the operators that nothing else in the forward reads; ``only_for``: that reads x inside."""

        def is_read_outside(node: fx.Node, absorbed: list[fx.Node]) -> bool:
            outside = [u for u in self._forward_users(node) if u not in absorbed and u is not only_for]
            return bool(outside) and (node is not x or only_for is not None)

        return self.absorb(x, is_read_outside)

    def _forward_users(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if not is_backward(u) and not _serves_backward(u)]

    def is_max_pool(self, node: fx.Node, absorbed: list[fx.Node], x: fx.Node) -> bool:
        """Is ``node`` the values of a plain 2-D max-pool that nothing outside the region reads?"""
        if not is_call(node, operator.getitem) or Call(node).index != 0:
            return False
        pool = Call(node).source
        if not is_call(pool, prims._low_memory_max_pool_with_offsets.default):
            return False
        call, source = Call(pool), Call(pool).self
        plain = not call.ceil_mode and all(d == 1 for d in call.dilation) and value(source).dim() == 4
        others = [u for u in self._forward_users(pool) if u is not node]
        outside = [] if node is x else [u for u in self._forward_users(node) if u not in absorbed]
        return plain and not others and not outside and value(source).dtype in SOURCES


# -- putting it into the graph ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Readers:
    """Who reads an activation besides its packing."""

    masks: list[fx.Node]
    others: list[fx.Node]
    later: list[fx.Node]
    """Of the backward, which read the values from memory; others compute them again on the way."""


def _readers(x: fx.Node) -> _Readers:
    readers = _Readers([], [], [])
    packings = (fqt.activation_threshold.default, fqt.pack_activation.default)
    for user in x.users:
        if user.target in packings:
            continue
        if is_backward(user):
            readers.later += [user] * (not is_supported(user, user))
            continue
        if _serves_backward(user):
            continue
        masks = _negative_masks(user)
        if masks is None:
            readers.others.append(user)
        else:
            readers.masks += masks
    return readers


def _serves_backward(user: fx.Node) -> bool:
    """Is ``user`` an alias in the forward that only pointwise operators of the backward read (autograd's saved x)?"""
    if user.target is not aten.alias.default:
        return False
    readers = [_serves_backward(u) or (is_backward(u) and is_supported(u, u)) for u in user.users]
    return bool(readers) and all(readers)


def _negative_masks(user: fx.Node) -> list[fx.Node] | None:
    """The ``pack_bool(x <= 0)`` that ``user`` leads to, if it leads to nothing else."""
    users = list(user.users)
    if user.target is aten.alias.default:
        found = [_negative_masks(u) for u in users]
        return None if any(f is None for f in found) else [mask for f in found for mask in f or []]
    if is_not_positive(user):
        return users if all(is_call(u, fqt.pack_bool.default) for u in users) else None
    return None


def _replace(emitter: Emitter, x: fx.Node, pack: fx.Node, region: _ActivationRegion) -> fx.Node:
    """``pack``: the packing of x, or of its negative mask alone."""
    packing = Call(pack) if is_call(pack, fqt.pack_activation.default) else None
    threshold, after = (packing.threshold, packing.after) if packing else (None, None)
    rule = (threshold, "sample")
    if is_call(threshold, fqt.activation_threshold.default):
        rule = (None, Call(threshold).rule)
    readers = _readers(x)
    anchor = min((*readers.masks, *readers.others, pack), key=position)
    if after is not None and position(after) > position(anchor):
        anchor.prepend(after)  # the seed depends on nothing
    at = emitter.at(anchor, site_of(pack))
    code = "sign" if threshold is None else "threshold"
    operands = region.arguments(at)
    keep = (bool(readers.others), bool(readers.masks))
    args = (operands, str(region.program), code, region.window, *keep, after, *rule)
    bits, mask, values, below = at.call("fused", fqt.fused_activation.default, *args)
    items = list(pack.users) if packing else []
    for item in items:
        replacement = (bits, mask)[Call(item).index]
        replacement.meta.update({k: item.meta[k] for k in ("recompute",) if k in item.meta})
        item.replace_all_uses_with(replacement)
    for words in readers.masks:
        below.meta["recompute"] = words.meta.get("recompute")
        words.replace_all_uses_with(below)
    if readers.others:
        kept = at.cast("fused", values, value(x).dtype)
        x.replace_all_uses_with(kept, delete_user_cb=lambda user: user in readers.others + readers.later)
    erase_unused(x, *items, *readers.masks)
    fused: fx.Node = Call(bits).source
    return fused


def _fuse_weight_gradients(state: State) -> None:
    """``weight_gradient(dequantize_grad_weight(grad_weight_product))`` of all output channels as one operation.

    The integers and the gradient of alpha sign(W) then never leave the cache.
    """
    emitter = state.emitter()
    for node in state.candidates(list(state.graph.nodes)):
        if not is_call(node, fqt.weight_gradient.default):
            continue
        through, dequantize = Call(node), Call(Call(node).grad_hat)
        if not is_call(dequantize.node, fqt.dequantize_grad_weight.default) or dequantize.channels is not None:
            continue
        product = Call(Call(dequantize.acc).source)
        at = emitter.at(node, site_of(node))
        quantized = (product.lanes, product.x_bits, product.rows, dequantize.scale, dequantize.zero_point)
        weight = (through.weight, through.weight_scale, through.mode)
        args = (*quantized, *weight, product.code, product.output_size, product.stride, product.padding)
        node.replace_all_uses_with(at.call("grad_weight", fqt.grad_weight.default, *args))
    erase_dead(state.graph)


@graph_pass(requires=("fused activations", "fused gradients"), ensures="narrow products")
def narrow(state: State) -> None:
    """int16 for outputs that only integer-reading operations see."""
    live = live_nodes(state.graph)
    readers = (
        *(fqt.fused_activation.default, fqt.fused_gradient.default, fqt.max_pool_gradient.default),
        *(fqt.channel_moments.default, fqt.gradient_moments.default),
    )
    for node in state.candidates(state.graph.nodes):
        if not is_call(node, fqt.output_product.default) or largest_output(node) > INT16_LIMIT:
            continue
        users = [u for u in node.users if u in live]
        if users and all(u.target in readers for u in users):
            Call(node).replace(narrow=True)
            node.meta["val"] = value(node).to(torch.int16)
