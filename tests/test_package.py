"""The package as users get it: backend registered without an import, wheel and sdist complete and importable."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NEEDED = (
    "fqt_compile/passes/pipeline.py",
    "fqt_compile/kernels/cpu.py",
    "fqt_compile/kernels/templates/common.h",
    "fqt_compile/kernels/templates/triton/conv_product.py.jinja",
)


def test_backend_is_listed_without_an_import():
    code = "import torch; print('fqt1bit' in torch._dynamo.list_backends())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert "fqt1bit" in torch._dynamo.list_backends()


@pytest.mark.slow
def test_sdist_and_wheel_are_complete_and_importable(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]  # the wheel is built from the sdist
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
    code = "from fqt_compile.kernels import codegen, cpu; print(cpu.__file__); codegen.rendered_sources()"
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip().startswith(str(target)), done.stderr


def test_links_at_the_root_are_the_package():
    for name in ("passes", "kernels"):
        assert (ROOT / "fqt_compile" / name).resolve() == ROOT / name
