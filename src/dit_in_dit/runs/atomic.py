"""Files and folders that are complete or absent: written to a temporary name, synced to the disk, renamed.

(Checkpoints do more: `checkpoint.save` reads its files again and reports which of them the disk refused.)
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dit_in_dit.config.errors import UserError
from dit_in_dit.runs import integrity


def _beside(path: Path) -> Path:
    """A temporary name next to `path` that no user and no other process has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def clear_temporary(folder: Path, names: Collection[str]) -> None:
    """Delete the temporary files that killed processes left for these names in the folder."""
    for left in folder.glob(".*.part"):
        known = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.part", left.name)
        if known and known[1] in names:
            left.unlink(missing_ok=True)


@contextmanager
def file(path: Path, *, once: bool = False) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block ends without an error. With `once`, an existing file stays.

    A killed process leaves a hidden `.NAME.RANDOM.part`; an error leaves nothing.
    """
    beside = _beside(path)
    try:
        with beside.open("xb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        if not once:
            beside.replace(path)
        elif not path.exists():
            with suppress(FileExistsError):  # another process was faster; a rename would replace its file
                os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str, *, once: bool = False) -> None:
    """Write `content` to a file, by means of `file`."""
    with file(path, once=once) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


def check_free(out: Path) -> None:
    """UserError when `out` is a file or a folder with content, or holds the current folder."""
    if out.name in ("", "..") or (out.is_dir() and Path.cwd().is_relative_to(out.resolve())):
        raise UserError(f"--out {out} is the current folder or a folder above it: give a new name")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists already: choose another --out")


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to `out` when the block ends without an error.

    Raises:
        UserError: `out` exists already.
    """
    check_free(out)
    beside = _beside(out)
    beside.mkdir(parents=True)
    try:
        yield beside
        for written in (beside, *beside.rglob("*")):
            if written.is_file():
                # The folder has them from the umask. safetensors writes files that only their owner can read.
                written.chmod(beside.stat().st_mode & 0o666)
            if written.is_file() or written.is_dir():
                integrity.sync(written)
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
        integrity.sync(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
