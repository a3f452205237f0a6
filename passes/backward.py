"""Backward rewrite: AGP chooses rows, SCQ's two quantizers pack the gradient, two packed products follow.

    rows, 1/p        = select(row_importance(g))                         NUMERICS 3, here or once per step (`rows`)
    planes, s, z     = quantize_rows(alpha * g, rows, 1/p)               PSQ, for grad_input
    lanes, s', z'    = quantize_channels(g / p, rows)                    PCQ, for grad_weight
    grad_input       = mask * (s * acc + z * sum W)                      acc = grad_input_product(planes, w_bits)
    grad_W_hat       = s' * acc + z' * sum x                             acc = grad_weight_product(lanes, x_bits)
    grad_weight      = through W_hat = alpha sign(W)                     weight_gradient

``grad="exact"`` and ``"psq"`` replace the products that they do not pack by float ones over unpacked codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from ..config import FQTConfig
from ..kernels.noise import STEP_STREAM, Role, stream_of
from .call import Call
from .graph import Emitter, Insertion, aten, replace, value
from .local import same
from .sites import Site, factors
from .state import PackedForward, RowChoice, State, graph_pass

fqt = torch.ops.fqt


@dataclasses.dataclass
class Backward:
    """What the backward rewrite of one graph shares."""

    config: FQTConfig
    seed: fx.Node | None
    step_rows: fx.Node | None = None
    """Rows chosen once per step, or None: every site chooses."""

    @property
    def zero_point(self) -> dict[str, bool]:
        """How the quantizers place zero."""
        return {} if self.config.zero_point == "grid" else {"grid": False}

    def select(self, at: Insertion, importance: fx.Node, stream: int) -> tuple[fx.Node, fx.Node]:
        keep = self.config.kept_fraction
        prune = self.config.prune if self.config.prunes else "none"
        args = (importance, self.seed, stream, prune, keep.numerator, keep.denominator)
        rows, scale = at.call("select", fqt.select.default, *args)
        return rows, scale

    def select_rows(self, at: Insertion, g: fx.Node, stream: int) -> tuple[fx.Node, fx.Node]:
        kind = self.config.importance if self.config.prunes else "uniform"
        return self.select(at, at.call("importance", fqt.row_importance.default, g, kind), stream)


@graph_pass(requires=("packed forward", "row choice"), ensures="packed backward")
def backward(state: State) -> None:
    """Replace grad_input, grad_weight and grad_bias of every packed, trained site."""
    choice, config = state.choice, state.config
    emitter = Emitter(state.graph, "backward")
    shared = Backward(config, state.seed)
    if choice.cuts:
        shared.step_rows = _prune_at_cuts(emitter, choice.cuts, shared)
    for site in state.sites:
        if not site.trained or site.backward is None:
            continue
        site.reread()  # the cut, and the input gradients of other sites, are replaced
        at = emitter.at(site.backward, site.name)
        rows = shared.step_rows if site.index in choice.below else None
        if not site.packed:
            if rows is not None and _has_sample_rows(site, choice):
                _rewrite_float_site(at, site, rows)
        elif config.grad == "exact":
            _rewrite_exact(at, site, state.forward[site.index], config)
        else:
            _rewrite_quantized(at, site, state.forward[site.index], shared, rows)
    state.step_rows = shared.step_rows


def _prune_at_cuts(emitter: Emitter, cuts: Sequence[fx.Node], shared: Backward) -> fx.Node:
    """Choose the step's rows at the cuts and scale them by 1/p; below, rows not kept are zero."""
    # Before the first use, not after the cut: a cut that is a graph input stands above the seed.
    readers = {user for cut in cuts for user in cut.users}
    at = emitter.at(next(n for n in emitter.graph.nodes if n in readers), "step")
    gradient = cuts[0]
    if len(cuts) > 1:  # one row: the gradients of all outputs for one sample, side by side
        samples = at.size(gradient, 0)
        gradient = at.call("importance", aten.cat.default, [_as_rows(at, cut, samples) for cut in cuts], 1)
    importance = at.call("importance", fqt.row_importance.default, gradient, shared.config.importance)
    rows, scale = shared.select(at, importance, STEP_STREAM)
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


# -- packed gradients ----------------------------------------------------------------------------------------


