"""Options are declared once; docstring, help and README say what the declarations say."""

from __future__ import annotations

import importlib
from pathlib import Path

from typer.testing import CliRunner

from fqt_compile import FQTConfig
from fqt_compile.cli import app
from fqt_compile.config import MEANINGS, OPTIONS, PRESETS, option_table


def test_every_default_is_accepted_and_presets_set_known_options():
    for name, field in OPTIONS.items():
        assert field.metadata["accepted"].checked(name, field.default) == field.default
    for preset in PRESETS:
        assert FQTConfig.from_options({"preset": preset})
        assert PRESETS[preset].keys() <= OPTIONS.keys()


def test_words_of_a_choice_are_explained_in_its_order():
    """The first word of a meaning belongs to the first choice, which is the default."""
    for name, field in OPTIONS.items():
        names = field.metadata["accepted"].names
        assert not names or field.default == names[0], name


def test_docstring_and_help_have_every_option():
    words = " ".join(str(FQTConfig.__doc__).split())
    assert all(
        f"{name} ({OPTIONS[name].metadata['accepted'].text}): {text}." in words for name, text in MEANINGS.items()
    )
    shown = CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "1000"}).output
    assert all(MEANINGS[name] in shown for name in ("bits", "keep", "scope", "grad"))
    assert ", ".join(MEANINGS) in shown


def test_readme_has_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    table = importlib.import_module("option_table")
    assert table.pages()
    for page in table.pages():
        assert table.renewed(page.read_text()) == page.read_text(), f"python docs/option_table.py renews {page.name}"
    assert option_table().count("\n") == len(OPTIONS) + 3  # with the preset and two lines of head
