"""Where rows are chosen: eager FQT (by what is out of reach without a node) and the passes (by dominators) agree."""

from __future__ import annotations

import ast
import operator
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import fqt_compile
from fqt_compile.eager_fqt import model as eager_model
from fqt_compile.eager_fqt.flow import AutogradFlow
from fqt_compile.passes import rows

SAMPLES = 4
GRAPHS = 200
NETS = 9
BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


class AbstractNode:
    """What a flow reads of an autograd node; ``shapes``: of the gradients that enter its backward."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.next_functions: list[tuple[AbstractNode, int]] = []
        self._input_metadata = [SimpleNamespace(shape=shape, dtype=torch.float32) for shape in shapes]


class RandomGraph:
    """A random backward: ``nodes`` from the outputs on, their ``parents``, ``roots``, ``norms`` and ``targets``."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        count = draw.randint(4, 24)
        shapes = [(SAMPLES, 3)] * 10 + [(SAMPLES + 3, 3)]
        self.nodes = [AbstractNode([draw.choice(shapes)] * (2 if draw.random() < 0.1 else 1)) for _ in range(count)]
        self.roots = [self.nodes[0]] + [node for node in self.nodes[1:] if draw.random() < 0.06]
        self.parents: list[list[int]] = []
        for place in range(count):
            # Mostly from nearby, so that graphs are deep and have narrow places.
            above = range(max(0, place - draw.choice([1, 1, 2, 3, count])), place)
            self.parents.append([draw.choice(above) for _ in range(draw.choice([1, 1, 1, 2, 3]))] if above else [])
            for parent in self.parents[place]:
                self.nodes[parent].next_functions.append((self.nodes[place], 0))
        single = [n for n in self.nodes if len(n.next_functions) == 1 and len(n._input_metadata) == 1]
        self.norms = [node for node in single if draw.random() < 0.3]
        layers = [n for n in self.nodes if n not in self.norms and len(n._input_metadata) == 1]
        self.targets = draw.sample(layers, min(len(layers), draw.randint(1, 4)))


def gradient_graph(source: RandomGraph) -> tuple[fx.Graph, dict[AbstractNode, fx.Node]]:
    """The same backward as the passes see it: a node for every gradient; BatchNorm's backward stands between two."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(SAMPLES, 3)
    gradients: dict[AbstractNode, fx.Node] = {}

    def call(target, args, value):
        node = graph.call_function(target, args)
        node.meta |= {"val": value, "partitioner_tag": "is_backward"}
        return node

    for node, parents in zip(source.nodes, source.parents, strict=True):
        zeros = [torch.zeros(data.shape) for data in node._input_metadata]
        value = zeros[0] if len(zeros) == 1 else tuple(zeros)
        inputs = []
        if node in source.roots:
            inputs.append(graph.placeholder(f"tangents_{len(gradients)}"))
            inputs[0].meta |= {"val": value, "partitioner_tag": "is_backward"}
        for parent in (source.nodes[place] for place in parents):
            gradient = gradients[parent]
            if parent in source.norms:
                args = (gradient, x, None, None, None, None, None, True, 1e-5, [True, False, False])
                gradient = call(operator.getitem, (call(BATCH_NORM_BACKWARD, args, (value,)), 0), value)
            inputs.append(gradient)
        gradients[node] = call(max, tuple(inputs), value)
    return graph, gradients


@pytest.mark.parametrize("cut", ["layer", "batch_norm"])
def test_both_find_the_same_place_in_random_graphs(cut):
    moved = found = 0
    for seed in range(GRAPHS):
        source = RandomGraph(seed)
        flow = AutogradFlow(source.roots, source.norms, SAMPLES)
        place = flow.common(source.targets)
        if cut == "batch_norm" and place is not None:
            above = flow.above_batch_norm(place)
            moved += above is not place
            place = above
        graph, gradients = gradient_graph(source)
        names = {node: name for name, node in enumerate(gradients)}
        sites = [
            SimpleNamespace(
                index=names[node],
                name=str(names[node]),
                grad_output=gradients[node],
                packed=node in source.targets,
                trained=True,
                rows_are_tokens=False,
            )
            for node in source.nodes
            if node not in source.norms
        ]
        if any(site.packed and site.grad_output.meta["val"].shape[0] != SAMPLES for site in sites):
            continue  # layers with different numbers of rows choose their own
        choice = rows._choose_rows(graph, sites, cut)
        if place is None:
            assert len(choice.cuts) == 0 or all(node.op == "placeholder" for node in choice.cuts), seed
        elif not flow.has_sample_rows(place):
            assert choice.cuts == (), seed
        else:
            found += 1
            assert choice.cuts == (gradients[place],), seed
            below = flow.reached_only_through([place])
            assert choice.below == {names[node] for node in below if node not in source.norms}, seed
            assert len(choice.norms) == len([n for n in below if n in source.norms and n.next_functions]), seed
    assert found > GRAPHS / 2
    assert moved > GRAPHS / 20 or cut == "layer"


class RandomNet(nn.Module):
    """Layers, BatchNorms, residual sums and one or two outputs, wired at random; all but the BatchNorms are packed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        kinds = [draw.choice(["layer", "layer", "norm", "relu", "sum", "sum"]) for _ in range(draw.randint(4, 9))]
        self.steps = [("layer", 0, 0)]
        self.steps += [(kind, draw.choice([i, i, max(0, i - 2)]), draw.randint(0, i)) for i, kind in enumerate(kinds)]
        read = {i for kind, first, second in self.steps[1:] for i in ((first, second) if kind == "sum" else (first,))}
        ends = [i for i in range(len(self.steps)) if i not in read]  # a layer that nothing reads is not captured
        self.heads = [ends] if draw.random() < 0.5 else [part for part in (ends[::2], ends[1::2]) if part]
        made = {"layer": lambda: nn.Linear(32, 32), "norm": lambda: nn.BatchNorm1d(32)}
        self.parts = nn.ModuleList(made.get(kind, nn.Identity)() for kind, _, _ in self.steps)

    def forward(self, x: torch.Tensor):
        values = []
        for (kind, first, second), part in zip(self.steps, self.parts, strict=True):
            h = values[first] if values else x
            values.append(h + values[second] if kind == "sum" else torch.relu(h) if kind == "relu" else part(h))
        return tuple(sum(values[end] for end in ends) for ends in self.heads)


@pytest.mark.parametrize("seed", range(NETS))
def test_both_find_the_same_layers_below_the_cut_of_random_nets(seed, monkeypatch):
    """The captured joint graph against autograd's own, which Dynamo and AOTAutograd have not touched."""
    steps = []
    make = eager_model.Step
    monkeypatch.setattr(eager_model, "Step", lambda *args: steps.append(make(*args)) or steps[-1])
    torch.manual_seed(seed)
    eager = fqt_compile.eager(RandomNet(seed), {"skip": (), "cut": ("batch_norm", "layer", "output")[seed % 3]})
    eager(torch.randn(8, 32))
    (step,) = steps
    below = {site.name: node in step.below for node, site, _ in step._layers}
    trained = {node for node, _, _ in step._layers}
    assert len(trained) == len(step._layers) == len(eager._fqt_plan)
    assert below == {site.name: site.below_cut for site in eager._fqt_plan}


def test_eager_shares_no_algorithm_with_the_passes():
    """It takes the decisions (which layers, which code) from a capture, and nothing from the passes themselves."""
    for path in Path(eager_model.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.ImportFrom) or "passes" not in (node.module or ""), path
