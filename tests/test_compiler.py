"""What the compiler and the disk do wrong: once or always, each in one sentence, and nothing of it stays."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fqt_compile import notices
from fqt_compile.errors import CompilerMissingError, FQTWarning, KernelBuildError
from fqt_compile.kernels import cache as cache_module
from fqt_compile.kernels import cost
from fqt_compile.kernels.cache import CACHE_ENVIRONMENT, keep, locked, recalled, replacing, scratch
from fqt_compile.kernels.cpu import codegen, compiler
from fqt_compile.status import GraphStatus, LayerStatus

TEMPLATE = "dequantize"  # the quickest to compile


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, nothing loaded, nothing known of compilers, and no headers to compile."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv(CACHE_ENVIRONMENT, str(directory))
    monkeypatch.setattr(codegen, "_libraries", {})
    monkeypatch.setattr(compiler, "_openmp", {})
    monkeypatch.setattr(codegen, "_precompiled_headers", lambda *_: ())
    return directory


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Use a compiler that is a shell script: ``first`` before what the real one does, in which $n counts its calls."""
    real = codegen.find_compiler()[0]

    def script(first: str, then: str = f'exec {real} "$@"') -> Path:
        path, counter = tmp_path / "compiler", tmp_path / "calls"
        count = f"n=$(cat {counter} 2>/dev/null || echo 0); echo $((n + 1)) >{counter}"
        versions = 'case "$*" in *--version*) echo 1.0; exit;; esac'
        path.write_text(f"#!/bin/sh\n{versions}\n{count}\n{first}\n{then}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        return counter

    return script


def build() -> Path:
    return codegen.build(TEMPLATE, "portable")


def unfinished(directory: Path) -> list[Path]:
    return list(directory.glob(".building-*"))


def has_threads(library: Path) -> bool:
    return b"GOMP_parallel" in library.read_bytes() or b"__kmpc_fork_call" in library.read_bytes()


# -- the compiler ------------------------------------------------------------------------------------------------


@pytest.mark.rotates(3)
@pytest.mark.parametrize("call", [0, 1], ids=["asking for threads", "compiling a kernel"])
@pytest.mark.parametrize(
    "end",
    ["kill -9 $$", "exit 137", 'echo "fatal error: Killed signal terminated program cc1plus" >&2; exit 1'],
    ids=["signal", "shell", "a part of it"],
)
def test_a_compiler_killed_once_costs_no_threads(cache: Path, use: Callable[..., Path], call: int, end: str) -> None:
    use(f"if [ $n = {call} ]; then {end}; fi")
    library = build()
    assert has_threads(library)
    assert not unfinished(cache)


def test_a_compiler_that_is_always_killed_is_explained(cache: Path, use: Callable[..., Path]) -> None:
    use('touch "$TMPDIR/ccXYZ.s"; kill -9 $$')
    with pytest.raises(KernelBuildError, match=r"was killed or found no memory, twice; remedy: free memory") as raised:
        build()
    assert "-fopenmp" in str(raised.value)
    assert not list(cache.glob("*.so"))
    assert not unfinished(cache)


def test_a_compiler_without_openmp_builds_without_threads_and_says_so(cache: Path, use: Callable[..., Path]) -> None:
    use('case "$*" in *-fopenmp*) exit 1;; esac')
    with pytest.warns(FQTWarning, match="has no OpenMP .* one thread; remedy: install its OpenMP library"):
        library = build()
    assert not has_threads(library)
    use("")  # now it has
    compiler._openmp.clear()
    assert has_threads(build())


def test_a_failure_without_and_with_threads_says_nothing_of_threads(cache: Path, use: Callable[..., Path]) -> None:
    use("exit 1")
    with pytest.raises(KernelBuildError, match=r"status 1; remedy: set CXX .*"):
        build()
    use("")
    assert has_threads(build())


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("/tmp", CompilerMissingError, "CXX='/tmp', which is no program that can be run"),
        ("'g++", CompilerMissingError, "which is no command"),
        ("/bin/false", KernelBuildError, r"(?s)failed with status 1; remedy: set CXX to another.*wrote no message"),
        ("/bin/true", KernelBuildError, r"reported success but wrote no library; remedy: set CXX"),
    ],
)
def test_what_is_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(error, match=message):
        build()
    assert not list(cache.glob("*.so"))
    assert not unfinished(cache)


