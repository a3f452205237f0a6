"""`status`, the line at the first compilation, and what is said of layers that run in float behind the user's back."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import textwrap
import warnings

import pytest
import torch
from support import processes, sample
from support.nets import SmallNet, small_batch
from torch import nn

import fqt_compile
from fqt_compile.errors import FQTWarning
from fqt_compile.kernels.cpu import memory

EAGER = {"lowering": "eager", "report": False}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.lstm, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.LSTM(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.c(self.lstm(self.b(self.a(x).relu()))[0])


def test_status_tells_graphs_layers_and_reasons():
    model, (x, _) = SmallNet(norm=True), small_batch()
    assert fqt_compile.status(model).graphs == []
    step = torch.compile(model, backend="fqt1bit", options=EAGER)
    step(x).sum().backward()
    with torch.no_grad():
        step(x)
    found = fqt_compile.status(step)
    assert [graph.mode for graph in found.graphs] == ["training", "inference"]
    assert found.packed
    assert not set(found.packed) & set(found.float)
    assert "skip='first'" in next(iter(found.float.values()))
    assert found.not_captured == []
    assert "layers packed" in str(found)
    assert "rows: rows are chosen" in str(found)
    with pytest.raises(TypeError, match=r"accepted: a torch\.nn\.Module"):
        fqt_compile.status("model")


@pytest.mark.parametrize("report", [True, False])
def test_one_line_is_logged_at_the_first_compilation(report, monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("fqt_compile")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    step = torch.compile(SmallNet(), backend="fqt1bit", options={**EAGER, "report": report})
    step(small_batch()[0])
    with torch.no_grad():
        step(small_batch()[0])
    assert lines == ["fqt1bit: SmallNet: 3 of 6 layers packed, 3 float by choice"] * report


@pytest.mark.rotates(4)
def test_a_cached_compilation_has_the_same_status(tmp_path):
    """In the next process Inductor has the graphs in its cache, and no pass runs."""
    script = textwrap.dedent(
        """
        import torch, fqt_compile
        from torch import nn
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        step = torch.compile(model, backend="fqt1bit")
        step(torch.randn(16, 64)).sum().backward()
        print(fqt_compile.status(step))
        """
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [processes.run(["-c", script], environment) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert "1 of 3 layers packed, 2 float by choice" in runs[0].stdout
    assert "1 of 3 layers packed" in runs[1].stderr


def test_layers_in_no_graph_are_announced_after_the_first_step():
    class Printing(SmallNet):
        def forward(self, x):
            return self.extra(super().forward(x))

        @torch.compiler.disable
        def extra(self, x):
            return self.outside(x)

    model = Printing()
    model.outside = nn.Linear(10, 10)
    step, (x, _) = torch.compile(model, backend="fqt1bit", options=EAGER), small_batch()
    model.unused = nn.Linear(10, 10)
    step(x).sum().backward()
    loss = step(x).sum()
    with pytest.warns(FQTWarning, match="outside of Printing is in no captured graph") as said:
        loss.backward()
    assert len(said) == 1
    assert fqt_compile.status(step).not_captured == ["outside", "unused"]
    step(x).sum().backward()  # once is enough


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_block_that_is_used_twice_in_a_step_is_no_second_step():
    """It is called with the same parameters again before the later layers have run once: nothing is wrong yet."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.last(torch.relu(self.block(torch.relu(self.block(x)))))

    model = Twice()
    for layer in (model.block, model.last):
        layer.compile(backend="fqt1bit", options={**EAGER, "skip": ()})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FQTWarning)
        for _ in range(3):
            model(torch.randn(8, 64)).sum().backward()
    assert fqt_compile.status(model).not_captured == []


def test_a_model_of_which_nothing_is_captured_is_announced():
    step, x = torch.compile(Recurrent(), backend="fqt1bit", options=EAGER), torch.randn(4, 8, 32)
    with pytest.warns(FQTWarning, match="captured no graph of Recurrent"):
        step(x)
    assert fqt_compile.status(step).not_captured == ["a", "b", "lstm", "c"]
    step(x)


