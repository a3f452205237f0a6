"""The runs that `compare` compares: same model, inputs, loss and random state; what every layer computes is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..backend import FQTPass, fqt1bit
from ..capture import run_captured
from ..config import FQTConfig
from ..eager_fqt.model import eager
from ..interpret import NativeInterpreter, ReferenceInterpreter, compile_interpreted
from ..kernels.operations import OPERATIONS
from ..origin import names_in_model
from ..passes.graph import Provenance, provenance
from ..passes.pipeline import UNOPTIMIZED, analyse, run_pipeline

ROLES = ("output", "grad_input", "grad_weight")
OPERANDS = "operands"
"""What an operation without a role of its own prepares."""
Values = dict[tuple[str, str, str], Tensor]
"""(site, role, node) -> what the node returned."""
Loss = Callable[[Any], Tensor]


class Runs:
    """The runs of one comparison: same model, inputs, loss and random state."""

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: FQTConfig, loss: Loss
    ) -> None:
        self.model, self.args, self.kwargs, self.config, self.loss = model, args, kwargs, config, loss
        self.packed_sites: dict[str, str] = {}

    def compiled(self) -> tuple[float, dict[str, Tensor]]:
        return self._gradients(self.model, lambda gm, inputs: fqt1bit(gm, inputs, options=self.config))

    def eager(self) -> tuple[float, dict[str, Tensor]]:
        copied = eager(self.model, self.config)
        with torch.random.fork_rng(devices=[]):
            copied(*self.args, **self.kwargs)  # captures the plan, so that the run below draws the seed first
        loss, gradients = self._step(copied, lambda call: call(*self.args, **self.kwargs))
        return loss, gradients

    def recorded(self, interpreter: type[Recorder], joint_pass: type[FQTPass]) -> tuple[float, Values]:
        values: Values = {}

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            joint = joint_pass(self.config, names_in_model(gm, inputs), self._note_sites)
            return compile_interpreted(gm, inputs, joint, lambda graph: interpreter(graph, values))

        loss, _ = self._gradients(self.model, backend)
        return loss, values

    def _note_sites(self, state: Any) -> None:
        self.packed_sites |= {site.name: site.activation for site in state.sites if site.packed}

    def _gradients(self, model: nn.Module, backend: Callable[..., Any]) -> tuple[float, dict[str, Tensor]]:
        return self._step(model, lambda call: run_captured(call, self.args, self.kwargs, backend))

    def _step(self, model: nn.Module, forward: Callable[[nn.Module], Any]) -> tuple[float, dict[str, Tensor]]:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[]):
            loss = self.loss(forward(model))
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return loss.item(), {name: g for name, g in zip(named, grads, strict=True) if g is not None}


class MarkPass(FQTPass):
    """Names the float nodes of every site that would be packed, and changes nothing."""

    def __call__(self, graph: fx.Graph) -> None:
        for site in analyse(graph, self.config, self.names).sites:
            for role in ROLES:
                node = getattr(site, role)
                if site.packed and node is not None:
                    node.meta["fqt"] = Provenance("mark", site.name, role)


class PlainPass(FQTPass):
    """The rewrite without optimizations: every layer's float values are nodes of the graph."""

    def __call__(self, graph: fx.Graph) -> None:
        run_pipeline(graph, self.config, self.names, steps=UNOPTIMIZED)


class Recorder(NativeInterpreter):
    """Keeps a copy of what nodes return."""

    def __init__(self, graph: fx.GraphModule, values: Values) -> None:
        super().__init__(graph)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        key = self.key(n)
        if key is not None:
            results = result if isinstance(result, tuple | list) else [result]
            for i, item in enumerate(results):
                self.values.setdefault((*key, f"{n.name}[{i}]"), item.detach().clone())
        return result

    def key(self, n: fx.Node) -> tuple[str, str] | None:
        """Site and role under which to keep the result of a node, or None."""
        raise NotImplementedError


class RoleRecorder(Recorder):
    """Every layer's output, grad_input and grad_weight."""

    def key(self, n: fx.Node) -> tuple[str, str] | None:
        made = provenance(n)
        if made is None or made.role not in ROLES or not isinstance(n.meta.get("val"), Tensor):
            return None
        return made.site, made.role

    def run_node(self, n: fx.Node) -> Any:
        key = self.key(n)
        seen = key is not None and any(known[:2] == key for known in self.values)
        return NativeInterpreter.run_node(self, n) if seen else super().run_node(n)


class OperationRecorder(Recorder):
    """Every result of every packed operation."""

    def key(self, n: fx.Node) -> tuple[str, str] | None:
        made = provenance(n)
        if made is None or getattr(n.target, "namespace", None) != "fqt":
            return None
        return made.site, OPERATIONS[n.target._opname].role or OPERANDS  # type: ignore[union-attr]


class ReferenceRecorder(OperationRecorder, ReferenceInterpreter):
    """The same with reference operations."""
