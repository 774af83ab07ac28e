"""Memory of the machine, and the C library's handling of freed memory."""

from __future__ import annotations

import ctypes
import math
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed pages for the next step, as other allocators of tensors do.

    By default glibc returns freed large blocks to the system immediately and gets zeroed blocks back: thousands of
    page faults per step. Memory use hardly grows (docs/decisions/benchmark.md). Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def device_memory(device: torch.device) -> float:
    """Memory of a CUDA device in bytes, whatever part is in use; 0 for other devices."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0.0


def installed_memory() -> float:
    """Memory of this machine in bytes; infinity when unknown."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
