"""Keeping large buffers from step to step.

glibc gives freed memory above 32 MB, and memory at the top of its heap, back to the system. The next step gets it as
fresh pages, and the faults cost as much as the products computed in them: 2 us a page, 18 ms for the float output of
VGG-16's first layer (33.5 MB), which takes 5 ms to compute.
"""

from __future__ import annotations

import ctypes
import functools
import sys

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 << 20

kept = False
"""Whether `keep_freed_memory` has succeeded: then the heap keeps its addresses, and what was advised about them."""


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, in the whole process, for good; False where it cannot be told to."""
    global kept
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, TOP_PAD))
    done = [bool(mallopt(ctypes.c_int(name), ctypes.c_int(setting))) for name, setting in settings]
    kept = all(done)
    return kept
