"""`explain`: what the compiler decides and does for a model, without training it."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from ..capture import CapturedGraph, SiteReport, capture
from ..config import FQTConfig
from ..errors import ConfigError
from ..passes.region import FusedProgram
from ..results import write_atomic

SHOWN = 4
"""Layers named in one line."""


@dataclasses.dataclass
class Report:
    """The result of `explain`.

    sites: every use of a convolution or linear layer, in forward order, with decision and reason.
    stages: the graph as text after each pass, in order; "captured" is before any. With graph breaks the names
    are numbered ("2: forward").
    saved_bytes: bytes kept for the backward, without parameters and inputs, as the partitioner decides it:
    "float32" for the model as it is, "packed" for the rewritten one.
    kernels: source of every native kernel template, rendered for this machine, by name.
    row_choice: where AGP chooses its rows, and why.
    unseen: convolution and linear modules that no captured call uses: not run with these inputs, or hidden from
    the matcher.
    optimizations: what row compaction and fusion did, and what the optimizing passes left as it was, and why.
    fused: the operations that run a pointwise program (activations straight to bits, gradients, their sums), with it.
    """

    config: FQTConfig
    sites: list[SiteReport]
    stages: dict[str, str]
    saved_bytes: dict[str, int]
    row_choice: list[str]
    unseen: list[str]
    optimizations: list[str]
    fused: list[FusedProgram]

    @functools.cached_property
    def kernels(self) -> dict[str, str]:
        from ..kernels.cpu import codegen
        from ..kernels.cpu import programs as pointwise

        programs = dict.fromkeys((f.template, pointwise.parameters_for(f.text, f.dtypes)) for f in self.fused)
        return codegen.rendered_sources(programs)

    @property
    def packed(self) -> list[SiteReport]:
        """The sites that run on packed bits."""
        return [site for site in self.sites if site.decision == "packed"]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=150, no_color=True)
        console.print(self.render())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def render(self) -> RenderableType:
        """Table of sites and summary, for a rich console."""
        return Group(self._table(), self._summary())

    def save(self, path: str | Path) -> None:
        """Write everything, graphs and kernels included: HTML for a ``.html`` path, else plain text."""
        path = Path(path)
        html = path.suffix.lower() in (".html", ".htm")
        console = Console(file=io.StringIO(), width=200, record=True)
        console.print(self.render())
        before = None
        for name, text in self.stages.items():
            shown = "(unchanged)" if text == before else Syntax(text, "python", word_wrap=False)
            console.print(Panel(shown, title=f"graph after pass: {name}"))
            before = text
        for name, text in self.kernels.items():
            console.print(Panel(Syntax(text, "cpp"), title=f"kernel: {name}"))
        text = console.export_html() if html else console.export_text()
        write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")))

    def _table(self) -> Table:
        table = Table(title=f"fqt1bit: {len(self.packed)} of {len(self.sites)} layers packed")
        for column in ("layer", "kind", "input", "weight", "decision", "code", "saved, bytes", "reason"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            table.add_row(
                site.name,
                site.kind,
                "x".join(map(str, site.input_shape)),
                "x".join(map(str, site.weight_shape)),
                site.decision,
                site.activation or "-",
                f"{site.saved_bytes_before:,} -> {site.saved_bytes_after:,}",
                site.activation_reason if site.decision == "packed" else site.reason,
            )
        return table

    def _summary(self) -> str:
        macs = sum(site.macs for site in self.sites)
        share = sum(site.macs for site in self.packed) / macs if macs else 0.0
        before, after = self.saved_bytes["float32"], self.saved_bytes["packed"]
        ratio = f" ({before / after:.1f} times less)" if after else ""
        return "\n".join(
            [
                f"packed share of the multiplications: {share:.1%}",
                f"saved for backward: {before:,} bytes float -> {after:,} bytes packed{ratio}",
                f"gradients: {self.config.gradient_bits} bits, kept fraction {self.config.kept_fraction}",
                *(f"rows: {reason}" for reason in self.row_choice),
                *self.optimizations,
                *(f"module without a call: {name}" for name in self.unseen),
            ]
        )


def explain(
    model: nn.Module,
    *args: Any,
    config: FQTConfig | Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """Capture ``model(*args, **kwargs)`` and report what ``fqt1bit`` does with it.

    The model is traced twice (as it is and rewritten), not trained: parameters, buffers and the random state are
    left as they were. No compiler is needed.

    Raises `ConfigError` for wrong options, `CaptureError` if nothing could be captured.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    settings = FQTConfig.from_options(config)
    plain = capture(model, args, kwargs or {}, settings, steps=())  # for the bytes that it saves in float
    packed = capture(model, args, kwargs or {}, settings, rewrite=True)
    sites = [site for graph in packed for site in graph.sites]
    return Report(
        config=settings,
        sites=sites,
        stages=_stages(packed),
        saved_bytes={"float32": _saved(plain), "packed": _saved(packed)},
        row_choice=list(dict.fromkeys(graph.row_choice for graph in packed)),
        unseen=_unseen(model, sites),
        optimizations=[line for graph in packed for line in _optimizations(graph)],
        fused=[fused for graph in packed for fused in graph.fused],
    )


def _optimizations(graph: CapturedGraph) -> list[str]:
    lines = []
    if graph.compacted:
        lines.append(f"row compaction: {graph.compacted} values of the backward on the kept rows only")
    if graph.fused:
        texts = {fused.text for fused in graph.fused}
        activations = sum(fused.template == "fused_activation" for fused in graph.fused)
        gradients = sum(fused.template != "fused_activation" and "|" in fused.text for fused in graph.fused)
        lines.append(
            f"fusion: {activations} activations straight to bits, {gradients} gradients, {len(texts)} programs"
        )
    layers: dict[tuple[str, str], list[str]] = {}
    for left in graph.not_optimized:
        layers.setdefault((left.step, left.reason), []).append(left.layer)
    for (step, reason), names in layers.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"not optimized by {step}: {', '.join(names[:SHOWN])}{more}: {reason}")
    return lines


def _unseen(model: nn.Module, sites: list[SiteReport]) -> list[str]:
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    seen = {site.name.split("#")[0] for site in sites}
    return [name for name, module in model.named_modules() if isinstance(module, layers) and name and name not in seen]


def _saved(graphs: list[CapturedGraph]) -> int:
    return sum(graph.saved_bytes for graph in graphs)


def _stages(graphs: list[CapturedGraph]) -> dict[str, str]:
    if len(graphs) == 1:
        return graphs[0].stages
    return {f"{i}: {name}": text for i, graph in enumerate(graphs, 1) for name, text in graph.stages.items()}