def test_a_file_that_is_no_program(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\0\1\2")
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(KernelBuildError, match=r"cannot be run \(Exec format error\); remedy: set CXX"):
        build()


def test_messages_in_any_encoding(cache: Path, use: Callable[..., Path]) -> None:
    use(r"printf 'caf\351\n' >&2; exit 1")
    with pytest.raises(KernelBuildError, match="caf�"):
        build()


def test_a_library_that_cannot_be_loaded_is_removed(cache: Path, use: Callable[..., Path]) -> None:
    real = codegen.find_compiler()[0]
    use("", then=f'exec {real} -c "$@"')
    with pytest.raises(KernelBuildError, match=r"cannot be loaded .* is removed; remedy: try again"):
        codegen.library(TEMPLATE, "portable")
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize("code", ["failed to map segment from shared object: Operation not permitted", "whatever"])
def test_a_cache_that_runs_no_code(cache: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: {code}")

    library = cache / "x.so"
    library.write_bytes(b"a library")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    if code == "whatever":
        monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(KernelBuildError, match=r"runs no code .*noexec.*; remedy: set FQT_COMPILE_CACHE .* execution"):
        codegen._loaded(library)
    assert library.exists()


def test_broken_precompiled_headers_are_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = cache / "headers-0.h"
    header.write_text("#error broken")
    gch = Path(f"{header}.gch")
    gch.write_bytes(b"half of it")
    assert not codegen._intact(gch)
    monkeypatch.setattr(codegen, "_precompiled_headers", lambda *_: ("-include", str(header)))
    assert has_threads(build())
    assert not gch.exists()


# -- the cache ---------------------------------------------------------------------------------------------------


def test_a_broken_checksum_counts_as_absent(cache: Path) -> None:
    library = build()
    for damage in (b"\xff\xfe\0", b"", b"0" * 64):
        library.with_suffix(".sha256").write_bytes(damage)
        assert not codegen._intact(library)
    assert build() == library
    assert codegen._intact(library)
    library.with_suffix(".sha256").unlink()
    library.with_suffix(".sha256").mkdir()
    with pytest.raises(KernelBuildError, match=r"sha256: Is a directory"):
        build()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["write_text", "mkstemp", "mkdtemp", "replace", "lock"])
def test_what_the_system_refuses(cache: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    monkeypatch.setattr(codegen, "has_openmp", lambda *_: True)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    if where == "lock":
        opened = open

        def only_locks(path: object, *args: object, **kwargs: object) -> object:
            return (refuse if ".lock" in str(path) else opened)(path, *args, **kwargs)

        monkeypatch.setattr("builtins.open", only_locks)
    elif where == "write_text":
        monkeypatch.setattr(Path, "write_text", refuse)
    elif where == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    else:
        monkeypatch.setattr(cache_module.tempfile, where, refuse)
    with pytest.raises(KernelBuildError, match=rf"{cache}.*: {os.strerror(number)}; .*remedy: .*FQT_COMPILE_CACHE"):
        build()
    monkeypatch.undo()
    assert not unfinished(cache)
    assert not list(cache.glob("*.so"))


def test_a_full_disk_under_the_compiler(cache: Path, use: Callable[..., Path]) -> None:
    use('echo "final link failed: No space left on device" >&2; exit 1')
    with pytest.raises(
        KernelBuildError, match=r"found no space .*; remedy: free space there, or set FQT_COMPILE_CACHE"
    ):
        build()
    assert not unfinished(cache)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target, other = tmp_path / "x-1.so", tmp_path / ".building-x-2-abc.so"
    other.write_text("being written")
    (tmp_path / ".building-x-1-abc.so").write_text("left")
    (tmp_path / ".building-x-1-def").mkdir()
    (tmp_path / ".building-x-1-def" / "cc.s").write_text("left")
    with locked(target):
        assert unfinished(tmp_path) == [other]


def test_temporary_files_go_with_any_exception(tmp_path: Path) -> None:
    for manager in (replacing, scratch):
        with pytest.raises(KeyboardInterrupt), manager(tmp_path / "file"):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# -- measurements and messages -----------------------------------------------------------------------------------

BROKEN = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"packed": 1}', b'{"packed": {"overhead": 0}}']


@pytest.mark.parametrize("content", [*BROKEN, None], ids=range(len(BROKEN) + 1))
def test_an_unreadable_cost_is_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(cost, "_packed", lambda layer: (1e6 * layer[0], 1e-3 * layer[0]))
    monkeypatch.setattr(cost, "_float", lambda layer, dtype: (1e6 * layer[0], 1e-3 * layer[0]))
    measured = cost._costs.__wrapped__("key")
    path = cache / "costs-key.json"
    whole = path.read_text()
    if content is None:
        content = json.dumps({name: {"overhead": 0, "rate": float("nan")} for name in json.loads(whole)}).encode()
    path.write_bytes(content)
    assert cost._costs.__wrapped__("key") == measured
    assert path.read_text() == whole
    monkeypatch.setattr(cache_module.tempfile, "mkstemp", full)
    path.unlink()
    assert cost._costs.__wrapped__("key") == measured  # kept nowhere, and measured next time


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b'"text"', b'{"a": 1}', b"[1]"])
def test_unreadable_notices_say_so(cache: Path, content: bytes) -> None:
    graph = GraphStatus("training", "no rows", (LayerStatus("fc", False, "narrow"),))
    notices.remember("k", ["all of it runs in float"], graph)
    assert notices.recall("k") == (["all of it runs in float"], graph)
    (cache / "notices-k.json").write_bytes(content)
    (message,), none = notices.recall("k")
    assert none is None
    assert "cannot be read" in message
    assert "remedy: fqt_compile.explain" in message
    notices.remember("k", [], graph)
    assert notices.recall("k") == ([], graph)
    assert notices.recall("other") == ([], None)


def test_a_full_cache_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    keep(cache / "a.json", 1)
    assert recalled(cache / "a.json") is None
    assert not list(cache.iterdir())
