"""`fqt1bit bench`: the report, its arithmetic, its errors."""

from __future__ import annotations

import importlib
import io
import json
import os
import statistics
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from fqt_compile.bench import (
    ALLOCATORS,
    BFLOAT16,
    FLOAT32,
    OURS,
    VARIANTS,
    BenchError,
    BenchSettings,
    measure,
    phases,
    ratios,
    tables,
    turns,
    worker,
)
from fqt_compile.cli import app
from fqt_compile.errors import ConfigError

TINY = f"{Path(__file__)}:tiny"
BROKEN = f"{Path(__file__)}:no_bfloat16"
NOISY = f"{Path(__file__)}:noisy"
REPORT_KEYS = {
    *("model", "batch", "size", "threads", "steps", "speedup_fp32", "speedup_bf16"),
    *("saved_bytes", "peak_rss", "versions", "cpu"),
}


def tiny(num_classes: int) -> nn.Module:
    """One packed convolution between float layers."""
    body = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))


def test_only_parameters_of_fqt1bit_are_in_the_default_order():
    settings = BenchSettings(model=TINY, batch=2, size=8)
    for variant, memory_format in (("eager float32", torch.channels_last), (OURS, torch.contiguous_format)):
        trainee = worker.make_trainee(settings, variant)
        assert trainee.images.is_contiguous(memory_format=torch.channels_last)
        assert trainee.model[2].weight.is_contiguous(memory_format=memory_format)


class NoBfloat16(nn.Module):
    """Raises under autocast."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = tiny(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise TypeError("no bfloat16 here")
        return self.net(x)


class Noisy(NoBfloat16):
    """Prints what could be taken for an answer, and ends its process under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print('{"value": 0}', flush=True)
        if torch.is_autocast_enabled("cpu"):
            print("cannot go on", file=sys.stderr, flush=True)
            os._exit(3)
        return self.net(x)


def noisy(num_classes: int) -> nn.Module:
    return Noisy(num_classes)


def no_bfloat16(num_classes: int) -> nn.Module:
    return NoBfloat16(num_classes)


