"""The passes: operations of the rewritten graph and decisions, on whole torchvision models and on corner cases."""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import warnings

import pytest
import torch
import torchvision
from support.graphs import operations, sites_of
from support.nets import SmallNet, small_batch, step_gradients
from torch import nn

from fqt_compile import FQTConfig, explain
from fqt_compile.backend import fqt1bit
from fqt_compile.capture import capture
from fqt_compile.errors import FQTWarning, PassError
from fqt_compile.passes import pipeline, schemes
from fqt_compile.passes.call import Call, takes
from fqt_compile.passes.rows import Dominators
from fqt_compile.passes.state import graph_pass


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10
    )


def mlp() -> nn.Module:
    return torchvision.ops.MLP(64, [128, 64, 64, 10])


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (4, 3, 64, 64), 21, 16, "threshold"),
    "vgg16_bn": (lambda: torchvision.models.vgg16_bn(num_classes=10), (2, 3, 32, 32), 16, 14, "threshold"),
    "vit": (vit, (4, 3, 32, 32), 10, 8, "sign"),
    "mlp": (mlp, (8, 64), 4, 2, "threshold"),
}
PER_PACKED_SITE = {
    "pack_activation": 1,
    "quantize_weight": 1,
    "output_product": 1,
    "quantize_rows": 1,
    "transpose_weight": 1,
    "grad_input_product": 1,
    "dequantize_grad_input": 1,
    "quantize_channels": 1,
    "grad_weight_product": 1,
    "dequantize_grad_weight": 1,
    "weight_gradient": 1,
}


@pytest.mark.rotates(8)
@pytest.mark.parametrize("name", list(MODELS))
def test_operations_of_whole_models(name):
    build, shape, sites, packed, code = MODELS[name]
    (graph,) = capture(build(), (torch.randn(shape),), {}, FQTConfig())
    chosen = [site for site in graph.sites if site.decision == "packed"]
    assert (len(graph.sites), len(chosen)) == (sites, packed)
    assert collections.Counter(site.activation for site in chosen)[code] >= packed - 2
    before, after = operations(graph.stages["captured"]), operations(graph.stages["share"])
    for operation, count in PER_PACKED_SITE.items():
        shared = operation == "pack_activation" and after[f"fqt.{operation}"] < packed
        assert after[f"fqt.{operation}"] == count * packed or shared, operation
    assert after["fqt.draw_seed"] == 1
    assert after["aten.convolution"] == before["aten.convolution"] - sum(s.kind == "conv2d" for s in chosen)
    linear = sum(s.kind == "linear" for s in chosen)
    products = before["aten.mm"] + before["aten.addmm"] - after["aten.mm"] - after["aten.addmm"]
    assert products == 3 * linear
    once = name != "vit"
    assert (after["fqt.prune_rows"], after["fqt.select"]) == ((1, 1) if once else (0, packed))


