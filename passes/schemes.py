"""How a packed layer is differentiated: a gradient scheme is one class, and one entry of `SCHEMES`.

``fqt``: AGP chooses rows, SCQ's two quantizers pack the gradient, two packed products follow.

    rows, 1/p        = select(row_importance(g))                         docs/math.md 4, here or once per step (`rows`)
    planes, s, z     = quantize_rows(alpha * g, rows, 1/p)               PSQ, for grad_input
    lanes, s', z'    = quantize_channels(g / p, rows)                    PCQ, for grad_weight
    grad_input       = mask * (s * acc + z * sum W)                      acc = grad_input_product(planes, w_bits)
    grad_hat         = s' * acc + z' * sum x                             acc = grad_weight_product(lanes, x_bits)

``exact`` and ``psq`` replace the products that they do not pack by float ones over unpacked codes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from ..config import FQTConfig
from ..kernels.noise import Role, stream_of
from .emit import Insertion
from .graph import aten, value
from .sites import Site
from .state import PackedForward

fqt = torch.ops.fqt


@dataclasses.dataclass
class LayerBackward:
    """What a scheme is given: one packed layer, and where its backward is written."""

    at: Insertion
    site: Site
    forward: PackedForward
    config: FQTConfig
    seed: fx.Node | None
    g: fx.Node
    """Gradient of the layer's output, as the graph has it."""
    step_rows: fx.Node | None = None
    """Rows chosen once per step, scaled by 1/p in ``g`` already; None: the layer chooses."""


class Scheme:
    """The gradients of one packed layer. Each is asked for once at most, ``grad_input`` first."""

    is_random = True
    """Does it read the step's seed?"""

    def __init__(self, layer: LayerBackward) -> None:
        self.layer = layer

    def grad_input(self) -> fx.Node:
        """The gradient of the input, zero where the mask is: float32 ``[N, C_i, *S]``."""
        raise NotImplementedError

    def grad_hat(self) -> fx.Node:
        """The gradient of ``alpha sign(W)``: float32 ``[C_o, C_i, *kernel]``."""
        raise NotImplementedError


class FullyQuantized(Scheme):
    """``fqt``: both products on packed bits."""

    def __init__(self, layer: LayerBackward) -> None:
        super().__init__(layer)
        self.rows, self.scale = layer.step_rows, None
        if self.rows is None:
            kind = layer.config.importance if layer.config.prunes else "uniform"
            importance = layer.at.call("importance", fqt.row_importance.default, layer.g, kind)
            self.rows, self.scale = self._select(importance, Role.SELECT_ROWS)

    def _select(self, importance: fx.Node, role: Role) -> tuple[fx.Node, fx.Node]:
        layer = self.layer
        return select(layer.at, importance, layer.seed, stream_of(layer.site.index, role), layer.config)

    @property
    def _zero_point(self) -> dict[str, bool]:
        """How the quantizers place zero."""
        return {} if self.layer.config.zero_point == "grid" else {"grid": False}

    def grad_input(self) -> fx.Node:
        at, site, forward, config = self.layer.at, self.layer.site, self.layer.forward, self.layer.config
        stream = stream_of(site.index, Role.QUANTIZE_ROWS)
        quantize = (self.layer.g, forward.weight_scale, self.rows, self.scale, self.layer.seed, stream)
        planes, s, z = at.call(
            "quantize_rows", fqt.quantize_rows.default, *quantize, config.gradient_bits, **self._zero_point
        )
        channels = (site.in_channels, site.out_channels)
        w_bits_t = at.call("transpose_weight", fqt.transpose_weight.default, forward.w_bits, *channels)
        size = [at.size(forward.x_bits, 1 + axis) for axis in range(len(site.stride))]
        geometry = (size, list(site.stride), list(site.padding))
        acc, weight_sum = at.call("product", fqt.grad_input_product.default, planes, w_bits_t, *channels, *geometry)
        args = (acc, weight_sum, s, z, self.rows, forward.mask)
        grad: fx.Node = at.call("grad_input", fqt.dequantize_grad_input.default, *args)
        return grad

    def grad_hat(self) -> fx.Node:
        at, site, forward, config = self.layer.at, self.layer.site, self.layer.forward, self.layer.config
        rows, scale, kept, kept_scale = self.rows, self.scale, None, None
        if config.prune_weight == "channel" and config.prunes:
            if scale is not None:  # the paper's SCQ: all rows, some channels
                rows, scale = self._all_rows(), None
            args = (self.layer.g, rows, scale, config.importance)
            importance = at.call("importance", fqt.channel_importance.default, *args)
            kept, kept_scale = self._select(importance, Role.SELECT_CHANNELS)
        stream = stream_of(site.index, Role.QUANTIZE_CHANNELS)
        quantize = (self.layer.g, rows, scale, kept, kept_scale, self.layer.seed, stream, config.gradient_bits)
        lanes, s, z = at.call("quantize_channels", fqt.quantize_channels.default, *quantize, **self._zero_point)
        width = site.out_channels if kept is None else value(kept).shape[0]
        size = [at.size(self.layer.g, 2 + axis) for axis in range(len(site.stride))]
        geometry = (size, list(site.kernel), list(site.stride), list(site.padding))
        product = (lanes, forward.x_bits, rows, site.in_channels, width, site.activation, *geometry)
        acc, code_sum = at.call("product", fqt.grad_weight_product.default, *product)
        channels = (kept, site.out_channels)
        grad: fx.Node = at.call("dequantize", fqt.dequantize_grad_weight.default, acc, code_sum, s, z, *channels)
        return grad

    def _all_rows(self) -> fx.Node:
        """Every row, for a product that prunes channels instead."""
        at, site, seed = self.layer.at, self.layer.site, self.layer.seed
        importance = at.call("importance", fqt.row_importance.default, self.layer.g, "uniform")
        stream = stream_of(site.index, Role.SELECT_ROWS)
        rows, _ = at.call("select", fqt.select.default, importance, seed, stream, "none", 1, 1)
        return rows


