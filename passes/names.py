"""What the layers of a graph are called: by their paths in the model, which the graph itself does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx
from torch._functorch._aot_autograd.descriptors import ParamAOTInput

STACK = "nn_module_stack"


@dataclasses.dataclass(frozen=True)
class Names:
    """Of one captured graph, which may be a part of a model only.

    parameters: all paths of every graph input that is a parameter (``emb.weight`` and ``lm_head.weight`` where it is
    tied), nothing for other inputs. modules: the path of a module by the key that Dynamo notes it under.
    first, last: the model's first and last layer, where the graph is a part of the model; None: the graph's own.
    layers: every layer of the model, in this graph or not. base: the module that was traced, inside of the model.
    signed: positions of graph inputs that had negative values when a part of a model was captured.
    """

    parameters: tuple[tuple[str, ...], ...] = ()
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    layers: tuple[str, ...] = ()
    base: str | None = None
    signed: tuple[int, ...] = ()

    def of(self, output: fx.Node, weight: fx.Node) -> tuple[str, tuple[str, ...]]:
        """The name of the layer that computes ``output`` from ``weight``, and the other names of its weight.

        That of the module that computes it, also where the weight is shared with another or computed from others.
        """
        inside, paths = self._module(output), self._paths(weight)
        own = [path for path in paths if path.rpartition(".")[0] == inside]
        if not paths:
            return (_noted(output) or weight.name) if inside is None else inside or "(model)", ()
        path = (own or list(paths))[0]
        return layer_name(path), tuple(layer_name(other) for other in paths if other != path)

    def identity(self) -> tuple[object, ...]:
        """All that a rewritten graph depends on; the keys of modules differ from process to process."""
        places = self.first, self.last, self.layers, self.base
        return self.parameters, tuple(self.modules.values()), *places, self.signed

    def is_parameter(self, node: fx.Node) -> bool:
        """Is ``node`` a parameter of the model? Without names, every input of the graph may be one."""
        if node.op != "placeholder":
            return False
        return not self.parameters or isinstance(node.meta.get("desc"), ParamAOTInput) or bool(self._paths(node))

    def is_signed(self, node: fx.Node) -> bool:
        """Is ``node`` a graph input that was seen to have negative values?"""
        return getattr(node.meta.get("desc"), "idx", None) in self.signed

    def _paths(self, node: fx.Node) -> tuple[str, ...]:
        position = getattr(node.meta.get("desc"), "idx", None)
        return self.parameters[position] if position is not None and position < len(self.parameters) else ()

    def _module(self, node: fx.Node) -> str | None:
        """The path of the innermost module that computes ``node``, if it is known."""
        stack = node.meta.get(STACK)
        return self.modules.get(module_key(list(stack)[-1])) if stack else self.base


UNNAMED = Names()


def module_key(noted: str) -> str:
    """The key of a module without the number of the call."""
    return noted.partition("@")[0]


def layer_name(path: str) -> str:
    """``layer1.0.weight`` -> ``layer1.0``; other parameters keep their own name."""
    return "(model)" if path == "weight" else path.removesuffix(".weight")


def _noted(node: fx.Node) -> str | None:
    stack = node.meta.get(STACK)
    return str(list(stack.values())[-1][0]) if stack else None