def test_first_last_and_downsampling_of_resnet18_stay_in_float_with_their_reasons():
    sites = sites_of(MODELS["resnet18"][0](), torch.randn(2, 3, 64, 64))
    floats = {site.name: site.reason for site in sites if site.decision == "float"}
    assert set(floats) == {"conv1", "fc", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    assert "first layer" in floats["conv1"]
    assert "last layer" in floats["fc"]
    assert "strided 1x1" in floats["layer2.0.downsample.0"]


def decisions(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32, **options):
    """Decision and reason of every layer, by name; nothing is skipped unless asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FQTWarning)
        sites = sites_of(model, torch.randn(*shape, dtype=dtype), **{"skip": (), **options})
    return {site.name: (site.decision, site.reason) for site in sites}


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(64, 64, 3, groups=64), (2, 64, 8, 8), "depthwise"),
        (nn.Conv2d(64, 64, 3, groups=2), (2, 64, 8, 8), "groups=2"),
        (nn.Conv2d(64, 64, 3, dilation=2), (2, 64, 8, 8), "dilation=[2, 2]"),
        (nn.ConvTranspose2d(64, 64, 3), (2, 64, 8, 8), "conv_transpose2d"),
        (nn.Conv3d(64, 64, 3), (2, 64, 8, 8, 8), "conv3d"),
        (nn.Conv2d(16, 64, 3), (2, 16, 8, 8), "narrow: 16 -> 64"),
        (nn.Linear(64, 64).double(), (2, 64), "torch.float64"),
        (nn.Conv2d(64, 64, 3), (64, 8, 8), None),
        (nn.Conv2d(64, 64, 3, padding=1), (0, 64, 8, 8), "empty operand"),
    ],
)
def test_refusals_name_their_reason(layer, shape, reason):
    dtype = next(layer.parameters()).dtype
    ((decision, got),) = decisions(layer, *shape, dtype=dtype).values()
    if reason is None:  # an unbatched image is traced as a batch of one
        assert decision == "packed"
    else:
        assert decision == "float"
        assert reason in got


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(64, 64, 3, stride=2), (2, 64, 9)),
        (nn.Conv2d(64, 64, 5, padding=4), (2, 64, 2, 2)),
        (nn.Conv2d(64, 64, 3, padding="same"), (1, 64, 4, 4)),
        (nn.Linear(64, 64, bias=False), (2, 3, 64)),
        (nn.Linear(64, 64), (2, 64)),
    ],
)
def test_supported_layers_are_packed(layer, shape):
    assert [decision for decision, _ in decisions(layer, *shape).values()] == ["packed"]


def test_skip_names_modules_and_patterns_and_warns_about_typing_errors():
    model = SmallNet()
    chosen = decisions(model, 2, 3, 8, 8, skip=("conv1", "fc*"))
    assert chosen["conv1"] == ("float", "named by skip='conv1'")
    assert chosen["fc1"] == ("float", "named by skip='fc*'")
    assert chosen["conv2"][0] == "packed"
    with pytest.warns(FQTWarning, match=r"names no layer"):
        sites_of(model, torch.randn(2, 3, 8, 8), skip=("convv1",))


def test_a_model_without_an_eligible_layer_warns():
    with pytest.warns(FQTWarning, match="no convolution or linear layer of this graph is packed.*first layer"):
        sites_of(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(2, 64))


class Activations(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(64, 64), function

    def forward(self, x):
        return self.layer(self.function(x))


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (torch.relu, "threshold"),
        (nn.functional.relu6, "threshold"),
        (torch.sigmoid, "threshold"),
        (lambda x: x.abs() + 1, "threshold"),
        (lambda x: torch.relu(x) * 2 + torch.sigmoid(x), "threshold"),
        (lambda x: nn.functional.dropout(torch.relu(x), 0.5), "threshold"),
        (lambda x: torch.cat([torch.relu(x[:, :32]), x[:, 32:] ** 2], 1), "threshold"),
        (lambda x: torch.softmax(x, 1), "threshold"),
        (torch.tanh, "sign"),
        (nn.functional.gelu, "sign"),
        (lambda x: torch.relu(x) - 1, "sign"),
        (lambda x: torch.cat([torch.relu(x[:, :32]), x[:, 32:]], 1), "sign"),
        (lambda x: -torch.relu(x), "sign"),
        (lambda x: x, "sign"),
    ],
)
def test_activation_codes_by_non_negativity(function, code):
    assert sites_of(Activations(function), torch.randn(4, 64), skip=())[0].activation == code


def test_the_sign_of_what_is_never_negative_is_announced():
    """Asked for, it is taken; but all bits are +1, and the layer sees nothing."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with pytest.warns(FQTWarning, match="never negative .a ReLU's.: all bits are [+]1 in 2; activation='auto'") as said:
        (graph,) = capture(model, (torch.randn(4, 64),), {}, FQTConfig(activation="sign", skip=()))
    assert len(said) == 1
    assert "input is non-negative (relu): all bits are +1" in graph.sites[1].activation_reason
    assert graph.sites[2].activation_reason == "asked for by activation='sign'"


def test_operands_are_packed_once():
    """Three projections of one input share its bits; a weight used twice shares its."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x) + self.q(torch.relu(x))

    graph = capture(Shared(), (torch.randn(4, 64),), {}, FQTConfig(skip=()))[0]
    after = operations(graph.stages["share"])
    assert [site.name for site in graph.sites] == ["q", "k", "v", "q#2"]
    assert after["fqt.pack_activation"] == 2
    assert after["fqt.quantize_weight"] == 3
    assert after["fqt.output_product"] == 4
    assert after["fqt.grad_weight_product"] == 4


def test_inference_graphs_are_rewritten_and_hold_nothing_for_a_backward(monkeypatch):
    texts = []
    monkeypatch.setattr("fqt_compile.backend.notices", lambda state: texts.append(pipeline.describe(state.graph)) or [])
    model, (x, _) = SmallNet().eval(), small_batch()
    with torch.no_grad():
        torch.compile(model, backend="fqt1bit", options={"lowering": "eager"})(x)
    after = operations(texts[-1])
    assert after["fqt.output_product"] == 3
    assert after["fqt.draw_seed"] == after["fqt.quantize_rows"] == 0


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({"grad": "exact"}, "apply_mask", "select"),
        ({"grad": "psq"}, "dequantize_rows", "quantize_channels"),
        ({"preset": "paper"}, "channel_importance", "prune_rows"),
        ({"keep": 1.0}, "quantize_rows", "prune_rows"),
        ({"check_finite": True}, "check_finite", None),
    ],
)
def test_operations_of_every_mode(options, present, absent):
    config = FQTConfig.from_options(options)
    after = operations(capture(SmallNet(), (small_batch()[0],), {}, config)[0].stages["share"])
    assert after[f"fqt.{present}"] > 0
    assert absent is None or after[f"fqt.{absent}"] == 0


def test_a_frozen_weight_has_no_weight_product_and_a_first_layer_no_input_product():
    model = SmallNet()
    model.conv1.weight.requires_grad_(False)
    after = operations(capture(model, (small_batch()[0],), {}, FQTConfig(skip=("last",)))[0].stages["share"])
    assert after["fqt.output_product"] == 4  # the stem is too narrow, the down-sampling layer is packed
    assert after["fqt.grad_weight_product"] == 3


def test_dominators_of_a_diamond_with_a_bypass():
    #   root -> a -> b -> d,  a -> c -> d,  d -> e ;  f hangs on a second root
    order = ["a", "b", "c", "d", "e", "f"]
    before = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["d"], "f": []}
    dominators = Dominators(order, before, ["a", "f"])
    assert dominators.common(["b", "c"]) == "a"
    assert dominators.common(["e"]) == "e"
    assert dominators.common(["e", "c"]) == "a"
    assert dominators.common(["e", "f"]) is None
    assert dominators.dominates("d", "e")
    assert not dominators.dominates("b", "d")


def test_two_heads_choose_rows_by_both_gradients():
    """Nothing else is common to all paths; where the outputs' rows are no samples, every layer chooses its own."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            h = torch.relu(self.body(x))
            return self.a(h), self.b(h)

    graph = capture(TwoHeads(), (torch.randn(8, 64),), {}, FQTConfig(skip=()))[0]
    assert "where the gradient enters: tangents_1, tangents_2" in graph.row_choice
    assert operations(graph.stages["share"])["fqt.select"] == 1
    assert operations(graph.stages["share"])["fqt.prune_rows"] == 2

    class Losses(TwoHeads):
        def forward(self, x):
            return tuple(h.square().mean() for h in TwoHeads.forward(self, x))

    graph = capture(Losses(), (torch.randn(8, 64),), {}, FQTConfig(skip=()))[0]
    assert "several separate paths" in graph.row_choice
    assert operations(graph.stages["share"])["fqt.select"] == 3


def test_a_broken_contract_names_the_pass(monkeypatch):
    broken = pipeline.Pass("decide", lambda state: None, ("sites",), "decisions", lambda state: "nothing was decided")
    monkeypatch.setattr(pipeline, "PIPELINE", (pipeline.PIPELINE[0], broken))
    with pytest.raises(Exception, match="pass 'decide' broke its contract: nothing was decided"):
        capture(SmallNet(), (small_batch()[0],), {}, FQTConfig())
    with pytest.raises(PassError, match="pass 'activation' needs"):
        pipeline._run((pipeline.PIPELINE[0], pipeline.ANALYSES[2]), pipeline.State(torch.fx.Graph(), FQTConfig()), None)


def test_a_pass_declares_itself():
    @graph_pass(requires=("graph",), ensures="counted", check=lambda state: None if state.fuel else "nothing counted")
    def count(state):
        state.fuel = len(state.graph.nodes)

    assert (count.name, count.requires, count.ensures) == ("count", ("graph",), "counted")
    with pytest.raises(PassError, match="pass 'count' broke its contract: nothing counted"):
        pipeline._run((count,), pipeline.State(torch.fx.Graph(), FQTConfig()), None)


def test_operands_by_name():
    graph = torch.fx.Graph()
    g, alpha, rows, seed, kept, extremes = map(graph.placeholder, ("g", "alpha", "rows", "seed", "kept", "extremes"))
    args = (g, alpha, rows, None, seed, 7, 4)
    node = graph.call_function(torch.ops.fqt.quantize_rows.default, args, {"grid": False})
    call = Call(node)
    assert (call.g, call["rows"], call.bits, call.compact, call.extremes, call.grid) == (g, rows, 4, False, None, False)
    assert call.changed(compact=True) == ((*args, True), {"grid": False})
    call.replace(g=kept, extremes=extremes)  # what is left out before it takes the schema's default
    assert (node.args, node.kwargs) == ((kept, *args[1:], False, extremes), {"grid": False})
    call.replace(grid=True)
    assert (node.args, node.kwargs) == ((kept, *args[1:], False, extremes, True), {})
    for misspelt in (lambda: call.row, lambda: call.replace(row=rows)):
        with pytest.raises(PassError, match=r"got operand 'row'; fqt.quantize_rows.default has g, .*grid"):
            misspelt()
    total = graph.call_function(torch.ops.aten.sum.dim_IntList, (g, [0]))
    Call(total).replace(dtype=torch.float64, self=kept)
    assert (total.args, total.kwargs) == ((kept, [0]), {"dtype": torch.float64})
    item = graph.call_function(operator.getitem, (node, 1))
    assert (Call(item).source, Call(item).index) == (node, 1)
    assert takes(node, "rows", "compact")
    assert not takes(total, "rows")
    assert not takes(g, "rows")


@pytest.mark.rotates(3)
def test_a_gradient_scheme_is_one_class_and_one_entry(monkeypatch):
    """The toy scheme scales exact gradients by a power of two and back: not a bit may differ from them."""

    class Scaled(schemes.Exact):
        def grad_hat(self):
            double = self.layer.at.call("toy", torch.ops.aten.mul.Tensor, super().grad_hat(), 2.0)
            return self.layer.at.call("toy", torch.ops.aten.mul.Tensor, double, 0.5)

    monkeypatch.setitem(schemes.SCHEMES, "toy", Scaled)
    exact = FQTConfig(grad="exact", lowering="eager")
    toy = exact.replace()
    object.__setattr__(toy, "grad", "toy")  # past the validation of options
    model, batch = SmallNet(norm=True), small_batch()
    steps = []
    for config in (exact, toy):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=functools.partial(fqt1bit, options=config))
        steps.append(step_gradients(compiled, *batch))
    assert steps[0][0] == steps[1][0]
    for name, gradient in steps[0][1].items():
        assert torch.equal(gradient, steps[1][1][name]), name
    text = capture(model, (batch[0],), {}, toy)[0].stages["backward"]
    assert text.count(" toy") == 2 * 3


