"""Keeping large buffers from step to step.

glibc gives freed memory above 32 MB, and memory at the top of its heap, back to the system. The next step gets it as
fresh pages, and the faults cost as much as the products computed in them: 2 us a page, 18 ms for the float output of
VGG-16's first layer (33.5 MB), which takes 5 ms to compute.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 << 20

kept = False
"""Whether `keep_freed_memory` has succeeded: then the heap keeps its addresses, and what was advised about them."""


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, in the whole process (but see `Excess`); False where it cannot."""
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


class Excess:
    """Gives back what the process has freed and the steps do not use: data that a user has let go of, say.

    Called at the beginning of every forward graph: with one graph a step, when only what stays is in use. Two calls
    after memory was given back, what the process occupies is what the steps need; `SLACK` bytes above that, it is given
    back again, at most every `SECONDS`. The next step gets its own part anew, at the cost of its page faults, once.
    """

    SLACK, SECONDS, FIRST, SETTLED = 256 << 20, 10.0, 3, 2

    def __init__(self) -> None:
        self.calls, self.measured_at, self.needed, self.next = 0, 0, 0, 0.0

    def give_back(self) -> None:
        """To be called at the beginning of a forward graph; mostly, nothing is to be done."""
        if not kept:
            return
        self.calls += 1
        if self.calls == self.FIRST:
            self._trim()
        elif self.calls == self.measured_at:
            self.needed, self.next = _resident(), time.monotonic() + self.SECONDS
        elif self.calls > self.measured_at and self.needed and time.monotonic() > self.next:
            self.next = time.monotonic() + self.SECONDS
            if _resident() > self.needed + self.SLACK:
                self._trim()

    def _trim(self) -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(TOP_PAD))
            self.measured_at = self.calls + self.SETTLED


excess = Excess()


def _resident() -> int:
    """Bytes of memory that the process occupies."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
