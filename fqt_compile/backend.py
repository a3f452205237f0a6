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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._prims_common import is_contiguous_for_memory_format_or_false, is_contiguous_or_false

from . import inductor
from .attention import keep_attention_visible
from .config import FQTConfig
from .cumulative import make_traceable
from .data_parallel import announce_hidden_blocks, keep_graphs_whole, tracing
from .errors import ConfigError
from .interpret import SWITCHED_OFF, ReferenceInterpreter, TritonInterpreter, compile_interpreted
from .kernels.cpu.codegen import find_compiler
from .kernels.cpu.fork import survive_forks
from .kernels.cpu.memory import excess, keep_freed_memory
from .kernels.gpu.launch import require_triton
from .notices import graph_key, notices, recall, remember
from .origin import guard_places, model_of, names_of
from .passes.batch_norm import decompositions
from .passes.names import Names
from .passes.pipeline import PIPELINE, State, fuel_from_environment, is_strict, run_pipeline
from .status import GraphStatus, Record, record_of
from .watch import watch_first_steps

CONVOLUTIONS = frozenset({torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default})
PACKAGE = pathlib.Path(__file__).parent
make_traceable()  # here, since torch.compile imports the backend before it traces
keep_attention_visible()
keep_graphs_whole()
watch_first_steps()


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
        names: Names,
        on_state: Callable[[State], None] | None = None,
        observe: Callable[[str, str], None] | None = None,
    ) -> None:
        self.config, self.names, self.on_state, self.observe = config, names, on_state, observe
        self.messages: list[str] | None = None
        """What is to be said about the graph; None before the pass has run."""
        self.status: GraphStatus | None = None
        self.before = other_pass()

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        state = run_pipeline(graph, self.config, self.names, self.observe)
        self.messages, self.status = notices(state), GraphStatus.of(state)
        if self.on_state is not None:
            self.on_state(state)

    def uuid(self) -> Any:
        steps = [step.name for step in PIPELINE]
        before = None if self.before is None else self.before.uuid()
        if self.before is not None and before is None:
            return None
        settings = (self.config.canonical(), fuel_from_environment(), is_strict(self.config))
        return before, source_hash(), repr(self.names.identity()), repr(steps), *settings


def other_pass() -> CustomGraphPass | None:
    """The user's own pass over joint graphs, which runs before ours (ours would take its place)."""
    configured: Any = torch._inductor.config.joint_custom_pre_pass
    return None if configured is None or isinstance(configured, FQTPass) else configured


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
    model = model_of(gm, example_inputs)
    names = names_of(gm, example_inputs, model)
    guard_places(gm, example_inputs, model, names, config.skip)
    joint_pass, record = FQTPass(config, names), record_of(model)
    compiled = _compiled(gm, example_inputs, config, joint_pass)
    messages, status = joint_pass.messages or [], joint_pass.status
    if status is None:  # Inductor had it in its cache
        messages, status = recall(graph_key(gm, example_inputs, joint_pass.uuid()))
    record.announce([*messages, *at_recompile_limit(), *_switched_off()])
    if status is not None:
        record.add(status, config.report)
    return _watched(compiled, record)


def _watched(compiled: Callable[..., Any], record: Record) -> Callable[..., Any]:
    """``compiled``; called for the same parameters again, after the model's first step, it checks what was left out.

    One graph serves all blocks of a kind that are compiled one by one.
    """
    seen: set[int] = set()

    def run(*args: Any) -> Any:
        excess.give_back()
        if not record.checked:
            parameters = {id(x) for x in args if isinstance(x, torch.nn.Parameter)}
            if parameters and parameters <= seen:
                record.check()
            seen.update(parameters)
            record.ran |= parameters
        return compiled(*args)

    return run


def at_recompile_limit() -> list[str]:
    """Beyond its limit Dynamo runs the original function, in float: said when the limit is reached."""
    traced, limit = tracing(), torch._dynamo.config.recompile_limit
    if traced is None:
        return []
    code = traced.f_code
    if len(_debug_get_cache_entry_list(code)) + 1 != limit:
        return []
    where = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    return [
        f"fqt1bit: {where} was compiled {limit} times, which is torch's limit: another variant will run uncompiled, in "
        "float. Remedy: TORCH_LOGS=recompiles says what changes; dynamic=True, or a higher "
        "torch._dynamo.config.recompile_limit"
    ]


def _switched_off() -> list[str]:
    return [
        f"fqt1bit: torch._inductor.config.{name} is left off for this model: {reason}"
        for name, reason in SWITCHED_OFF.items()
        if getattr(torch._inductor.config, name)
    ]


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FQTConfig, joint_pass: FQTPass
) -> Callable[..., Any]:
    """The graph by the lowering that is asked for."""
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
        survive_forks()
        if config.reuse_memory:
            keep_freed_memory()
    # Donated buffers save a little memory and forbid retain_graph=True; torch checks the setting again when the
    # backward runs, so it cannot be changed for one compilation only.
    torch._functorch.config.donated_buffer = False
    key = graph_key(gm, example_inputs, joint_pass.uuid())
    inductor.register()
    patches = {"joint_custom_pre_pass": joint_pass, **dict.fromkeys(SWITCHED_OFF, False), **layout_patches(gm)}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches, decompositions=decompositions())
    if joint_pass.status is not None and joint_pass.messages is not None:
        remember(key, joint_pass.messages, joint_pass.status)
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
