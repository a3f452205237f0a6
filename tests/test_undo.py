"""A pass that fails leaves the layer in float, or the region as it was, with the reason: a user's training goes on."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support import sample
from support.nets import SmallNet, small_batch, step_gradients
from torch import fx

import fqt_compile
from fqt_compile.errors import FQTWarning
from fqt_compile.passes import pipeline
from fqt_compile.passes.graph import Snapshot, describe
from fqt_compile.passes.pipeline import PIPELINE, STRICT_VARIABLE
from fqt_compile.passes.state import State


def failing(name: str, at: int | None):
    """`PIPELINE` with the pass ``name`` failing at its ``at``-th candidate, whatever it does there; None: at once."""

    def replaced(step):
        if step.name != name:
            return step

        def run(state: State) -> None:
            if at is None and (state.sites or step.name == "match"):
                raise KeyError("a fault of the pass")
            given, count = state.candidates, itertools.count()

            def candidates(found):
                for item in given(found):
                    yield item
                    if next(count) == at and not state.avoided.sites and not state.avoided.nodes:
                        raise KeyError("a fault of the pass")

            state.candidates = candidates
            try:
                step.run(state)
            finally:
                del state.candidates

        return dataclasses.replace(step, run=run)

    return tuple(map(replaced, PIPELINE))


@pytest.fixture
def trained(monkeypatch):
    """Trains a small net by a pipeline, not strictly; the result, the warnings, the layers."""

    def train(steps, **options):
        monkeypatch.setenv(STRICT_VARIABLE, "0")
        monkeypatch.setattr(pipeline, "PIPELINE", steps)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, (x, y) = SmallNet(norm=True), small_batch()
        compiled = torch.compile(model, backend="fqt1bit", options={"lowering": "eager", "report": False, **options})
        with pytest.warns(FQTWarning) as said:
            loss, gradients = step_gradients(compiled, x, y)
        return loss, gradients, [str(w.message) for w in said], fqt_compile.status(compiled)

    return train


@pytest.mark.parametrize("name", sample.some("undo layer", ["forward", "backward", "activation"]))
def test_the_layer_at_which_a_pass_fails_stays_in_float(trained, name):
    _, gradients, said, status = trained(failing(name, 1))
    assert len([reason for reason in status.float.values() if "please report" in reason]) == 1
    assert any("please report (KeyError" in message and name in message for message in said)
    assert len(status.packed) >= 1
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    "name",
    sample.some("undo region", ["fuse", "compact", "gradients", "moments", "fuse_gradients", "share", "narrow"]),
)
def test_the_region_at_which_an_optimization_fails_stays_as_it_was(trained, name):
    expected = trained_as_is()
    loss, gradients, said, _ = trained(failing(name, 30))
    assert any("please report (KeyError" in message for message in said)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for key, gradient in expected[1].items():
        assert (gradients[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, key


@pytest.mark.parametrize("name", sample.some("undo", [step.name for step in PIPELINE]))
def test_no_pass_that_fails_stops_a_training(trained, name):
    _, gradients, said, _ = trained(failing(name, None))
    assert any("please report (KeyError" in message for message in said)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def trained_as_is():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (x, y) = SmallNet(norm=True), small_batch()
    return step_gradients(torch.compile(model, backend="fqt1bit", options={"lowering": "eager"}), x, y)


def test_strict_raises(monkeypatch):
    monkeypatch.setattr(pipeline, "PIPELINE", failing("fuse", None))
    with pytest.raises(Exception, match="a fault of the pass"):
        trained_as_is()


def test_a_snapshot_restores_a_graph():
    def function(x):
        return torch.relu(x + 1).sum()

    graph = fx.symbolic_trace(function).graph
    text, snapshot = describe(graph), Snapshot(graph)
    (relu,) = (n for n in graph.nodes if n.name == "relu")
    relu.replace_all_uses_with(relu.args[0])
    graph.eliminate_dead_code()
    assert describe(graph) != text
    snapshot.restore(graph)
    assert describe(graph) == text
    graph.lint()
