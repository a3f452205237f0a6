"""Adding nodes to an AOTAutograd graph, with all the metadata that Inductor and the partitioner need."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .call import Call
from .graph import (
    CASTS,
    TRANSPOSES,
    VIEWS,
    Provenance,
    add_call,
    aten,
    first,
    is_backward,
    is_call,
    operator_of,
    position,
    prims,
    value,
)

REQUIRES_STRIDES = frozenset({aten.view.default, aten._unsafe_view.default})
"""Views that not every memory layout allows."""


COPIED_META = ("nn_module_stack", "fwd_nn_module_stack", "seq_nr", "stack_trace", "custom")


@dataclasses.dataclass(frozen=True)
class _Traced:
    """What a function of tensors computes, how its results are nested, and which nodes' fake results can be copied."""

    graph: fx.Graph
    result_spec: Any
    known: frozenset[fx.Node]


def _described(argument: Any) -> Any:
    """What a fake result depends on of an argument, without its name; the argument itself where that is symbolic."""
    if isinstance(argument, list | tuple):
        return tuple(map(_described, argument))
    if isinstance(argument, dict):
        return tuple((name, _described(item)) for name, item in argument.items())
    fake = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    if isinstance(fake, torch.Tensor) and not _is_symbolic(fake):
        return tuple(fake.shape), fake.stride(), fake.storage_offset(), fake.dtype, fake.device
    return type(argument), argument


def _is_symbolic(result: Any) -> bool:
    """Does a result, or one of several, have a size that is not known?"""
    if isinstance(result, tuple | list):
        return any(map(_is_symbolic, result))
    if not isinstance(result, torch.Tensor):
        return isinstance(result, torch.SymInt | torch.SymFloat | torch.SymBool)
    return not all(isinstance(size, int) for size in (*result.shape, *result.stride(), result.storage_offset()))


@functools.cache
def _memory(target: Any) -> str:
    """Of what an operator returns: ``new``, ``first`` where it is a view of its first operand, else ``unknown``."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return "unknown"
    if all(result.alias_info is None for result in schema.returns):
        return "new"
    is_view = target.is_view and len(schema.returns) == 1 and schema.arguments[0].alias_info is not None
    return "first" if is_view else "unknown"


@functools.cache
def _stream(target: Any) -> int | None:
    """Place of the operand that says which numbers of its noise an operation takes: no result's description has it."""
    names = [argument.name for argument in target._schema.arguments]
    return names.index("stream") if "stream" in names else None


def _key(node: fx.Node) -> Any:
    """What the fake results of a call depend on; None where they are computed each time."""
    target, args = operator_of(node), node.args
    if _memory(target) == "unknown":
        return None
    stream = _stream(target)
    if stream is not None and stream < len(args):
        args = (*args[:stream], *args[stream + 1 :])
    return target, _described(args), _described(node.kwargs)


