"""Exact statistics and fusion: what they do to graphs, and to no number."""

from __future__ import annotations

import re

import pytest
import torch
from support import sample
from support.graphs import BATCH, captured, captured_once, images, operations
from support.nets import PreActivation, SmallNet, compiled, small_batch, step_gradients
from support.steps import assert_same_step, interpreted
from torch import nn

from fqt_compile import explain
from fqt_compile.capture import CapturedGraph
from fqt_compile.errors import UnsupportedInputError
from fqt_compile.kernels import cpu, program
from fqt_compile.models import small_vgg


def test_vgg_has_no_float_activation_between_packed_layers():
    graph = captured_once("vgg")
    lines = graph.stages["layout"].splitlines()
    forward = lines[: next(i for i, line in enumerate(lines) if "tangents_1" in line and "mm" in line)]
    floats = [line for line in forward if re.match(rf"\w+: float32\[{BATCH}, \d+, \d+, \d+\] =", line)]
    assert [line.split(" = ")[1].split(".")[1] for line in floats[:1]] == ["convolution"]  # the float stem
    behind_the_last = [line for line in floats[1:] if "128, 8, 8" not in line and "128, 1, 1" not in line]
    assert behind_the_last == []
    after = operations(graph.stages["layout"])
    assert after["fqt.fused_activation"] == 4
    assert after["fqt.channel_moments"] == 4 + 4  # and those of the kept rows
    assert after["fqt.grad_weight"] == 4
    assert after["fqt.activation_threshold"] == after["fqt.weight_gradient"] == 0


@pytest.mark.rotates(4)
@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"scope": "layer"}], ids=str)
def test_programs_fold_batch_norm_and_pool(options):
    graph = captured_once("vgg", **options)
    fused = [f for f in graph.fused if f.template == "fused_activation"]
    assert [f.site for f in fused] == ["4", "7", "11", "14"]
    folded = "full,channel,channel|t0=mul(x0,x1)|t1=add(t0,x2)|t2=relu(t1)"
    assert [f.text for f in fused] == [f"{folded}|t3=pool(t2)", folded, f"{folded}|t3=pool(t2)", folded]
    assert fused[0].dtypes[0] == torch.float32  # the stem
    assert [f.dtypes[0] for f in fused[1:]] == [torch.int16] * 3


def test_the_backward_is_fused_with_and_without_compaction():
    # With pruning, the stem's statistics are taken once more, of the kept rows.
    for options, quantizers, statistics in (({}, 8, 2), ({"keep": 1}, 8, 1)):
        graph = captured_once("vgg", **options)
        after = operations(graph.stages["layout"])
        assert after["fqt.max_pool_gradient"] == 2
        assert after["fqt.gradient_moments"] == 5
        assert after["fqt.float_moments"] == statistics  # of the stem
        assert after["aten.scatter_add"] == after["aten.var_mean.correction"] == 0
        lines = graph.stages["layout"].splitlines()
        assert not [line for line in lines if re.match(r"\w+: \w+\[\d+, \d+, \d+, \d+\] = aten.where", line)]
        measured = [line for line in lines if "fqt.quantize_" in line and line.count("getitem") >= 3]
        assert len([line for line in measured if re.search(r"(True|False), getitem_\d+\)", line)]) == quantizers


def programs_of(graph: CapturedGraph, template: str) -> list[str]:
    return [f.text for f in graph.fused if f.template == template]


def test_what_sums_pools_and_pointwise_operators_read_is_not_written():
    # With pruning, one more value is written: the gradient that rows are chosen by.
    for options, written in (({}, 6), ({"keep": 1}, 5)):
        graph = captured_once("vgg", **options)
        after = operations(graph.stages["layout"])
        assert after["fqt.dequantize_grad_input"] == 2  # a max-pool's gradient reads it several times
        assert after["fqt.fused_gradient"] == written  # of BatchNorm: the input of every convolution's gradient
        sums, pools = programs_of(graph, "gradient_moments"), programs_of(graph, "max_pool_gradient")
        assert sorted("map" in text for text in sums) == [False, False, False, True, True]
        assert pools == ["full,channel,channel|t0=mul(x0,x1)|t1=add(t0,x2)|t2=relu(t1)"] * 2


