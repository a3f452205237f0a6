"""Layers are named, and first and last, by the model that they are in, whatever part of it one graph is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fqt_compile
from fqt_compile import backend
from fqt_compile.errors import FQTWarning
from fqt_compile.interpret import ReferenceInterpreter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no convolution or linear layer of this graph is packed"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch's own, where graphs follow each other
]
EAGER = {"lowering": "eager", "report": False}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.f, self.g = nn.Embedding(128, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 128, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, i):
        return self.lm_head(self.g(self.f(self.emb(i)).relu()).relu())


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = self.body[0](x).relu()
        torch._dynamo.graph_break()
        return self.body[2](self.body[1](x).relu())


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.o = Broken(), nn.Linear(64, 10)

    def forward(self, x):
        return self.o(self.enc(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (self.weight.abs() > 0.01), self.bias)


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), *[Block() for _ in range(2)], nn.Linear(64, 10))


def decisions(model: nn.Module, x: torch.Tensor, **options) -> dict[str, bool]:
    return {site.name: site.decision == "packed" for site in fqt_compile.explain(model, x, config=options).sites}


def test_a_tied_layer_has_its_own_name_and_is_skipped_by_each():
    x = torch.randint(0, 128, (4, 8))
    assert decisions(Tied(), x) == {"f": False, "g": True, "lm_head": False}
    assert decisions(Tied(), x, skip=["lm_head"]) == {"f": True, "g": True, "lm_head": False}
    assert decisions(Tied(), x, skip=["emb"]) == {"f": True, "g": True, "lm_head": False}


def test_paths_are_whole_behind_a_graph_break_and_first_and_last_are_the_models():
    expected = {"enc.body.0": False, "enc.body.1": True, "enc.body.2": True, "o": False}
    assert decisions(Outer(), torch.randn(16, 64)) == expected


@pytest.mark.parametrize("skip", ["enc.body.1", "body.1", "enc.*.1", "*.1"])
def test_a_pattern_names_a_layer_by_its_path_in_the_model_or_in_what_was_traced(skip):
    assert not decisions(Outer(), torch.randn(16, 64), skip=[skip])["enc.body.1"]


@pytest.mark.rotates(3)
def test_a_pattern_names_everything_inside_of_a_module():
    assert set(decisions(blocks(), torch.randn(8, 32), skip=["?"]).values()) == {False}
    assert decisions(blocks(), torch.randn(8, 32), skip=["1"])["2.up"]
    assert not decisions(blocks(), torch.randn(8, 32), skip=["1"])["1.up"]


def test_computed_weights_are_packed_under_the_name_of_their_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), weight_norm(nn.Linear(64, 64)), nn.ReLU(), Masked(64, 64))
    model.extend([nn.ReLU(), nn.Linear(64, 10)])
    x = torch.randn(16, 64)
    assert decisions(model, x) == {"0": False, "2": True, "4": True, "6": False}
    torch._dynamo.reset()
    gradients = []
    for step in (fqt_compile.eager(model), torch.compile(model, backend="fqt1bit", options=EAGER)):
        step(x)
        model.zero_grad()
        torch.manual_seed(3)
        step(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


def test_a_matrix_that_is_data_is_no_layer():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, adjacency):
            return self.b(torch.relu(self.a(x)).T @ adjacency)

    sites = fqt_compile.explain(Graph(), torch.randn(64, 64), torch.randn(64, 64)).sites
    assert [site.name for site in sites] == ["a", "b"]


def test_blocks_compiled_one_by_one_have_the_decisions_of_the_whole_model():
    whole, parts, x = blocks(), blocks(), torch.randn(8, 32)
    torch.compile(whole, backend="fqt1bit", options=EAGER)(x).sum().backward()
    for part in parts:
        part.compile(backend="fqt1bit", options=EAGER)
    parts(x).sum().backward()
    assert fqt_compile.status(parts).float.keys() == fqt_compile.status(whole).float.keys() == {"0", "3"}


def test_a_wrong_pattern_is_warned_of_once_for_a_model_of_several_graphs():
    step = torch.compile(Outer(), backend="fqt1bit", options={**EAGER, "skip": ["first", "last", "enc.bdoy.1"]})
    with pytest.warns(FQTWarning) as said:
        step(torch.randn(16, 64)).sum().backward()
    assert len([w for w in said if "enc.bdoy.1" in str(w.message)]) == 1


def equal_blocks(activation: type[nn.Module], **options: object) -> nn.Sequential:
    """Blocks of equal shape, each compiled by itself."""
    made = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), activation()) for _ in range(4)), nn.Linear(64, 10))
    for block in made:
        block.compile(backend="fqt1bit", options={"lowering": "eager", "report": False, **options})
    return made


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("skip", [("first", "last"), ("2.*", "4")], ids=str)
def test_blocks_of_equal_shape_share_a_graph_only_if_the_same_is_decided(skip, monkeypatch):
    """Dynamo would run the graph of the first block, whose layer stays in float, for all of them in evaluation."""
    ran: list[str] = []
    product = ReferenceInterpreter.operations["output_product"]
    counted = {"output_product": lambda *args, **kwargs: (ran.append("packed"), product(*args, **kwargs))[1]}
    monkeypatch.setattr(ReferenceInterpreter, "operations", {**ReferenceInterpreter.operations, **counted})
    model, x = equal_blocks(nn.ReLU, skip=skip), torch.randn(8, 64)
    with torch._dynamo.config.patch(recompile_limit=16):
        for mode in (True, False, True, False):
            ran.clear()
            with torch.set_grad_enabled(mode):
                output = model.train(mode)(x)
            assert len(ran) == 3
            if mode:
                output.sum().backward()
    assert len(fqt_compile.status(model).graphs) <= 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("activation", "code"), [(nn.ReLU, "threshold"), (nn.Tanh, "sign")])
def test_codes_of_blocks_by_what_comes_from_outside(activation, code, monkeypatch):
    codes: list[str | None] = []
    run_pipeline = backend.run_pipeline

    def noted(*args, **kwargs):
        state = run_pipeline(*args, **kwargs)
        codes.extend(site.activation for site in state.packed)
        return state

    monkeypatch.setattr(backend, "run_pipeline", noted)
    equal_blocks(activation)(torch.randn(8, 64)).sum().backward()
    assert codes == [code]
