"""What `models.py` measures of one model: decisions, and one training step computed in several ways.

    eager      fqt_compile.eager(model)                                     the definition, on values
    oracle     torch.compile(..., options={"lowering": "eager"})            the rewritten graph by reference operations
    kernels    the same graph, node by node, by native kernels              equal to the oracle bit for bit
    native     torch.compile(model, backend="fqt1bit")                      inside what Inductor makes of the graph
    inductor   torch.compile(model)                                         for its compile time only

All start from the same parameters, buffers and generator. Differences are judged by `verdict`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from model_zoo import Case, built
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fqt_compile
from fqt_compile import capture as capture_module
from fqt_compile.backend import FQTPass
from fqt_compile.config import FQTConfig
from fqt_compile.errors import FQTWarning
from fqt_compile.interpret import NativeInterpreter, compile_interpreted
from fqt_compile.origin import names_in_model

PACKAGE = Path(fqt_compile.__file__).parent
OURS = [str(path.resolve()) for path in (PACKAGE, PACKAGE / "passes", PACKAGE / "kernels")]
STAGES = ("captured", "oracle", "native")
SEED = 5
ROUNDING = 1e-4
"""Relative difference of a gradient that float rounding alone may make."""
JITTER = 2.0**-22
"""Relative change of every parameter of the oracle's jittered steps: two units in the last place."""
JITTERED = 2
LIKELY = 4.0
"""How many times the largest jittered difference still counts as explained by rounding."""


@dataclasses.dataclass
class Step:
    """One training step: loss, gradients by parameter, seconds."""

    loss: float
    gradients: dict[str, Tensor]
    seconds: float


