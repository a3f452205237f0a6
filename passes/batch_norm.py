"""BatchNorm is one node of the captured graph, forward and backward, until this module writes it out.

    forward                       Inductor's own decomposition, as without us
    backward on all rows          the same
    backward on kept rows         a projection on these rows (reference.batch_norm_gradient, docs/math.md 8)

Where rows are dropped, the plain backward would lose the dropped rows' share of its batch means, and with it the
orthogonality to 1 and to the normalized input that the exact gradient has. Frozen BatchNorm, LayerNorm, GroupNorm and
InstanceNorm treat rows one by one and need none of this.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table

from ..kernels import reference
from .call import Call, takes
from .emit import Emitter
from .graph import Replacements, aten, erase_dead, is_call, site_of, value
from .local import same
from .products import PRODUCTS
from .state import State, graph_pass

fqt = torch.ops.fqt
FORWARD = frozenset(
    {
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.no_stats,
    }
)
BACKWARD = aten.native_batch_norm_backward.default


class _Decompositions(dict[Any, Callable[..., Any]]):
    """Pickled by name: Inductor's cache key has it, and some of its functions cannot be pickled. Without a key nothing
    is cached; what the table holds is in the key by torch's version and ours (`backend.source_hash`)."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return decompositions, ()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions without those of BatchNorm and of products: what a graph is captured with."""
    whole = {*FORWARD, BACKWARD, *PRODUCTS}
    kept = {target: made for target, made in select_decomp_table().items() if target not in whole}
    return _Decompositions(kept)


def output_of(node: fx.Node) -> fx.Node | None:
    """The BatchNorm whose normalized output ``node`` is, if it is one."""
    if not is_call(node, operator.getitem) or Call(node).index != 0:
        return None
    source: fx.Node = Call(node).source
    return source if source.op == "call_function" and source.target in FORWARD else None


def is_instance_norm(norm: fx.Node) -> bool:
    """Is ``norm`` the InstanceNorm of a batch of one, which autograd writes as a BatchNorm of ``[1, N C, *S]``?

    What tells them apart are running statistics: BatchNorm's are graph inputs, InstanceNorm has none or repeats them.
    """
    running = Call(norm).running_mean if takes(norm, "running_mean") else None
    return same(value(Call(norm).input).shape[0], 1) and not (
        isinstance(running, fx.Node) and running.op == "placeholder"
    )


def mixes_samples(node: fx.Node, samples: Any) -> bool:
    """Is ``node`` the backward of a BatchNorm that normalized by the statistics of this batch of ``samples`` rows?"""
    return is_call(node, BACKWARD) and Call(node).train and same(value(Call(node).input).shape[0], samples)


@graph_pass(requires=("packed backward",), ensures="written-out BatchNorm")
def batch_norm(state: State) -> None:
    """Write out every BatchNorm: on kept rows as a projection, the rest by Inductor's decomposition."""
    if state.step_rows is not None and state.config.batch_norm == "project":
        _project(state.emitter("backward"), state.choice.norms, state.step_rows, state.config.prune != "bernoulli")
    _write_out(state.emitter())


def _project(emitter: Emitter, norms: Iterable[fx.Node], rows: fx.Node, all_used: bool) -> None:
    """Replace the backward of ``norms`` by the projection on the kept ``rows``; without ``all_used`` some may be -1."""
    replacements = Replacements(emitter.graph)
    for node in norms:
        at = emitter.at(node, "step")
        norm = Call(node)
        kept = [at.call("gather", fqt.gather_rows.default, full, rows) for full in (norm.grad_out, norm.input)]
        used = None if all_used else at.call("gather", aten.ge.Scalar, rows, 0)
        args = (*kept, norm.weight, norm.save_mean, norm.save_invstd, norm.eps, used)
        grad, *parameters = at.inline("batch_norm", reference.batch_norm_gradient, *args)
        full = at.call("batch_norm", fqt.scatter_rows.default, grad, rows, at.size(norm.input, 0))
        for item in list(node.users):
            made = (full, *parameters)[Call(item).index]
            replacements.replace(item, at.cast("batch_norm", made, value(item).dtype))
    replacements.finish()
    erase_dead(emitter.graph)


def _write_out(emitter: Emitter) -> None:
    """Replace every BatchNorm node that is left by Inductor's decomposition."""
    table, replacements = select_decomp_table(), Replacements(emitter.graph)
    for node in list(emitter.graph.nodes):
        if node.op != "call_function" or node.target not in {*FORWARD, BACKWARD}:
            continue
        at = emitter.at(node, site_of(node))
        results = at.inline("batch_norm", table[node.target], *node.args, **node.kwargs)
        for item in list(node.users):
            replacements.replace(item, results[Call(item).index])
    replacements.finish()
    erase_dead(emitter.graph)
