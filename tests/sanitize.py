"""Do the native kernels stay inside their operands? The grid under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [arguments of pytest ...]

Runs tests/test_kernels.py (every operation, every instruction set that this CPU has, 1 and 2 threads; ``--all`` for
more than the layers of the day) with kernels compiled with ``-fsanitize=address,undefined``. Operands are torch's own
allocations, each with a red zone around it. Needs g++ with its sanitizers. Not part of `make test`: kernels are several
times slower and are compiled anew. A finding ends the run with the sanitizer's report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
TESTS = [str(ROOT / "tests" / "test_kernels.py"), "-k", "reference"]


def library(compiler: str, name: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("g++ is not on PATH")
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "CXX": f"{compiler} {FLAGS}",
            "FQT_COMPILE_CACHE": cache,
            "LD_PRELOAD": " ".join(library(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
            # Python and torch do not free everything; torch's own threads are not instrumented.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *TESTS, *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
