"""What has been compiled of every model: which layers run on packed bits, which in float and why, which in no graph.

A line is written when the first graph of a model is compiled (logger ``fqt_compile``, option ``report``). A layer that
is in no captured graph after the first step, and gets a gradient, is announced: Dynamo runs it as it is, in float.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .data_parallel import unwrapped
from .errors import FQTWarning
from .origin import layers_of
from .passes.graph import is_backward
from .passes.pipeline import State

LOG = logging.getLogger("fqt_compile")
CATEGORIES = {"skip=": "float by choice", "narrow:": "too narrow", "slow (": "float by choice"}


@dataclasses.dataclass(frozen=True)
class LayerStatus:
    """One use of a layer in a graph. ``reason``: why it is in float; ``threshold``: of its activation code, or None."""

    name: str
    packed: bool
    reason: str
    threshold: str | None = None


@dataclasses.dataclass(frozen=True)
class GraphStatus:
    """One compiled graph: ``mode`` is ``training`` or ``inference``; ``rows``: where the kept rows are chosen."""

    mode: str
    rows: str
    layers: tuple[LayerStatus, ...]

    @staticmethod
    def of(state: State) -> GraphStatus:
        layers = (LayerStatus(s.name, s.packed, "" if s.packed else s.reason, s.threshold) for s in state.sites)
        tangents = (n for n in state.graph.nodes if n.op == "placeholder" and is_backward(n))
        mode = "inference" if next(tangents, None) is None else "training"
        return GraphStatus(mode, state.choice.reason, tuple(layers))

    @staticmethod
    def read(kept: Mapping[str, Any]) -> GraphStatus:
        """From ``dataclasses.asdict``."""
        return GraphStatus(kept["mode"], kept["rows"], tuple(LayerStatus(**layer) for layer in kept["layers"]))


@dataclasses.dataclass
class Status:
    """The result of `status`: every graph compiled of a model, and the layers that are in none."""

    graphs: list[GraphStatus]
    not_captured: list[str]

    @property
    def packed(self) -> list[str]:
        """The layers that run on packed bits wherever they run."""
        uses = self._uses()
        return [name for name, layers in uses.items() if all(layer.packed for layer in layers)]

    @property
    def float(self) -> dict[str, str]:
        """The layers that run in float in some graph, with the reason."""
        found = {n: [x for x in layers if not x.packed] for n, layers in self._uses().items()}
        return {name: layers[0].reason for name, layers in found.items() if layers}

    def _uses(self) -> dict[str, list[LayerStatus]]:
        uses: dict[str, list[LayerStatus]] = {}
        for layer in (layer for graph in self.graphs for layer in graph.layers):
            uses.setdefault(layer.name.split("#")[0], []).append(layer)
        return uses

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graphs compiled: {_line(layer for g in self.graphs for layer in g.layers)}"]
        for graph in self.graphs:
            thresholds = Counter(layer.threshold for layer in graph.layers if layer.threshold)
            told = ", ".join(f"{count} of each {name}" for name, count in thresholds.items())
            lines.append(f"  {graph.mode}: {_line(graph.layers)}; thresholds: {told or 'none'}; rows: {graph.rows}")
        lines += [f"  float: {name}: {reason}" for name, reason in self.float.items()]
        lines += [f"  not captured: {name}" for name in self.not_captured]
        return "\n".join(lines)


@dataclasses.dataclass
class Record:
    """What is known of one model.

    ``ran``: ids of parameters that graphs were called with. ``said``: messages that were given already. ``checked``:
    see `Record.check`.
    """

    model: weakref.ref[nn.Module] | None = None
    graphs: list[GraphStatus] = dataclasses.field(default_factory=list)
    ran: set[int] = dataclasses.field(default_factory=set)
    said: set[str] = dataclasses.field(default_factory=set)
    checked: bool = False

    def add(self, graph: GraphStatus, report: bool) -> None:
        """Note a compiled graph; the model's first is reported."""
        if report and not self.graphs and graph.layers:
            _log(f"fqt1bit: {self._name()}: {_line(graph.layers)}")
        self.graphs.append(graph)

    def announce(self, messages: Iterable[str]) -> None:
        """Issue them as `FQTWarning`, each once for the model."""
        for message in messages:
            if message not in self.said:
                self.said.add(message)
                warnings.warn(message, FQTWarning, stacklevel=3)

    def check(self) -> None:
        """After the first step: announce layers that are in no graph, once a gradient says that they do run."""
        self.checked = True
        if not any(layer.packed for graph in self.graphs for layer in graph.layers) and len(self.graphs) > 1:
            self.announce([f"fqt1bit: no layer of {self._name()} is packed, all of it runs in float"])
        model = self.model() if self.model else None
        for path in self.not_captured() if model else ():
            trained = [p for p in model.get_submodule(path).parameters() if p.requires_grad]  # type: ignore[union-attr]
            if trained:
                self._announce_when_trained(path, trained[0])

    def _announce_when_trained(self, path: str, parameter: nn.Parameter) -> None:
        """A layer that does not run (the head that another loss has) is none of the user's worries."""

        def say(_: Any) -> None:
            handle.remove()
            if path not in self.not_captured():  # a later graph of the same step has it
                return
            remedy = "TORCH_LOGS=graph_breaks says why, fqt_compile.status(model) lists the layers"
            self.announce(
                [f"fqt1bit: {path} of {self._name()} is in no captured graph: it runs in float. Remedy: {remedy}"]
            )

        handle = parameter.register_post_accumulate_grad_hook(say)

    def not_captured(self) -> list[str]:
        model = self.model() if self.model else None
        seen = {layer.name.split("#")[0] for graph in self.graphs for layer in graph.layers}

        def is_captured(path: str, layer: nn.Module) -> bool:
            named = any(name == path or name.startswith(f"{path}.") for name in seen)
            return named or any(id(parameter) in self.ran for parameter in layer.parameters())

        return [path for path, layer in layers_of(model).items() if not is_captured(path, layer)] if model else []

    def _name(self) -> str:
        model = self.model() if self.model else None
        return type(model).__name__ if model else "a function"