class WorkerHere(worker.Worker):
    """In this process, with eager models in place of compiled ones: nothing is compiled, no process is started."""

    process = types.SimpleNamespace(kill=lambda: None)

    def ask(self, request):
        try:
            return json.loads(json.dumps(worker.REQUESTS[request](self)))
        except Exception as error:
            raise BenchError(worker.one_line(error)) from error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def steps_here(settings, environment=None, say=None):
    """`measure_steps` with `WorkerHere`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_compiled", lambda model, kind, settings: model)
        patch.setattr(turns, "start_worker", lambda settings, variant, environment: WorkerHere(settings, variant))
        return turns.measure_steps(settings, environment or {})


@pytest.fixture(scope="module")
def eager_steps():
    return steps_here(BenchSettings(model=TINY, batch=4, size=8, rounds=3))


@pytest.fixture
def in_process(monkeypatch, eager_steps):
    """`bench` without processes; the tasks it asked for."""
    asked = []

    def measure_steps(settings, environment, say):
        asked.append(("steps", settings.variants, dict(environment)))
        return json.loads(json.dumps(eager_steps))

    def ask_worker(request, settings, variant, environment):
        asked.append((request, variant, dict(environment)))
        memory = {"start": 1, "warm": 2, "peak": 3 * 10**6, "ru_maxrss": 4}
        phases = {"step_s": 0.02, "unprofiled_s": 0.01, "phases": {"packing": 0.02}, "operations": {}}
        return {"memory": memory, "phases": phases}[request]

    monkeypatch.setattr(measure, "measure_steps", measure_steps)
    monkeypatch.setattr(measure, "ask_worker", ask_worker)
    return asked


def test_report_has_the_documented_keys_and_ratios_of_medians(in_process, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--batch", "4", "--size", "8", "--rounds", "3", "--allocator", "both", "--phases", "--json", str(out)]
    result = CliRunner().invoke(app, ["bench", "--model", TINY, *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["steps"].keys() == report["saved_bytes"].keys() == report["peak_rss"].keys()
    assert report["command"]
    for timed in report["allocators"].values():
        median = {name: statistics.median(step["all_s"]) for name, step in timed["steps"].items()}
        assert all(step["min_s"] <= median[name] <= step["max_s"] for name, step in timed["steps"].items())
        assert timed["speedup_fp32"] == pytest.approx(min(median[name] for name in FLOAT32) / median[OURS])
        assert timed["speedup_bf16"] == pytest.approx(min(median[name] for name in BFLOAT16) / median[OURS])
        saved = timed["saved_bytes"]
        assert timed["saved_ratio"][OURS] == pytest.approx(saved["inductor float32"] / saved[OURS])
    assert [environment for task, _, environment in in_process if task == "steps"] == list(ALLOCATORS.values())
    assert [variant for task, variant, _ in in_process if task == "memory"] == list(VARIANTS)
    assert result.stdout.count("inductor bf16") == 2  # tables
    assert "packing" in result.stdout


def test_losses_are_shown_and_missing_baselines_have_no_ratio():
    assert ratios({"eager float32": 1.0, "inductor float32": 2.0, OURS: 4.0})[OURS] == {"fp32": 0.25, "bf16": None}
    step = {"median_s": 4.0, "min_s": 4.0, "max_s": 4.0}
    timed = {
        "steps": {OURS: step},
        "ratios": {OURS: {"fp32": 0.25, "bf16": None}},
        "saved_bytes": {OURS: 10},
        "saved_ratio": {OURS: None},
    }
    failed = {"fqt1bit bf16": "it broke"}
    report = {"model": "m", "batch": 1, "size": 8, "threads": 1, "cpu": "c", "allocator": "default"}
    console = Console(file=io.StringIO(), width=tables.WIDTH)
    for table in tables.tables({**report, "allocators": {"default": {**timed, "failed": failed}}}):
        console.print(table)
    text = console.file.getvalue()
    assert "0.25" in text
    assert "fqt1bit bf16: it broke" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vgg16-cifr"], "--model: got 'vgg16-cifr' (did you mean 'vgg16-cifar'?); accepted: vgg16-cifar, "),
        (["--model", "resnet50"], "torchvision.models:NAME"),
        (["--model", "no_such_module:net"], "cannot be imported"),
        (["--model", TINY, "--batch", "0"], "--batch: got 0; accepted: an integer >= 1"),
        (["--model", TINY, "--rounds", "-1"], "--rounds: got -1; accepted: an integer >= 1"),
        (["--model", TINY, "--allocator", "glibc"], "--allocator: got 'glibc'; accepted: default, tuned, both"),
        (
            ["--model", TINY, "--only", "eager"],
            "accepted: eager float32, inductor float32, eager bf16, ",
        ),
        (["--model", TINY, "--only", "eager bf16"], "add fqt1bit"),
        (["--model", TINY, "--option", "bit=3"], "unknown option 'bit' (did you mean 'bits'?)"),
        (["--model", TINY, "--bits", "9"], "option 'bits': got 9; accepted: an integer from 1 to 8"),
        (["--model", TINY, "--json", f"{__file__}/out.json"], "out.json'; accepted: a file in a folder that can be"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_settings_survive_the_way_to_the_worker():
    settings = BenchSettings(model=TINY, batch=3, allocator="both", only=(OURS,))
    assert BenchSettings.from_record(json.loads(json.dumps(settings.record()))) == settings
    assert settings.allocators == tuple(ALLOCATORS)
    with pytest.raises(ConfigError, match="--threads: got True"):
        BenchSettings(threads=True)


def test_ours_saves_less_than_float32(eager_steps):
    saved = eager_steps["saved_bytes"]
    activations = 4 * 4 * 8 * 8 * 32  # bytes of one activation; each ReLU saves its result, which the next layer shares
    assert 2 * activations <= saved["eager float32"] <= 2.2 * activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "start_worker", lambda settings, variant, environment: WorkerHere(settings, variant))
        ours = turns.measure_steps(BenchSettings(model=TINY, batch=4, size=8, rounds=1, warm=1, only=(OURS,)), {})
    assert not ours["failed"]
    assert ours["saved_bytes"][OURS] < saved["eager float32"]
    assert ours["compile"][OURS]["compile_s"] > 0


def test_a_failing_variant_is_reported_and_left_out():
    figures = steps_here(BenchSettings(model=BROKEN, batch=2, size=8, rounds=1))
    assert figures["failed"].keys() == {*BFLOAT16, "fqt1bit bf16"}
    assert figures["failed"]["eager bf16"] == "TypeError: no bfloat16 here"
    assert figures["steps"].keys() == figures["saved_bytes"].keys() == {*FLOAT32, OURS}
    assert figures["compile"].keys() == {"inductor float32", OURS}


class Tired(WorkerHere):
    """Writes down what it is asked, and fails in its second round."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def ask(self, request):
        self.asked.append((self.variant, request))
        if self.variant == "eager bf16" and self.asked.count((self.variant, request)) == 2:
            raise BenchError("too tired")
        return super().ask(request)


