"""Building kernels: the cache is shared, private and repaired; a missing or failing compiler is explained."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import processes

from fqt_compile.errors import CompilerMissingError, KernelBuildError
from fqt_compile.kernels import cpu
from fqt_compile.kernels.cache import CACHE_ENVIRONMENT
from fqt_compile.kernels.cpu import codegen, native

TEMPLATE = "dequantize"  # the quickest to compile
BUILD = f"""
from fqt_compile.kernels.cpu import codegen
codegen.library({TEMPLATE!r}, "portable")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv(CACHE_ENVIRONMENT, str(directory))
    monkeypatch.setattr(codegen, "_libraries", {})
    native._kernel.cache_clear()
    yield directory
    native._kernel.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def use_library() -> None:
    with cpu.force_isa("portable"):
        rows = torch.tensor([0], dtype=torch.int32)
        one = torch.ones(1)
        planes = torch.ones(1, 1, 1, dtype=torch.int64)
        assert cpu.OPERATIONS["dequantize_rows"](planes, one, one, rows, 1, 1).item() == 2


def test_cache_is_private_and_readable(cache: Path) -> None:
    use_library()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (library,) = libraries(cache)
    source = library.with_suffix(".cpp").read_text()
    assert "dequantize_grad_input" in source
    assert "{{" not in source
    assert "{%" not in source


@pytest.mark.rotates(2)
def test_concurrent_processes_build_one_library(cache: Path) -> None:
    started = [processes.Process(["-c", BUILD], os.environ) for _ in range(2)]
    assert [process.wait(120).returncode for process in started] == [0, 0]
    assert len(libraries(cache)) == 1
    assert not list(cache.glob(".building-*"))


def test_concurrent_threads_load_one_library(cache: Path) -> None:
    threads = [threading.Thread(target=codegen.library, args=(TEMPLATE, "portable")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codegen._libraries) == len(libraries(cache)) == 1


@pytest.mark.rotates(4)
@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_library_is_rebuilt(cache: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    with cpu.force_isa("portable"):
        library = codegen.build(TEMPLATE, "portable")
    whole = library.read_bytes()
    library.write_bytes(whole[:keep])
    use_library()
    assert library.read_bytes() == whole


def test_no_compiler_is_explained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompilerMissingError, match=r'install g\+\+, set CXX .*"lowering": "eager"'):
        use_library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerMissingError, match="CXX='no-such-compiler'"):
        use_library()


def test_failing_compiler_is_explained(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text('#!/bin/sh\necho "line 1: no such thing" >&2\nexit 3\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelBuildError, match=r"(?s)status 3.*command: .*broken-compiler.*no such thing"):
        use_library()
    assert not libraries(cache)
    assert not list(cache.glob(".building-*"))


def test_cxx_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = codegen.find_compiler()[0]
    monkeypatch.setenv("CXX", f"{compiler} -DFQT_TEST")
    assert codegen.find_compiler() == [compiler, "-DFQT_TEST"]
    use_library()


def test_headers_are_precompiled_and_the_library_is_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library()
    (library,) = libraries(cache)
    assert len(list(cache.glob("headers-*.h.gch"))) == 1
    monkeypatch.setenv(CACHE_ENVIRONMENT, str(tmp_path / "without"))
    monkeypatch.setattr(codegen, "_precompiled_headers", lambda *_: ())
    assert codegen.build(TEMPLATE, "portable").read_bytes() == library.read_bytes()


def test_a_compiler_without_precompiled_headers_builds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    refuse = 'case "$*" in *c++-header*) exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {codegen.find_compiler()[0]} "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    use_library()
    assert not list(cache.glob("*.gch"))


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_cache_writable_by_others_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(KernelBuildError, match=r"not writable by group or others; remedy: chmod 700"):
        use_library()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_cache_of_another_user_is_refused(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.raises(KernelBuildError, match="owned by user 12345"):
        use_library()


def test_cache_that_is_a_file_is_refused(cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(KernelBuildError, match="remedy: set FQT_COMPILE_CACHE"):
        use_library()
