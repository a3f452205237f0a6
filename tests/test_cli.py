"""The command line: parsing, exit codes, texts."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from support import processes
from support.finetuning import TINY
from torch._dynamo.exc import BackendCompilerFailed
from typer.testing import CliRunner

from fqt_compile.cli import app
from fqt_compile.cli_options import parse_options
from fqt_compile.config import FQTConfig
from fqt_compile.errors import CaptureError, ConfigError, KernelBuildError

pytest.importorskip("torchvision")


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], FQTConfig()),
        (["bits=2", "keep=0.5"], FQTConfig(bits=2, keep=0.5)),
        (["keep=none", "check_finite=true"], FQTConfig(check_finite=True)),
        (["skip=first,layer4.*"], FQTConfig(skip=("first", "layer4.*"))),
        (["skip=last"], FQTConfig(skip=("last",))),
        (["skip="], FQTConfig(skip=())),
        (["preset=paper", "prune='topk'"], FQTConfig.from_options({"preset": "paper", "prune": "topk"})),
    ],
)
def test_options_are_parsed(texts, expected):
    assert parse_options(texts, {}) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["bits"], "got 'bits'; accepted: NAME=VALUE"),
        (["bits=3"], "'bits' is given twice"),
        (["bit=3"], r"unknown option 'bit' \(did you mean 'bits'\?\)"),
        (["keep=2"], r"option 'keep': got 2; accepted: a number in \(0, 1\]"),
    ],
)
def test_bad_options(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(texts, {"bits": 4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--arch", "resnet81"], "did you mean 'resnet18'?"),
        (["finetune", "--data", "digit"], "did you mean 'digits'?"),
        (["finetune", "--bits", "9"], "option 'bits': got 9; accepted: an integer from 1 to 8"),
        (["finetune", "--scope", "steps"], "did you mean 'step'?"),
        (["finetune", "--methods", "float"], "setting 'methods'"),
        (["finetune", "--out", __file__], "cannot be written"),
        (["explain", "--option", "skip=3"], "option 'skip'"),
        (["compare", "--arch", "no_such_module:net"], "cannot be imported"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(arguments, message, tmp_path):
    if arguments[0] == "finetune" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_debug_shows_the_exception():
    with pytest.raises(ConfigError):
        CliRunner().invoke(app, ["explain", "--bits", "9", "--debug"], catch_exceptions=False)


def test_finetune_ends_with_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("fqt_compile.finetune.training.compile_step", lambda model, config: model)
    sizes = ["--arch", TINY, "--size", "8", "--limit", "40", "--batch", "8"]
    lengths = ["--epochs", "1", "--qat-epochs", "1", "--out", str(tmp_path / "run")]
    result = call("finetune", *sizes, *lengths)
    assert result.exit_code == 0, result.output
    assert "FQT (packed both ways)" in result.stdout
    assert result.stdout.endswith("results.png\n")


class FakeReport:
    stages = types.MappingProxyType({"sites": "graph after sites", "forward": "graph after forward"})
    kernels = types.MappingProxyType({"binary_conv2d": "void binary_conv2d();"})

    def __str__(self) -> str:
        return "the report"

    def save(self, path: Path) -> None:
        Path(path).write_text("saved")


@pytest.fixture
def fake_modules(monkeypatch):
    """Stand-ins for explain and compare, which have their own tests; the calls they received."""
    calls = []

    def received(model, *inputs, config, seeds=8):
        calls.append((model, inputs, config))
        return FakeReport()

    for name in ("explain", "compare"):
        module = types.ModuleType(f"fqt_compile.inspect.{name}")
        setattr(module, name, received)
        monkeypatch.setitem(sys.modules, f"fqt_compile.inspect.{name}", module)
    return calls


def test_explain_and_compare_pass_model_images_and_config(fake_modules, tmp_path):
    saved = tmp_path / "r.html"
    result = call("explain", "--arch", TINY, "--size", "8", "--batch", "3", "--bits", "2", "--save", str(saved))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the report\n")
    assert saved.read_text() == "saved"
    assert call("compare", "--arch", TINY, "--classes", "4").stdout == "the report\n"
    (model, (images,), config), (other, _, _) = fake_modules
    assert model.training
    assert images.shape == (3, 3, 8, 8)
    assert config == FQTConfig(bits=2)
    assert other(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_explain_prints_a_stage_and_kernels(fake_modules):
    assert call("explain", "--arch", TINY, "--stage", "forward").stdout == "graph after forward\n"
    assert "void binary_conv2d();" in call("explain", "--arch", TINY, "--kernels").stdout
    result = call("explain", "--arch", TINY, "--stage", "backward")
    assert result.exit_code == 2
    assert "error: --stage: got 'backward'; accepted: sites, forward" in result.stderr


def test_error_of_a_command_has_no_traceback(fake_modules, monkeypatch):
    def fail(*args, **kwargs):
        raise CaptureError("the model\nhas a graph break")

    monkeypatch.setattr(sys.modules["fqt_compile.inspect.explain"], "explain", fail)
    result = call("explain", "--arch", TINY)
    assert (result.exit_code, result.stderr) == (2, "error: the model has a graph break\n")


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (KernelBuildError("no space; remedy: free some"), "no space; remedy: free some"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("what?"), "torch cannot compile the model: ValueError: what?; --debug shows the traceback"),
    ],
)
def test_an_error_inside_of_a_compilation_is_one_line(fake_modules, monkeypatch, inner, expected):
    def fail(*args, **kwargs):
        raise BackendCompilerFailed(None, inner, None) from inner

    monkeypatch.setattr(sys.modules["fqt_compile.inspect.explain"], "explain", fail)
    result = call("explain", "--arch", TINY)
    assert (result.exit_code, result.stderr) == (2, f"error: {expected}\n")


def test_an_error_that_nobody_expected_keeps_its_traceback(fake_modules, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["fqt_compile.inspect.explain"], "explain", fail)
    assert isinstance(call("explain", "--arch", TINY).exception, ZeroDivisionError)


def test_interrupt_names_the_remedy(fake_modules, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fqt_compile.inspect.compare"], "compare", interrupt)
    result = call("compare", "--arch", TINY)
    assert (result.exit_code, result.stderr.count("--resume")) == (130, 1)


@pytest.mark.rotates(3)
def test_module_runs_and_lists_its_commands():
    result = processes.run(["-m", "fqt_compile.cli", "--help"], os.environ)
    for name in ("finetune", "explain", "compare", "bench"):
        assert name in result.stdout
