"""What a compiled step accepts: dynamic batches and sizes, memory formats, dtypes, autocast, batches of 1 and 0."""

from __future__ import annotations

import re

import pytest
import torch
from support import sample
from support.nets import SmallNet, compiled, small_batch, step_gradients
from support.steps import interpreted
from torch import nn
from torch._inductor.utils import run_and_get_code

from fqt_compile import eager
from fqt_compile.backend import layout_patches

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.rotates(6)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dynamic_batch_and_memory_formats(memory_format):
    model = SmallNet()
    step, oracle = compiled(model), eager(model)
    for batch in (8, 6, 11):  # the second is compiled for all sizes
        x, y = small_batch(batch)
        x = x.contiguous(memory_format=memory_format)
        native, expected = step_gradients(step, x, y), step_gradients(oracle, x, y)
        for name, gradient in expected[1].items():
            assert (native[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (batch, name)


@pytest.mark.rotates(6)
@pytest.mark.parametrize("scope", ["step", "layer"])
def test_fully_dynamic_shapes(scope):
    """By the reference; what Inductor makes of it: tests/test_launch.py."""
    model = SmallNet()
    step = torch.compile(model, backend="fqt1bit", options={"scope": scope, "lowering": "eager"}, dynamic=True)
    oracle = eager(model, {"scope": scope})
    for batch, size in ((4, 8), (6, 12)):
        x, y = small_batch(batch, size)
        native = step_gradients(step, x, y)
        expected = step_gradients(oracle, x, y)
        for name, gradient in expected[1].items():
            assert (native[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_batch_of_one():
    x, y = small_batch(1)
    loss, gradients = step_gradients(interpreted(SmallNet()), x, y)
    assert loss > 0
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_channels_last_weights_get_channels_last_gradients():
    model = SmallNet().to(memory_format=torch.channels_last)
    x, y = small_batch()
    step_gradients(compiled(model), x, y)
    nn.functional.cross_entropy(compiled(model)(x), y).backward()
    assert model.conv1.weight.grad.stride() == model.conv1.weight.stride()


@pytest.mark.rotates(3)
def test_packed_words_are_not_taken_for_images():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    )
    model = nn.Sequential(
        net, nn.Conv2d(32, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # the last one is left in float
    x = torch.randn(8, 3, 12, 12)
    expected = [(torch.channels_last, False)]
    if sample.one_in(4, "copied"):  # where it fails, Inductor has stopped doing so, and layout_patches is not needed
        expected.append((torch.contiguous_format, True))
    for memory_format, is_copied in expected:
        torch._dynamo.reset()
        images = x.contiguous(memory_format=memory_format)
        run = torch.compile(model.to(memory_format=memory_format), backend="fqt1bit")
        _, code = run_and_get_code(lambda run=run, images=images: run(images).sum().backward())
        assert any("fqt.output_product" in text for text in code)
        words = re.findall(r"empty_strided_cpu\(\(8, \d+, \d+, \d+\), .*, torch.int64", "".join(code))
        assert bool(words) == is_copied, memory_format


def test_the_layout_is_left_to_inductor_unless_all_convolutions_read_channels_last():
    found = []

    def backend(gm, example_inputs):
        found.append(layout_patches(gm))
        return gm

    class Contiguous(nn.Module):
        def forward(self, x):
            return x.contiguous()

    two, one = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(1, 4, 3))
    moved = nn.Sequential(nn.Conv2d(4, 4, 3), Contiguous(), nn.Conv2d(4, 4, 1))
    cases = [
        (two, torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last), {"layout_optimization": False}),
        (two, torch.randn(2, 4, 8, 8), {}),
        (one, torch.randn(2, 1, 8, 8), {}),  # both orders at once
        (moved, torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last), {}),
        (nn.Linear(4, 4), torch.randn(2, 4), {}),
    ]
    for model, x, expected in cases:
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(x)
        assert found.pop() == expected, (model, x.stride())


@pytest.mark.rotates(3)
@pytest.mark.parametrize("dtype", [*sample.some("half", [torch.bfloat16, torch.float16]), torch.float64])
def test_other_dtypes(dtype):
    """bfloat16 and float16 are computed; float64 runs in float, with a warning that says so."""
    model, (x, y) = SmallNet().to(dtype), small_batch()
    if dtype == torch.float64:
        with pytest.warns(UserWarning, match="torch.float64"):
            loss, gradients = step_gradients(compiled(model, lowering="eager"), x.to(dtype), y)
        expected = step_gradients(model, x.to(dtype), y)
        assert loss == pytest.approx(expected[0])
        return
    native = compiled if sample.one_in(3, f"{dtype} by Inductor") else interpreted
    loss, gradients = step_gradients(native(model), x.to(dtype), y)
    assert loss == pytest.approx(step_gradients(compiled(model, lowering="eager"), x.to(dtype), y)[0], rel=0.02)
    assert gradients["conv1.weight"].dtype == dtype


def test_autocast_packs_every_site():
    model, (x, y) = SmallNet(norm=True), small_batch()
    saved: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        step = interpreted(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            output = step(x)
    assert output.dtype == torch.bfloat16
    assert sum(t.dtype == torch.int64 and t.dim() > 1 for t in saved) >= 6  # bits and mask of three layers
    nn.functional.cross_entropy(output.float(), y).backward()
    assert model.conv1.weight.grad.dtype == torch.float32


@pytest.mark.rotates(3)
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_integer_and_complex_models_run_in_float_around_the_packed_layers():
    embedding = nn.Sequential(nn.Embedding(11, 64), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    output = compiled(embedding, skip=["last"])(torch.randint(0, 11, (4, 4)))
    output.sum().backward()
    assert embedding[2].weight.grad is not None
    spectral = compiled(nn.Linear(64, 64, dtype=torch.complex64), skip=[])
    with pytest.warns(UserWarning, match="torch.complex64"):
        output = spectral(torch.randn(2, 64, dtype=torch.complex64))
    assert output.dtype == torch.complex64


def test_empty_batch_runs_in_float():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    with pytest.warns(UserWarning, match="empty operand"):
        output = compiled(model, skip=[])(torch.randn(0, 64, 4, 4))
    assert output.shape == (0, 64, 4, 4)


@pytest.mark.rotates(6)
@pytest.mark.parametrize("lowering", ["native", "eager"])
def test_pooling_under_autocast(lowering):
    """The backward of pooling views a bfloat16 gradient as rows, which its NHWC replacement cannot be viewed as."""
    conv, pool, head = nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), pool, head)
    step = compiled(model, skip=[], lowering=lowering)
    with torch.autocast("cpu", torch.bfloat16):
        step(torch.randn(2, 32, 8, 8)).float().sum().backward()
    assert conv.weight.grad.isfinite().all()
    assert conv.weight.grad.abs().sum() > 0