def test_fuel_bisects(monkeypatch):
    monkeypatch.setenv(pipeline.FUEL_VARIABLE, "1")
    chosen = decisions(SmallNet(), 2, 3, 8, 8, skip=("first", "last"))
    assert [name for name, (decision, _) in chosen.items() if decision == "packed"] == ["conv1"]
    assert "fuel used up" in chosen["conv2"][1]
    monkeypatch.setenv(pipeline.FUEL_VARIABLE, "many")
    with pytest.raises(PassError, match="FQT_COMPILE_FUEL: got 'many'"):
        pipeline.fuel_from_environment()


@pytest.mark.rotates(3)
def test_report(tmp_path, monkeypatch):
    model = SmallNet()
    model.spare = nn.Linear(64, 64)
    report = explain(model, small_batch()[0])
    assert report.unseen == ["spare"]
    assert "module without a call: spare" in str(report)
    assert [site.name for site in report.packed] == ["conv1", "conv2", "fc1"]
    assert list(report.stages) == ["captured", *(step.name for step in pipeline.PIPELINE)]
    assert 0 < report.saved_bytes["packed"] < report.saved_bytes["float32"]
    assert "strided 1x1 convolution" in str(report)
    shown = {name: report.kernels[name] for name in ("select",)}  # colouring all of them takes longest
    monkeypatch.setattr(type(report), "kernels", shown)
    report.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<html>" in page
    assert "output_product" in page
    assert "kernel: select" in page
    assert page.count("(unchanged)") == sum(a == b for a, b in itertools.pairwise(report.stages.values())) > 3
