"""What the documents name exists: files, decisions (ADR n) and sections of docs/math.md; README stays short."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
FOLDERS = ("kernels", "passes", "fqt_compile", "tests", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
SECTIONS = re.findall(r"^## (\d+)\.", (ROOT / "docs" / "math.md").read_text(), re.MULTILINE)
NAMED = re.compile(rf"\b(?:docs|{'|'.join(FOLDERS)})/[\w*./-]*[\w*]")


def test_files_that_documents_name_exist():
    missing = []
    for document in DOCUMENTS:
        text = document.read_text().replace("/MACHINE/", "/zen*/").replace("/MACHINE", "")
        links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
        missing += [f"{document.name}: {link}" for link in links if not (document.parent / link).exists()]
        if document.parent.name == "adr" or document.name == "CHANGELOG.md":
            continue  # of their time
        names = set(NAMED.findall(text))
        missing += [f"{document.name}: {name}" for name in names if not [*ROOT.glob(name), *ROOT.glob(f"{name}-*")]]
    assert not missing


def test_decisions_and_sections_that_are_named_exist():
    numbers = {path.name[:4] for path in (ROOT / "docs" / "adr").glob("*.md")}
    for path in [*DOCUMENTS, *SOURCES]:
        text = path.read_text()
        decisions = re.findall(r"\bdocs/adr/(\d{4})", text) + [f"{int(n):04}" for n in re.findall(r"\bADR (\d+)", text)]
        assert numbers.issuperset(decisions), path.name
        assert {*SECTIONS} >= {*re.findall(r"\bmath\.md (\d+)", text)}, path.name


def test_readme_can_be_read_at_once():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120
