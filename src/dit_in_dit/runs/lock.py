"""Locks on files: one holder among all processes, and among all callers within one process.

A lock belongs to the opened file (`flock`), not to the process: a second caller in one process is refused, and nothing
is released when the second caller closes its file. The lock ends when its holder releases it, is garbage-collected or
dies.
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
    """Another process or caller holds the lock."""


class LocklessWarning(UserWarning):
    """The file system does not support locks."""


def _forget() -> None:
    """Close a forked child's copies of locked files: they would keep the locks of a killed parent."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def open_locked(path: Path, *, wait: bool) -> io.FileIO:
    """Open the file, creating it if necessary, and lock it until `release`.

    Raises:
        BlockingIOError: another process or caller holds the lock, and `wait` is false.
        OSError: the file cannot be opened, or its file system does not support locks.
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
    """Release a file of `open_locked`."""
    file.close()
    _held.discard(file)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock; false if the file system does not support locks."""
    try:
        with path.open() as file:  # a shared lock, for a moment
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextmanager
def lock_file(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on a file that names its holder. Warn (LocklessWarning) and continue without a lock when the file
    system does not support them.

    Args:
        what: begins the message of BusyError, such as 'RUN is being trained'.

    Raises:
        BusyError: another process or caller holds the lock.
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
        warnings.warn(
            f"cannot lock {path} ({problem}): make sure that nobody else uses it", LocklessWarning, stacklevel=4
        )
    let_go = _held.discard  # bound now: at exit, when an unfinished run ends, module names are gone
    try:
        if file:
            file.truncate(0)
            file.write(f"{owner}\n".encode())
        yield
    finally:
        if file:
            file.close()
            let_go(file)
