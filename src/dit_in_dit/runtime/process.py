"""This process: its place in a launcher (torchrun, Slurm), whose variables only this module reads, and its start-up."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def rank() -> int:
    """Number of this process, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> str:
    """Number of this process on its machine, which is its GPU's number; empty without a launcher."""
    return os.environ.get("LOCAL_RANK", "")


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes for all."""
    return rank() == 0


@contextmanager
def gc_paused() -> Iterator[None]:
    """Import without garbage collection, which takes a fifth of the time of `import torch` and frees nothing.

    What was imported is left out of later collections too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