def _view(fake_mode: Any, like: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same description in the memory of ``base``."""
    with no_dispatch():
        meta = torch.empty(0, dtype=like.dtype, device="meta")
        meta.set_(base.untyped_storage(), like.storage_offset(), like.shape, like.stride())
        return _faked(fake_mode, meta, like)


def fresh(fake_mode: Any, like: torch.Tensor, stride: Sequence[int] | None = None) -> torch.Tensor:
    """A fake tensor of the same description in memory of its own, or with other strides; its sizes are known."""
    with no_dispatch():
        strides = like.stride() if stride is None else stride
        meta = torch.empty_strided(like.shape, strides, dtype=like.dtype, device="meta")
        return _faked(fake_mode, meta, like)


def _faked(fake_mode: Any, meta: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``meta`` as a fake tensor of the device of ``like``. What its constructor sets is copied: half of its time."""
    if not isinstance(like, FakeTensor) or like.fake_mode is not fake_mode or fake_mode._allow_unsafe_data_ptr_access:
        return FakeTensor(fake_mode, meta, like.device)
    made = torch.Tensor._make_subclass(
        FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=like.fake_device
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(like.__dict__, constant=None)
    return made


@dataclasses.dataclass
class Known:
    """What was traced for one graph: once for operands alike, since a model has hundreds of equal layers."""

    fake_mode: Any
    traced: dict[Any, _Traced] = dataclasses.field(default_factory=dict)
    results: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Fake results of operators by what they depend on of their operands."""


class Emitter:
    """Adds call nodes with all the metadata Inductor and the partitioner need; ``known`` is that of the graph."""

    def __init__(self, graph: fx.Graph, made_by: str, known: Known) -> None:
        self.graph = graph
        self.made_by = made_by
        self.fake_mode = known.fake_mode
        self.known = known

    def trace(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[_Traced, list[fx.Node]]:
        """``function(*args, **kwargs)`` decomposed as for Inductor, and the nodes among the arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
        nodes = [leaves[i] for i in places]
        key = (function, spec, _described(leaves))
        traced = self.known.traced
        if key in traced:
            return traced[key], nodes

        result_spec: list[Any] = [None]

        def call(*tensors: Any) -> list[Any]:
            given = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                given[i] = tensor
            call_args, call_kwargs = tree_unflatten(given, spec)
            results, result_spec[0] = tree_flatten(function(*call_args, **call_kwargs))
            return results

        with self.fake_mode, maybe_enable_thunkify(), torch.no_grad():
            graph = make_fx(call, select_decomp_table())(*map(value, nodes)).graph
        calls = [node for node in graph.nodes if node.op == "call_function"]
        known = [node for node in calls if _memory(node.target) != "unknown" and not _is_symbolic(value(node))]
        traced[key] = _Traced(graph, result_spec[0], frozenset(known))
        return traced[key], nodes

    def at(self, anchor: fx.Node, site: str) -> Insertion:
        """Insert before ``anchor``, in the same part of the graph, for ``site``."""
        return Insertion(self, anchor, site)


class Insertion:
    """A position in the graph: before ``anchor``, or behind the latest operand where that is defined later.

    What replaces a node reads what the node reads, or what was emitted before it: so it stands before the node's users.
    """

    def __init__(self, emitter: Emitter, anchor: fx.Node, site: str) -> None:
        self.emitter, self.anchor, self.site = emitter, anchor, site

    def call(self, role: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a call of ``target``. Returns the node, or a tuple of nodes for an operator with several results."""
        if target in REQUIRES_STRIDES and not is_contiguous_or_false(value(args[0])):
            target = aten.reshape.default  # an operand traced in one memory format may have become NHWC
        with self.emitter.graph.inserting_before(self.anchor):
            node = add_call(self.emitter.graph, target, args, kwargs)
        following = self._behind_operands(node)
        result = self._fake_result(node)
        self._describe(node, result, role)
        if not isinstance(result, tuple | list):
            return node
        return tuple(self._item(node, i, part, role, following) for i, part in enumerate(result))

    def repeat(self, role: str, node: fx.Node, **changes: Any) -> Any:
        """Add the call that ``node`` is, with some operands changed (by name)."""
        args, kwargs = Call(node).changed(**changes)
        return self.call(role, operator_of(node), *args, **kwargs)

    def _behind_operands(self, node: fx.Node) -> fx.Node:
        """Move a node that was put before the anchor behind operands defined later; the node that it is before then."""
        latest = max(node.all_input_nodes, key=position, default=None)
        if latest is None or position(latest) < position(node):
            return self.anchor
        following = latest.next
        following.prepend(node)
        return following

    def inline(self, role: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add what ``function(*args)`` computes, decomposed as for Inductor; its results with nodes for tensors."""
        traced, nodes = self.emitter.trace(function, args, kwargs)
        known = dict(zip([n for n in traced.graph.nodes if n.op == "placeholder"], nodes, strict=True))
        for node in traced.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                with self.emitter.graph.inserting_before(self.anchor):
                    made = add_call(self.emitter.graph, node.target, args, kwargs, node.name)
                known[node] = made
                made.meta.update(node.meta)
                self._behind_operands(made)
                result = self._again(made, value(node)) if node in traced.known else self._computed(made)
                self._describe(made, result, role)
        (output,) = (n for n in traced.graph.nodes if n.op == "output")
        results = [known[r] if isinstance(r, fx.Node) else r for r in first(output)]
        return tree_unflatten(results, traced.result_spec)

    def _fake_result(self, node: fx.Node) -> Any:
        """What a node returns of its operands' fake values; computed once for equal operands."""
        known, key = self.emitter.known.results, _key(node)
        if key in known:
            return self._again(node, known[key])
        result = self._computed(node)
        if key is not None and not _is_symbolic(result):
            known[key] = result
        return result

    def _again(self, node: fx.Node, result: Any) -> Any:
        """A value of its own like ``result``, since Inductor takes it for memory."""
        if _memory(node.target) == "first":
            return _view(self.emitter.fake_mode, result, value(first(node)))
        if isinstance(result, torch.Tensor):
            return fresh(self.emitter.fake_mode, result)
        again = (fresh(self.emitter.fake_mode, item) if isinstance(item, torch.Tensor) else item for item in result)
        return tuple(again)

    def _computed(self, node: fx.Node) -> Any:
        with self.emitter.fake_mode, maybe_enable_thunkify():
            return operator_of(node)(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """Size of a dimension: an int, or a node where it is symbolic."""
        size = value(node).shape[dim]
        return size if isinstance(size, int) else self.call("size", aten.sym_size.int, node, dim)

    def cast(self, role: str, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` as ``dtype``; nothing is added if it already is."""
        if value(node).dtype == dtype:
            return node
        return self.call(role, prims.convert_element_type.default, node, dtype)

    def _item(self, node: fx.Node, i: int, part: Any, role: str, following: fx.Node) -> fx.Node:
        with self.emitter.graph.inserting_before(following):
            item = add_call(self.emitter.graph, operator.getitem, (node, i), {})
        self._describe(item, part, role)
        return item

    def _describe(self, node: fx.Node, result: Any, role: str) -> None:
        node.meta["val"] = result
        for key in COPIED_META:
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        backward = is_backward(self.anchor)
        node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
        if backward:
            node.meta["autograd_backward"] = True
        node.meta["fqt"] = Provenance(self.emitter.made_by, self.site, role)


def replace(node: fx.Node, new: fx.Node, insertion: Insertion, role: str) -> None:
    """Use ``new`` (float32) in place of ``node``, in the dtype its users want.

    Users that only move ``node`` about and then cast it to the dtype of ``new`` (autocast's way of returning a
    gradient to its parameter) are rebuilt on ``new``, so that nothing is rounded on the way.
    """
    if value(node).dtype == value(new).dtype:
        node.replace_all_uses_with(new)
        return
    for user in list(node.users):
        if is_call(user, user.target) and user.target in CASTS and value(user).dtype == value(new).dtype:
            user.replace_all_uses_with(new)
        elif _is_moved_and_cast(user, value(new).dtype):
            there = Insertion(insertion.emitter, user, insertion.site)
            replace(user, there.call(role, operator_of(user), new, *user.args[1:]), there, role)
    if any(user.users or user.op == "output" for user in node.users):
        node.replace_all_uses_with(insertion.cast(role, new, value(node).dtype))


def _is_moved_and_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    """Does ``node`` only move its operand about, for a cast to ``dtype``?"""
    if node.op != "call_function" or node.target not in TRANSPOSES | VIEWS:
        return False
    casts = [user for user in node.users if user.target in CASTS and value(user).dtype == dtype]
    return bool(casts) or any(_is_moved_and_cast(user, dtype) for user in node.users)
