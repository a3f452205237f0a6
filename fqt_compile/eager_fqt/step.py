"""What the layers of one forward share: the seed, and where and which rows are chosen once per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import SiteReport
from ..config import FQTConfig
from ..kernels import noise, reference, selection
from .flow import AutogradFlow


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
        self._norms: list[tuple[Node, int]] = []
        self._samples: int | None = None

    def seed(self) -> int:
        """The step's seed, drawn the first time it is wanted, as the compiled graph does."""
        if self._seed is None:
            self._seed = int(noise.draw_seed(torch.device("cpu")))
        return self._seed

    def keys(self, stream: int) -> tuple[int, int]:
        return noise.stream_keys(self.seed(), stream)

    def record(self, output: Tensor, site: SiteReport) -> None:
        if output.grad_fn is not None:
            self._layers.append((output.grad_fn, site, output.shape[0]))

    def record_batch_norm(self, output: Tensor) -> None:
        if output.grad_fn is not None:
            self._norms.append((output.grad_fn, output.shape[0]))

    def kept_rows(self, ctx: Any, rows: int) -> Tensor | None:
        """The rows chosen once per step, if the gradient of the node ``ctx``, of ``rows`` rows, has these only.

        What is not made of samples (a weight that is normalized) has other rows.
        """
        return self.rows if self.rows is not None and ctx in self.below and rows == self._samples else None

    def select(self, importance: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        config = self.config
        prune = config.prune if config.prunes else "none"
        return selection.select(importance, self.keys(stream), prune, config.kept_fraction)

    def place_cut(self, output: Any, inputs: Sequence[Any] = ()) -> Any:
        """Find where rows are chosen (passes/rows.py has the rule) and prune what enters there; the output to return.

        ``inputs``: what autograd has behind them is not looked at. An autograd node stands for the gradient of its
        output, which is what enters its backward.
        """
        packed = [(node, site, rows) for node, site, rows in self._layers if site.decision == "packed"]
        samples = {rows for _, _, rows in packed}
        if not self.prunes_once or len(samples) != 1 or any(site.rows_are_tokens for _, site, _ in packed):
            return output
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
        self._samples = samples.pop()
        norms = {node for node, rows in self._norms if rows == self._samples}
        ends = {t.grad_fn for t in inputs if isinstance(t, Tensor) and t.grad_fn is not None}
        flow = AutogradFlow(roots, norms, self._samples, ends)
        nodes = [node for node, _, _ in packed if node in flow.nodes]
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
        cut = [t for t in tensors if t.grad_fn is not None and flow.reached([t.grad_fn]).keys() & set(nodes)]
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
