"""Fixtures shared by all tests: deterministic, with clean compiler caches; how much of the grids is tested."""

from __future__ import annotations

import collections
import gc
import os

import pytest
import torch
from support import sample
from support.finetuning import settings, uncompiled  # noqa: F401
from torch._dynamo import guards

from fqt_compile.passes.pipeline import STRICT_VARIABLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole grids, not the sample of the day (make test-all)")
    parser.addoption("--days", type=int, default=1, help="tests that take turns: those of so many days (.ci/run: 3)")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(STRICT_VARIABLE, "1")  # a pass that fails is a failure
    if config.getoption("--all"):
        os.environ[sample.ENVIRONMENT] = sample.ALL
    guards.profile_guard_manager = lambda *arguments: 0.0  # Dynamo times them on a flushed cache: 30 ms a graph
    sample.seed()  # before workers are started, so that they have the same


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``rotates(n)``: one in n of a test's parametrizations a day; a test without any, every n-th day.

    In turn, so that no day has all of the dear ones. Tests that are asked for by name (``file::test``) run on any day.
    """
    if any("::" in argument for argument in config.args):
        return
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    rotating = {name: each for name, each in tests.items() if each[0].get_closest_marker("rotates")}
    left_out = set()
    for first, (_, each) in enumerate(sorted(rotating.items())):
        (days,) = each[0].get_closest_marker("rotates").args
        left_out |= set(each) - set(sample.turn(days, first, each, config.getoption("--days")))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Captured graphs are millions of objects that are no garbage: looking through them again and again took 7 %."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


def pytest_report_header() -> str:
    return f"sample of the grids: {sample.ENVIRONMENT}={sample.seed()} (--all for all of them)"


@pytest.fixture(autouse=True)
def _deterministic():
    torch._dynamo.reset()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core has the other worker
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(_deterministic):
    """For tests of what threads share: kernels, launches and whole steps of them."""
    torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter):
    """The sample again, for who has to repeat it; every GPU kernel, shape and architecture that was covered."""
    terminalreporter.write_line(pytest_report_header())
    reports = terminalreporter.getreports("passed")
    lines = [value for report in reports for key, value in report.user_properties if key == "triton coverage"]
    if lines:
        terminalreporter.section("GPU kernels covered without a GPU: where | what | kernels | shapes:argument lists")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)
