"""Forks: a child has one thread of its process, and GNU OpenMP waits forever for the others.

What is compiled asks for a number of threads at every parallel region. Where no level of parallelism is allowed, a
region runs on the thread that it meets, and every loop is still divided and computed whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

GNU_OPENMP = "libgomp.so.1"


@functools.cache
def survive_forks() -> None:
    """Let forked children compute with one thread, in torch's kernels, too (other OpenMP libraries see to it)."""
    if hasattr(os, "register_at_fork"):
        with contextlib.suppress(OSError):  # not loaded: nothing has threads
            openmp = ctypes.CDLL(GNU_OPENMP, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            os.register_at_fork(after_in_child=lambda: openmp.omp_set_max_active_levels(0))
