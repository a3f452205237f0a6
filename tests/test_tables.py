"""The tables in README.md and docs/ are those of the recorded results, and every result names its machine."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("tables")
    sys.modules.pop("tables")


def test_tables_are_those_of_the_results(tables):
    differ = [path.name for path in tables.documents() if path.read_text() != tables.with_tables(path.read_text())]
    assert not differ, "after a new record: python benchmarks/tables.py --write"


def test_every_table_is_shown_and_none_is_empty(tables):
    shown = set()
    for path in tables.documents():
        for _, name, folders, _ in tables.MARKED.findall(path.read_text()):
            shown.add(name)
            assert len(list(tables.TABLES[name](*(RESULTS / folder for folder in folders.split())))) > 1, name
        begun = re.findall(r"^<!-- table:", path.read_text(), re.MULTILINE)
        assert len(begun) == len(tables.MARKED.findall(path.read_text())), f"{path.name}: a table without an end"
    assert shown == tables.TABLES.keys()


def test_a_changed_number_is_found(tables):
    path = ROOT / "docs" / "results.md"
    assert tables.with_tables(path.read_text().replace("| 1301 |", "| 1300 |")) == path.read_text()


@pytest.mark.parametrize("folder", sorted(path.name for path in RESULTS.iterdir()))
def test_results_are_those_of_their_machine(folder):
    machine = json.loads((RESULTS / folder / "machine.json").read_text())
    assert {"name", "cpu", "isa", "cores", "torch", "compiler", "recorded", "sources"} <= machine.keys()
    for path in (RESULTS / folder).glob("*.json"):
        contents = json.loads(path.read_text())
        for report in contents.values() if path.stem == "scaling" else [contents]:
            if "versions" in report:
                assert (report["cpu"], report["versions"]["torch"]) == (machine["cpu"], machine["torch"]), path.name


def test_costs_on_paper_are_those_of_the_model(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "gpu_cost_model.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "gpu.md").read_text()