def test_variants_take_turns_and_a_later_failure_leaves_one_out(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WorkerHere", Tired)
    monkeypatch.setattr(BenchSettings, "variants", ("eager float32", "eager bf16", OURS))
    figures = steps_here(BenchSettings(model=TINY, batch=2, size=8, rounds=3, warm=1))
    timed = [variant for variant, request in Tired.asked if request == "step_twice"]
    assert timed == ["eager float32", "eager bf16", OURS] * 2 + ["eager float32", OURS]
    assert figures["failed"] == {"eager bf16": "too tired"}
    assert figures["steps"].keys() == figures["saved_bytes"].keys() == {"eager float32", OURS}
    assert all(len(step["all_s"]) == 3 for step in figures["steps"].values())


@pytest.mark.rotates(4)
def test_processes_take_turns_answer_and_say_why_they_ended():
    settings = BenchSettings(model=TINY, batch=2, size=8)
    memory = measure.ask_worker("memory", settings, "eager float32", ALLOCATORS["tuned"])
    assert 0 < memory["start"] <= memory["peak"]
    only = BenchSettings(model=NOISY, batch=2, size=8, rounds=2, only=("eager float32", "eager bf16", OURS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BenchSettings, "variants", ("eager float32", "eager bf16"))
        figures = turns.measure_steps(only, {})
    assert len(figures["steps"]["eager float32"]["all_s"]) == 2
    assert figures["failed"] == {"eager bf16": "its process ended with status 3: cannot go on"}
    broken = BenchSettings(model=BROKEN, batch=2, size=8)
    with pytest.raises(BenchError, match=r"measuring memory of eager bf16 failed: TypeError: no bfloat16 here; ac"):
        measure.ask_worker("memory", broken, "eager bf16", {})


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("fqt::output_product", "output products"),
        ("fqt::grad_input_product", "grad_input products"),
        ("fqt::grad_weight_product", "grad_weight products"),
        ("fqt::pack_activation", "packing"),
        ("fqt::activation_threshold", "packing"),
        ("fqt::apply_mask", "packing"),
        ("fqt::quantize_rows", "quantizing"),
        ("fqt::dequantize_grad_weight", "quantizing"),
        ("fqt::quantize_weight", "weight packing and gradient"),
        ("fqt::weight_gradient", "weight packing and gradient"),
        ("fqt::select", "row choice"),
        ("fqt::fused_activation", "fused float"),
        ("fqt::max_pool_gradient", "fused float"),
        ("fqt::something_new", phases.ANY_PACKED),
        ("Optimizer.step#Adam.step", "optimizer"),
        ("mkldnn::_convolution_pointwise", "float convolution, linear"),
        ("aten::addmm", "float convolution, linear"),
        ("graph_0_cpp_fused_relu_1", "generated float kernels"),
        ("aten::_log_softmax", "loss, other float"),
        ("aten::empty_strided", None),
        ("CompiledFunctionBackward", None),
    ],
)
def test_phase_of_an_operation(name, phase):
    assert phases.phase_of(name) == phase


def test_every_operation_has_a_phase_of_its_own():
    from fqt_compile.kernels.operations import OPERATIONS

    unknown = [name for name in OPERATIONS if phases.phase_of(f"fqt::{name}") == phases.ANY_PACKED]
    assert unknown == ["check_finite"]  # a debugging aid


def test_phases_add_up_and_inner_events_count_once():
    def event(name, microseconds, parent=None):
        cpu = torch.autograd.DeviceType.CPU
        return types.SimpleNamespace(name=name, cpu_time_total=microseconds, cpu_parent=parent, device_type=cpu)

    outer = event("CompiledFunction", 900)
    product = event("fqt::output_product", 500, outer)
    inner = event("aten::fill_", 100, event("aten::empty", 120, product))
    operations = phases.operation_seconds([outer, product, inner, event("aten::add", 50, outer)])
    assert operations == pytest.approx({"fqt::output_product": 500e-6, "aten::add": 50e-6})
    seconds = phases.breakdown(operations, step_s=1e-3)
    assert sum(seconds.values()) == pytest.approx(1e-3)
    assert seconds[phases.OVERHEAD] == pytest.approx(450e-6)


@pytest.mark.rotates(3)
def test_phases_of_a_real_step():
    def make_step():
        settings = BenchSettings(model=TINY, batch=4, size=8)
        return worker.make_trainee(settings, OURS).timed_step

    figures = phases.measure_phases(make_step, steps=2)
    seconds = figures["phases"]
    assert sum(seconds.values()) == pytest.approx(figures["step_s"])
    assert min(seconds.values()) >= 0
    measured = ("output products", "grad_weight products", "fused float", "quantizing", "optimizer")
    assert all(seconds[name] > 0 for name in (*measured, "generated float kernels", "float convolution, linear"))


@pytest.mark.parametrize("folder", ["zen4", "zen5", "cascadelake"])
def test_every_recorded_result_can_be_compared_with_the_goals(monkeypatch, folder):
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    targets = importlib.import_module("targets")
    verdicts = {goal.what: goal.verdict for goal in targets.goals(benchmarks / "results" / folder)}
    assert len(verdicts) == 15
    assert "not recorded" not in [verdict for what, verdict in verdicts.items() if "times the best float32" in what]


def test_benchmark_scripts_know_their_layers(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import kernel_rates

    assert 1 < kernel_rates.clock_ghz() < 10
    for layers, network in zip(kernel_rates.NETWORKS.values(), ("vgg16", "resnet18"), strict=True):
        assert sum(layer.count for layer in layers) == {"vgg16": 12, "resnet18": 19}[network]
    same = kernel_rates.Layer(64, 64, 4, 1)
    assert same.nominal_products(1) == 64 * 64 * 16 * 9
    assert same.inside_products(1) == 64 * 64 * (4 * 3 - 2) ** 2
    strided = kernel_rates.Layer(64, 128, 5, 1, 1, 2)
    assert (strided.output_size, strided.inside_products(2)) == (3, 2 * 64 * 128 * 9)
    for name in ("kernel_rates", "clock"):
        sys.modules.pop(name)
