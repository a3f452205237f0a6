"""The package's shape: imports point downwards only, none in a circle, and public names are what they say."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path

import fqt_compile

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fqt_compile"
FLOORS = (
    ("errors",),
    ("batches", "config", "cumulative", "data_parallel", "kernels", "optional"),
    ("attention", "cli_options", "models", "passes", "recalibrate", "results"),
    ("inductor", "interpret", "origin", "weights"),
    ("status",),
    ("notices", "watch"),
    ("backend",),
    ("capture", "saving"),
    ("eager_fqt",),
    ("bench", "finetune", "inspect"),
    ("cli",),
)
"""Modules and packages of fqt_compile from the ground up: each imports from lower floors only."""
LINKED = ("kernels", "passes")
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module by its name below fqt_compile; the package itself is ``""``."""
    folders = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir())]  # rglob does not follow links
    files = {file for folder in folders for file in folder.rglob("*.py")}
    parts = {file: file.relative_to(PACKAGE).with_suffix("").parts for file in files}
    return {".".join(name for name in names if name != "__init__"): file for file, names in parts.items()}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, inside functions as well."""
    package = ["fqt_compile", *name.split(".")] if name else ["fqt_compile"]
    package = package if file.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = base + (node.module.split(".") if node.module else [])
            if source[0] == "fqt_compile":
                inside = ".".join(source[1:])
                names = {f"{inside}.{alias.name}".strip(".") for alias in node.names}
                found |= {other if other in known else inside for other in names}
    return found - {name}


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def test_imports_point_downwards():
    assert {name.split(".")[0] for name in modules()} - {""} == FLOOR.keys()
    for name, others in arrows().items():
        room = name.split(".")[0]
        for other in {other.split(".")[0] for other in others} - {room}:
            assert room == "" or FLOOR[other] < FLOOR[room], f"{name} imports {other}, which is not below it"


def test_no_module_imports_in_a_circle():
    own = {name: others for name, others in arrows().items() if name.split(".")[0] not in LINKED}
    graphlib.TopologicalSorter(own).prepare()


def test_every_package_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in modules().values() if file.name == "__init__.py"}
    assert set(packages) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_public_names_stay_what_they_are_when_everything_is_imported():
    """A package called as a function would take its place as soon as it is imported."""
    for module in pkgutil.walk_packages(fqt_compile.__path__, "fqt_compile."):
        if module.name.split(".")[1] not in LINKED:  # GPU kernels need Triton
            importlib.import_module(module.name)
    for name in ("compare", "eager", "explain", "fqt1bit", "gradient_noise", "load", "recalibrate", "save"):
        assert inspect.isfunction(getattr(fqt_compile, name)), name
    assert all(name in fqt_compile.__doc__ for name in fqt_compile.__all__)