@pytest.mark.rotates(3)
def test_values_of_windows_that_overlap_and_of_several_tensors_are_written():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (
                nn.Conv2d(3, 32, 3),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.Conv2d(32, 32, 3, padding=1),
            )
            self.norm, self.last = nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3)
            self.fc = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.max_pool2d(torch.relu(self.norm(self.a(torch.relu(self.stem(x))))), 3, 2, 1)
            return self.fc(torch.relu(self.last(x + self.b(x))).mean((2, 3)))

    graph = captured(Net(), images(16))
    assert programs_of(graph, "max_pool_gradient") == ["full"]
    assert_same_step(Net(), *small_batch())
    torch.manual_seed(3)
    graph = captured_once("skips")
    assert programs_of(graph, "gradient_moments") == ["full,full"] * 2  # two gradients meet behind both additions


@pytest.mark.rotates(3)
@pytest.mark.filterwarnings("ignore:fqt1bit. activation='sign' tells nothing")
def test_a_relu_inside_the_mask_of_its_packing_is_masked_once():
    packed, relus = 4, 5
    for x in (images(), images().contiguous(memory_format=torch.channels_last)):
        graph = captured(small_vgg(10), x)
        before, after = operations(graph.stages["share"]), operations(graph.stages["gradients"])
        assert before["aten.le.Scalar"] == relus
        assert after["aten.le.Scalar"] == relus - packed  # the last one is no packed layer's input
        lines = graph.stages["layout"].splitlines()
        assert not [line for line in lines if "aten.clone" in line and re.search(r"\[\d+, \d+, [^1]", line)]
    graph = captured_once("vgg", activation="sign")
    assert operations(graph.stages["gradients"])["aten.le.Scalar"] == relus  # |x| <= 1 holds for zeros, too


class Truncated(nn.Module):
    """Statistics of a truncated convolution are not those of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x * 4).to(torch.int32).float()
        return self.fc(torch.relu(self.conv(torch.relu(self.norm(y)))).mean((2, 3)))


def test_casts_that_change_values_are_seen():
    torch.manual_seed(3)
    assert_same_step(Truncated(), *small_batch(), tolerance=2e-3)


def test_masks_behind_junctions_are_saved_as_bits():
    for options in ({}, {"keep": 1}):
        graph = captured_once("skips", **options)
        after = operations(graph.stages["gradients"])
        assert after["fqt.pack_bool"] == after["fqt.unpack_bool"] > 0
        fused = operations(graph.stages["layout"])
        assert fused["fqt.pack_bool"] == fused["fqt.unpack_bool"] == 0  # made with the activation, read in programs
        assert any("bits" in f.text for f in graph.fused)


ACTIVATIONS = [(nn.ReLU, "relu"), (nn.PReLU, "where"), (nn.Hardtanh, "minimum"), (nn.ReLU6, "minimum")]


@pytest.mark.rotates(6)
@pytest.mark.parametrize(("activation", "text"), ACTIVATIONS)
def test_other_activations_are_fused_and_equal_eager(activation, text):
    torch.manual_seed(3)  # with some seeds rounding moves one code by a step
    model, (x, y) = SmallNet(norm=True, activation=activation), small_batch()
    assert any(text in f.text for f in captured(model, x).fused)
    assert_same_step(model, x, y, tolerance=2e-3)


def test_an_activation_that_others_read_is_written_once():
    graph = captured_once("skips")
    values = [line for line in graph.stages["layout"].splitlines() if "fqt.fused_activation" in line]
    assert any(", True, " in line or ", True)" in line for line in values)  # the residual reads it


def test_what_programs_cannot_say_stays_outside():
    graph = captured(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(4, 64), skip=[])
    assert [f.template for f in graph.fused] == ["fused_gradient"]  # the derivative of tanh is pointwise arithmetic
    assert operations(graph.stages["layout"])["fqt.pack_activation"] == 2


class Between(nn.Module):
    """``function(network, x)`` between two packed convolutions; bias-free, with BatchNorms to use."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.c1, self.c2, self.c3 = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3))
        self.b1, self.b2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.last = nn.Linear(32, 10)
        self.columns = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.function(self, torch.relu(self.stem(x)))
        return self.last(torch.relu(self.c3(x)).mean((2, 3)))


REVIEWED = [
    (lambda m, x: torch.relu(m.b1(m.c1(x))) - 0.1, 8),  # numbers fold into numbers, not vectors
    (lambda m, x: torch.relu(m.b1(m.c1(x)) * 2 * 3 - 0.5 + 0.25), 8),
    (lambda m, x: torch.relu(m.b1(m.c1(x) + m.columns)), 32),  # as many columns as channels
    (lambda m, x: torch.relu(nn.functional.max_pool2d(m.b1(m.c1(x)) + m.b2(m.c2(x)), 2)), 8),
    (lambda m, x: torch.relu(m.b1(m.c1(x)).bool().float() * 0.3 - 0.1), 8),
    (lambda m, x: torch.clamp(m.b1(m.c1(x)), min=-0.5), 8),  # one bound only
    (lambda m, x: torch.clamp(m.b1(m.c1(x)), max=0.5), 8),
]


