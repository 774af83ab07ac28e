"""Files and folders that are whole or not there: written beside, put on the disk, renamed.

(Checkpoints do more: `checkpoint.save` reads what it wrote, and says what the disk did not take.)
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dit_in_dit.mistakes import UserError


@contextmanager
def file(path: Path, *, once: bool = False) -> Iterator[BinaryIO]:
    """A file to write, at `path` once the block ends well. With `once`, one that is there by then stays.

    A killed process leaves `NAME.RANK.PID.part`; an error leaves nothing.
    """
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}.{os.getpid()}.part")  # pids of machines agree
    try:
        with beside.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        if not once:
            beside.replace(path)
        elif not path.exists():
            _link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, path: Path) -> None:
    """Give the file its name, unless another has it: a rename would replace that one."""
    with suppress(FileExistsError):
        os.link(beside, path)


def write(path: Path, content: bytes | str, *, once: bool = False) -> None:
    """`file` with all of its content."""
    with file(path, once=once) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


def check_free(out: Path) -> None:
    """UserError when a file, or a folder with something in it, is at `out`."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another --out")


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, at `out` once the block ends well.

    Raises:
        UserError: something is there already.
    """
    check_free(out)
    out = out.absolute()
    if out.resolve() == Path.cwd():
        raise UserError(f"--out {out} is the working folder, which cannot be replaced: name a new folder")
    beside = out.with_name(f".{out.name}.{secrets.token_hex(6)}.part")  # nobody else's, whatever lies there
    try:
        beside.mkdir(parents=True)
        yield beside
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
