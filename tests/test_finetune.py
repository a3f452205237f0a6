"""The fine-tuning job, with the compiler replaced by the model itself where it is not the point."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import math
import os
import urllib.error

import pytest
import torch
from rich.console import Console
from torch import nn

import fqt_compile
from fqt_compile.config import FQTConfig
from fqt_compile.errors import ConfigError, FQTWarning
from fqt_compile.finetune import CheckpointError, DivergedError, FinetuneSettings, finetune, table
from fqt_compile.finetune import training as job
from fqt_compile.finetune.checkpoint import load_weights, open_workspace
from fqt_compile.finetune.report import probe
from fqt_compile.models import make_model
from fqt_compile.results import OutputError, measure_saved_bytes, write_atomic
from fqt_compile.saving import compiled_options

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = f"{__file__}:tiny"


def tiny(num_classes: int) -> nn.Module:
    """Has dropout, so that an exact resume needs torch's generator, and BatchNorm, which has buffers."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))


def not_a_model(num_classes: int) -> str:
    return "text"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The seam: every method trains the plain model, except that FQT's gradients are not quantized."""
    seen: list[FQTConfig | None] = []

    def compile_step(model, config):
        seen.append(config)
        return model

    monkeypatch.setattr(job, "compile_step", compile_step)
    return seen


@pytest.fixture
def settings(tmp_path):
    return FinetuneSettings(
        arch=TINY, size=8, limit=100, batch=16, epochs=2, qat_epochs=2, lr=1e-2, out=tmp_path / "run"
    )


def again(settings: FinetuneSettings, **changes: object) -> FinetuneSettings:
    return job.dataclasses.replace(settings, **changes)


def quiet() -> Console:
    return Console(quiet=True)


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


