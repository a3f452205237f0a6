"""Fixtures shared by all tests: deterministic, with clean compiler caches; how much of the grids is tested."""

from __future__ import annotations

import collections
import math
import os

import pytest
import torch
from support import sample
from support.finetuning import settings, uncompiled  # noqa: F401
from torch._dynamo import guards

from fqt_compile.passes.pipeline import STRICT_VARIABLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole grids, not the sample of the day (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(STRICT_VARIABLE, "1")  # a pass that fails is a failure
    if config.getoption("--all"):
        os.environ[sample.ENVIRONMENT] = sample.ALL
    guards.profile_guard_manager = lambda *arguments: 0.0  # Dynamo times them on a flushed cache: 30 ms a graph
    sample.seed()  # before workers are started, so that they have the same


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``rotates(n)``: one in n of a test's parametrizations a day, at least one; a test without any, one day in n."""
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    left_out = []
    for name, each in tests.items():
        marker = each[0].get_closest_marker("rotates")
        if marker is None:
            continue
        (days,) = marker.args
        if len(each) > 1:
            chosen = sample.some(name, each, math.ceil(len(each) / days))
        else:
            chosen = each if sample.one_in(days, name) else []
        left_out += [item for item in each if item not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> str:
    return f"sample of the grids: {sample.ENVIRONMENT}={sample.seed()} (--all for all of them)"


@pytest.fixture(autouse=True)
def _deterministic():
    torch._dynamo.reset()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    """The sample again, for who has to repeat it; every GPU kernel, shape and architecture that was covered."""
    terminalreporter.write_line(pytest_report_header())
    reports = terminalreporter.getreports("passed")
    lines = [value for report in reports for key, value in report.user_properties if key == "triton coverage"]
    if lines:
        terminalreporter.section("GPU kernels covered without a GPU: where | what | kernels | shapes:argument lists")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)
