"""The autograd Functions of eager FQT: one packed layer, one float layer, and what a step shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .capture import SiteReport
from .config import FQTConfig
from .errors import NonFiniteError
from .kernels import noise, reference, selection
from .kernels.noise import Role
from .kernels.packing import channels_last, channels_second
from .passes.rows import Dominators

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a layer's weight meets its input; empty tuples for a linear layer."""

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear function; weight ``[C_o, C_i, *kernel]``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


class Step:
    """What the layers of one forward share: the seed, and the rows chosen once per step."""

    def __init__(self, config: FQTConfig) -> None:
        self.config = config
        self.prunes_once = config.prunes and config.scope == "step"
        self.rows: Tensor | None = None
        self.below: set[Node] = set()
        self._seed: int | None = None
        self._layers: list[tuple[Node, SiteReport, int]] = []

    def seed(self) -> int:
        """The step's seed, drawn from torch's default generator the first time it is wanted."""
        if self._seed is None:
            self._seed = int(torch.randint(0, 2**62, ()))
        return self._seed

    def keys(self, stream: int) -> tuple[int, int]:
        return noise.stream_keys(self.seed(), stream)

    def record(self, output: Tensor, site: SiteReport) -> None:
        if output.grad_fn is not None:
            self._layers.append((output.grad_fn, site, output.shape[0]))

    def select(self, importance: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        config = self.config
        prune = config.prune if config.prunes else "none"
        return selection.select(importance, self.keys(stream), prune, config.kept_fraction)

    def place_cut(self, output: Any) -> None:
        """Find the autograd node that every packed gradient crosses and prune what enters it (passes/rows.py)."""
        packed = [(node, site, rows) for node, site, rows in self._layers if site.decision == "packed"]
        roots = [t.grad_fn for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn]
        if not self.prunes_once or not packed or not roots or any(site.rows_are_tokens for _, site, _ in packed):
            return
        dominators = _autograd_dominators(roots)
        cut = dominators.common([node for node, _, _ in packed if node in dominators.depth])
        while cut is not None and len(cut._input_metadata) != 1:
            cut = dominators.immediate[cut]
        if cut is None:
            return
        shape = cut._input_metadata[0].shape
        if len(shape) < 2 or any(rows != shape[0] for _, _, rows in packed):
            return
        self.below = {
            node
            for node, site, rows in self._layers
            if dominators.dominates(cut, node) and rows == shape[0] and not site.rows_are_tokens
        }
        cut.register_prehook(self._prune)

    def _prune(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (g,) = grads
        importance = reference.importance(reference.nhwc_rows(reference.as_float32(g)), self.config.importance)
        self.rows, scale = self.select(importance, noise.STEP_STREAM)
        valid = self.rows[self.rows >= 0].long()
        pruned = torch.zeros_like(g)
        pruned[valid] = reference.kept_gradient(g, self.rows, scale).to(g.dtype)
        return (pruned,)


def _autograd_dominators(roots: list[Node]) -> Dominators[Node]:
    """Dominators of the autograd graph below the outputs."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    order.reverse()
    predecessors: dict[Node, list[Node]] = {node: [] for node in order}
    for node in order:
        for following, _ in node.next_functions:
            if following is not None:
                predecessors[following].append(node)
    return Dominators(order, predecessors, roots)


def nhwc(x: Tensor) -> Tensor:
    """The same values in NHWC memory, as the graph's operations return them."""
    return channels_second(channels_last(x).contiguous())


def output_dtype(x: Tensor) -> torch.dtype:
    """What a layer returns: the autocast dtype where autocast is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def float_product_dtype(x: Tensor, config: FQTConfig) -> torch.dtype:
    """What the product of a layer left in float computes in; ``float_dtype`` is for float32 ones."""
    dtype = output_dtype(x)
    return torch.bfloat16 if config.float_dtype == "bfloat16" and dtype == torch.float32 else dtype


def require_finite(config: FQTConfig, x: Tensor, where: str) -> None:
    if config.check_finite and not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"{where}: NaN or infinite values; accepted: finite values only (check_finite=True)")


class PackedLayer(torch.autograd.Function):
    """A binarized layer with quantized gradients, on values (NUMERICS 1 to 5)."""

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
        threshold = reference.activation_threshold(x) if code == "threshold" else None
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
        step_rows = step.rows if step.rows is not None and _is_below(step, ctx) else None
        wanted = ctx.needs_input_grad
        if config.grad == "exact":
            grad_input, grad_weight = backward.exact(g.to(torch.float32), wanted)
        else:
            grad_input, grad_weight = backward.quantized(g, step_rows, wanted)
        grad_bias = None
        if ctx.dtypes[2] is not None and wanted[2]:
            kept = nhwc(g if step_rows is None else _gather(g, step_rows))
            grad_bias = kept.sum([0, *range(2, g.dim())])
        return *_cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None


def _cast(grads: Sequence[Tensor | None], dtypes: Sequence[Any]) -> list[Tensor | None]:
    """Each gradient in the dtype of what it is the gradient of."""
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _is_below(step: Step, ctx: Any) -> bool:
    return ctx in step.below


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, zero where a row is unused (-1)."""
    gathered = x[rows.long().clamp(min=0)]
    return torch.where(reference.per_row(rows >= 0, gathered), gathered, torch.zeros_like(gathered))


def _scatter(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    full = kept.new_zeros(size, *kept.shape[1:])
    valid = rows >= 0
    full[rows[valid].long()] = kept[valid]
    return full


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
        codes, s, z = reference.quantize_rows(g, self.alpha, rows, scale, self.keys(Role.QUANTIZE_ROWS), bits)
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
        codes, s, z = reference.quantize_channels(g, rows, scale, channels, channel_scale, keys, config.bits)
        count = int((rows >= 0).sum())
        x = self.values[rows[:count].long()]
        kernel = self.weight.shape[2:]
        acc, code_sum = reference.grad_weight_product(codes[:count], x, kernel, geometry.stride, geometry.padding)
        return reference.dequantize_grad_weight(acc, code_sum, s, z, channels, g.shape[1])

    def _psq_grad_hat(self, g: Tensor, rows: Tensor) -> Tensor:
        """One bit per row of g for the weight too: a float product, since its scale is inside the contraction."""
        codes, s, z = reference.quantize_rows(g, None, rows, None, self.keys(Role.QUANTIZE_CHANNELS), 1)
        dequantized = reference.per_row(s, codes) * codes.to(torch.float32) + reference.per_row(z, codes)
        grad_hat = self._float_products(nhwc(dequantized), False, True)[1]
        assert grad_hat is not None
        return grad_hat

    def _float_products(self, g: Tensor, to_input: bool, to_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        x, weight = nhwc(self.values), nhwc(self.sign * reference.per_row(self.alpha, self.sign))
        return float_gradients(g, x, weight, self.geometry, [to_input, to_weight, False])[:2]


def float_gradients(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_input, grad_weight and grad_bias of a float layer, in the dtype of its operands even inside autocast."""
    with torch.autocast(g.device.type, enabled=False):
        if geometry.kind == "linear":
            rounded = g.to(x.dtype)
            grads = (rounded @ weight if wanted[0] else None, rounded.t() @ x if wanted[1] else None)
            return *grads, (g.sum(0) if wanted[2] else None)
        args = (geometry.stride, geometry.padding, geometry.dilation, geometry.transposed, geometry.output_padding)
        bias_size = [g.shape[1]] if wanted[2] else None
        output: tuple[Tensor | None, Tensor | None, Tensor | None] = aten.convolution_backward(
            g.to(x.dtype), x, weight, bias_size, *args, geometry.groups, wanted
        )
        return output


class FloatLayer(torch.autograd.Function):
    """A layer left in float whose gradients run on the rows kept once per step (NUMERICS 3)."""

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
        dtype = float_product_dtype(x, step.config)
        ctx.save_for_backward(x.to(dtype), weight.to(dtype))
        ctx.layer = geometry, step
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        operands = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if geometry.kind == "linear":
                return torch.nn.functional.linear(*operands).to(output_dtype(x))
            args = (geometry.stride, geometry.padding, geometry.dilation, geometry.transposed, geometry.output_padding)
            output: Tensor = aten.convolution(*operands, *args, geometry.groups)
        return output.to(output_dtype(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        geometry, step = ctx.layer
        x, weight = ctx.saved_tensors
        rows = step.rows if step.rows is not None and _is_below(step, ctx) else None
        size = x.shape[0]
        if rows is not None:
            g, x = nhwc(_gather(g, rows)), nhwc(_gather(x, rows))
        wanted = [*ctx.needs_input_grad[:2], ctx.dtypes[2] is not None and ctx.needs_input_grad[2]]
        grad_input, grad_weight, grad_bias = float_gradients(g, x, weight, geometry, wanted)
        if grad_input is not None and rows is not None:
            grad_input = _scatter(grad_input, rows, size)
        return *_cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None
