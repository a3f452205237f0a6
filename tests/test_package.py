"""The package as users get it: backend registered without an import, wheel and sdist complete and importable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fqt_compile.backend import source_hash
from fqt_compile.kernels.cache import CACHE_ENVIRONMENT

ROOT = Path(__file__).parent.parent
NEEDED = (
    "fqt_compile/passes/pipeline.py",
    "fqt_compile/kernels/cpu/native.py",
    "fqt_compile/kernels/gpu/launch.py",
    "fqt_compile/kernels/operations/products.py",
    "fqt_compile/kernels/reference/products.py",
    "fqt_compile/kernels/templates/cpu/common.h",
    "fqt_compile/kernels/templates/gpu/conv_product.py.jinja",
)


@pytest.mark.rotates(3)
def test_no_import_is_needed():
    code = """
import torch
assert "fqt1bit" in torch._dynamo.list_backends()
step = torch.compile(torch.nn.Linear(64, 64), backend="fqt1bit", options={"lowering": "eager", "skip": []})
step(torch.randn(4, 64)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 layers packed" in done.stderr
    assert "fqt1bit" in torch._dynamo.list_backends()


@pytest.mark.rotates(3)
def test_import_is_quiet_compiles_nothing_and_needs_no_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import fqt_compile.kernels.cpu
from fqt_compile.errors import TritonMissingError
from fqt_compile.kernels.gpu import launch
try:
    launch.require_triton(["cuda"])
except TritonMissingError as error:
    print(error)
"""
    env = {**os.environ, CACHE_ENVIRONMENT: str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "triton not found" not in line]) == (0, [])
    assert "pip install 'fqt-compile[gpu]'" in done.stdout
    assert not (tmp_path / "cache").exists()


@pytest.mark.rotates(3)
@pytest.mark.slow
def test_sdist_and_wheel_are_complete_and_importable(tmp_path):
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]  # the wheel is built from the sdist
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert all(any(name.endswith(needed) for name in names) for needed in NEEDED)
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert set(NEEDED) <= set(archive.namelist())
        archive.extractall(target)
    code = "from fqt_compile.kernels.cpu import codegen; print(codegen.__file__); codegen.rendered_sources()"
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip().startswith(str(target)), done.stderr


def test_links_at_the_root_are_the_package():
    for name in ("passes", "kernels"):
        assert (ROOT / "fqt_compile" / name).resolve() == ROOT / name


@pytest.mark.parametrize("links", [True, False], ids=["links", "installed"])
def test_a_change_in_any_folder_changes_the_source_hash(tmp_path, links):
    """It keys the caches of compiled graphs: a file that it misses would run with graphs of its old version."""
    package = tmp_path / "fqt_compile"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fqt_compile", package, symlinks=links, ignore=ignored)
    if links:
        for name in ("passes", "kernels"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    folders = [Path(folder) for folder, _, names in os.walk(package, followlinks=True) if names]
    assert {"fqt_compile", "passes", "kernels"} <= {folder.name for folder in folders}
    assert any("templates" in folder.parts for folder in folders)
    seen = {source_hash.__wrapped__(package)}
    for folder in folders:
        with open(min(path for path in folder.iterdir() if path.is_file()), "a") as file:
            file.write("\n")
        seen.add(source_hash.__wrapped__(package))
    assert len(seen) == 1 + len(folders)
    cached = package / "__pycache__"
    cached.mkdir()
    (cached / "module.pyc").write_bytes(b"compiled")
    assert source_hash.__wrapped__(package) in seen
