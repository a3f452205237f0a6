"""``torch.compile(backend="fqt1bit")`` with native kernels: equality with the oracle, training, modes, bad input."""

from __future__ import annotations

import collections
import os
import subprocess

import pytest
import torch
import torchvision
from support import processes, sample
from support.nets import SmallNet, compiled, small_batch, step_gradients
from support.steps import interpreted
from torch import nn
from torchvision.models.resnet import BasicBlock

import fqt_compile
from fqt_compile import FQTConfig, compare, fqt1bit
from fqt_compile.backend import FQTPass
from fqt_compile.errors import ConfigError, FQTWarning, NonFiniteError
from fqt_compile.passes.names import Names
from fqt_compile.results import measure_saved_bytes


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    return processes.run(["-c", code], env)


@pytest.mark.rotates(2)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"grad": "exact"}, {"grad": "psq"}], ids=str)
def test_native_equals_the_oracle(options):
    """Same rewritten graph, once through Inductor and C++, once interpreted with the reference."""
    model, (x, y) = SmallNet(norm=True), small_batch()
    native = step_gradients(compiled(model, **options), x, y)
    torch._dynamo.reset()
    oracle = step_gradients(compiled(model, **options, lowering="eager"), x, y)
    assert native[0] == pytest.approx(oracle[0], rel=1e-6)
    zero = 1e-6 * max(gradient.abs().max() for gradient in oracle[1].values())
    for name, gradient in oracle[1].items():
        # A bias in front of a BatchNorm has the gradient 0, up to rounding.
        assert (native[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + zero, name


def resnet() -> nn.Module:
    """ResNet-18, or with one block instead of two in each of its stages."""
    return torchvision.models.ResNet(BasicBlock, [2 if sample.everything() else 1] * 4, num_classes=10)


def vgg() -> nn.Module:
    """torchvision's features; its own classifier of 120 million weights takes the reference minutes."""
    widths = [64, "M", 128, "M"]  # the first layers of vgg11_bn
    layers = torchvision.models.vgg.make_layers(widths, batch_norm=True)
    model = torchvision.models.vgg16_bn(num_classes=10) if sample.everything() else torchvision.models.VGG(layers)
    channels = 512 if sample.everything() else 128
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(channels, 64), nn.Linear(64, 10))
    return model


MODELS = {
    "resnet": (resnet, (4, 3, 32, 32)),
    "vgg": (vgg, (2, 3, 32, 32)),
    "vit": (
        lambda: torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10
        ),
        (4, 3, 32, 32),
    ),
    "mlp": (lambda: torchvision.ops.MLP(64, [128, 64, 64, 10]), (8, 64)),
}


@pytest.mark.rotates(8)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", list(MODELS))
def test_whole_models_against_reference_eager_and_float(name):
    build, shape = MODELS[name]
    model = build()
    for module in model.modules():  # no normalized output sits exactly on the ReLU's corner
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
    result = compare(model, torch.randn(shape), seeds=8 if name == "mlp" else 0)
    assert result.native_equals_reference, str(result)
    assert result.losses["compiled"] == pytest.approx(result.losses["eager"], rel=1e-4)
    # Rounding upstream can move a code by one step; a wrong kernel or gradient is off by its whole size.
    assert result.largest_eager_difference < 0.1, str(result)
    for site in result.sites:
        assert site.float_cosine["output"] > 0.2, str(result)


