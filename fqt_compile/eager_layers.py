"""The autograd Functions of eager FQT: one packed layer, one float layer, and what a step shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

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

    def __init__(
        self,
        config: FQTConfig,
        seed: int | None = None,
        recorder: Callable[[str, str, Tensor], None] | None = None,
    ) -> None:
        """seed: instead of one that is drawn. recorder: told site, role and value of every packed layer's gradients."""
        self.config = config
        self.prunes_once = config.prunes and config.scope == "step"
        self.grid = config.zero_point == "grid"
        self.rows: Tensor | None = None
        self.below: set[Node] = set()
        self.recorder = recorder
        self._seed = seed
        self._layers: list[tuple[Node, SiteReport, int]] = []
        self._norms: set[Node] = set()

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

    def record_batch_norm(self, output: Tensor) -> None:
        if output.grad_fn is not None:
            self._norms.add(output.grad_fn)

    def kept_rows(self, ctx: Any) -> Tensor | None:
        """The rows chosen once per step, if the gradient of the autograd node ``ctx`` has these only."""
        return self.rows if self.rows is not None and ctx in self.below else None

    def select(self, importance: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        config = self.config
        prune = config.prune if config.prunes else "none"
        return selection.select(importance, self.keys(stream), prune, config.kept_fraction)

    def place_cut(self, output: Any) -> Any:
        """Find where rows are chosen (passes/rows.py has the rule) and prune what enters there; the output to return.

        An autograd node stands for the gradient of its output, which is what enters its backward.
        """
        packed = [(node, site, rows) for node, site, rows in self._layers if site.decision == "packed"]
        samples = {rows for _, _, rows in packed}
        if not self.prunes_once or len(samples) != 1 or any(site.rows_are_tokens for _, site, _ in packed):
            return output
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
        flow = AutogradFlow(roots, self._norms, samples.pop())
        nodes = [node for node, _, _ in packed if node in flow.sources]
        if not nodes:
            return output
        cut = None if self.config.cut == "output" else flow.common(nodes)
        if cut is None:
            return self._cut_outputs(output, tensors, flow, nodes)
        cut = flow.above_batch_norm(cut) if self.config.cut == "batch_norm" else cut
        cut = flow.where_it_enters(cut)
        if flow.has_sample_rows(cut):
            self.below = flow.reached_only_through([cut])
            cut.register_prehook(lambda grads: tuple(self._prune(grads)))
        return output

    def _cut_outputs(self, output: Any, tensors: list[Tensor], flow: AutogradFlow, nodes: list[Node]) -> Any:
        """Rows are chosen by the gradients of all outputs that reach a packed layer, together."""
        above = flow.above(nodes)
        cut = [t for t in tensors if t.grad_fn in above]
        if not all(t.dim() >= 2 and t.shape[0] == flow.samples for t in cut):
            return output
        self.below = flow.reached_only_through([t.grad_fn for t in cut])
        pruned = dict(zip(map(id, cut), PrunedOutputs.apply(self, *cut), strict=True))
        return tree_map(lambda t: pruned.get(id(t), t), output)

    def _prune(self, grads: Sequence[Tensor]) -> list[Tensor]:
        rows = [g if len(grads) == 1 else reference.as_float32(g.reshape(g.shape[0], -1)) for g in grads]
        gradient = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        importance = reference.importance(reference.nhwc_rows(reference.as_float32(gradient)), self.config.importance)
        self.rows, scale = self.select(importance, noise.STEP_STREAM)
        valid = self.rows[self.rows >= 0].long()
        pruned = [torch.zeros_like(g) for g in grads]
        for p, g in zip(pruned, grads, strict=True):
            p[valid] = reference.kept_gradient(g, self.rows, scale).to(g.dtype)
        return pruned


class PrunedOutputs(torch.autograd.Function):
    """The outputs of a model as they are; their gradients with the rows kept once per step only."""

    @staticmethod
    def forward(ctx: Any, step: Step, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        return tuple(t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.step._prune(grads)


class AutogradFlow:
    """The autograd nodes below the outputs, from these on, each with the nodes whose backward comes before it."""

    def __init__(self, roots: Sequence[Node], norms: set[Node], samples: int) -> None:
        self.roots, self.norms, self.samples = list(dict.fromkeys(roots)), norms, samples
        order = _topological(self.roots)
        self.sources: dict[Node, list[Node]] = {node: [] for node in order}
        for node in order:
            for following, _ in node.next_functions:
                if following is not None:
                    self.sources[following].append(node)
        self.dominators = Dominators(order, self.sources, self.roots)

    def has_sample_rows(self, node: Node) -> bool:
        metadata = node._input_metadata
        return len(metadata) == 1 and len(metadata[0].shape) >= 2 and metadata[0].shape[0] == self.samples

    def common(self, nodes: list[Node]) -> Node | None:
        """The nearest node with one gradient through which every path to ``nodes`` goes."""
        cut = self.dominators.common(nodes)
        while cut is not None and len(cut._input_metadata) != 1:
            cut = self.dominators.immediate[cut]
        return cut

    def above_batch_norm(self, cut: Node) -> Node:
        """The nearest node above from which every path to ``cut`` goes through BatchNorm; ``cut`` if there is none."""
        directly = self.above([cut], stop=self.norms)
        if not directly.isdisjoint(self.roots):
            return cut
        above = self.dominators.immediate[cut]
        while above is not None and (above in directly or not self.has_sample_rows(above)):
            above = self.dominators.immediate[above]
        return above or cut

    def where_it_enters(self, cut: Node) -> Node:
        """The node above that hands the gradient of ``cut`` on unchanged, to others as well (a residual sum).

        A graph has one value there, which is pruned for all of its readers.
        """
        while len(self.sources[cut]) == 1:
            (above,) = self.sources[cut]
            place = [following for following, _ in above.next_functions].index(cut)
            unchanged = above.name() == "CloneBackward0" or (
                above.name() == "AddBackward0" and (place == 0 or above._saved_alpha == 1)  # type: ignore[attr-defined]
            )
            mine, its = (node._input_metadata for node in (cut, above))
            if not unchanged or len(its) != 1 or (mine[0].shape, mine[0].dtype) != (its[0].shape, its[0].dtype):
                break
            cut = above
        return cut

    def above(self, nodes: Sequence[Node], stop: Collection[Node] = ()) -> set[Node]:
        """``nodes`` and all whose backward leads to them, without those in ``stop`` and beyond."""
        found: set[Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found and node not in stop:
                found.add(node)
                pending.extend(self.sources[node])
        return found

    def reached_only_through(self, cuts: Sequence[Any]) -> set[Node]:
        """Nodes to which every path from an output goes through one of ``cuts``, these included."""
        around: set[Node] = set()
        for node, sources in self.sources.items():
            if node not in cuts and (node in self.roots or any(n in around for n in sources)):
                around.add(node)
        return set(self.sources) - around


def _topological(roots: list[Node]) -> list[Node]:
    """Every node before those that its backward leads to."""
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
    return order


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
        step_rows = step.kept_rows(ctx)
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
            kept = nhwc(g if step_rows is None else _gather(g, step_rows))
            grad_bias = kept.sum([0, *range(2, g.dim())])
        return *_cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None


def activation_threshold(x: Tensor, site: SiteReport) -> Tensor | None:
    """The threshold of the site's code, None for ``sign``."""
    if site.threshold is None:
        return None
    if site.batch_norm is not None:
        return reference.batch_norm_threshold(*site.batch_norm)
    return reference.activation_threshold(x, site.threshold)


def _cast(grads: Sequence[Tensor | None], dtypes: Sequence[Any]) -> list[Tensor | None]:
    """Each gradient in the dtype of what it is the gradient of."""
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


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


class BatchNormLayer(torch.autograd.Function):
    """BatchNorm in training mode; its backward on rows kept once per step is a projection (math.md 8)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        step: Step,
    ) -> Tensor:
        output, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.layer = eps, step, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        eps, step, bias_dtype = ctx.layer
        rows = step.kept_rows(ctx) if step.config.batch_norm == "project" else None
        dtypes = x.dtype, None if weight is None else weight.dtype, bias_dtype
        if rows is None:
            wanted = [True, weight is not None, bias_dtype is not None]
            grads = aten.native_batch_norm_backward(g, x, weight, None, None, mean, invstd, True, eps, wanted)
        else:
            used = None if bool((rows >= 0).all()) else rows >= 0
            kept = (_gather(g, rows), _gather(x, rows))
            grad, *parameters = reference.batch_norm_gradient(*kept, weight, mean, invstd, eps, used)
            grads = (_scatter(grad, rows, x.shape[0]), *parameters)
        present = [grad if dtype is not None else None for grad, dtype in zip(grads, dtypes, strict=True)]
        return *_cast(present, dtypes), None, None, None, None


class FloatLayer(torch.autograd.Function):
    """A layer left in float whose gradients run on the rows kept once per step (math.md 4)."""

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
        rows = step.kept_rows(ctx)
        size = x.shape[0]
        if rows is not None:
            g, x = nhwc(_gather(g, rows)), nhwc(_gather(x, rows))
        wanted = [*ctx.needs_input_grad[:2], ctx.dtypes[2] is not None and ctx.needs_input_grad[2]]
        grad_input, grad_weight, grad_bias = float_gradients(g, x, weight, geometry, wanted)
        if grad_input is not None and rows is not None:
            grad_input = _scatter(grad_input, rows, size)
        return *_cast((grad_input, grad_weight, grad_bias), ctx.dtypes), None, None, None, None
