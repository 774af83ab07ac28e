"""Storage of a study's trials: a journal file, or a database that may be unreachable for a while.

The URL of a database may hold a password, which no message shows.
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.runs import lock

if TYPE_CHECKING:
    import sqlalchemy

PAUSES = (0.1, 2.0)  # first and longest wait before a call is repeated, seconds
URL_FORM = "write it as postgresql+psycopg://USER:PASSWORD@HOST/NAME, with @ : / % of a password as %40 %3A %2F %25"
SECRET = re.compile(r"pass|pwd|secret|token|odbc_connect", re.IGNORECASE)  # query keys of a URL whose value is secret


class StorageAwayError(Exception):
    """The storage has not answered for the length of a lease."""


def parse_url(url: str) -> sqlalchemy.URL:
    """Parse the URL of a database.

    Raises:
        UserError: the URL is invalid, or part of a password would be parsed as the host or name. The message does not
            repeat the URL.
    """
    from sqlalchemy import make_url

    try:
        parsed = make_url(url)
    except Exception:  # ArgumentError, or ValueError of a port; their messages may hold the password
        raise UserError(f"cannot open --storage: this is not the URL of a database; {URL_FORM}") from None
    if not parsed.drivername.startswith("sqlite") and "@" in f"{parsed.host or ''}{parsed.database or ''}":
        raise UserError(f"cannot open --storage: the URL's host or name would contain '@'; {URL_FORM}")
    return parsed


def masked_url(parsed: sqlalchemy.URL) -> str:
    """The URL without its password, and without its query, because the query may also hold a password."""
    return truncate(parsed.set(query={}).render_as_string(hide_password=True), 60)


def _reason(error: BaseException, parsed: sqlalchemy.URL) -> str:
    """The first line of a driver's message, without the URL's secrets."""
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    secrets = {str(parsed.password or "")}
    for key, values in parsed.query.items():
        if SECRET.search(key):
            secrets |= {values} if isinstance(values, str) else set(values)
    for secret in sorted(secrets, key=len, reverse=True):
        for form in {secret, quote(secret, safe=""), quote_plus(secret)} - {""}:
            text = text.replace(form, "***")
    return truncate(text.splitlines()[0], 90)


class Storage:
    """Optuna's storage. If the database does not answer, calls wait for it up to `lease` seconds.

    If an answer was lost, the call runs a second time, so calls must be safe to repeat.

    Args:
        say: called with a line of text when a call begins to wait, and when the storage answers again.

    Attributes:
        outages: the number of outages that ended. During an outage, no worker's beat arrives.
    """

    def __init__(
        self, storage: Any, name: str, reason: Callable[[BaseException], str], lease: float, say: Callable[[str], None]
    ) -> None:
        self._storage, self._name, self._reason, self._lease, self._say = storage, name, reason, lease, say
        self.outages = 0
        self._since: float | None = None  # start of the current outage
        self._said = False
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._storage, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **kwargs: self._call(lambda: attribute(*args, **kwargs))

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a `with` block, calls of this thread do not wait: the first failure raises StorageAwayError."""
        self._thread.at_once = True
        try:
            yield
        finally:
            self._thread.at_once = False

    def _call(self, action: Callable[[], Any]) -> Any:
        pause, longest = PAUSES
        while True:
            try:
                result = action()
            except Exception as error:
                if not _is_away(error):
                    raise
                self._wait(error, pause)
                pause = min(longest, 2 * pause)
            else:
                self._answered()
                return result

    def _wait(self, error: Exception, pause: float) -> None:
        now = time.monotonic()
        since = self._since = now if self._since is None else self._since
        at_once = getattr(self._thread, "at_once", False)
        if at_once or now - since > self._lease:
            waited = "does not answer" if at_once else f"has not answered for {self._lease:.0f} s"
            raise StorageAwayError(
                f"{self._name} {waited} ({self._reason(error)}): run the same command once it does"
            ) from None
        if not self._said:
            self._said = True
            self._say(f"{self._name} does not answer ({self._reason(error)}): waiting up to {self._lease:.0f} s")
        time.sleep(pause)

    def _answered(self) -> None:
        since, self._since = self._since, None
        if since is None:
            return
        self.outages += 1
        if self._said:
            self._said = False
            self._say(f"{self._name} answers again, after {time.monotonic() - since:.1f} s")


def _is_away(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, means that the database did not answer."""
    from sqlalchemy import exc

    while error is not None:
        # PendingRollbackError: Optuna repeats a query in the session whose connection broke
        if isinstance(error, exc.OperationalError | exc.InterfaceError | exc.TimeoutError | exc.PendingRollbackError):
            return True
        if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__
    return False


class JournalLock:
    """The journal's lock. Unlike Optuna's own lock, it is freed when its process ends, and taking it removes an
    incomplete last line of the journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: io.FileIO | None = None
        self.threads = threading.Lock()

    def acquire(self) -> bool:
        """Wait for the lock. If the journal or the file system's locks are missing: UserError, and no lock is held."""
        self.threads.acquire()
        action, way_out = "lock", "choose another --out, or give --storage"
        try:
            self.file = lock.open_locked(self.path.with_name(self.path.name + ".lock"), wait=True)
            action, way_out = "read", "put it back, or choose another --out"
            self._cut_incomplete_line()
        except BaseException as error:
            self.release()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot {action} {self.path} ({error.strerror or error}): {way_out}") from None
        return True

    def _cut_incomplete_line(self) -> None:
        with self.path.open("r+b") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 1))
            if size and journal.read(1) != b"\n":  # its writer was killed, or its machine went down
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)

    def release(self) -> None:
        """Free the lock."""
        if self.file:
            lock.release(self.file)
            self.file = None
        self.threads.release()


def open_storage(out: Path, url: str | None, lease: float, say: Callable[[str], None]) -> Storage:
    """Open the database at `url`, or the journal in `out`.

    Raises:
        UserError: Optuna or a driver is missing, or the database refuses the connection. The error is
            raised at once, and its message does not show the password.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("studies need optuna: pip install 'dit-in-dit[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        journal = out / "journal.log"
        journal.touch()
        backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))  # type: ignore[arg-type]
        return Storage(optuna.storages.JournalStorage(backend), str(journal), str, lease, say)
    parsed = parse_url(url)
    reason = partial(_reason, parsed=parsed)
    try:
        database = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except Exception as error:  # of SQLAlchemy, a driver or a server
        raise UserError(f"cannot open --storage {masked_url(parsed)}: {reason(error)}") from None
    return Storage(optuna.storages.get_storage(database), f"the storage {masked_url(parsed)}", reason, lease, say)
