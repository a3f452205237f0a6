"""The messages of the passes about a graph, repeated when a cached compilation runs without the passes.

Inductor's caches skip the passes in the next process. A model that is left in float would then run so silently; the
messages are therefore kept beside the kernels and found by everything the rewritten graph depends on.
"""

from __future__ import annotations

import contextlib
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


def notices(state: State) -> list[str]:
    """What a user would otherwise find out from a benchmark."""
    messages = []
    if not any(site.packed for site in state.sites):
        reasons = "; ".join(f"{site.name}: {site.reason}" for site in state.sites) or "it has no such layer"
        messages.append(
            f"fqt1bit: no convolution or linear layer of this graph is packed, all of it runs in float ({reasons})"
        )
    unmatched = unmatched_patterns(state.sites, state.config.skip)
    if unmatched:
        names = ", ".join(site.name for site in state.sites)
        messages.append(f"fqt1bit: skip={unmatched} names no layer; layers: {names}")
    return messages


def announce(messages: Sequence[str]) -> None:
    """Issue them as `FQTWarning`."""
    for message in messages:
        warnings.warn(message, FQTWarning, stacklevel=3)


def graph_key(gm: fx.GraphModule, example_inputs: Sequence[Any], uuid: Any) -> str:
    """Names a compilation: the graph, what its inputs look like, and the digest of options and sources."""
    inputs = [(x.dtype, tuple(map(str, x.shape)), x.device) if torch.is_tensor(x) else type(x) for x in example_inputs]
    return hashlib.sha256(repr((gm.code, inputs, uuid)).encode()).hexdigest()[:24]


def remember(key: str, messages: Sequence[str]) -> None:
    """Keep the messages of a compilation; without a writable cache they are lost."""
    with contextlib.suppress(OSError, KernelBuildError):
        if messages:
            keep(_path(key), list(messages))
        else:
            _path(key).unlink(missing_ok=True)


def recall(key: str) -> list[str]:
    """The messages kept for a compilation; where they are unreadable, that there were some."""
    with contextlib.suppress(OSError, KernelBuildError):
        path = _path(key)
        if not path.exists():
            return []
        messages = recalled(path)
        if isinstance(messages, list) and all(isinstance(message, str) for message in messages):
            return messages
        return [
            f"fqt1bit: what was said about this graph when it was compiled cannot be read ({path}); remedy: "
            "fqt_compile.explain(model, ...) says it again; delete the file to hear no more of it"
        ]
    return []


def _path(key: str) -> Path:
    return cache_directory() / f"notices-{key}.json"