def _rewrite_quantized(
    at: Insertion, site: Site, forward: PackedForward, shared: Backward, step_rows: fx.Node | None
) -> None:
    g = _checked_gradient(at, site, shared.config)
    rows, scale = step_rows, None
    if rows is None:
        rows, scale = shared.select_rows(at, g, stream_of(site.index, Role.SELECT_ROWS))
    if site.grad_input is not None:
        replace(site.grad_input, _grad_input(at, site, forward, shared, g, rows, scale), at, "grad_input")
    if site.grad_weight is not None:
        if shared.config.grad == "psq":
            grad_hat = _psq_grad_weight(at, site, forward, shared, g, rows)
        else:
            grad_hat = _grad_weight(at, site, forward, shared, g, rows, scale)
        _finish_grad_weight(at, site, forward, grad_hat, shared.config)
    _replace_grad_bias(at, site, g, step_rows)


def _checked_gradient(at: Insertion, site: Site, config: FQTConfig) -> fx.Node:
    assert site.grad_output is not None
    if not config.check_finite:
        return site.grad_output
    return at.call("check", fqt.check_finite.default, site.grad_output, f"{site.name} (gradient of the output)")


def _grad_input(
    at: Insertion,
    site: Site,
    forward: PackedForward,
    shared: Backward,
    g: fx.Node,
    rows: fx.Node,
    scale: fx.Node | None,
) -> fx.Node:
    stream = stream_of(site.index, Role.QUANTIZE_ROWS)
    bits = shared.config.gradient_bits
    quantize = (g, forward.weight_scale, rows, scale, shared.seed, stream, bits)
    planes, s, z = at.call("quantize_rows", fqt.quantize_rows.default, *quantize, **shared.zero_point)
    channels = (site.in_channels, site.out_channels)
    w_bits_t = at.call("transpose_weight", fqt.transpose_weight.default, forward.w_bits, *channels)
    size = [at.size(forward.x_bits, 1 + axis) for axis in range(len(site.stride))]
    geometry = (size, list(site.stride), list(site.padding))
    acc, weight_sum = at.call("product", fqt.grad_input_product.default, planes, w_bits_t, *channels, *geometry)
    args = (acc, weight_sum, s, z, rows, forward.mask)
    grad: fx.Node = at.call("grad_input", fqt.dequantize_grad_input.default, *args)
    return grad


def _grad_weight(
    at: Insertion,
    site: Site,
    forward: PackedForward,
    shared: Backward,
    g: fx.Node,
    rows: fx.Node,
    scale: fx.Node | None,
) -> fx.Node:
    config, kept, kept_scale = shared.config, None, None
    if config.prune_weight == "channel" and config.prunes:
        if scale is not None:  # the paper's SCQ: all rows, some channels
            rows, scale = _all_rows(at, site, shared, g), None
        importance = at.call("importance", fqt.channel_importance.default, g, rows, scale, config.importance)
        kept, kept_scale = shared.select(at, importance, stream_of(site.index, Role.SELECT_CHANNELS))
    stream = stream_of(site.index, Role.QUANTIZE_CHANNELS)
    quantize = (g, rows, scale, kept, kept_scale, shared.seed, stream, config.gradient_bits)
    lanes, s, z = at.call("quantize_channels", fqt.quantize_channels.default, *quantize, **shared.zero_point)
    width = site.out_channels if kept is None else value(kept).shape[0]
    size = [at.size(g, 2 + axis) for axis in range(len(site.stride))]
    geometry = (size, list(site.kernel), list(site.stride), list(site.padding))
    args = (lanes, forward.x_bits, rows, site.in_channels, width, site.activation, *geometry)
    acc, code_sum = at.call("product", fqt.grad_weight_product.default, *args)
    channels = (kept, site.out_channels)
    grad_hat: fx.Node = at.call("dequantize", fqt.dequantize_grad_weight.default, acc, code_sum, s, z, *channels)
    return grad_hat


def _all_rows(at: Insertion, site: Site, shared: Backward, g: fx.Node) -> fx.Node:
    """Every row, for a product that prunes channels instead."""
    importance = at.call("importance", fqt.row_importance.default, g, "uniform")
    stream = stream_of(site.index, Role.SELECT_ROWS)
    rows, _ = at.call("select", fqt.select.default, importance, shared.seed, stream, "none", 1, 1)
    return rows