class Measurement:
    """One model in all ways. ``record`` is what is known so far, ``save`` keeps it after every part."""

    def __init__(self, case: Case, stage: str, save: Callable[[dict[str, Any]], None]) -> None:
        self.case, self.stage, self.save = case, STAGES.index(stage), save
        self.record: dict[str, Any] = {"stage": stage, "errors": {}, "seconds": {}}
        self.steps: dict[str, Step] = {}
        self.model, self.args, self.kwargs = nn.Module(), (), {}

    def run(self) -> None:
        """Every part of the stage; one that fails is recorded, and the others go on."""
        self.part("build", self.build)
        if "build" in self.record["errors"]:
            return
        self.part("captured", self.captured)
        if self.stage >= STAGES.index("oracle"):
            self.part("oracle", self.oracle)
            self.part("eager", lambda: self.step("eager", fqt_compile.eager(self.model)))
            self.part("eager compared", lambda: self.compared("oracle", "eager"))
        if self.stage >= STAGES.index("native"):
            self.part("kernels", lambda: self.step("kernels", torch.compile(self.model, backend=by_kernels)))
            self.part("kernels compared", lambda: self.compared("kernels", "oracle"))
            self.part("inductor", lambda: self.step("inductor", torch.compile(self.model, dynamic=False), again=True))
            self.part("native", lambda: self.step("native", self.compiled(), again=True))
            self.part("native compared", lambda: self.compared("native", "oracle"))

    def part(self, name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        self.record["running"] = name
        self.save(self.record)
        try:
            run()
        except Exception as error:  # of the model, of PyTorch or of ours: all are findings
            self.record["errors"][name] = fault(error)
        self.record["seconds"][name] = round(time.perf_counter() - start, 2)
        self.record["running"] = None
        self.save(self.record)

    def build(self) -> None:
        self.model, self.args, self.kwargs = built(self.case)
        self.record["parameters"] = sum(p.numel() for p in self.model.parameters())
        inputs = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        self.record["input"] = "x".join(map(str, inputs[0].shape))

    def captured(self) -> None:
        seconds: list[float] = []
        with timed(capture_module, "run_pipeline", seconds), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            graphs = capture_module.capture(self.model, self.args, self.kwargs, FQTConfig(), rewrite=True)
        sites = [site for graph in graphs for site in graph.sites]
        floats = Counter(brief(site.reason) for site in sites if site.decision != "packed")
        self.record |= {
            "layers": len(sites),
            "packed": len(sites) - floats.total(),
            "graphs": len(graphs),
            "reasons": dict(floats.most_common()),
            "passes_s": round(sum(seconds), 3),
            "warnings": sorted({str(w.message).splitlines()[0] for w in said if issubclass(w.category, FQTWarning)}),
        }

    def compiled(self, **options: Any) -> Callable[..., Any]:
        return torch.compile(self.model, backend="fqt1bit", options=options, dynamic=False)

    def oracle(self) -> None:
        """The oracle, and how far moving every parameter in its last places moves it."""
        compiled, jitter = self.compiled(lowering="eager"), 0.0
        self.step("oracle", compiled)
        for seed in range(JITTERED):
            with parameters_moved(self.model, seed):
                moved = difference(self.one_step(compiled, reset=False), self.steps["oracle"])
            jitter = max(jitter, moved["largest"], moved["loss"])
        self.record["jitter"] = jitter

    def step(self, name: str, forward: Callable[..., Any], again: bool = False) -> None:
        """``again``: a second step, so that the difference of the two is the time of compiling."""
        made = self.steps[name] = self.one_step(forward)
        self.record.setdefault("loss", {})[name] = made.loss
        if again:
            compiling = made.seconds - self.one_step(forward, reset=False).seconds
            self.record.setdefault("compile_s", {})[name] = round(compiling, 2)

    def one_step(self, forward: Callable[..., Any], reset: bool = True) -> Step:
        if reset:
            torch._dynamo.reset()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with buffers_kept(self.model):
            torch.manual_seed(SEED)
            start = time.perf_counter()
            loss = total(forward(*self.args, **self.kwargs))
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            seconds = time.perf_counter() - start
        return Step(loss.item(), {n: g for n, g in zip(named, grads, strict=True) if g is not None}, seconds)

    def compared(self, way: str, other: str) -> None:
        if way not in self.steps or other not in self.steps:
            return
        found = difference(self.steps[way], self.steps[other])
        found["verdict"] = verdict(found, self.record.get("jitter"), exact=way == "kernels")
        self.record[f"{way} - {other}"] = found


def by_kernels(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: the graphs that Inductor would get, node by node with native kernels."""
    joint_pass = FQTPass(FQTConfig(), names_in_model(gm, inputs))
    return compile_interpreted(gm, inputs, joint_pass, NativeInterpreter)


def total(output: Any) -> Tensor:
    """A scalar of all outputs with a gradient: squares of the distance from random targets; losses as they are."""
    generator = torch.Generator().manual_seed(SEED)
    parts = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            target = torch.randn(leaf.shape, generator=generator)
            parts.append(leaf.float() if leaf.dim() == 0 else (leaf.float() - target).square().mean())
    return torch.stack(parts).sum()


def difference(a: Step, b: Step) -> dict[str, Any]:
    """Relative differences of the losses and of the gradient that differs most, and where.

    A gradient is measured by the largest of its module's gradients in ``b``: that of a bias before a BatchNorm is 0 but
    for rounding.
    """
    modules: dict[str, float] = {}
    for name, g in b.gradients.items():
        module = name.rpartition(".")[0]
        modules[module] = max(modules.get(module, 0.0), float(g.abs().max()))
    found: dict[str, float] = {}
    for name in a.gradients.keys() | b.gradients.keys():
        ours, wanted = (step.gradients.get(name) for step in (a, b))
        if ours is None or wanted is None:  # no gradient is one of zeros
            present = ours if wanted is None else wanted
            found[name] = math.inf if present is not None and bool(present.any()) else 0.0
            continue
        gap = float((ours.float() - wanted.float()).abs().max()) if ours.numel() else 0.0
        found[name] = gap / (modules[name.rpartition(".")[0]] or 1.0) if math.isfinite(gap) else math.inf
    where = max(found, key=lambda name: found[name], default=None)
    return {
        "loss": abs(a.loss - b.loss) / (abs(b.loss) or 1.0),
        "largest": found[where] if where is not None else 0.0,
        "where": where,
        "differing": sum(gap > ROUNDING for gap in found.values()),
        "gradients": len(found),
    }


def verdict(found: dict[str, Any], jitter: float | None, exact: bool = False) -> str:
    """``equal`` bit for bit, ``rounding`` (within `ROUNDING`), ``explained`` or ``unexplained``.

    Rounding can carry an activation across its threshold or a gradient into the next code, from where it spreads. A
    difference is explained if it is at most `LIKELY` times what moving the parameters by `JITTER` does to the oracle.
    """
    largest = found["largest"] + found["loss"]
    if largest == 0:
        return "equal"
    if exact:
        return "unexplained"
    if largest <= ROUNDING:
        return "rounding"
    return "explained" if jitter is not None and largest <= LIKELY * jitter < math.inf else "unexplained"


def brief(reason: str) -> str:
    """A refusal in two or three words."""
    for mark in (" (", ":", "="):
        reason = reason.partition(mark)[0]
    return reason


def fault(error: BaseException) -> dict[str, str]:
    """The first line of an error, and the innermost line of ours that it came through."""
    chain = [error]
    while (cause := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__) is not None:
        chain.append(cause)
    frames = [frame for one in chain for frame in traceback.extract_tb(one.__traceback__)]
    ours = [f for f in frames if any(str(Path(f.filename).resolve()).startswith(folder) for folder in OURS)]
    innermost = f"{Path(ours[-1].filename).resolve()}:{ours[-1].lineno} {ours[-1].name}" if ours else "none of ours"
    lines = str(chain[-1]).strip().splitlines() or [""]
    last = f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return {
        "line": f"{type(chain[-1]).__name__}: {lines[0]}"[:300],
        "frame": innermost.replace(f"{PACKAGE.parent.resolve()}/", ""),
        "last": last,
    }


@contextlib.contextmanager
def timed(module: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Note the processor's seconds of every call of a module's function, which another process does not change."""
    function = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    with mock.patch.object(module, name, call):
        yield


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)


@contextlib.contextmanager
def parameters_moved(model: nn.Module, seed: int) -> Iterator[None]:
    """Every parameter changed by `JITTER`, up or down, meanwhile."""
    generator = torch.Generator().manual_seed(seed)
    before = [(p, p.detach().clone()) for p in model.parameters()]
    for p, value in before:
        signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
        p.data.copy_(value * (1 + JITTER * signs))
    try:
        yield
    finally:
        for p, value in before:
            p.data.copy_(value)
