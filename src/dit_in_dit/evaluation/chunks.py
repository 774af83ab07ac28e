"""Long work in files of a few images each: what is there is not done again, and processes share the rest.

A chunk is written beside and renamed, so it is whole or not there. Chunk k belongs to process k modulo their number
(`RANK` and `WORLD_SIZE`, as torchrun sets them); results are read in index order, whoever made them.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config import UserError

Arrays = dict[str, NDArray[Any]]
PATIENCE = 1800  # seconds without a new chunk after which the other processes are given up


def process() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _paths(folder: Path, total: int, size: int) -> Iterator[tuple[range, Path]]:
    for start in range(0, total, size):
        part = range(start, min(start + size, total))
        yield part, folder / f"{part.start:07d}-{part.stop:07d}.npz"


def fill(folder: Path, total: int, size: int, make: Callable[[range], Arrays]) -> Iterator[int]:
    """Make the missing chunks of `size` images, yielding how many of the `total` are there; ends when all are."""
    rank, world = process()
    folder.mkdir(parents=True, exist_ok=True)
    chunks = list(_paths(folder, total, size))
    done = sum(len(part) for part, path in chunks if path.exists())
    yield done
    for number, (part, path) in enumerate(chunks):
        if number % world == rank and not path.exists():
            _write(path, make(part))
            done += len(part)
            yield done
    yield from _wait(chunks)


def _wait(chunks: list[tuple[range, Path]]) -> Iterator[int]:
    """Until the other processes' chunks are there too."""
    missing, since = len(chunks), time.monotonic()
    while left := [part for part, path in chunks if not path.exists()]:
        if len(left) < missing:
            missing, since = len(left), time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise UserError(
                f"{len(left)} parts of {chunks[0][1].parent} did not come within {PATIENCE} s: run it again"
            )
        yield chunks[-1][0].stop - sum(map(len, left))
        time.sleep(0.1)


def _write(path: Path, arrays: Arrays) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read(folder: Path, total: int, size: int, name: str) -> Iterator[NDArray[Any]]:
    """One array of every chunk, in index order; UserError names a chunk that is damaged."""
    for _, path in _paths(folder, total, size):
        yield _load(path, name)


def stored(folder: Path, total: int, size: int, name: str) -> Callable[[range], NDArray[Any]]:
    """One array's rows by number; the chunk that was read last is kept."""
    paths = [path for _, path in _paths(folder, total, size)]
    load = lru_cache(maxsize=1)(lambda chunk: _load(paths[chunk], name))
    return lambda numbers: np.stack([load(n // size)[n % size] for n in numbers])


def _load(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({str(error)[:60]}): remove it and run again") from None
