"""The faster of two ways to count the products of gradients is measured once and remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from fqt_compile.kernels import codegen, counting, cpu
from fqt_compile.kernels import isa as instruction_sets

POPCOUNTS, TABLES = counting.CANDIDATES


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a measurement finds, on a CPU that has both and where nobody asked for one; counts measurements."""
    found = {POPCOUNTS: 2.0, TABLES: 1.0, "measured": 0}

    def measure(isa: str) -> float:
        found["measured"] += 1
        return found[isa]

    monkeypatch.setenv(codegen.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.delenv(instruction_sets.ENVIRONMENT, raising=False)
    monkeypatch.setattr(instruction_sets, "_default", lambda: POPCOUNTS)
    monkeypatch.setattr(counting, "_seconds", measure)
    monkeypatch.setattr(counting, "_faster", counting._faster.__wrapped__)  # forgets at once what is not on disk
    return found


@pytest.mark.parametrize("faster", counting.CANDIDATES)
def test_gradients_take_the_faster(seconds: dict[str, float], faster: str) -> None:
    seconds[faster] = 0.5
    assert {counting.isa_of(template) for template in counting.GRADIENT_PRODUCTS} == {faster}
    assert counting.isa_of("output_product") == POPCOUNTS
    assert seconds["measured"] == 2
    seconds[POPCOUNTS], seconds[TABLES] = seconds[TABLES], seconds[POPCOUNTS]  # not asked for again
    assert counting.isa_of("grad_input_product") == faster


def test_what_is_asked_for_is_used(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.force_isa("portable"):
        assert counting.isa_of("grad_weight_product") == "portable"
    monkeypatch.setenv(instruction_sets.ENVIRONMENT, POPCOUNTS)
    assert counting.isa_of("grad_weight_product") == POPCOUNTS
    assert not seconds["measured"]


def test_other_cpus_have_no_choice(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets, "_default", lambda: TABLES)
    assert counting.isa_of("grad_weight_product") == TABLES
    assert not seconds["measured"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"avx512": 1}', '{"avx512": 1, "avx512bw": "x"}'])
def test_unreadable_answer_is_measured_again(seconds: dict[str, float], text: str) -> None:
    assert counting.isa_of("grad_weight_product") == TABLES
    (path,) = codegen.cache_directory().glob("counting-*.json")
    path.write_text(text)
    assert counting.isa_of("grad_weight_product") == TABLES
    assert seconds["measured"] == 4


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_measures(isa: str) -> None:
    assert 0 < counting._seconds(isa) < 10