@pytest.mark.parametrize(("function", "width"), sample.some("reviewed", REVIEWED, 3))
def test_what_a_review_found_wrong_equals_eager(function, width):
    torch.manual_seed(3)
    x, y = torch.randn(BATCH, 3, 8, width), torch.arange(BATCH)
    assert_same_step(Between(function), x, y, tolerance=2e-3)


class Masked(nn.Module):
    """A mask that programs cannot read, and one of rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.register_buffer("mask", torch.arange(BATCH * 64).view(BATCH, 64) % 3 > 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x)) * self.mask
        h = torch.relu(self.second(h)) + h
        return self.third(torch.where(h.sum(1) > 0, h.t(), h.t() * 2).t())


def test_masks_from_outside_and_of_one_axis_equal_eager():
    torch.manual_seed(3)
    assert_same_step(Masked(), torch.randn(BATCH, 64), torch.arange(BATCH), skip=["last"])


def test_wrong_programs_are_refused():
    with pytest.raises(UnsupportedInputError, match=r"t0=tanh\(x0\).*accepted"):
        program.parse("full|t0=tanh(x0)")
    with pytest.raises(UnsupportedInputError, match=r"reads.*x7"):
        program.parse("full|t0=add(x0,x7)")
    x, vector = torch.randn(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(UnsupportedInputError, match="row operand; accepted: full, channel"):
        cpu.OPERATIONS["fused_activation"]([x, vector], "full,row|t0=mul(x0,x1)", "sign", [], False, False)
    with pytest.raises(UnsupportedInputError, match="got a row operand first; accepted: a full one"):
        cpu.OPERATIONS["gradient_moments"]([vector, x], "row,full|t0=mul(x0,x1)", None, None, torch.ones(3))
    with pytest.raises(UnsupportedInputError, match=r"map operand of shape \(2, 3, 4, 4\); accepted: \(1, 3, 4, 4\)"):
        cpu.OPERATIONS["fused_gradient"]([x, x], "full,map|t0=mul(x0,x1)", False)


def test_explain_says_what_was_optimized():
    report = explain(small_vgg(10), images())
    assert "values of the backward on the kept rows only" in str(report)
    assert "4 activations straight to bits, 10 gradients, 8 programs" in str(report)
    programs = [source for name, source in report.kernels.items() if name.startswith("fused_activation")]
    assert len(programs) == 3  # one of the two programs reads float and int16
    assert all("t2 = t1 <= 0 ? 0.0f : t1" in source for source in programs)


@pytest.mark.rotates(3)
def test_explain_says_what_was_not_optimized_and_why():
    """One line for a reason, with the layers that it holds for."""
    text = str(explain(PreActivation(), images(8)))
    moments = "normalizes what aten.add.Tensor makes: neither a packed layer nor a float convolution"
    assert f"not optimized by moments: norms.1, norms.2: {moments}" in " ".join(text.split())
    assert text.count("aten.add.Tensor makes") == 1
    report = explain(SmallNet(norm=True), images(8), config={"prune": "bernoulli"})
    assert "not optimized by compact: all layers: prune='bernoulli' keeps a random number of rows" in str(report)
    assert "not optimized by fuse: fc1: its input is made by aten.view, which no program says" in str(report)
    assert not [line for line in explain(small_vgg(10), images()).optimizations if line.startswith("not optimized")]


@pytest.mark.rotates(6)
@pytest.mark.parametrize("network", ["small_vgg", "SmallNet"])
def test_autocast_with_max_pooling_and_skips(network):
    model, x, y = (small_vgg(10) if network == "small_vgg" else SmallNet(norm=True)), *small_batch(BATCH, 16)
    if network == "SmallNet":
        x, y = small_batch(BATCH, 8)
    with torch.autocast("cpu", torch.bfloat16):
        native = compiled if sample.one_in(8, f"autocast by Inductor {network}") else interpreted
        loss, gradients = step_gradients(native(model), x, y)
        torch._dynamo.reset()
        oracle, _ = step_gradients(torch.compile(model, backend="fqt1bit", options={"lowering": "eager"}), x, y)
    assert loss == pytest.approx(oracle, rel=0.02)
    assert all(torch.isfinite(g).all() for g in gradients.values())
