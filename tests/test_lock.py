"""One trainer per run: among processes, among generators of one process, and after a process or generator has ended."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from conftest import with_train
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs.folder import create_run, lock_run
from dit_in_dit.runs.lock import BusyError, LocklessWarning
from dit_in_dit.training.loop import train

TRY = (
    "import sys; from pathlib import Path; from dit_in_dit.runs.folder import lock_run\n"
    "with lock_run(Path(sys.argv[1])): pass"
)


def another_process_is_refused(run: Path) -> bool:
    tried = subprocess.run([sys.executable, "-c", TRY, str(run)], capture_output=True, text=True, check=False)
    assert tried.returncode == 0 or "BusyError" in tried.stderr, tried.stderr
    return tried.returncode != 0


@pytest.fixture
def run_folder(run_config, tmp_path):
    create_run(tmp_path / "run", run_config)
    return tmp_path / "run"


def test_a_second_training_generator_is_refused_and_does_not_release_the_lock(run_config, tmp_path):
    config, run = with_train(run_config, steps=3), tmp_path / "run"
    first = train(config, run, device="cpu")
    next(first)
    second = train(config, run, resume=True, device="cpu")
    with pytest.raises(BusyError, match=r"by another caller in this process \(process \d+ on .*\): wait, or stop it"):
        next(second)
    second.close()
    assert another_process_is_refused(run)
    (run / "lock").read_bytes()  # a POSIX lock is lost when its process closes the file anywhere
    assert another_process_is_refused(run)
    first.close()
    assert not another_process_is_refused(run)


def test_a_training_generator_that_is_garbage_collected_releases_its_run(run_config, tmp_path):
    config, run = with_train(run_config, steps=3), tmp_path / "run"
    facts = train(config, run, device="cpu")
    list(islice(facts, 2))
    del facts
    gc.collect()
    assert next(train(config, run, resume=True, device="cpu")).kind == "start"


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(run_folder):
    held = (
        "import os, sys, time; from pathlib import Path; from dit_in_dit.runs.folder import lock_run\n"
        "with lock_run(Path(sys.argv[1])):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)  # the child says so itself: by then it has let go\n"
        "    time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", held, str(run_folder)], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(BusyError), lock_run(run_folder):
            pass
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it lives
        with lock_run(run_folder):
            pass
    finally:
        os.kill(child, 9)


def test_a_file_system_without_locks_is_reported_and_the_run_is_trained(run_folder, monkeypatch):
    def without(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.warns(LocklessWarning, match=r"cannot lock .*lock \(No locks available\)"), lock_run(run_folder):
        pass


def test_a_second_journal_lock_in_one_process_waits_for_the_first(tmp_path):
    from dit_in_dit.study.storage import JournalLock

    journal = tmp_path / "journal.log"
    journal.touch()
    first, second, order = JournalLock(journal), JournalLock(journal), []
    first.acquire()

    def wait() -> None:
        second.acquire()
        order.append("second")
        second.release()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    order.append("first")
    first.release()
    thread.join(10)
    assert order == ["first", "second"]


def test_a_deleted_journal_is_reported_and_the_lock_is_released(tmp_path):
    from dit_in_dit.study.storage import JournalLock

    journal = tmp_path / "journal.log"
    for held in (JournalLock(journal), JournalLock(journal)):
        for _ in range(2):  # the second would wait for the first
            with pytest.raises(UserError, match=r"cannot read .*journal\.log \(No such file .*\): put it back, or"):
                held.acquire()
            assert not held.threads.locked()
    journal.touch()
    assert held.acquire()
    held.release()
