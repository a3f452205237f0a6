"""Which model a captured graph belongs to, and what its layers are called there.

Dynamo gives the backend the graph of one frame: of a whole model, of what lies between two graph breaks, of a block
that is compiled alone, or of one of DDP's buckets. The model is found on the call stack: it is what was compiled, or
the outermost module that is being called and has the graph's parameters.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

from .config import SKIP_GROUPS
from .data_parallel import tracing, unwrapped
from .passes.decide import is_named
from .passes.names import STACK, Names, layer_name, module_key

CALLS = frozenset({"_call_impl", "_wrapped_call_impl", "forward", "__call__"})
LAYERS = (_ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase)


def model_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> nn.Module | None:
    """The model that the graph is, or is a part of; None if no module has its parameters."""
    wanted = {id(x) for x in _read(gm, example_inputs) if isinstance(x, nn.Parameter)}
    called = list(_called())
    compiled = [module for module in called if isinstance(module, OptimizedModule)]
    for module in (*compiled, *called, *_traced(gm)):
        model = unwrapped(module)
        if isinstance(model, nn.Module) and any(id(parameter) in wanted for parameter in model.parameters()):
            return model
    return None


def _read(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What the graph reads: its inputs and, where Inductor is to freeze them, the parameters that it has itself."""
    return [*example_inputs, *gm.parameters()]


def _called() -> Iterator[nn.Module]:
    """The modules that are being called, the outermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_name in CALLS and isinstance(frame.f_locals.get("self"), nn.Module):
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return reversed(found)


def _traced(gm: fx.GraphModule) -> Iterator[Any]:
    """The modules that the traced function found among its variables."""
    scope: dict[str, Any] = dict(zip("LG", traced_variables(), strict=True))
    for base in dict.fromkeys(_source(node).partition("._modules[")[0] for node in _inputs(gm)):
        value: Any = scope.get(base[:1])
        for name in re.findall(r"\[['\"]?(\w+)['\"]?\]", base):
            value = value.get(name) if isinstance(value, dict) else None
        yield value


def traced_variables() -> tuple[dict[str, Any], dict[str, Any]]:
    """Local and global variables of the function that is traced; none where a backend is called by hand."""
    traced: Any = tracing()
    return (traced.output.local_scope, traced.output.global_scope) if traced else ({}, {})


def _inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _source(node: fx.Node) -> str:
    """``L['self']._modules['layer1']._modules['0']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None)
    text = source.name if source is not None else node.name
    return str(text() if callable(text) else text)


def names_in_model(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Names:
    """What the layers of the graph are called in the model that it belongs to."""
    return names_of(gm, example_inputs, model_of(gm, example_inputs))


# -- names ---------------------------------------------------------------------------------------------------


def names_of(gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module | None) -> Names:
    """What the layers of the graph are called in ``model``."""
    if model is None:
        return Names(tuple(_from_source(node, x) for node, x in zip(_inputs(gm), example_inputs, strict=False)))
    modules = {str(id(module)): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    parameters = tuple(
        tuple(paths.get(id(x), ())) or _from_source(node, x)
        for node, x in zip(_inputs(gm), example_inputs, strict=False)
    )
    layers = layers_of(model)
    first, last = None, None
    if layers and not _is_whole(layers, _read(gm, example_inputs)):
        order = [_layer_name(path, layer) for path, layer in layers.items() if not isinstance(layer, nn.RNNBase)]
        first, last = (order[0], order[-1]) if order else (None, None)
    used = {module_key(str(key)) for node in gm.graph.nodes for key in node.meta.get(STACK) or ()}
    return Names(
        parameters,
        {key: path for key, path in modules.items() if key in used},
        first,
        last,
        tuple(_layer_name(path, layer) for path, layer in layers.items()),
        _base(modules),
        _signed(gm) if first is not None else (),
    )


def _signed(gm: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the graph inputs that have negative values in the call that is traced."""
    scope = dict(zip("LG", traced_variables(), strict=True))
    found = []
    for position, node in enumerate(_inputs(gm)):
        try:
            seen = eval(_source(node), dict(scope))  # as Dynamo evaluates it for its guards
        except Exception:  # a source that is no expression of the function's variables
            continue
        is_float = isinstance(seen, torch.Tensor) and not isinstance(seen, FakeTensor) and seen.is_floating_point()
        if is_float and not isinstance(seen, nn.Parameter) and bool((seen.detach() < 0).any()):
            found.append(position)
    return tuple(found)


PLACE = "_fqt_place"
"""Attribute of a layer's parameters, with the options that name layers: what the decision depends on besides shapes."""


def guard_places(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module | None, names: Names, skip: Sequence[str]
) -> None:
    """Let Dynamo use the graph of a part of a model only for layers about which is decided alike.

    It runs one graph for all modules of a class whose tensors look alike: the first block's, whose first layer stays in
    float, for all blocks, too. ``skip``: the option, which may name layers.
    """
    if model is None or names.first is None or TracingContext.try_get() is None:
        return
    patterns = [pattern for pattern in skip if pattern not in SKIP_GROUPS]
    attribute = f"{PLACE}_{zlib.crc32(repr(patterns).encode())}"
    for path, layer in layers_of(model).items():
        name = _layer_name(path, layer)
        place = "first" if name == names.first else "last" if name == names.last else "between"
        named = [pattern for pattern in patterns if is_named(name, pattern, names)]
        for parameter in layer.parameters():
            setattr(parameter, attribute, f"{place} {named}")
    for node, x in zip(_inputs(gm), example_inputs, strict=False):
        source = getattr(node, "_dynamo_source", None)
        if source is not None and isinstance(x, nn.Parameter) and hasattr(x, attribute):
            install_guard(AttrSource(source, attribute).make_guard(GuardBuilder.EQUALS_MATCH))


def _base(modules: dict[str, str]) -> str | None:
    """The path of the module whose frame is traced; None if it is a function's."""
    own = [
        value
        for name, value in traced_variables()[0].items()
        if not name.startswith("__") and isinstance(value, nn.Module)
    ]
    return next((modules[str(id(module))] for module in own if str(id(module)) in modules), None)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The convolution, linear, attention and recurrent modules of a model by path, in the order of registration."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}


def _layer_name(path: str, layer: nn.Module) -> str:
    return layer_name(f"{path}.{'in_proj_weight' if isinstance(layer, nn.MultiheadAttention) else 'weight'}".strip("."))


def _is_whole(layers: dict[str, nn.Module], inputs: Sequence[Any]) -> bool:
    """Does the graph read a parameter of every layer?"""
    read = {id(x) for x in inputs if isinstance(x, torch.Tensor)}
    return all(any(id(p) in read for p in layer.parameters()) for layer in layers.values())


def _from_source(node: fx.Node, example: Any) -> tuple[str, ...]:
    """The path of a parameter as the traced function says it."""
    if not isinstance(example, nn.Parameter):
        return ()
    text = _source(node)
    names = [*re.findall(r"_modules\['([^']+)'\]", text), *re.findall(r"_parameters\['([^']+)'\]", text)]
    return (".".join(names) or (re.findall(r"\w+", text) or [node.name])[-1],)
