"""Disks that are full, limited, read-only or broken during a save: nothing is lost, and one line reports the fault.

Faults are injected by Python's profiler, which sees every call into C: the package has no hooks for faults.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from calls import is_of_the_system

from conftest import with_train
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.training.loop import train

DRAW = torch.Generator().manual_seed(0)
TENSORS = {str(number): torch.randn(100 * number, generator=DRAW) for number in range(8)}  # 11 kB
KEPT, LEFT = ["0000010", "0000020"], "0000015.part"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, and the remains of a killed save."""
    create_run(tmp_path, RunConfig())
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / LEFT).mkdir()
    return tmp_path


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, RunConfig(), step, TENSORS, TENSORS, ("a",))


def is_good(folder: Path) -> bool:
    try:
        return bool(checkpoint.verify(folder))
    except checkpoint.DamagedError:
        return False


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def check_that_nothing_was_lost(run: Path, error: checkpoint.SaveError) -> None:
    """Older checkpoints verify, the failed one leaves nothing, one line reports the failure; the next save works."""
    assert "\n" not in str(error)
    assert str(error).startswith(f"cannot save {run / 'checkpoints/0000030'}: ")
    assert set(names(run)) - {LEFT} == set(KEPT)
    for name in KEPT:
        checkpoint.verify(run / "checkpoints" / name)
    save(run, 30)
    assert names(run) == ["0000020", "0000030"]
    assert checkpoint.newest(run).folder.name == "0000030"


@contextmanager
def failing_call(number: int, error: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Fail the `number`-th call (from 0) into the operating system or its files; yields the names of all calls."""
    made: list[str] = []

    def watch(frame, event: str, function: Callable) -> None:
        if event != "c_call" or not is_of_the_system(function):
            return
        made.append(function.__name__)
        if len(made) == number + 1:
            sys.setprofile(None)
            raise OSError(error, os.strerror(error))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield made
    finally:
        sys.setprofile(before)


def test_a_failure_of_any_system_call_loses_nothing(run, tmp_path_factory, full):
    whole = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(run, whole)
    with failing_call(-1) as calls:
        save(whole, 30)
    assert {"open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink"} <= set(calls)
    after = len(calls) - calls[::-1].index("fsync")  # here it has its name, and older ones go
    failed, few = [], {calls.index(name) for name in calls} | set(range(after, len(calls)))
    for number in range(len(calls)) if full else sorted(few):
        again = tmp_path_factory.mktemp("again") / "run"
        shutil.copytree(run, again)
        with failing_call(number) as made:
            try:
                save(again, 30)
            except checkpoint.SaveError as error:
                sys.setprofile(None)
                failed.append(made[-1])
                if "0000030" not in names(again):
                    check_that_nothing_was_lost(again, error)
        good = [name for name in names(again) if is_good(again / "checkpoints" / name)]
        assert len(good) >= 2, (number, made[-1])
        assert good[-1] == "0000030"
        shutil.rmtree(again)
    assert {"write", "fsync", "rename"} <= set(failed)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errno.ENOSPC, "No space left on device; older checkpoints are unchanged: make room"),
        (errno.EDQUOT, "make room within your quota"),
        (errno.EFBIG, r"raise the limit of file sizes \(ulimit -f\)"),
        (errno.EROFS, "Read-only file system; older checkpoints are unchanged: mount it writable"),
        (errno.EIO, "Input/output error; older checkpoints are unchanged: check the disk"),
    ],
)
def test_a_disk_error_gives_a_one_line_error_with_its_remedy(run, monkeypatch, error, remedy):
    def refuse(descriptor):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(checkpoint.SaveError, match=f"{remedy}$") as raised:
            save(run, 30)
    check_that_nothing_was_lost(run, raised.value)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_of_any_value_loses_no_checkpoint(run, tmp_path_factory, full):
    needed = max(path.stat().st_size for path in (run / "checkpoints/0000020").iterdir())
    sizes = [0, 1, 7, 8, needed - 1, needed, *range(100, needed, needed // (60 if full else 4))]
    for size in sizes:
        again = tmp_path_factory.mktemp("again") / "run"
        shutil.copytree(run, again)
        raised = None
        with largest_file(size):
            try:
                save(again, 30)
            except checkpoint.SaveError as error:
                raised = error
        assert (raised is None) == (size >= needed), size
        if raised is not None:
            check_that_nothing_was_lost(again, raised)
        shutil.rmtree(again)


def test_a_run_continues_when_a_checkpoint_cannot_be_saved_and_saves_the_next(run_config, tmp_path):
    config = with_train(run_config, steps=8, checkpoint_every=2)
    list(train(config, tmp_path / "unbroken", device="cpu"))
    saved, unsaved = [], []
    with ExitStack() as limit:
        for fact in train(config, tmp_path / "run", device="cpu"):
            if fact.kind == "checkpoint":
                saved.append(fact.step)
                if fact.step == 2:
                    limit.enter_context(largest_file(10_000))  # enough for the log
            elif fact.kind == "unsaved":
                unsaved.append(fact.step)
                assert "raise the limit of file sizes" in fact.values["why"]
                assert checkpoint.newest(tmp_path / "run").manifest["step"] == 2
                if fact.step == 4:
                    limit.close()
    assert (saved, unsaved) == ([2, 6, 8], [4])
    assert checkpoint.newest(tmp_path / "run").manifest == checkpoint.newest(tmp_path / "unbroken").manifest
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "unbroken/log.jsonl").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, with room for three and a half checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_really_full_disk_loses_nothing(small_disk):
    needed = None
    for free in range(0, 100_000, 4096):
        run, other = small_disk / "run", small_disk / "other"
        create_run(run, RunConfig())
        for step in (10, 20):
            save(run, step)
        disk = os.statvfs(small_disk)
        other.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
        try:
            save(run, 30)
            needed = free
            break
        except checkpoint.SaveError as error:
            raised = error
        other.unlink()
        check_that_nothing_was_lost(run, raised)
        assert f"{raised.__cause__}".startswith(f"[Errno {errno.ENOSPC}]")
        shutil.rmtree(run)
    assert needed == 7 * 4096  # pages: 3 of each file of tensors, 1 of the manifest