def test_a_training_run_learns():
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 10
    model = SmallNet(norm=True)
    step = interpreted(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.rotates(3)
def test_the_profile_shows_packed_operations():
    layers = [layer for i in (32, 64, 64) for layer in (nn.Linear(i, 64), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(4, 32)
    step = compiled(model)
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(x).square().mean().backward()
    count = collections.Counter()
    for event in profiler.key_averages():  # one for those launched and one for those that went through the dispatcher
        count[event.key] += event.count
    assert count["fqt::grad_weight"] == count["fqt::grad_input_product"] == 2
    assert count["fqt::output_product"] >= 2  # again in the backward where values are computed again


@pytest.mark.rotates(3)
def test_accumulation_and_retained_graphs():
    model, (x, y) = SmallNet(), small_batch()
    step = compiled(model)
    loss = nn.functional.cross_entropy(step(x), y)
    loss.backward(retain_graph=True)
    once = model.conv1.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.conv1.weight.grad, 2 * once)  # the seed belongs to the forward


def test_seed_comes_from_torch_manual_seed():
    model, (x, y) = SmallNet(), small_batch()
    step = compiled(model)
    first, again, other = (step_gradients(step, x, y, seed)[1]["conv1.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_is_saved_are_packed_bits():
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())])
    x = torch.relu(torch.randn(8, 64, 16, 16))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        compiled(model, skip=[])(x)
    parameters = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    kept = [t for t in saved if t.data_ptr() not in parameters]
    floats = sum(t.numel() * t.element_size() for t in kept if t.is_floating_point() and t.dim() == 4)
    bits = sum(t.numel() * 8 for t in kept if t.dtype == torch.int64)
    assert floats == 0
    assert 0 < bits < 4 * x.numel()  # four layers, two bits a value and the weights, against 4 bytes a value


@pytest.mark.rotates(3)
def test_saved_outputs_change_what_is_saved_and_nothing_else():
    model, (x, y) = SmallNet(norm=True), small_batch()
    for keep, saves_more in ((1.0, True), (0.25, False)):
        found = {}
        for save_outputs in (False, True):
            step = interpreted(model, keep=keep, save_outputs=save_outputs)  # saved is what the partitioner says
            torch.manual_seed(3)
            found[save_outputs] = (*step_gradients(step, x, y), measure_saved_bytes(step, model, x))
        (loss, gradients, small), (other_loss, other, large) = found[False], found[True]
        assert loss == other_loss
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=0, msg=name)
        assert (large > small) == saves_more, (keep, small, large)


def test_eval_and_no_grad_run_packed_and_equal_the_oracle():
    model, (x, _) = SmallNet(norm=True).eval(), small_batch()
    with torch.no_grad():
        output = compiled(model)(x)
        torch._dynamo.reset()
        assert torch.allclose(output, compiled(model, lowering="eager")(x), atol=1e-5)
    float_output = model(x)
    assert not torch.allclose(output, float_output, atol=1e-2)  # it really is binarized


def test_nan_in_an_activation_is_announced_and_can_raise():
    """Bits cannot carry a NaN: a warning says so, and check_finite=True raises with the layer's name."""
    model, (x, _) = SmallNet(), small_batch()
    x[0] = float("nan")
    with pytest.warns(FQTWarning, match="NaN or infinite values reached a packed layer"):
        interpreted(model)(x)
    with pytest.raises(NonFiniteError, match=r"conv1 \(input\)"):
        compiled(model, check_finite=True)(x)  # Inductor must not take out what nobody reads


def test_nan_in_a_gradient_reaches_the_parameters():
    """It is kept before all other rows, and everything dequantized from its group is NaN."""
    model, (x, _) = SmallNet(), small_batch()
    output = compiled(model)(x)
    g = torch.ones_like(output)
    g[3] = float("nan")
    output.backward(g)
    assert bool(model.fc1.weight.grad.isnan().any())
    assert bool(model.stem.weight.grad.isnan().any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitz": 4}, "unknown option 'bitz' .did you mean 'bits'"),
        ({"bits": 9}, "option 'bits': got 9; accepted: an integer from 1 to 8"),
        ({"bits": True}, "option 'bits': got True"),
        ({"keep": 0}, r"option 'keep': got 0; accepted: a number in \(0, 1\]"),
        ({"scope": "stepp"}, "option 'scope': got 'stepp'; accepted: 'step', 'layer' .did you mean 'step'"),
        ({"skip": "first"}, "option 'skip': got 'first'; accepted: a list"),
        ({"preset": "papers"}, "did you mean 'paper'"),
        ({"lowering": None}, "option 'lowering': got None; accepted: 'native', 'eager'"),
        ({"min_channels": 0}, "option 'min_channels': got 0"),
        ({"check_finite": 1}, "option 'check_finite': got 1; accepted: True or False"),
    ],
)
def test_wrong_options_name_field_value_and_accepted_ones(options, message):
    with pytest.raises(ConfigError, match=message):
        FQTConfig.from_options(options)
    with pytest.raises(Exception, match=message):
        compiled(nn.Linear(64, 64), **options)(torch.randn(2, 64))


