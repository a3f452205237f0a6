"""The sample of the grids: what it always has, and that nothing is left out for ever."""

from __future__ import annotations

import pytest
from support import sample
from support.grid import KINDS, LAYERS, OPERATIONS, PROGRAM_LAYERS, WIDE, WITH_PROGRAMS, sampled

DAYS = [str(day) for day in range(60)]


def names(operation: str) -> list[str]:
    return [layer.name for layer in sampled(operation, LAYERS)]


def test_every_layer_is_of_a_kind():
    assert {name for kind in KINDS for name in kind} == {layer.name for layer in [*LAYERS, *WIDE]}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_day_has_every_kind_and_all_days_together_every_layer(operation, monkeypatch):
    seen = set()
    for day in DAYS:
        monkeypatch.setenv(sample.ENVIRONMENT, day)
        chosen = names(operation)
        assert chosen == names(operation)  # the same in every worker
        for kind in KINDS:
            members = {name for name in kind if name in {layer.name for layer in LAYERS}}
            assert not members or members & set(chosen), (day, kind)
        seen |= set(chosen)
        assert operation not in WITH_PROGRAMS or set(PROGRAM_LAYERS) <= set(chosen)
    assert seen == {layer.name for layer in LAYERS}


def test_all_is_everything_and_a_seed_can_be_repeated(monkeypatch):
    monkeypatch.setenv(sample.ENVIRONMENT, sample.ALL)
    assert sampled(OPERATIONS[0], LAYERS) == LAYERS
    assert sample.one_in(1000, "anything")
    assert sample.some("anything", [1, 2]) == [1, 2]
    monkeypatch.setenv(sample.ENVIRONMENT, "7")
    assert sample.number("a name") == sample.number("a name")
    assert sum(sample.one_in(4, str(i)) for i in range(4000)) == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("items", [["alone"], ["a", "b", "c"], list(range(7))], ids=len)
def test_days_in_a_row_have_everything(items, monkeypatch):
    for days in (2, 3):
        seen = []
        for day in range(20261128, 20261128 + days):
            monkeypatch.setenv(sample.ENVIRONMENT, str(day))
            seen += sample.turn(days, 5, items)
        assert sorted(seen) == sorted(items) == sample.turn(days, 5, items, in_a_row=days)
