"""The faster of two ways to count the products of gradients is measured once and remembered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fqt_compile.errors import FQTWarning, KernelBuildError
from fqt_compile.kernels import cache, cpu
from fqt_compile.kernels.cpu import counting
from fqt_compile.kernels.cpu import isa as instruction_sets
from fqt_compile.kernels.cpu.functions import Function

POPCOUNTS, TABLES = counting.CANDIDATES


class Measurement:
    """What is found on a CPU that has both, where nobody asked for one; ``count``: how often it is made."""

    def __init__(self) -> None:
        self.seconds = [2.0, 1.0]
        self.count = 0
        self.error: Exception | None = None

    def __call__(self, threads: int) -> list[float]:
        self.count += 1
        if self.error is not None:
            raise self.error
        return list(self.seconds)


@pytest.fixture
def measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurement]:
    made = Measurement()
    monkeypatch.setenv(cache.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(instruction_sets, "_default", lambda: (POPCOUNTS, False))
    monkeypatch.setattr(counting, "_seconds", made)
    counting._faster.cache_clear()
    yield made
    counting._faster.cache_clear()


@pytest.mark.parametrize("faster", counting.CANDIDATES)
def test_gradients_take_the_faster(measurement: Measurement, faster: str) -> None:
    measurement.seconds[counting.CANDIDATES.index(faster)] = 0.5
    assert {counting.isa_of(template) for template in counting.GRADIENT_PRODUCTS} == {faster}
    assert counting.isa_of("output_product") == POPCOUNTS
    counting._faster.cache_clear()  # as in another process
    measurement.seconds.reverse()
    assert counting.isa_of("grad_input_product") == faster
    assert measurement.count == 1


def test_what_is_asked_for_is_used(measurement: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.force_isa("portable"):
        assert counting.isa_of("grad_weight_product") == "portable"
    monkeypatch.setattr(instruction_sets, "_default", lambda: (POPCOUNTS, True))
    assert counting.isa_of("grad_weight_product") == POPCOUNTS
    assert not measurement.count


def test_other_cpus_have_no_choice(measurement: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets, "_default", lambda: ("avx2", False))
    assert counting.isa_of("grad_weight_product") == "avx2"
    assert not measurement.count


@pytest.mark.parametrize("text", ["", "{", "[]", '{"avx512": 1}', '{"avx512": 1, "avx512tables": "x"}', "1" * 400])
def test_unreadable_answer_is_measured_again(measurement: Measurement, text: str) -> None:
    assert counting.isa_of("grad_weight_product") == TABLES
    (path,) = cache.cache_directory().glob("counting-*.json")
    path.write_text(text)
    counting._faster.cache_clear()
    assert counting.isa_of("grad_weight_product") == TABLES
    assert measurement.count == 2


def test_an_answer_that_cannot_be_kept_is_used(measurement: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise PermissionError(path)
        yield path

    monkeypatch.setattr(cache, "replacing", full)
    assert counting.isa_of("grad_weight_product") == TABLES


def test_popcounts_where_tables_cannot_be_built(measurement: Measurement) -> None:
    measurement.error = KernelBuildError("no such flag")
    with pytest.warns(FQTWarning, match=r"popcounts.*no such flag"):
        assert counting.isa_of("grad_weight_product") == POPCOUNTS


def test_threads_measure_once(measurement: Measurement) -> None:
    barrier, found = threading.Barrier(4), []

    def ask() -> None:
        barrier.wait()
        found.append(counting.isa_of("grad_input_product"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [TABLES] * 4
    assert measurement.count == 1
    assert not instruction_sets.is_forced()


def test_measures_without_forcing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads would see it."""
    run, forced = Function.on, []

    def noticed(self: Function, *args: Any) -> int:
        forced.append(instruction_sets._forced)
        return run(self, *args)

    monkeypatch.setattr(Function, "on", noticed)
    isas = tuple(cpu.supported_isas())
    with torch.device("meta"):  # what tensors are made on by default does not matter
        seconds = counting._seconds(1, isas)
    assert len(seconds) == len(isas)
    assert all(0 < s < 10 for s in seconds)
    assert forced == [None] * len(isas) * (1 + counting.REPEATS)
