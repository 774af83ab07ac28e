"""Folders of files sealed by a manifest of SHA-256: written and synced, verified, each damaged file named.

A file of tensors loads without an error when a bit is flipped: its hash is the only protection.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.strict_json import has_form

FORM = {"step": int, "config": str, "classes": [str], "steady": bool, "bytes": dict, "sha256": dict}  # of a manifest
DATA = {"digest": str, "place": str}  # of a manifest's `data`, which is optional
Kind = Literal["missing", "truncated", "flipped", "swapped", "extra", "unreadable"]
KINDS: dict[Kind, str] = {
    "missing": "is missing",
    "truncated": "is truncated",
    "flipped": "is not what was written",
    "swapped": "belongs to another place or checkpoint",
    "extra": "does not belong there",
    "unreadable": "cannot be read",
}


class Damage(NamedTuple):
    """Damage of one file in a checkpoint's folder.

    The kind `flipped` means other content of the same size. `swapped` means the content of another file in this
    checkpoint or in another checkpoint of the run. `extra` means a file that does not belong there; hidden files of
    file managers and NFS are ignored.
    """

    folder: Path
    file: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.folder / self.file} {KINDS[self.kind]}"


class DamagedError(UserError):
    """A checkpoint does not verify; `damages` lists every damaged file."""

    def __init__(self, damages: list[Damage]) -> None:
        more = f", and {len(damages) - 1} more" if len(damages) > 1 else ""
        super().__init__(f"damaged checkpoint: {damages[0]}{more}")
        self.damages = damages


class DamagedWarning(UserWarning):
    """A damaged checkpoint was skipped, and an older checkpoint is used."""


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write and sync a file; return size and SHA-256 of the given bytes, not of the bytes on the disk."""
    size, sha256 = 0, hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            sha256.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that reading it again reads the disk, not the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size, sha256.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Sync the names in a folder, or a file, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json; its last key is the SHA-256 of the rest."""
    own = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "seal": own}, indent=1).encode() + b"\n"


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, if every file is as it was written; else DamagedError, which names each changed file."""
    manifest = read_manifest(checkpoint)
    sha256: dict[str, str] = manifest["sha256"]
    damages = []
    for name, expected in sha256.items():
        kind, actual = _compare(checkpoint / name, manifest["bytes"][name], expected)
        if kind and actual and actual in _others(checkpoint) | set(sha256.values()):
            kind = "swapped"
        if kind:
            damages.append(Damage(checkpoint, name, kind))
    try:
        others = sorted({path.name for path in checkpoint.iterdir()} - {"manifest.json", *sha256})
        damages += [Damage(checkpoint, name, "extra") for name in others if not name.startswith(".")]
    except OSError:
        damages.append(Damage(checkpoint, "", "unreadable"))
    if damages:
        raise DamagedError(damages)
    return manifest


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The content of manifest.json, if its seal and step are right; the files that it names are not read."""
    path, name = checkpoint / "manifest.json", checkpoint.name.partition(".")[0]
    kind: Kind
    try:
        content = path.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        del manifest["seal"]
        if content != seal(manifest) or not _has_all_parts(manifest):
            raise ValueError
        if not name.isdigit() or manifest["step"] == int(name):
            return manifest
        kind = "swapped"
    except (FileNotFoundError, NotADirectoryError):
        kind = "missing"
    except OSError:
        kind = "unreadable"
    except (ValueError, TypeError, KeyError, RecursionError):
        kind = "flipped" if content.endswith(b"}\n") else "truncated"
    raise DamagedError([Damage(checkpoint, "manifest.json", kind)])


def _has_all_parts(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has all keys that are read, and a size and a hash of each file."""
    if not has_form(manifest, FORM) or not has_form(manifest.get("data", dict.fromkeys(DATA, "")), DATA):
        return False
    if manifest["bytes"].keys() != manifest["sha256"].keys():
        return False
    return has_form([*manifest["bytes"].values()], [int]) and has_form([*manifest["sha256"].values()], [str])


def _compare(path: Path, size: int, sha256: str) -> tuple[Kind | None, str]:
    """The kind of a file's damage (None without damage), and the file's SHA-256 if the file can be read."""
    try:
        actual_size, actual = path.stat().st_size, file_sha256(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing", ""
    except OSError:
        return "unreadable", ""
    if actual == sha256:
        return None, actual
    return "truncated" if actual_size < size else "flipped", actual


def _others(checkpoint: Path) -> set[str]:
    """SHA-256 of the files of other checkpoints of the run whose manifests can be read."""
    hashes: set[str] = set()
    for folder in checkpoint.parent.iterdir():
        if folder != checkpoint:
            with suppress(DamagedError):
                hashes |= set(read_manifest(folder)["sha256"].values())
    return hashes