class OneBitPerRow(FullyQuantized):
    """``psq``: one bit per row of g; the row scale is inside the weight's contraction, whose product is a float one."""

    def grad_hat(self) -> fx.Node:
        layer, at, site = self.layer, self.layer.at, self.layer.site
        stream = stream_of(site.index, Role.QUANTIZE_CHANNELS)
        quantize = (layer.g, None, self.rows, None, layer.seed, stream, 1)
        planes, s, z = at.call("quantize_rows", fqt.quantize_rows.default, *quantize, **self._zero_point)
        size = at.size(layer.forward.x_bits, 0)
        args = (planes, s, z, self.rows, site.out_channels, size)
        g = at.call("dequantize_rows", fqt.dequantize_rows.default, *args)
        _, grad_hat = float_products(layer, g, input_too=False)
        assert grad_hat is not None
        return grad_hat


class Exact(Scheme):
    """``exact``: QAT, exact gradients of the binarized layer, in float32."""

    is_random = False

    def __init__(self, layer: LayerBackward) -> None:
        super().__init__(layer)
        g = layer.at.cast("grad_output", layer.g, torch.float32)
        self._grad_input, self._grad_hat = float_products(layer, g)

    def grad_input(self) -> fx.Node:
        mask = self.layer.forward.mask
        grad: fx.Node = self.layer.at.call("grad_input", fqt.apply_mask.default, self._grad_input, mask)
        return grad

    def grad_hat(self) -> fx.Node:
        assert self._grad_hat is not None
        return self._grad_hat


SCHEMES: dict[str, type[Scheme]] = {"fqt": FullyQuantized, "exact": Exact, "psq": OneBitPerRow}
"""By the option ``grad``."""


def select(
    at: Insertion, importance: fx.Node, seed: fx.Node | None, stream: int, config: FQTConfig
) -> tuple[fx.Node, fx.Node]:
    """Rows (or channels) to keep, and their scale 1/p."""
    keep = config.kept_fraction
    prune = config.prune if config.prunes else "none"
    rows, scale = at.call(
        "select", fqt.select.default, importance, seed, stream, prune, keep.numerator, keep.denominator
    )
    return rows, scale


def float_products(
    layer: LayerBackward, g: fx.Node, *, input_too: bool = True
) -> tuple[fx.Node | None, fx.Node | None]:
    """The two products of g (float32) with unpacked operands, those of them that the graph wants."""
    at, site, forward = layer.at, layer.site, layer.forward
    alpha, channels = forward.weight_scale, site.in_channels
    weight = at.call("dequantize_weight", fqt.unpack_weight.default, forward.w_bits, alpha, channels)
    x = at.call("unpack_input", fqt.unpack_activation.default, forward.x_bits, channels, site.activation)
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
