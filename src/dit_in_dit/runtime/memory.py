"""How much memory there is, and what the C library does with what a step frees."""

from __future__ import annotations

import ctypes
import math
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed pages for the next step, as every other allocator of tensors does.

    By default it gives large blocks back at once, and the system hands out zeroed ones anew: thousands of page
    faults a step. Training takes hardly more for it (docs/decisions/benchmark.md). Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def installed_memory() -> float:
    """Bytes of memory of this machine; infinity where that is not known."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
