"""Digests of what a source lists, by which a run notices that its data changed.

A digest depends on neither the place of the data nor the time of a change, the working folder or the order in which a
file system lists. Files count by name, label and size, and where there are few (MOST_CONTENT) by content; arrays by
shape, dtype and bytes. Of arrays above MOST_ARRAY bytes only evenly spaced rows are read: a change between them goes
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.data.picture import UNREADABLE

MOST_CONTENT = 2**28  # bytes of all files, up to which they are read: flat images of one size differ in nothing else
MOST_ARRAY = 2**32  # bytes of an array, up to which all rows count
CHUNK = 2**24  # bytes of an array that are in memory at a time


class Listing(Protocol):
    """Images by name (data.files.ImageFiles)."""

    names: list[str]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The classes, and the label and family of each of `names`."""
        ...

    def inside(self) -> list[str]:
        """The names, in order, without what depends on how the images are packed."""
        ...

    def sizes(self) -> list[int]:
        """The bytes of each file, in order; -1 for one that cannot be looked at."""
        ...

    def content(self, name: str) -> bytes:
        """One file as it is stored."""
        ...


def digest_files(files: Listing) -> str:
    """The SHA-256, in hex, of image files: classes, names, labels, families, sizes or contents, in their order."""
    classes, labels, families = files.about(files.names)
    sizes, digest = files.sizes(), hashlib.sha256()
    by_content = sum(sizes) <= MOST_CONTENT
    digest.update(_line("files", list(classes)))
    for name, inside, label, family, size in zip(files.names, files.inside(), labels, families, sizes, strict=True):
        digest.update(_line(inside, label, family, _content(files, name) if by_content else size))
    return digest.hexdigest()


def _content(files: Listing, name: str) -> str | None:
    try:
        return hashlib.sha256(files.content(name)).hexdigest()
    except UNREADABLE:
        return None  # whoever reads the image says so


def digest_arrays(*arrays: NDArray[Any] | None) -> str:
    """The SHA-256, in hex, of arrays, in their order."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(_line(None))
            continue
        digest.update(_line(list(array.shape), array.dtype.str))
        rows = np.atleast_1d(array)[:: max(1, -(-array.nbytes // MOST_ARRAY))]
        step = max(1, CHUNK * len(rows) // max(1, rows.nbytes))
        for start in range(0, len(rows), step):
            digest.update(rows[start : start + step].tobytes())
    return digest.hexdigest()


def digest_values(*values: object) -> str:
    """The SHA-256, in hex, of plain values."""
    return hashlib.sha256(_line(*values)).hexdigest()


def _line(*values: object) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"
