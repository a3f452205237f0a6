"""Backward rewrite: every packed layer's gradients by the scheme that the option ``grad`` names (`schemes`).

    rows, 1/p        = select(row_importance(g))       with ``scope="step"``: once, at the cuts that `rows` has chosen
    grad_input       = of the scheme
    grad_weight      = weight_gradient(grad_hat)       grad_hat, of the scheme, is that of W_hat = alpha sign(W)
    grad_bias        = sum g                           exact

Layers left in float below the cut are differentiated on the kept rows only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..config import FQTConfig
from ..kernels.noise import STEP_STREAM
from .call import Call
from .emit import Emitter, Insertion, replace
from .graph import aten, value
from .local import same
from .schemes import SCHEMES, LayerBackward, select
from .sites import Site, factors
from .state import RowChoice, State, graph_pass

fqt = torch.ops.fqt


@graph_pass(requires=("packed forward", "row choice"), ensures="packed backward")
def backward(state: State) -> None:
    """Replace grad_input, grad_weight and grad_bias of every packed, trained site."""
    choice, config = state.choice, state.config
    emitter = state.emitter()
    if choice.cuts:
        state.step_rows = _prune_at_cuts(emitter, choice.cuts, state)
    for site in state.candidates(state.sites):
        if not site.trained or site.backward is None:
            continue
        site.reread()  # the cut, and the input gradients of other sites, are replaced
        at = emitter.at(site.backward, site.name)
        rows = state.step_rows if site.index in choice.below else None
        if site.packed:
            g = _checked_gradient(at, site, config)
            _rewrite_packed(LayerBackward(at, site, state.forward[site.index], config, state.seed, g, rows))
        elif rows is not None and _has_sample_rows(site, choice):
            _rewrite_float_site(at, site, rows)


def _prune_at_cuts(emitter: Emitter, cuts: Sequence[fx.Node], state: State) -> fx.Node:
    """Choose the step's rows at the cuts and scale them by 1/p; below, rows not kept are zero."""
    # Before the first use, not after the cut: a cut that is a graph input stands above the seed.
    readers = {user for cut in cuts for user in cut.users}
    at = emitter.at(next(n for n in emitter.graph.nodes if n in readers), "step")
    gradient = cuts[0]
    if len(cuts) > 1:  # one row: the gradients of all outputs for one sample, side by side
        samples = at.size(gradient, 0)
        gradient = at.call("importance", aten.cat.default, [_as_rows(at, cut, samples) for cut in cuts], 1)
    importance = at.call("importance", fqt.row_importance.default, gradient, state.config.importance)
    rows, scale = select(at, importance, state.seed, STEP_STREAM, state.config)
    for cut in cuts:
        pruned = at.call("prune", fqt.prune_rows.default, cut, rows, scale)
        cut.replace_all_uses_with(pruned, delete_user_cb=readers.__contains__)
    return rows


def _as_rows(at: Insertion, gradient: fx.Node, samples: int | fx.Node) -> fx.Node:
    """float32 ``[N, n]``."""
    rows: fx.Node = at.call("importance", aten.reshape.default, gradient, [samples, -1])
    return at.cast("importance", rows, torch.float32)


def _has_sample_rows(site: Site, choice: RowChoice) -> bool:
    """A float site below the cut runs on the kept rows only if its rows are the cut's samples."""
    assert site.grad_output is not None
    rows = value(site.grad_output).shape[0]
    return same(rows, value(choice.cuts[0]).shape[0]) and not site.rows_are_tokens and site.refusal is None


# -- packed layers -------------------------------------------------------------------------------------------


def _checked_gradient(at: Insertion, site: Site, config: FQTConfig) -> fx.Node:
    assert site.grad_output is not None
    if not config.check_finite:
        return site.grad_output
    return at.call("check", fqt.check_finite.default, site.grad_output, f"{site.name} (gradient of the output)")


def _rewrite_packed(layer: LayerBackward) -> None:
    site, scheme = layer.site, SCHEMES[layer.config.grad](layer)
    if site.grad_input is not None:
        replace(site.grad_input, scheme.grad_input(), layer.at, "grad_input")
    if site.grad_weight is not None:
        _replace_grad_weight(layer, scheme.grad_hat())
    _replace_grad_bias(layer)


def _replace_grad_weight(layer: LayerBackward, grad_hat: fx.Node) -> None:
    """Gradient of the stored weight from that of ``alpha sign(W)``, in the orientation the graph wants."""
    at, site, forward = layer.at, layer.site, layer.forward
    args = (grad_hat, forward.weight, forward.weight_scale, layer.config.weight_scale)
    grad = at.call("grad_weight", fqt.weight_gradient.default, *args)
    assert site.grad_weight is not None
    if site.kind == "linear" and site.input_side == 0:
        grad = at.call("grad_weight", aten.permute.default, grad, [1, 0])
    replace(site.grad_weight, grad, at, "grad_weight")


def _replace_grad_bias(layer: LayerBackward) -> None:
    """The exact float sum of g; with ``scope="step"`` over the kept rows, the only ones that are not zero."""
    at, site, g = layer.at, layer.site, layer.g
    if site.grad_bias is None:
        return
    is_conv = bool(site.stride)
    if not is_conv and layer.step_rows is None:
        return  # the graph's own sum stays
    if layer.step_rows is not None:
        g = at.call("grad_bias", fqt.gather_rows.default, g, layer.step_rows)
    axes = [0, *range(2, 2 + len(site.stride))]
    keepdim = value(site.grad_bias).dim() > 1
    total = at.call("grad_bias", aten.sum.dim_IntList, g, axes, keepdim)
    replace(site.grad_bias, total, at, "grad_bias")


# -- float layers --------------------------------------------------------------------------------------------


def _rewrite_float_site(at: Insertion, site: Site, rows: fx.Node) -> None:
    """A float layer below the cut: its gradients on the kept rows only; the others have none (docs/math.md 4)."""
    assert site.grad_output is not None
    g = at.call("gather", fqt.gather_rows.default, site.grad_output, rows)
    if site.kind == "linear":
        _rewrite_float_linear(at, site, g, rows)
        return
    node = site.backward
    assert node is not None
    x = at.call("gather", fqt.gather_rows.default, Call(node).input, rows)
    grads = at.repeat("float_product", node, grad_output=g, input=x)
    for old, new in zip((site.grad_input, site.grad_weight, site.grad_bias), grads, strict=True):
        if old is None:
            continue
        if old is site.grad_input:
            new = at.call("grad_input", fqt.scatter_rows.default, new, rows, at.size(Call(node).grad_output, 0))
        old.replace_all_uses_with(new)


def _rewrite_float_linear(at: Insertion, site: Site, g: fx.Node, rows: fx.Node) -> None:
    assert site.grad_output is not None
    if site.grad_input is not None:
        kept = at.call("float_product", aten.mm.default, g, Call(site.grad_input).mat2)
        size = at.size(site.grad_output, 0)
        full = at.call("grad_input", fqt.scatter_rows.default, kept, rows, size)
        site.grad_input.replace_all_uses_with(full)
    if site.grad_weight is not None:
        x = at.call("gather", fqt.gather_rows.default, factors(site.output)[0], rows)
        left, right = (x, g) if site.input_side == 0 else (g, x)
        left = at.call("float_product", aten.permute.default, left, [1, 0])
        site.grad_weight.replace_all_uses_with(at.call("grad_weight", aten.mm.default, left, right))
    if site.grad_bias is not None:
        total = at.call("grad_bias", aten.sum.dim_IntList, g, [0], value(site.grad_bias).dim() > 1)
        site.grad_bias.replace_all_uses_with(total)
