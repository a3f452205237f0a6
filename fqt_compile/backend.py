"""``torch.compile(model, backend="fqt1bit")``: options -> joint-graph pass -> Inductor, or the eager lowering.

The pass runs as Inductor's ``joint_custom_pre_pass``, on the joint forward and backward graph in training and
on the forward graph in inference. Inductor compiles everything around the packed operations; its min-cut
partitioner decides, by our tags, what is saved.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims_common import is_contiguous_for_memory_format_or_false, is_contiguous_or_false

from . import inductor
from .config import FQTConfig
from .cumulative import make_traceable
from .data_parallel import announce_hidden_blocks, keep_graphs_whole
from .errors import ConfigError
from .interpret import ReferenceInterpreter, TritonInterpreter, compile_interpreted
from .kernels.cpu.codegen import find_compiler
from .kernels.cpu.memory import keep_freed_memory
from .kernels.gpu.launch import require_triton
from .notices import announce, graph_key, notices, recall, remember
from .passes.batch_norm import decompositions
from .passes.pipeline import PIPELINE, State, fuel_from_environment, run_pipeline

CONVOLUTIONS = frozenset({torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default})
PACKAGE = pathlib.Path(__file__).parent
make_traceable()  # here, since torch.compile imports the backend before it traces
keep_graphs_whole()


@functools.cache
def source_hash(package: pathlib.Path = PACKAGE) -> str:
    """Digest of everything a rewritten graph depends on besides the options: every file of the package."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in _sources(package):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _sources(package: pathlib.Path) -> list[pathlib.Path]:
    """Files of the package in all folders, in order. Path.rglob would stop at the links `passes` and `kernels`."""
    files = []
    for folder, _, names in os.walk(package, followlinks=True):
        if not folder.endswith("__pycache__"):
            files += [pathlib.Path(folder, name) for name in names]
    return sorted(files)


class FQTPass(CustomGraphPass):
    """The pipeline as Inductor's joint pass. ``uuid`` covers options, names and sources, so caches stay right."""

    def __init__(
        self,
        config: FQTConfig,
        names: Sequence[str | None],
        on_state: Callable[[State], None] | None = None,
        observe: Callable[[str, str], None] | None = None,
    ) -> None:
        self.config, self.names, self.on_state, self.observe = config, tuple(names), on_state, observe
        self.messages: list[str] | None = None
        """What was said about the graph; None before the pass has run."""

    def __call__(self, graph: fx.Graph) -> None:
        state = run_pipeline(graph, self.config, self.names, self.observe)
        self.messages = notices(state)
        announce(self.messages)
        if self.on_state is not None:
            self.on_state(state)

    def uuid(self) -> Any:
        steps = [step.name for step in PIPELINE]
        return source_hash(), self.config.canonical(), repr(self.names), fuel_from_environment(), repr(steps)


def fqt1bit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | FQTConfig | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """The backend. ``options``: fields of `FQTConfig` (and ``preset``), or an `FQTConfig`.

    Raises `ConfigError` for a wrong option, `CompilerMissingError` where native kernels cannot be built.
    """
    config = FQTConfig.from_options(options)
    if mode not in (None, "default"):
        raise ConfigError(f"mode: got {mode!r}; accepted: none, the fqt1bit backend takes options={{...}} instead")
    if unknown.pop("dynamic", None) is not None or unknown:
        raise ConfigError(f"unknown backend arguments {sorted(unknown)}; accepted: options")
    announce_hidden_blocks()
    joint_pass = FQTPass(config, parameter_names(gm, example_inputs))
    if config.lowering == "eager":
        return compile_interpreted(gm, example_inputs, joint_pass, ReferenceInterpreter)
    if config.lowering == "triton":
        require_triton(device_types(example_inputs))
        return compile_interpreted(gm, example_inputs, joint_pass, TritonInterpreter)
    # At once and in our words, rather than from the depths of a compilation.
    if "cuda" in device_types(example_inputs):
        require_triton(["cuda"])
    else:
        find_compiler()
        if config.reuse_memory:
            keep_freed_memory()
    # Donated buffers save a little memory and forbid retain_graph=True; torch checks the setting again when the
    # backward runs, so it cannot be changed for one compilation only.
    torch._functorch.config.donated_buffer = False
    key = graph_key(gm, example_inputs, joint_pass.uuid())
    inductor.register()
    patches = {"joint_custom_pre_pass": joint_pass, **layout_patches(gm)}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches, decompositions=decompositions())
    if joint_pass.messages is None:  # Inductor had it in its cache
        announce(recall(key))
    else:
        remember(key, joint_pass.messages)
    return compiled


def layout_patches(gm: fx.GraphModule) -> dict[str, bool]:
    """Inductor's layout optimization off where it has nothing to do: where the model's convolutions read channels_last.

    It turns everything of four dimensions before a convolution into channels_last memory, packed words included: with
    ResNet-18 it transposed and copied them in both directions, 28 kernels a step. Elsewhere its setting is not touched.
    """
    convolutions = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in CONVOLUTIONS]
    images = [node.args[0].meta.get("example_value") for node in convolutions if isinstance(node.args[0], fx.Node)]
    if images and len(images) == len(convolutions) and all(map(_is_channels_last, images)):
        return {"layout_optimization": False}
    return {}


def _is_channels_last(x: Any) -> bool:
    """Four dimensions in channels_last memory, and not also in the default order (one channel or one pixel)."""
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or is_contiguous_or_false(x):
        return False
    return is_contiguous_for_memory_format_or_false(x, memory_format=torch.channels_last)


def device_types(example_inputs: Sequence[Any]) -> set[str]:
    """``cpu``, ``cuda``, ... of the tensors among a graph's inputs."""
    return {example.device.type for example in example_inputs if isinstance(example, torch.Tensor)}


def parameter_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str | None]:
    """Module path of every graph input that is a parameter; None for other inputs."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names: list[str | None] = []
    for node, example in zip(inputs, example_inputs, strict=False):
        is_parameter = isinstance(example, torch.nn.Parameter)
        names.append(_module_path(node) if is_parameter else None)
    return names


def _module_path(node: fx.Node) -> str:
    """``L['self']._modules['layer1']._modules['0']._parameters['weight']`` -> ``layer1.0``."""
    source = getattr(node, "_dynamo_source", None)
    text = source.name if source is not None else node.name
    text = text() if callable(text) else text
    path = re.findall(r"_modules\['([^']+)'\]", text)
    parameter = re.findall(r"_parameters\['([^']+)'\]", text)
    if parameter and parameter[-1] != "weight":
        path.append(parameter[-1])
    return ".".join(path) or "(model)"