def state_of(settings: FinetuneSettings, name: str) -> dict:
    return torch.load(settings.out / name, weights_only=True)


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


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Raise KeyboardInterrupt in the middle of the epoch after ``epochs`` finished ones."""
    finished, train_epoch = [0], job.Running.train_epoch

    def interrupted(self, where, advance):
        if finished[0] == epochs:
            next(iter(self.loader))
            torch.rand(7)
            raise KeyboardInterrupt
        finished[0] += 1
        return train_epoch(self, where, advance)

    monkeypatch.setattr(job.Running, "train_epoch", interrupted)


@pytest.mark.parametrize("epochs", [1, 2, 5, 7])
def test_resume_is_exact(settings, tmp_path, epochs):
    whole = finetune(again(settings, out=tmp_path / "whole"), quiet())
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, epochs)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, quiet())
    torch.manual_seed(99)
    resumed = finetune(again(settings, resume=True), quiet())
    for method, figures in whole["methods"].items():
        for key in ("loss_history", "accuracy_history", "saved_bytes"):
            assert resumed["methods"][method][key] == figures[key]
        expected = state_of(again(settings, out=tmp_path / "whole"), f"{method}.pt")["model"]
        got = state_of(settings, f"{method}.pt")["model"]
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_resume_of_a_finished_run_repeats_its_results(settings):
    report = finetune(again(settings, methods=("float32",)), quiet())
    assert finetune(again(settings, methods=("float32",), resume=True), quiet()) == report


def test_resume_with_other_settings_names_the_first_difference(settings):
    settings = again(settings, methods=("float32",))
    finetune(settings, quiet())
    with pytest.raises(CheckpointError, match=r"setting 'lr' is 0.5, but the checkpoint .* with 0.01"):
        finetune(again(settings, lr=0.5, resume=True), quiet())
    with pytest.raises(CheckpointError, match="setting 'bits' is 2, but"):
        finetune(again(settings, config=FQTConfig(bits=2), resume=True), quiet())


def test_resume_with_other_data(settings, monkeypatch):
    settings = again(settings, methods=("float32",))
    finetune(settings, quiet())
    monkeypatch.setattr(job.ImageData, "fingerprint", lambda self: "other")
    with pytest.raises(CheckpointError, match="the data set has other contents"):
        finetune(again(settings, resume=True), quiet())


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_checkpoint_is_refused_and_kept(settings, damage):
    settings = again(settings, methods=("float32",), epochs=1, qat_epochs=0)
    finetune(settings, quiet())
    file = settings.out / "checkpoint.pt"
    whole = bytearray(file.read_bytes())
    if damage == "flip":
        whole[len(whole) // 2] ^= 255
    damaged = {"truncate": whole[: len(whole) // 2], "flip": whole, "empty": b"", "text": b"no checkpoint"}
    file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"checkpoint .*checkpoint\.pt: (truncated|wrong checksum)"):
        finetune(again(settings, resume=True), quiet())
    assert file.read_bytes() == damaged[damage]


def test_state_dict_is_no_checkpoint(settings):
    settings.out.mkdir()
    torch.save({"weight": torch.ones(1)}, settings.out / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="lacks data, format, history"):
        finetune(again(settings, resume=True), quiet())


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def full_disk(file):
        file.write(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomic(path, full_disk)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_output_folder_is_locked_and_not_replaced_by_accident(settings):
    settings = again(settings, methods=("float32",), epochs=1, qat_epochs=0)
    with pytest.raises(OutputError, match=r"has no checkpoint\.pt"):
        finetune(again(settings, resume=True), quiet())
    finetune(settings, quiet())
    with pytest.raises(OutputError, match=r"--resume, replace it with --overwrite"):
        finetune(settings, quiet())
    (settings.out / "mine.pt").write_bytes(b"keep")
    finetune(again(settings, overwrite=True), quiet())
    assert (settings.out / "mine.pt").exists()
    with (
        open_workspace(settings.out, resume=True, overwrite=False),
        pytest.raises(OutputError, match="in use by another fqt1bit process"),
    ):
        finetune(again(settings, resume=True), quiet())
    finetune(again(settings, resume=True), quiet())


def test_output_folder_below_a_file(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        finetune(again(settings, out=tmp_path / "file" / "run"), quiet())


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
        (f"{__file__}:tinny", r"has no callable 'tinny' \(did you mean 'tiny'\?\)"),
        (f"{__file__}:not_a_model", "the factory returned str"),
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


def test_weights_of_a_model_with_another_head(settings, tmp_path):
    donor = tiny(4)
    torch.save({f"_orig_mod.{name}": value for name, value in donor.state_dict().items()}, tmp_path / "w.pt")
    model = tiny(10)
    fresh_head = model[-1].weight.clone()
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    notes = load_weights(model, state, job.head_name(model), "w.pt")
    assert torch.equal(model[0].weight, donor[0].weight)
    assert torch.equal(model[-1].weight, fresh_head)
    assert len(notes) == 2
    assert "6.weight (got [4, 32], the model has [10, 32]) is left at its fresh initialization" in notes[0]
    console = Console(record=True, file=io.StringIO(), width=200)
    finetune(again(settings, weights=str(tmp_path / "w.pt"), methods=("float32",), qat_epochs=0), console)
    assert "6.weight (got [4, 32]" in console.export_text()


def test_stages_say_how_they_were_trained(settings):
    finetune(again(settings, config=FQTConfig(bits=2, keep=0.5)), quiet())
    about = {name: state_of(settings, f"{name}.pt")["fqt1bit"] for name in ("float32", "qat", "fqt", "checkpoint")}
    assert about["float32"]["options"] is None
    assert about["qat"]["options"]["grad"] == "exact"
    assert FQTConfig.from_options(about["fqt"]["options"]) == FQTConfig(bits=2, keep=0.5)
    assert about["checkpoint"] == about["fqt"]  # the last stage
    model = tiny(10)
    loaded = fqt_compile.load(settings.out / "fqt.pt", model)
    assert compiled_options(loaded) == FQTConfig(bits=2, keep=0.5)
    torch.testing.assert_close(model.state_dict(), dict(state_of(settings, "fqt.pt")["model"]), rtol=0, atol=0)
    assert compiled_options(fqt_compile.load(settings.out / "checkpoint.pt", tiny(10))) == FQTConfig(bits=2, keep=0.5)


def test_starting_from_one_bit_weights_says_so(settings, tmp_path):
    fqt_compile.save(tiny(10), tmp_path / "w.pt", {"bits": 2})
    settings = again(settings, weights=str(tmp_path / "w.pt"), qat_epochs=0, epochs=1)
    console = Console(record=True, file=io.StringIO(), width=200)
    finetune(again(settings, methods=("fqt",)), console)
    assert 'trained with 1-bit layers, {"activation"' in console.export_text()
    with pytest.warns(FQTWarning, match="something else in float32, one of the methods; remedy: --methods qat,fqt"):
        finetune(again(settings, overwrite=True), quiet())


@pytest.mark.parametrize("value", [math.nan, 1])
def test_nan_and_integers_in_weights(tmp_path, value):
    state = tiny(10).state_dict()
    state["0.bias"] = torch.full((8,), value)
    with pytest.raises(CheckpointError, match=r"0\.bias \((8 of 8 values are NaN|got int64, the model has float32)"):
        load_weights(tiny(10), state, "6", "w.pt")
    state = tiny(10).state_dict()
    state["6.bias"] = torch.full((10,), value)  # the head, of the right shape
    with pytest.raises(CheckpointError, match=r"6\.bias \((10 of 10 values are NaN|got int64, the model has float32)"):
        load_weights(tiny(10), state, "6", "w.pt")


def in_checkpoint(settings, change) -> None:
    state = state_of(settings, "checkpoint.pt")
    change(state)
    torch.save(state, settings.out / "checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=1), r"got format 1; accepted: 2; .*--overwrite"),
        (lambda c: c.update(history=3), "history cannot have been written by this command"),
        (lambda c: c.update(history={"fqt": {}}), "history cannot have been written"),
        (lambda c: c.update(settings=[1]), "settings cannot have been written"),
        (lambda c: c.update(model=[1]), "model cannot have been written"),
        (lambda c: c["model"]["0.bias"].fill_(math.nan), r"model cannot .* or have NaN; .*remedy"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(math.nan), "optimizer cannot .* or have NaN"),
        (lambda c: c["model"].pop("0.bias"), r"do not fit the model: 0\.bias \(got nothing"),
        (lambda c: c["optimizer"]["param_groups"].pop(), "does not belong to this run"),
        (lambda c: c.update(rng=torch.zeros(3)), "does not belong to this run"),
    ],
)
def test_checkpoints_that_this_command_has_not_written(settings, change, message):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            finetune(again(settings, methods=("float32",)), quiet())
    in_checkpoint(settings, change)
    with pytest.raises(CheckpointError, match=message):
        finetune(again(settings, methods=("float32",), resume=True), quiet())


def test_a_previous_stage_with_nan(settings):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            finetune(again(settings, methods=("float32",)), quiet())
    state = state_of(settings, "float32-pretrained.pt")
    state["model"]["0.bias"].fill_(math.nan)
    torch.save(state, settings.out / "float32-pretrained.pt")
    with pytest.raises(CheckpointError, match=r"float32-pretrained\.pt do not fit .*0\.bias \(8 of 8 values are NaN"):
        finetune(again(settings, methods=("float32",), resume=True), quiet())


def test_nan_of_the_last_step_keeps_the_checkpoint(settings, monkeypatch):
    train_epoch = job.Running.train_epoch

    def broken(self, where, advance):
        loss = train_epoch(self, where, advance)
        if "epoch 2" in where:
            with torch.no_grad():
                self.model[0].bias.fill_(math.nan)
        return loss

    monkeypatch.setattr(job.Running, "train_epoch", broken)
    with pytest.raises(DivergedError, match=r"epoch 2: NaN or infinite values in 0\.bias.*--lr"):
        finetune(again(settings, methods=("float32",)), quiet())
    assert not state_of(settings, "checkpoint.pt")["model"]["0.bias"].isnan().any()


def test_a_disk_full_at_a_checkpoint_loses_nothing(settings, tmp_path, monkeypatch):
    settings = again(settings, methods=("float32",))
    whole = finetune(again(settings, out=tmp_path / "whole"), quiet())
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"checkpoint\.pt .*No space left.* unchanged; remedy: free space"):
            finetune(settings, quiet())
    assert not list(settings.out.glob(".*.tmp"))
    (settings.out / ".checkpoint.pt.tmp").write_bytes(b"left by a killed process")
    resumed = finetune(again(settings, resume=True), quiet())
    assert resumed["methods"]["float32"]["loss_history"] == whole["methods"]["float32"]["loss_history"]
    assert not list(settings.out.glob(".*.tmp"))


def test_a_folder_that_cannot_be_locked_or_cleared(settings, monkeypatch):
    (settings.out / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"checkpoint\.pt cannot be removed .*; choose another folder"):
        finetune(again(settings, overwrite=True), quiet())

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OutputError, match=r"cannot be locked .*No locks available"):
        finetune(settings, quiet())


def test_bad_weights(tmp_path, monkeypatch):
    from fqt_compile.finetune.checkpoint import read_weights

    with pytest.raises(CheckpointError, match="no such file"):
        read_weights("resnet18", str(tmp_path / "none.pt"))
    (tmp_path / "w.pt").write_bytes(b"PK broken")
    with pytest.raises(CheckpointError, match="truncated or not readable"):
        read_weights("resnet18", str(tmp_path / "w.pt"))
    with pytest.raises(CheckpointError, match=r"0\.weight \(got \[1\], the model has \[8, 3, 3, 3\]\)"):
        load_weights(tiny(10), {"0.weight": torch.ones(1)}, "6", "w.pt")
    with pytest.raises(CheckpointError, match="torchvision has no weights for"):
        read_weights(TINY, "DEFAULT")

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .*no network.*put the file at .*resnet18"):
        read_weights("resnet18", "DEFAULT")


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
