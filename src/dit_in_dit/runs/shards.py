"""Long work on images in parts, one file each: existing parts are kept, and processes share the rest.

A file is written to a temporary name and renamed: it is complete or absent. Part k belongs to process k modulo the
number of processes (`RANK` and `WORLD_SIZE`, as torchrun sets them). Results are read in index order.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import json_difference, read_json
from dit_in_dit.runs import atomic
from dit_in_dit.runtime import process

Arrays = dict[str, NDArray[Any]]
PATIENCE = 1800  # seconds to wait for a new chunk of another process


def claim_folder(path: Path, identity: Mapping[str, Any]) -> None:
    """Write `identity`, which describes the files beside `path`, into `path` unless another process has done so.

    Raises:
        UserError: the existing file describes something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        atomic.write_atomic(path, json.dumps(identity, indent=1) + "\n", once=True)
    stored = read_json(path, advice=f"remove {path.parent}, or choose another --out")
    if field := json_difference(stored, json.loads(json.dumps(identity))):
        raise UserError(f"{path.parent} holds images of something else: {field}; choose another --out")


def share_work(total: int, size: int, there: Callable[[range], bool], make: Callable[[range], None]) -> Iterator[int]:
    """Make this process's share of the missing parts of `total` images, each of `size` images; yields the number of
    existing images until all exist. `there` tells whether a part exists.

    Raises:
        UserError: no new part of another process appeared for `PATIENCE` seconds.
    """
    rank, world = process.rank(), process.world_size()
    parts = _parts(total, size)
    done = sum(len(part) for part in parts if there(part))
    yield done
    for part in parts[rank::world]:
        if not there(part):
            make(part)
            done += len(part)
            yield done
    for left in wait_for_missing(parts, there, PATIENCE, lambda left: f"images from number {left[0].start} on"):
        yield total - sum(map(len, left))
    yield total


def wait_for_missing(
    parts: Sequence[range], there: Callable[[range], bool], patience: float, what: Callable[[Sequence[range]], str]
) -> Iterator[Sequence[range]]:
    """Wait until all parts exist; yields the missing parts ten times a second. `what` names them in the error.

    Raises:
        UserError: no new part appeared for `patience` seconds.
    """
    left, since = parts, time.monotonic()
    while missing := [part for part in left if not there(part)]:
        if len(missing) < len(left):
            left, since = missing, time.monotonic()
        if time.monotonic() - since > patience:
            raise UserError(f"{what(left)} did not come within {patience} s: run the command again")
        yield left
        time.sleep(0.1)


def _path(folder: Path, part: range) -> Path:
    return folder / f"{part.start:07d}-{part.stop:07d}.npz"


def _parts(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def fill_shards(folder: Path, total: int, size: int, make: Callable[[range], Arrays]) -> Iterator[int]:
    """Make the missing chunks of `size` images; yields the number of existing images until all `total` exist."""

    def keep(part: range) -> None:
        content = io.BytesIO()
        np.savez(content, **make(part))  # type: ignore[arg-type]
        atomic.write_atomic(_path(folder, part), content.getvalue())

    folder.mkdir(parents=True, exist_ok=True)
    return share_work(total, size, lambda part: _path(folder, part).exists(), keep)


def read_chunks(folder: Path, total: int, size: int, name: str) -> Iterator[NDArray[Any]]:
    """The array `name` of each chunk, in index order; UserError that names a damaged chunk."""
    for part in _parts(total, size):
        yield _load(_path(folder, part), name)


def lazy_rows(folder: Path, total: int, size: int, name: str) -> Callable[[range], NDArray[Any]]:
    """A function from image numbers to rows of one array; the function caches the last chunk."""
    parts = _parts(total, size)
    load = lru_cache(maxsize=1)(lambda chunk: _load(_path(folder, parts[chunk]), name))
    return lambda numbers: np.stack([load(n // size)[n % size] for n in numbers])


def _load(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({str(error)[:60]}): remove it and run again") from None
