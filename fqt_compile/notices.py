"""What the passes say of a graph, repeated when a cached compilation runs without the passes.

Inductor's caches skip the passes in the next process. A model that is left in float would then run so silently; the
messages and the layers' decisions are therefore kept beside the kernels and found by everything the rewritten graph
depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .errors import FQTWarning, KernelBuildError
from .kernels.cache import cache_directory, keep, recalled
from .passes.decide import unmatched_patterns
from .passes.pipeline import State
from .status import GraphStatus


def notices(state: State) -> list[str]:
    """What a user would otherwise find out from a benchmark."""
    messages = []
    is_part = state.names.first is not None  # of which the whole model may have packed layers elsewhere
    if not is_part and not any(site.packed for site in state.sites):
        reasons = "; ".join(f"{site.name}: {site.reason}" for site in state.sites) or "it has no such layer"
        messages.append(
            f"fqt1bit: no convolution or linear layer of this graph is packed, all of it runs in float ({reasons})"
        )
    unmatched = unmatched_patterns(state)
    if unmatched:
        names = ", ".join(state.names.layers or [site.name for site in state.sites])
        messages.append(f"fqt1bit: skip={unmatched} names no layer; layers: {names}")
    blind = ", ".join(site.name for site in state.sites if site.is_blind)
    if blind:
        messages.append(
            f"fqt1bit: activation='sign' tells nothing of inputs that are never negative (a ReLU's): all bits are +1 in"
            f" {blind}; activation='auto' takes a threshold there"
        )
    messages += [f"fqt1bit: {reason}" for reason in state.avoided.reasons]
    return messages


def announce(messages: Sequence[str]) -> None:
    """Issue them as `FQTWarning`."""
    for message in messages:
        warnings.warn(message, FQTWarning, stacklevel=3)


def graph_key(gm: fx.GraphModule, example_inputs: Sequence[Any], uuid: Any) -> str:
    """Names a compilation: the graph, what its inputs look like, and the digest of options and sources."""
    inputs = [(x.dtype, tuple(map(str, x.shape)), x.device) if torch.is_tensor(x) else type(x) for x in example_inputs]
    return hashlib.sha256(repr((gm.code, inputs, uuid)).encode()).hexdigest()[:24]


def remember(key: str, messages: Sequence[str], graph: GraphStatus) -> None:
    """Keep what is said of a compilation; without a writable cache it is lost."""
    with contextlib.suppress(OSError, KernelBuildError):
        keep(_path(key), {"messages": list(messages), "graph": dataclasses.asdict(graph)})


def recall(key: str) -> tuple[list[str], GraphStatus | None]:
    """What was kept for a compilation, if anything; where it is unreadable, that there was something."""
    with contextlib.suppress(OSError, KernelBuildError):
        path = _path(key)
        if not path.exists():
            return [], None
        with contextlib.suppress(KeyError, TypeError):
            kept: Any = recalled(path)
            return [str(message) for message in kept["messages"]], GraphStatus.read(kept["graph"])
        unreadable = (
            f"fqt1bit: what was said about this graph when it was compiled cannot be read ({path}); remedy: "
            "fqt_compile.explain(model, ...) says it again; delete the file to hear no more of it"
        )
        return [unreadable], None
    return [], None


def _path(key: str) -> Path:
    return cache_directory() / f"notices-{key}.json"
