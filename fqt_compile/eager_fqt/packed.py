"""A packed layer, by the definition: binarized operands, quantized gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..capture import SiteReport
from ..config import FQTConfig
from ..errors import NonFiniteError
from ..kernels import noise, reference
from ..kernels.noise import Role
from .calls import Geometry
from .floats import float_gradients
from .step import Step
from .tensors import cast, gather, nhwc, output_dtype


def require_finite(config: FQTConfig, x: Tensor, where: str) -> None:
    if config.check_finite and not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"{where}: NaN or infinite values; accepted: finite values only (check_finite=True)")


class PackedLayer(torch.autograd.Function):
    """A binarized layer with quantized gradients, on values (math.md 1 to 6)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        site: SiteReport,
        index: int,
        step: Step,
    ) -> Tensor:
        config = step.config
        require_finite(config, x, f"{site.name} (input)")
        if config.grad != "exact" and any(ctx.needs_input_grad):
            step.seed()
        code = site.activation
        assert code is not None
        threshold = activation_threshold(x, site)
        values = reference.code_values(reference.activation_bits(x, threshold), code)
        mask = reference.activation_mask(x, threshold)
        sign = reference.code_values(reference.weight_bits(weight), "sign")
        alpha = reference.weight_scale(weight, config.weight_scale)
        acc = reference.output_product(values, sign, geometry.stride, geometry.padding)
        ctx.save_for_backward(weight, values.to(torch.int8), mask, sign.to(torch.int8), alpha)
        ctx.layer = geometry, site, index, step
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return reference.dequantize_output(acc, alpha, bias).to(output_dtype(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        geometry, site, index, step = ctx.layer
        config = step.config
        require_finite(config, g, f"{site.name} (gradient of the output)")
        weight, values, mask, sign, alpha = ctx.saved_tensors
        values, sign = values.to(torch.float32), sign.to(torch.float32)
        backward = _LayerBackward(geometry, index, step, weight, values, mask, sign, alpha)
        step_rows = step.kept_rows(ctx, g.shape[0])
        wanted = ctx.needs_input_grad
        if config.grad == "exact":
            grad_input, grad_weight = backward.exact(g.to(torch.float32), wanted)
        else:
            grad_input, grad_weight = backward.quantized(g, step_rows, wanted)
        for role, grad in (("grad_input", grad_input), ("grad_weight", grad_weight)):
            if step.recorder is not None and grad is not None:
                step.recorder(site.name, role, grad)
        grad_bias = None
        if ctx.dtypes[2] is not None and wanted[2]:
            kept = nhwc(g if step_rows is None else gather(g, step_rows))
            grad_bias = kept.sum([0, *range(2, g.dim())])
        return *cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None


def activation_threshold(x: Tensor, site: SiteReport) -> Tensor | None:
    """The threshold of the site's code, None for ``sign``."""
    if site.threshold is None:
        return None
    if site.batch_norm is not None:
        return reference.batch_norm_threshold(*site.batch_norm)
    return reference.activation_threshold(x, site.threshold)


@dataclasses.dataclass
class _LayerBackward:
    """The gradients of one packed layer."""

    geometry: Geometry
    index: int
    step: Step
    weight: Tensor
    values: Tensor
    mask: Tensor
    sign: Tensor
    alpha: Tensor

    def keys(self, role: Role) -> tuple[int, int]:
        return self.step.keys(noise.stream_of(self.index, role))

    def quantized(self, g: Tensor, step_rows: Tensor | None, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
        config = self.step.config
        rows, scale = step_rows, None
        if rows is None:
            kind = config.importance if config.prunes else "uniform"
            importance = reference.importance(reference.nhwc_rows(reference.as_float32(g)), kind)
            rows, scale = self.step.select(importance, noise.stream_of(self.index, Role.SELECT_ROWS))
        grad_input = self._grad_input(g, rows, scale) if wanted[0] else None
        if not wanted[1]:
            return grad_input, None
        grad_hat = self._psq_grad_hat(g, rows) if config.grad == "psq" else self._grad_hat(g, rows, scale)
        return grad_input, self._through_scale(grad_hat)

    def exact(self, g: Tensor, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
        """QAT: float products with the binarized operands."""
        grad_input, grad_hat = self._float_products(g, wanted[0], wanted[1])
        if grad_input is not None:
            grad_input = torch.where(self.mask, grad_input, torch.zeros_like(grad_input))
        return grad_input, None if grad_hat is None else self._through_scale(grad_hat)

    def _through_scale(self, grad_hat: Tensor) -> Tensor:
        return reference.weight_gradient(grad_hat, self.weight, self.alpha, self.step.config.weight_scale)

    def _grad_input(self, g: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
        geometry, bits = self.geometry, self.step.config.gradient_bits
        keys, grid = self.keys(Role.QUANTIZE_ROWS), self.step.grid
        codes, s, z = reference.quantize_rows(g, self.alpha, rows, scale, keys, bits, grid=grid)
        size = self.values.shape[2:]
        acc, weight_sum = reference.grad_input_product(codes, self.sign, size, geometry.stride, geometry.padding)
        return reference.dequantize_grad_input(acc, weight_sum, s, z, rows, self.mask)

    def _grad_hat(self, g: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
        config, geometry = self.step.config, self.geometry
        channels = channel_scale = None
        if config.prune_weight == "channel" and config.prunes:
            if scale is not None:  # chosen at this layer: the paper prunes channels instead of rows
                rows, scale = torch.arange(g.shape[0], dtype=torch.int32), None
            kept = reference.kept_gradient(g, rows, scale)
            importance = reference.importance(kept.transpose(0, 1).flatten(1), config.importance)
            stream = noise.stream_of(self.index, Role.SELECT_CHANNELS)
            channels, channel_scale = self.step.select(importance, stream)
        keys = self.keys(Role.QUANTIZE_CHANNELS)
        groups = (channels, channel_scale, keys, config.bits)
        codes, s, z = reference.quantize_channels(g, rows, scale, *groups, grid=self.step.grid)
        count = int((rows >= 0).sum())
        x = self.values[rows[:count].long()]
        kernel = self.weight.shape[2:]
        acc, code_sum = reference.grad_weight_product(codes[:count], x, kernel, geometry.stride, geometry.padding)
        return reference.dequantize_grad_weight(acc, code_sum, s, z, channels, g.shape[1])

    def _psq_grad_hat(self, g: Tensor, rows: Tensor) -> Tensor:
        """One bit per row of g for the weight too: a float product, since its scale is inside the contraction."""
        keys = self.keys(Role.QUANTIZE_CHANNELS)
        codes, s, z = reference.quantize_rows(g, None, rows, None, keys, 1, grid=self.step.grid)
        dequantized = reference.per_row(s, codes) * codes.to(torch.float32) + reference.per_row(z, codes)
        grad_hat = self._float_products(nhwc(dequantized), False, True)[1]
        assert grad_hat is not None
        return grad_hat

    def _float_products(self, g: Tensor, to_input: bool, to_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        x, weight = nhwc(self.values), nhwc(self.sign * reference.per_row(self.alpha, self.sign))
        return float_gradients(g, x, weight, self.geometry, [to_input, to_weight, False])[:2]
