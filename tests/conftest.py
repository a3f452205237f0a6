"""Fixtures shared by all tests: deterministic, with clean compiler caches; how much of the grids is tested."""

from __future__ import annotations

import os

import pytest
import torch
from support import sample
from support.finetuning import settings, uncompiled  # noqa: F401

from fqt_compile.passes.pipeline import STRICT_VARIABLE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole grids, not the sample of the day (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(STRICT_VARIABLE, "1")  # a pass that fails is a failure
    if config.getoption("--all"):
        os.environ[sample.ENVIRONMENT] = sample.ALL
    sample.seed()  # before workers are started, so that they have the same


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