def test_evaluation_of_torchs_encoder_packs_what_training_packs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
            self.stem, self.encoder, self.head = nn.Linear(32, 64), nn.TransformerEncoder(layer, 1), nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.encoder(self.stem(x)).mean(1))

    step, x = torch.compile(Net().eval(), backend="fqt1bit", options=EAGER), torch.randn(8, 16, 32)
    with_gradients = step(x).detach()
    with torch.no_grad():
        assert (step(x) - with_gradients).abs().max() <= 1e-4 * with_gradients.abs().max()
    training, inference = fqt_compile.status(step).graphs
    assert [layer.packed for layer in training.layers] == [layer.packed for layer in inference.layers]


def test_the_recompile_limit_is_announced():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.phase = nn.Linear(64, 64), 0

        def forward(self, x):
            return self.layer(x) * (1 + self.phase)

    model = Phases()
    options = {**EAGER, "skip": []}
    step = torch.compile(model, backend="fqt1bit", dynamic=False, options=options)
    with torch._dynamo.config.patch(recompile_limit=2):
        step(torch.randn(8, 64))
        model.phase = 1
        with pytest.warns(FQTWarning, match="compiled 2 times, which is torch's limit"):
            step(torch.randn(8, 64))


def test_a_users_own_joint_pass_runs_too():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Mine(CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.nodes))

        def uuid(self):
            return "mine"

    step = torch.compile(SmallNet(), backend="fqt1bit", options=EAGER)
    with torch._inductor.config.patch(joint_custom_pre_pass=Mine()):
        step(small_batch()[0])
    assert seen
    assert fqt_compile.status(step).packed


def _answer(step, x, queue):
    with torch.no_grad():
        queue.put(float(step(x).sum()))


@pytest.mark.parametrize("setting", ["freezing", "cpp_wrapper"])
@pytest.mark.parametrize("lowering", sample.some("lowerings left off", ["native", "eager"]))
def test_settings_under_which_nothing_packed_compiles_are_left_off(setting, lowering):
    model, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), small_batch()
    options = {"skip": (), "report": False, "lowering": lowering}
    step = torch.compile(model, backend="fqt1bit", options=options)
    with torch.no_grad(), torch._inductor.config.patch({setting: True}):
        with pytest.warns(FQTWarning, match=f"{setting} is left off"):
            made = step(x)
        model[1].weight.neg_()
        assert not torch.equal(step(x), made)
    assert fqt_compile.status(step).packed == ["1", "3"]


def test_a_forked_child_answers():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    step, x = torch.compile(model, backend="fqt1bit", options={"report": False}), torch.randn(512, 64)
    with torch.no_grad():
        expected = float(step(x).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_answer, args=(step, x, queue))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert queue.get(timeout=5) == pytest.approx(expected, rel=1e-4)


def test_what_steps_do_not_need_is_given_back(monkeypatch):
    """Memory that the process has freed, beyond what the steps use."""
    trims, resident = [], [1000 << 20]
    excess = memory.Excess()
    monkeypatch.setattr(memory, "kept", True)
    monkeypatch.setattr(memory, "_resident", lambda: resident[0])
    monkeypatch.setattr(excess, "_trim", lambda: trims.append(excess.calls))
    excess.SECONDS = 0.0
    for _ in range(excess.FIRST):
        excess.give_back()
    assert trims == [excess.FIRST]
    excess.measured_at = excess.FIRST + excess.SETTLED
    for _ in range(5):
        excess.give_back()
    assert trims == [excess.FIRST]
    assert excess.needed == resident[0]
    resident[0] += excess.SLACK + 1
    excess.give_back()
    assert len(trims) == 2


def test_a_copy_of_a_compiled_model_starts_without_graphs():
    model, (x, _) = SmallNet(), small_batch()
    torch.compile(model, backend="fqt1bit", options=EAGER)(x)
    assert fqt_compile.status(copy.deepcopy(model)).graphs == []