_records: dict[int, Record] = {}
"""By the id of the model: a module need not be hashable."""


def record_of(model: nn.Module | None) -> Record:
    """The record of a model; a new one where there is no model."""
    if model is None:
        return Record()
    known = _known(model)
    if known is None:
        key = id(model)
        known = _records[key] = Record(weakref.ref(model, lambda _: _records.pop(key, None)))
    return known


def _known(model: nn.Module) -> Record | None:
    record = _records.get(id(model))
    return record if record is not None and record.model is not None and record.model() is model else None


def status(model: nn.Module) -> Status:
    """What has been compiled of a model so far, by graph and layer.

    model: the compiled model, or the one that was compiled. Nothing is compiled by asking: before the first step the
    status has no graphs, and all layers are not captured. A layer that torch runs without a graph (FSDP's hooks, LSTM)
    stays so.
    """
    plain_model = unwrapped(model)
    if not isinstance(plain_model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module, compiled or not")
    record = _known(plain_model) or Record(weakref.ref(plain_model))
    return Status(list(record.graphs), record.not_captured())


def _line(layers: Iterable[LayerStatus]) -> str:
    """``16 of 21 layers packed, 3 float by choice, 2 too narrow``."""
    uses = list(layers)
    counts = Counter(_category(layer.reason) for layer in uses if not layer.packed)
    parts = [f"{sum(layer.packed for layer in uses)} of {len(uses)} layers packed"]
    return ", ".join([*parts, *(f"{count} {category}" for category, count in counts.items())])


def _category(reason: str) -> str:
    return next((category for mark, category in CATEGORIES.items() if mark in reason), "not supported")


def _log(message: str) -> None:
    """By the logger, which writes to stderr where nobody has set it up."""
    if not LOG.handlers and LOG.level == logging.NOTSET:
        LOG.addHandler(logging.StreamHandler())
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
    LOG.info(message)
