"""The model sweep (benchmarks/models.py): how it judges, and another small model of its list every day."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
MODULES = ("models", "model_steps", "model_zoo", "model_tables")
REPRESENTATIVES = ("vit", "convnext", "densenet", "swin", "squeezenet1_0")


@pytest.fixture
def sweep(monkeypatch):
    """The sweep's modules: ``models``, with what it imports."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("models")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def steps(sweep):
    return sys.modules["model_steps"]


@pytest.mark.rotates(20)
@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_oracle_is_the_definition(sweep, steps, name):
    (case,) = [case for case in sweep.all_cases() if case.name == f"torchvision/{name}"]
    measurement = steps.Measurement(case, "oracle", lambda record: None)
    measurement.run()
    assert not measurement.record["errors"]
    assert measurement.record["packed"] > 0
    assert measurement.record["oracle - eager"]["verdict"] != "unexplained", measurement.record


def test_the_list_is_what_it_says(sweep):
    cases = sweep.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    packages = [case.package for case in cases]
    assert packages.count("timm") >= 40
    assert packages.count("transformers") >= 15
    assert {case.group for case in cases if case.package == "torchvision"} >= {
        f"torchvision, {group}" for group in ("classification", "segmentation", "detection", "video")
    }


def test_differences_are_measured_against_the_module(steps):
    wanted = steps.Step(1.0, {"a.weight": torch.tensor([2.0]), "a.bias": torch.tensor([0.0])}, 0.0)
    moved = steps.Step(1.0, {"a.weight": torch.tensor([2.0]), "a.bias": torch.tensor([1e-3])}, 0.0)
    found = steps.difference(moved, wanted)
    assert found["where"] == "a.bias"
    assert found["largest"] == pytest.approx(5e-4)
    missing = steps.Step(1.0, {"a.weight": torch.tensor([2.0])}, 0.0)
    assert steps.difference(missing, wanted)["largest"] == 0  # no gradient is one of zeros
    assert steps.difference(missing, moved)["largest"] == math.inf


@pytest.mark.parametrize(
    ("largest", "jitter", "exact", "judged"),
    [
        (0.0, None, True, "equal"),
        (1e-9, None, True, "unexplained"),
        (1e-6, None, False, "rounding"),
        (1e-2, 5e-3, False, "explained"),
        (1e-1, 5e-3, False, "unexplained"),
        (math.inf, 1.0, False, "unexplained"),
        (math.nan, 1.0, False, "unexplained"),
    ],
)
def test_verdicts(steps, largest, jitter, exact, judged):
    assert steps.verdict({"largest": largest, "loss": 0.0}, jitter, exact) == judged


def test_nothing_drops_and_nothing_is_alike(sweep):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    sys.modules["model_zoo"].settle(model)
    assert model[2].p == 0
    assert model[1].weight.unique().numel() == 4


def test_an_error_is_a_line_and_a_place_of_ours(steps):
    from fqt_compile import FQTConfig

    with pytest.raises(Exception, match="bits") as caught:
        FQTConfig(bits=99)
    found = steps.fault(caught.value)
    assert found["line"].startswith("ConfigError: option 'bits'")
    assert found["frame"].startswith("fqt_compile/config.py:")


def test_a_model_that_takes_too_long_is_a_record(sweep):
    record = sweep.run(sweep.all_cases()[0], "captured", timeout=0.01)
    assert record["errors"]["start"]["line"] == "longer than 0.01 s"


def test_only_records_of_these_sources_and_stages_are_done(sweep):
    known = {"source": "abc", "stage": "oracle"}
    assert sweep.is_done(known, "abc", "captured")
    assert not sweep.is_done(known, "abc", "native")
    assert not sweep.is_done(known, "abd", "captured")


def test_tables_show_every_model_and_every_failure(sweep):
    tables = importlib.import_module("model_tables")
    good = {"group": "g", "errors": {}, "layers": 3, "packed": 2, "reasons": {"first layer": 1}, "passes_s": 0.5}
    good["oracle - eager"] = {"verdict": "unexplained", "largest": 0.5, "loss": 0.0, "where": "a.weight"}
    bad = {"group": "g", "errors": {"oracle": {"line": "PassError: no", "frame": "passes/rows.py:1 rows"}}}
    report = json.loads(json.dumps({"models": {"x/good": good, "x/bad": bad}}))
    assert [row[0] for row in tables.models(report)] == ["model", "good", "bad"]
    assert list(tables.summary(report))[-1][:4] == ("all", "2", "2 of 3", "1")
    assert [row[1] for row in tables.failures(report)] == ["part", "oracle - eager", "oracle"]
