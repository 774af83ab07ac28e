"""Digests of a source's contents, by which a run detects that its data changed.

A digest does not depend on where the data lie, on modification times, on the working folder or on the order in which a
file system lists files. The digest of files covers their names, labels and contents. If the files have more than
MOST_CONTENT bytes in total, the digest covers sizes instead of contents. The digest of arrays covers shape, dtype and
bytes. If an array has more than MOST_ARRAY bytes, only evenly spaced rows are read, and a change between these rows is
not detected.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.picture import UNREADABLE

MOST_CONTENT = 2**28  # total bytes up to which contents are read: sizes show no change of uncompressed images
MOST_ARRAY = 2**32  # bytes of an array up to which all rows count
CHUNK = 2**24  # bytes of an array in memory at a time


def digest_files(files: ImageFiles) -> str:
    """SHA-256, in hex, of image files: classes, names, labels, families, and contents or sizes, in order."""
    classes, labels, families = files.about(files.names)
    sizes, digest = files.sizes(), hashlib.sha256()
    by_content = sum(sizes) <= MOST_CONTENT
    digest.update(_line("files", list(classes)))
    for name, inside, label, family, size in zip(files.names, files.inside(), labels, families, sizes, strict=True):
        digest.update(_line(inside, label, family, _content(files, name) if by_content else size))
    return digest.hexdigest()


def _content(files: ImageFiles, name: str) -> str | None:
    try:
        return hashlib.sha256(files.content(name)).hexdigest()
    except UNREADABLE:
        return None  # the error is raised where the image is read


def digest_arrays(*arrays: NDArray[Any] | None) -> str:
    """SHA-256, in hex, of arrays, in order."""
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
    """SHA-256, in hex, of plain values."""
    return hashlib.sha256(_line(*values)).hexdigest()


def _line(*values: object) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"