def test_wrong_mode_and_options_type():
    with pytest.raises(Exception, match="mode: got 'max-autotune'; accepted"):
        fqt1bit(torch.fx.GraphModule({}, torch.fx.Graph()), [], mode="max-autotune")
    with pytest.raises(ConfigError, match="options: got list"):
        FQTConfig.from_options([1])  # type: ignore[arg-type]


@pytest.mark.rotates(3)
def test_without_a_compiler_one_sentence_says_what_to_do(tmp_path):
    code = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
x = torch.randn(4, 64)
torch.compile(model, backend="fqt1bit", options={"skip": [], "lowering": "eager"})(x).sum().backward()
print("oracle ran")
import fqt_compile
fqt_compile.eager(model, {"skip": []})(x).sum().backward()
print("eager ran")
torch._dynamo.reset()
torch.compile(model, backend="fqt1bit", options={"skip": []})(x)
"""
    done = run_python(code, PATH=str(tmp_path), CXX=None, FQT_COMPILE_CACHE=str(tmp_path / "cache"))
    assert done.stdout.split("\n")[:2] == ["oracle ran", "eager ran"], done.stderr
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if "CompilerMissingError" in line]
    assert last
    assert "CXX" in done.stderr
    assert "lowering" in done.stderr


def test_uuid_covers_options_names_and_fuel(monkeypatch):
    config = FQTConfig()
    a, b = Names((("a.weight",),)), Names((("b.weight",),))
    base = FQTPass(config, a).uuid()
    assert FQTPass(config, a).uuid() == base
    assert FQTPass(config.replace(bits=2), a).uuid() != base
    assert FQTPass(config, b).uuid() != base
    monkeypatch.setenv("FQT_COMPILE_FUEL", "1")
    assert FQTPass(config, a).uuid() != base


def test_a_cached_compilation_says_again_what_runs_in_float():
    for _ in range(2):  # Inductor's cache skips the passes the second time
        torch._dynamo.reset()
        with pytest.warns(FQTWarning, match="all of it runs in float"):
            compiled(nn.Linear(5, 3), skip=[])(torch.randn(2, 5)).sum().backward()


@pytest.mark.rotates(3)
def test_the_second_compilation_comes_from_the_cache():
    """Everything in the key can be pickled; the same graph from the cache has the same results, bit for bit."""
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(4)
        found.append(step_gradients(compiled(SmallNet(norm=True)), *small_batch()))
    counts = torch._dynamo.utils.counters
    assert counts["inductor"]["fxgraph_cache_bypass"] == counts["inductor"]["fxgraph_cache_miss"] == 0
    assert counts["inductor"]["fxgraph_cache_hit"] == counts["aot_autograd"]["autograd_cache_hit"] * 2 == 2
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_graph_breaks_and_activation_checkpointing():
    class Broken(SmallNet):
        def forward(self, x):
            h = self.act(self.stem(x))
            torch._dynamo.graph_break()
            h = torch.utils.checkpoint.checkpoint(lambda t: self.act(self.conv1(t)), h, use_reentrant=False)
            return self.fc2(self.act(self.fc1(nn.functional.adaptive_avg_pool2d(self.conv2(h), 2).flatten(1))))

    x, y = small_batch()
    step = compiled(Broken(), skip=[], lowering="native" if sample.one_in(3, "graph breaks by Inductor") else "eager")
    loss, gradients = step_gradients(step, x, y)
    assert {"conv1", "conv2"} <= set(fqt_compile.status(step).packed)
    assert fqt_compile.status(step).float["stem"].startswith("narrow")
    assert loss > 0
    assert float(gradients["conv1.weight"].abs().sum()) > 0
