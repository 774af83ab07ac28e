"""This process among the processes of a launcher (torchrun, Slurm), from variables that only this module reads."""

from __future__ import annotations

import os


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


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
