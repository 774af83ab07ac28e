"""Memory of the machine, and the C library's handling of freed memory."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

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


def peak_memory(device: torch.device) -> int | None:
    """Largest bytes of tensors on a CUDA device so far, without a wait for the device; on a CPU, of the pages of this
    process in memory. None on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    with suppress(OSError, StopIteration):  # Linux: there getrusage begins with the peak of the parent process
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def installed_memory() -> float:
    """Memory of this machine in bytes; infinity when unknown."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
