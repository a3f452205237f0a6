"""Weights in files: they come back with their options, and what does not fit or is not finite is refused whole."""

from __future__ import annotations

import copy
import errno
import json
import os

import pytest
import torch
from torch import nn

import fqt_compile
from fqt_compile import saving, weights
from fqt_compile.config import FQTConfig
from fqt_compile.errors import ConfigError, FQTWarning
from fqt_compile.results import OutputError, write_atomic, write_json
from fqt_compile.weights import CheckpointError

OPTIONS = {"bits": 2, "keep": 0.5, "skip": [], "lowering": "eager"}  # needs no C++ compiler


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


def saved(path, model=None, options=OPTIONS):
    model = model or net()
    fqt_compile.save(model, path, options)
    return model


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def same(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_weights_come_back_with_their_options(path):
    x, model = torch.randn(8, 32), net()
    step = torch.compile(model, backend="fqt1bit", options=OPTIONS)
    step(x).sum().backward()
    fqt_compile.save(step, path)
    other = net()
    loaded = fqt_compile.load(path, other)
    same(other, model)
    assert saving.compiled_options(loaded) == FQTConfig.from_options(OPTIONS)
    assert torch.equal(loaded.eval()(x), step.eval()(x))
    assert not torch.equal(loaded(x), other(x))  # in float they mean something else
    assert not any("_orig_mod" in name for name in torch.load(path, weights_only=True)["model"])


def test_a_plain_model_is_saved_with_given_options(path):
    model = saved(path, options={"preset": "paper"})
    content = torch.load(path, weights_only=True)
    assert FQTConfig.from_options(content["fqt1bit"]["options"]) == FQTConfig.from_options({"preset": "paper"})
    json.dumps(content["fqt1bit"])
    other = torch.compile(net(), backend="fqt1bit", options=OPTIONS)  # loaded into what it was compiled from
    assert saving.compiled_options(fqt_compile.load(path, other)) == FQTConfig.from_options({"preset": "paper"})
    same(other._orig_mod, model)


def test_the_options_must_be_known_once(path):
    with pytest.raises(ConfigError, match=r"options: got none, and .*accepted: the compiled model, or the options"):
        fqt_compile.save(net(), path)
    with pytest.raises(ConfigError, match="options: got none"):
        fqt_compile.save(torch.compile(net()), path)
    step = torch.compile(net(), backend="fqt1bit", options=OPTIONS)
    with pytest.raises(ConfigError, match=r"got bits=4; accepted: bits=2, of the compiled model"):
        fqt_compile.save(step, path, {**OPTIONS, "bits": 4})
    with pytest.raises(ConfigError, match="model: got dict"):
        fqt_compile.save({}, path, {})
    assert not path.exists()
    fqt_compile.save(torch.compile(net(), backend="fqt1bit"), path)
    assert torch.load(path, weights_only=True)["fqt1bit"]["options"] == json.loads(FQTConfig().canonical())


def test_running_them_in_float_is_noticed(path):
    model, other = saved(path), net()
    with pytest.warns(FQTWarning, match=r"trained with 1-bit layers and mean something else in float32; remedy: run"):
        assert fqt_compile.load(path, other, compile=False) is other
    same(other, model)
    with pytest.raises(RuntimeError, match=r"[Uu]nexpected key\(s\).*fqt1bit"):
        net().load_state_dict(torch.load(path, weights_only=True))


def test_a_plain_state_dict_does_not_say(path):
    model, other = net(), net()
    torch.save({f"_orig_mod.{name}": value for name, value in model.state_dict().items()}, path)
    with pytest.raises(CheckpointError, match=r"not say how it was trained; .*remedy: options=\{...\} .*compile=False"):
        fqt_compile.load(path, other)
    with pytest.warns(FQTWarning, match="do not say how they were trained"):
        same(fqt_compile.load(path, other, compile=False), model)
    assert saving.compiled_options(fqt_compile.load(path, net(), OPTIONS)) == FQTConfig.from_options(OPTIONS)


def test_options_that_predictions_do_not_depend_on_may_change(path):
    saved(path)
    loaded = fqt_compile.load(path, net(), {"keep": 1.0, "grad": "fqt"})
    assert saving.compiled_options(loaded) == FQTConfig.from_options({**OPTIONS, "keep": 1.0})
    for options in ({"skip": ["first"]}, FQTConfig(), {"preset": "v1"}):
        with pytest.raises(ConfigError, match=r"accepted: \w+=.*, that the weights in .*weights.pt were trained with"):
            fqt_compile.load(path, net(), options)


def test_float_weights_are_compiled_without_bits(path):
    weights.write({"fqt1bit": weights.header(None), "model": net().state_dict()}, path)
    loaded = fqt_compile.load(path, net())
    assert saving.compiled_options(loaded) is None
    fqt_compile.load(path, net(), compile=False)  # without a warning
    with pytest.raises(ConfigError, match="were trained in float"):
        fqt_compile.load(path, net(), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(fqt1bit=3), "says about itself is broken"),
        (lambda c: c["fqt1bit"].update(format="1"), "says about itself is broken"),
        (lambda c: c.update(model=[1]), "says about itself is broken"),
        (lambda c: c["fqt1bit"].update(format=99), r"got format 99; accepted: up to 1; .*remedy: update"),
        (lambda c: c["fqt1bit"]["options"].update(warp=3), r"unknown option 'warp'.*remedy: update fqt-compile"),
        (lambda c: c["fqt1bit"]["options"].update(bits=16), r"option 'bits': got 16.*remedy: update fqt-compile"),
        (lambda c: c["fqt1bit"].update(options=[1]), "options are not known here"),
        (lambda c: c["fqt1bit"].pop("options"), "options are not known here"),
    ],
)
def test_headers_that_are_not_understood(path, change, message):
    saved(path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        fqt_compile.load(path, net())


def entry(name, value):
    return lambda c: c["model"].update({name: value})


WRONG = [
    (entry("0.weight", torch.ones(3)), r"0\.weight \(got \[3\], the model has \[64, 32\]\)"),
    (entry("6.weight", torch.ones(3)), r"6\.weight \(not in the model\)"),
    (entry(7, torch.ones(3)), r"7 \(not in the model\)"),
    (lambda c: c["model"].pop("5.bias"), r"5\.bias \(got nothing, the model has \[4\]\)"),
    (entry("5.bias", [1.0] * 4), r"5\.bias \(got nothing"),
    (entry("5.bias", torch.tensor([1, torch.nan, 0, 0])), r"5\.bias \(1 of 4 values are NaN or infinite\)"),
    (entry("5.bias", torch.tensor([1, -torch.inf, 0, 0])), r"5\.bias \(1 of 4 values are NaN or infinite\)"),
    (entry("5.bias", torch.full([4], 1e300, dtype=torch.float64)), r"5\.bias \(4 of 4 values are NaN or infinite\)"),
    (entry("1.running_mean", torch.full([64], torch.nan)), r"1\.running_mean \(64 of 64"),
    (entry("1.running_var", torch.full([64], -1.0)), r"1\.running_var \(a variance is negative\)"),
    (entry("5.bias", torch.ones(4, dtype=torch.int32)), r"5\.bias \(got int32, the model has float32\)"),
    (entry("5.bias", torch.ones(4, dtype=torch.bool)), r"5\.bias \(got bool, the model has float32\)"),
    (entry("5.bias", torch.ones(4, dtype=torch.complex64)), r"5\.bias \(got complex64, the model has float32\)"),
    (entry("1.num_batches_tracked", torch.tensor(1.5)), r"tracked \(got float32, the model has int64\)"),
    (entry("5.bias", torch.ones(4).to_sparse()), r"5\.bias \(got a tensor of torch\.sparse_coo"),
    (entry("5.bias", torch.ones(4, device="meta")), r"5\.bias \(got a tensor of .* on meta"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_weights_that_do_not_fit_change_nothing(path, change, message):
    saved(path)
    rewrite(path, change)
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=rf"weights .*weights\.pt do not fit the model: .*{message}"):
        fqt_compile.load(path, model)
    same(model, before)


def test_the_first_few_are_named(path):
    saved(path, model=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(CheckpointError, match=r"0\.weight .*; 0\.bias .*; 1\.weight .* and \d+ more; accepted: finite"):
        fqt_compile.load(path, net())
    torch.save({"epoch": 3, "state_dict": net().state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"dictionaries \(state_dict\): save the model's state dict alone"):
        fqt_compile.load(path, net(), {})


def test_a_mask_may_be_infinite_and_half_precision_is_read(path):
    def masked():
        model = net()
        model.register_buffer("mask", torch.triu(torch.full((3, 3), -torch.inf), 1))
        return model

    model = saved(path, model=masked())
    rewrite(path, lambda c: c["model"].update({"5.bias": c["model"]["5.bias"].half()}))
    other = masked()
    fqt_compile.load(path, other)
    assert torch.equal(other.mask, model.mask)
    assert torch.equal(other[5].bias, model[5].bias.half().float())


@pytest.mark.parametrize("damage", ["absent", "folder", "empty", "text", "truncated", "flipped", "list", "module"])
def test_broken_files(path, damage):
    saved(path)
    whole = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "list":
        torch.save([1], path)
    elif damage == "module":
        torch.save(nn.ReLU(), path)  # a whole module
    elif damage != "absent":
        whole[len(whole) // 2] ^= 255
        damaged = {"empty": b"", "text": b"no weights", "truncated": whole[:500], "flipped": bytes(whole)}
        path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"weights\.pt: (no such file|truncated|wrong checksum|got list)"):
        fqt_compile.load(path, net())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_written_over_good_weights(path, value):
    model = saved(path)
    good = path.read_bytes()
    with torch.no_grad():
        model[5].bias[1] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 5\.bias; .*nothing is written; remedy"):
        fqt_compile.save(model, path, {})
    assert path.read_bytes() == good


# -- writing -----------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(path, monkeypatch, where):
    saved(path)
    good = path.read_bytes()
    monkeypatch.setattr(os, where, full)
    with pytest.raises(OutputError, match=r"cannot write .*No space left.*is unchanged; remedy: free space"):
        saved(path)
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_that_torch_hides(path):
    def write(file):
        class Full:
            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

            def flush(self):
                pass

        torch.save({"a": torch.ones(10_000)}, Full())

    with pytest.raises(OutputError, match=r"cannot write .*; remedy: free space"):
        write_atomic(path, write)
    assert os.listdir(path.parent) == []


def test_an_interrupt_leaves_nothing(path):
    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write)
    assert os.listdir(path.parent) == []


def test_devices_are_written_to_and_links_followed(path):
    with pytest.raises(OutputError, match="No space left"):
        write_json({"a": 1}, type(path)("/dev/full"))
    assert not type(path)("/dev/full").is_file()
    link = path.with_name("link")
    link.symlink_to(path)
    write_json({"a": 1}, link)
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"a": 1}
    link.unlink()
    for wrong in (path.parent, path / "below", path.with_name("no") / "folder"):
        with pytest.raises(OutputError, match="cannot write"):
            write_json({"a": 1}, wrong)
    assert os.listdir(path.parent) == [path.name]
