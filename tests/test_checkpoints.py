"""Files of the fine-tuning job: exact resume, damaged and foreign checkpoints, weights, full disks, locked folders."""

from __future__ import annotations

import errno
import io
import math
import os
import urllib.error

import pytest
import torch
from rich.console import Console
from support.finetuning import TINY, again, interrupt_after, quiet, state_of, tiny

import fqt_compile
from fqt_compile.config import FQTConfig
from fqt_compile.errors import FQTWarning
from fqt_compile.finetune import CheckpointError, DivergedError, finetune
from fqt_compile.finetune import training as job
from fqt_compile.finetune.checkpoint import load_weights, open_workspace
from fqt_compile.results import OutputError, write_atomic
from fqt_compile.saving import compiled_options

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.rotates(2)
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