def _finish_grad_weight(
    at: Insertion, site: Site, forward: PackedForward, grad_hat: fx.Node, config: FQTConfig
) -> None:
    """Gradient of the stored weight from that of ``alpha sign(W)``, in the orientation the graph wants."""
    args = (grad_hat, forward.weight, forward.weight_scale, config.weight_scale)
    grad = at.call("grad_weight", fqt.weight_gradient.default, *args)
    assert site.grad_weight is not None
    if site.kind == "linear" and site.input_side == 0:
        grad = at.call("grad_weight", aten.permute.default, grad, [1, 0])
    replace(site.grad_weight, grad, at, "grad_weight")


def _replace_grad_bias(at: Insertion, site: Site, g: fx.Node, step_rows: fx.Node | None) -> None:
    """The exact float sum of g; with ``scope="step"`` over the kept rows, the only ones that are not zero."""
    if site.grad_bias is None:
        return
    is_conv = bool(site.stride)
    if not is_conv and step_rows is None:
        return  # the graph's own sum stays
    if step_rows is not None:
        g = at.call("grad_bias", fqt.gather_rows.default, g, step_rows)
    axes = [0, *range(2, 2 + len(site.stride))]
    keepdim = value(site.grad_bias).dim() > 1
    total = at.call("grad_bias", aten.sum.dim_IntList, g, axes, keepdim)
    replace(site.grad_bias, total, at, "grad_bias")


# -- float gradients -----------------------------------------------------------------------------------------


def _rewrite_exact(at: Insertion, site: Site, forward: PackedForward, config: FQTConfig) -> None:
    """QAT: exact gradients of the binarized layer, in float32."""
    gradient = _checked_gradient(at, site, config)
    g = at.cast("grad_output", gradient, torch.float32)
    weight = at.call(
        "dequantize_weight", fqt.unpack_weight.default, forward.w_bits, forward.weight_scale, site.in_channels
    )
    grad_input, grad_hat = _float_products(at, site, forward, g, weight)
    if grad_input is not None and site.grad_input is not None:
        masked = at.call("grad_input", fqt.apply_mask.default, grad_input, forward.mask)
        replace(site.grad_input, masked, at, "grad_input")
    if grad_hat is not None:
        _finish_grad_weight(at, site, forward, grad_hat, config)
    _replace_grad_bias(at, site, gradient, None)


def _float_products(
    at: Insertion, site: Site, forward: PackedForward, g: fx.Node, weight: fx.Node, *, input_too: bool = True
) -> tuple[fx.Node | None, fx.Node | None]:
    """The two products of g with unpacked operands, those of them that the graph wants."""
    x = at.call("unpack_input", fqt.unpack_activation.default, forward.x_bits, site.in_channels, site.activation)
    wanted = [input_too and site.grad_input is not None, site.grad_weight is not None, False]
    if site.stride:
        spatial = len(site.stride)
        geometry = (list(site.stride), list(site.padding), [1] * spatial, False, [0] * spatial, 1, wanted)
        args = (g, x, weight, None, *geometry)
        grads = at.call("float_product", aten.convolution_backward.default, *args)
        return (grads[0] if wanted[0] else None), (grads[1] if wanted[1] else None)
    grad_input = at.call("float_product", aten.mm.default, g, weight) if wanted[0] else None
    if not wanted[1]:
        return grad_input, None
    transposed = at.call("float_product", aten.permute.default, g, [1, 0])
    return grad_input, at.call("float_product", aten.mm.default, transposed, x)


def _psq_grad_weight(
    at: Insertion, site: Site, forward: PackedForward, shared: Backward, g: fx.Node, rows: fx.Node
) -> fx.Node:
    """One bit per row of g; the row scale is inside the contraction, so the product is a float one."""
    stream = stream_of(site.index, Role.QUANTIZE_CHANNELS)
    quantize = (g, None, rows, None, shared.seed, stream, 1)
    planes, s, z = at.call("quantize_rows", fqt.quantize_rows.default, *quantize, **shared.zero_point)
    size = at.size(forward.x_bits, 0)
    args = (planes, s, z, rows, site.out_channels, size)
    dequantized = at.call("dequantize_rows", fqt.dequantize_rows.default, *args)
    weight = at.call(
        "dequantize_weight", fqt.unpack_weight.default, forward.w_bits, forward.weight_scale, site.in_channels
    )
    _, grad_hat = _float_products(at, site, forward, dequantized, weight, input_too=False)
    assert grad_hat is not None
    return grad_hat


def _rewrite_float_site(at: Insertion, site: Site, rows: fx.Node) -> None:
    """A float layer below the cut: its gradients on the kept rows only; the others have none (NUMERICS 3)."""
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
