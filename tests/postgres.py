"""A PostgreSQL server of a test's own, which can be stopped and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


class Server:
    """A server with a user `study`. Skips the test where PostgreSQL or its driver is not installed.

    Args:
        password: of `study`; "": anybody is let in.
    """

    def __init__(self, password: str = "") -> None:
        places = [Path(shutil.which("initdb") or "").resolve().parent, *Path("/usr/lib/postgresql").glob("*/bin")]
        needed = ("initdb", "postgres", "pg_isready", "createdb")
        binaries = next((place for place in places if all((place / name).exists() for name in needed)), None)
        if binaries is None:
            pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'psycopg[binary]'")
        self.binaries, self.server = binaries, None
        self.user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
        self.home = Path("/tmp", f"dit-in-dit-postgres-{os.getpid()}")  # of that user, and short enough for a socket
        self.home.mkdir()
        (self.home / "password").write_text(password)
        if self.user:
            for path in (self.home, self.home / "password"):
                shutil.chown(path, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        how = ["-A", "scram-sha-256", "--pwfile", str(self.home / "password")] if password else ["-A", "trust"]
        ask = [str(binaries / "initdb"), "-D", str(self.home / "data"), "-U", "study", "--no-sync", *how]
        subprocess.run(ask, check=True, user=self.user, cwd="/", capture_output=True)

    def url(self, password: str = "", database: str = "postgres") -> str:
        """Of a database, for SQLAlchemy; the password as it stands in a URL."""
        return f"postgresql+psycopg://study{password and ':'}{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Create a database; returns its name."""
        command = [str(self.binaries / "createdb"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "study", database]
        environment = {**os.environ, "PGPASSWORD": (self.home / "password").read_text()}
        subprocess.run(command, check=True, env=environment, cwd="/", capture_output=True)
        return database

    def start(self) -> None:
        """Start it and wait until it answers."""
        run = [str(self.binaries / "postgres"), "-D", str(self.home / "data"), "-p", str(self.port)]
        run += ["-k", str(self.home), "-c", "fsync=off"]
        self.server = subprocess.Popen(
            run, user=self.user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ready = [str(self.binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)]
        for _ in range(100):
            if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)

    def stop(self) -> None:
        """End it, and the connections to it with it."""
        if self.server:
            self.server.send_signal(signal.SIGINT)
            self.server.wait(30)
            self.server = None

    def remove(self) -> None:
        """Stop it and delete all that it kept."""
        self.stop()
        shutil.rmtree(self.home)
