"""Locks on files: one holder among all processes, and among all callers within one.

A lock belongs to the opened file (`flock`), not to the process: a second caller in one process is refused, and what
that caller closes frees nothing. It ends when its holder lets go, is collected or dies.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_in_dit.config.errors import UserError

_held: set[io.FileIO] = set()


class BusyError(UserError):
    """Another holds the lock."""


class LocklessWarning(UserWarning):
    """The file system keeps no locks."""


def _forget() -> None:
    """Close a forked child's copies: with them it would keep the locks of a parent that was killed."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def open_locked(path: Path, *, wait: bool) -> io.FileIO:
    """Open the file, which is made where there is none, and lock it; for `release`.

    Raises:
        BlockingIOError: another holds it, and `wait` is false.
        OSError: it cannot be opened, or its file system keeps no locks.
    """
    file = io.FileIO(path, "a+")
    _held.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        release(file)
        raise
    return file


def release(file: io.FileIO) -> None:
    """Let others have it."""
    file.close()
    _held.discard(file)


@contextmanager
def lock_file(path: Path, what: str) -> Iterator[None]:
    """Keep others from taking the same file; it names its holder. Where the file system keeps no locks, warn
    (LocklessWarning) and go on without.

    Args:
        what: begins the message to others, such as 'RUN is being trained'.

    Raises:
        BusyError: another holds it.
    """
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    file = None
    try:
        file = open_locked(path, wait=False)
    except BlockingIOError:
        other = path.read_text(errors="replace").strip()
        named = f"another caller in this process ({owner})" if other == owner else other or "another process"
        raise BusyError(f"{what} by {named}: wait, or stop it") from None
    except OSError as error:
        if not path.exists():
            raise
        problem = error.strerror or error
        warnings.warn(f"cannot lock {path} ({problem}): see that nobody else uses it", LocklessWarning, stacklevel=4)
    let_go = _held.discard  # names of a module are gone when Python ends, and an unfinished run ends then
    try:
        if file:
            file.truncate(0)
            file.write(f"{owner}\n".encode())
        yield
    finally:
        if file:
            file.close()
            let_go(file)
