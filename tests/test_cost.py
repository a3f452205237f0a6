"""Layers left in float: in bfloat16, and where packing is slower by the cost model."""

from __future__ import annotations

import warnings

import pytest
from support.graphs import captured_once, images, operations
from support.nets import SmallNet

from fqt_compile import explain
from fqt_compile.errors import FQTWarning
from fqt_compile.kernels import cost


def test_float_layers_in_bfloat16():
    graph = captured_once("skips", float_dtype="bfloat16")
    lines = graph.stages["layout"].splitlines()
    products = [line for line in lines if " = aten.convolution.default" in line]
    assert products
    assert all(": bfloat16[" in line for line in products)
    assert operations(graph.stages["layout"])["fqt.output_product"] == 5


def test_layers_slower_than_float_stay_in_float_if_asked_to(monkeypatch):
    slow, fast = cost.Line(1.0, 1.0), cost.Line(0.0, 1e12)
    for packed, other, decision in ((slow, fast, "float"), (fast, slow, "packed")):
        monkeypatch.setattr(cost, "costs", lambda p=packed, o=other: cost.Costs(p, o, o))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FQTWarning)  # nothing is packed
            sites = explain(SmallNet(), images(8), config={"skip": ["first", "last", "slow"]}).sites
        assert {s.decision for s in sites if s.name in ("conv1", "conv2", "fc1")} == {decision}
        if decision == "float":
            assert "skip='slow'" in next(s.reason for s in sites if s.name == "conv1")


def test_costs_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FQT_COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "REPEATS", 1)
    cost._costs.cache_clear()
    measured = cost.costs()
    assert measured.packed.rate > 0
    cost._costs.cache_clear()
    monkeypatch.setattr(cost, "_packed", lambda layer: pytest.fail("measured twice"))
    assert cost.costs() == measured
    cost._costs.cache_clear()


def test_a_line_through_two_points():
    line = cost.Line.through((10.0, 2.0), (30.0, 3.0))
    assert line == cost.Line(overhead=1.5, rate=20.0)
    assert line.seconds(50.0) == 4.0
