"""Forward rewrite: output = dequantize(packed product(quantize x, quantize W)).

threshold     = of each channel from BatchNorm's parameters, or mean of each sample (threshold code only)
x_bits, mask  = pack_activation(x, threshold)            docs/math.md 1
w_bits, alpha = quantize_weight(W)
acc           = output_product(x_bits, w_bits)           exact int32
output        = alpha * float(acc) + bias                ATen: Inductor fuses it with what follows
"""

from __future__ import annotations

import torch
from torch import fx

from ..config import FQTConfig
from ..kernels import reference
from .emit import Emitter, Insertion, replace
from .graph import aten, is_training, mark, value
from .schemes import SCHEMES
from .sites import BatchNormThreshold, Site
from .state import PackedForward, State, graph_pass

fqt = torch.ops.fqt


@graph_pass(requires=("codes",), ensures="packed forward")
def forward(state: State) -> None:
    """Replace the output of every packed site."""
    graph, config, packed = state.graph, state.config, state.packed
    emitter = state.emitter()
    if packed and is_training(graph) and SCHEMES[config.grad].is_random and any(site.trained for site in packed):
        first = emitter.at(packed[0].output, "step")
        state.seed = first.call("seed", fqt.draw_seed.default, value(packed[0].x).device)
    known: dict[BatchNormThreshold, fx.Node] = {}
    for site in state.candidates(packed):
        if site.batch_norm is not None and site.batch_norm not in known:
            known[site.batch_norm] = _channel_threshold(emitter, site.batch_norm, site.name)
        limits = None if site.batch_norm is None else known[site.batch_norm]
        site.reread()  # the site before it may have replaced its input
        # The seed rides along with one forward operation, or the partitioner would draw it in the backward.
        at = emitter.at(site.output, site.name)
        state.forward[site.index] = _pack_site(at, site, config, limits, None if state.forward else state.seed)


def _channel_threshold(emitter: Emitter, norm: BatchNormThreshold, name: str) -> fx.Node:
    """``[1, C]`` at the top of the graph: it depends on parameters only, and whatever packs may move up."""
    first = next(node for node in emitter.graph.nodes if node.op != "placeholder")
    args = (norm.weight, norm.bias, norm.channels, norm.window, norm.top, norm.repeat)
    made: fx.Node = emitter.at(first, name).inline("threshold", reference.batch_norm_threshold, *args)
    return made


def _pack_site(
    at: Insertion, site: Site, config: FQTConfig, threshold: fx.Node | None, seed: fx.Node | None
) -> PackedForward:
    x = site.x
    if config.check_finite:
        x = at.call("check", fqt.check_finite.default, x, f"{site.name} (input)")
    if site.activation == "threshold" and threshold is None:
        threshold = at.call("threshold", fqt.activation_threshold.default, x, site.threshold)
    x_bits, mask = at.call("quantize_input", fqt.pack_activation.default, x, threshold, *([seed] if seed else []))
    weight = site.weight
    if site.weight_is_transposed:
        weight = at.call("weight", aten.permute.default, weight, [1, 0])
    w_bits, alpha = at.call("quantize_weight", fqt.quantize_weight.default, weight, config.weight_scale)
    acc = at.call(
        "product",
        fqt.output_product.default,
        x_bits,
        w_bits,
        site.in_channels,
        site.out_channels,
        site.activation,
        list(site.stride),
        list(site.padding),
    )
    output = _dequantize(at, acc, alpha, site.bias, len(site.stride))
    mark(output, "output")
    replace(site.output, output, at, "cast")
    return PackedForward(x_bits, mask, w_bits, alpha, weight, acc)


def _dequantize(at: Insertion, acc: fx.Node, alpha: fx.Node, bias: fx.Node | None, spatial: int) -> fx.Node:
    """``alpha[c] * float(acc) + bias[c]`` in float32."""
    shape = [1, -1, *[1] * spatial]
    output = at.call("dequantize", torch.ops.prims.convert_element_type.default, acc, torch.float32)
    output = at.call("dequantize", aten.mul.Tensor, output, at.call("dequantize", aten.view.default, alpha, shape))
    if bias is not None:
        bias = at.cast("dequantize", bias, torch.float32)
        output = at.call("dequantize", aten.add.Tensor, output, at.call("dequantize", aten.view.default, bias, shape))
    return output
