"""The fine-tuning job, with the compiler replaced by the model itself where it is not the point."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console
from support.finetuning import TINY, again, quiet, state_of, tiny
from torch import nn

from fqt_compile.config import FQTConfig
from fqt_compile.errors import ConfigError
from fqt_compile.finetune import DivergedError, FinetuneSettings, finetune, table
from fqt_compile.finetune import training as job
from fqt_compile.finetune.report import probe
from fqt_compile.models import make_model
from fqt_compile.results import measure_saved_bytes

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("uncompiled")


def test_all_methods_are_trained_and_reported(settings, uncompiled, capsys):
    report = finetune(again(settings, config=FQTConfig(bits=2)))
    assert [config and config.grad for config in uncompiled] == [None, "exact", "fqt"]
    assert uncompiled[2] == FQTConfig(bits=2)
    assert list(report["methods"]) == ["float32", "qat", "fqt"]
    figures = report["methods"]["fqt"]
    assert len(figures["accuracy_history"]) == len(figures["loss_history"]) == 4
    assert figures["steps_timed"] == 2 * (100 // 16) - job.WARM_STEPS
    assert figures["speedup"] == report["methods"]["float32"]["step_s"] / figures["step_s"]
    # The seam makes all methods the same computation, so equal seeds must give equal results.
    assert figures["loss_history"] == report["methods"]["float32"]["loss_history"]
    assert json.loads((settings.out / "results.json").read_text()) == json.loads(json.dumps(report))
    assert (settings.out / "results.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "stage fqt, epoch 2: loss" in output
    assert "\x1b" not in output  # no bars where there is no terminal


def test_table_shows_every_method_within_80_columns(settings):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(finetune(again(settings, methods=("qat", "fqt"), arch=TINY), quiet())))
    text = console.export_text()
    assert "QAT (packed forward)" in text
    assert "FQT (packed both ways)" in text
    assert "float32" not in text


def test_loss_falls(settings):
    report = finetune(again(settings, methods=("float32",), qat_lr=1e-2, head_lr=1e-2, limit=400), quiet())
    losses = report["methods"]["float32"]["loss_history"]
    assert losses[-1] < 0.8 * losses[0]


def test_training_is_the_same_with_and_without_recalibration(settings, tmp_path):
    settings = again(settings, methods=("float32",), limit=200, qat_epochs=0)
    off, few = again(settings, recalibrate=0, out=tmp_path / "off"), again(settings, recalibrate=2)
    without, report = finetune(off, quiet()), finetune(few, quiet())
    assert report["settings"]["recalibrate"] == 2
    assert report["methods"]["float32"]["loss_history"] == without["methods"]["float32"]["loss_history"]
    expected, got = state_of(off, "checkpoint.pt"), state_of(few, "checkpoint.pt")
    for key in ("model", "optimizer", "rng", "loader"):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["float32", "fqt"])
def test_the_saved_state_has_the_recalibrated_statistics_and_gives_the_accuracy(settings, method):
    settings = again(settings, methods=(method,), recalibrate=3)
    report = finetune(settings, quiet())
    data = job.load_data(settings.data, size=settings.size, limit=settings.limit, seed=settings.seed)
    trained, saved = tiny(10), tiny(10)
    trained.load_state_dict(state_of(settings, "checkpoint.pt")["model"])
    saved.load_state_dict(state_of(settings, f"{method}.pt")["model"])
    assert job.evaluate(saved, saved, data, settings.batch) == report["methods"][method]["accuracy"]
    assert saved[1].num_batches_tracked == 3
    assert trained[1].num_batches_tracked > 3
    batches = list(data.train_loader(settings.batch, torch.Generator().manual_seed(settings.seed)))
    convolved = torch.stack([trained[0](images).mean((0, 2, 3)) for images, _ in batches[:3]])
    torch.testing.assert_close(saved[1].running_mean, convolved.mean(0))


def test_statistics_are_put_back_after_an_error(settings):
    data = job.load_data(settings.data, size=settings.size, limit=settings.limit)
    model = tiny(10)
    before = copy.deepcopy(model.state_dict())
    with (
        contextlib.suppress(KeyboardInterrupt),
        job.recalibrated(model, model, data, batches=100, batch=16, seed=0),
    ):
        assert model[1].num_batches_tracked == 100 // 16  # an epoch has no more
        raise KeyboardInterrupt
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_diverging_loss_names_epoch_and_step(settings):
    with pytest.raises(DivergedError, match="stage float32-pretrained, epoch 1, step 2: the training loss is"):
        finetune(again(settings, qat_lr=1e30, head_lr=1e30, methods=("float32",)), quiet())


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet81", r"unknown torchvision classifier 'resnet81' \(did you mean 'resnet18'\?\)"),
        ("alexnet", r"does not accept images of 32 x 32 pixels .*--size"),
        ("no_such_module:net", "'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:net", "cannot be imported: FileNotFoundError"),
        (f"{TINY[:-4]}tinny", r"has no callable 'tinny' \(did you mean 'tiny'\?\)"),
        (f"{TINY[:-4]}not_a_model", "the factory returned str"),
        ("torch.nn:Linear", "building it failed: TypeError"),
    ],
)
def test_bad_architectures(arch, message):
    with pytest.raises(ConfigError, match=message):
        make_model(arch, classes=10, size=32)


@pytest.mark.parametrize("arch", ["resnet18", "fqt_compile.models:small_vgg", TINY])
def test_good_architectures(arch):
    model = make_model(arch, classes=7, size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert isinstance(model.get_submodule(job.head_name(model)), nn.Linear)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "setting 'batch': got 0; accepted: an integer >= 1"),
        ({"recalibrate": -1}, "setting 'recalibrate': got -1; accepted: an integer >= 0"),
        ({"epochs": 1.5}, "setting 'epochs': got 1.5; accepted: an integer >= 1"),
        ({"lr": math.nan}, "setting 'lr': got nan; accepted: a finite number >= 0"),
        ({"methods": ("float",)}, r"setting 'methods': got \('float',\); accepted: float32, qat, fqt"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneSettings(**changes)


def test_batch_larger_than_the_training_set(settings):
    with pytest.raises(ConfigError, match="setting 'batch': got 200; accepted: at most 100"):
        finetune(again(settings, batch=200), quiet())


def test_saved_bytes_are_those_of_activations():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.randn(16, 4)
    # Saved: the output of ReLU (16 x 8), float32, once for its two uses; the input exists anyway.
    assert measure_saved_bytes(model, model, images) == 4 * 16 * 8


def test_probe_leaves_no_trace():
    torch.manual_seed(0)
    model = tiny(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    measured = probe(model, model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert measured["saved_bytes"] > 0
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
