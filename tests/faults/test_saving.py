"""train.save=async: a thread writes checkpoints while training continues, and a run ends as with train.save=sync.

Tests hold the write at a chosen point, or let it fail, by replacing functions of the package.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import is_of_the_system

from conftest import SHARDED, with_train
from dit_in_dit.config.files import config_hash, from_yaml
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.runs import checkpoint, integrity
from dit_in_dit.runs.checkpoint import SaveError
from dit_in_dit.runs.jsonl import Lines
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training import step_log
from dit_in_dit.training.batches import Examples
from dit_in_dit.training.interrupt import StopRequest
from dit_in_dit.training.loop import train
from processes import run_together, trained

Facts = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch):
    monkeypatch.setattr(step_log, "FLUSH_SECONDS", 0.0)


@pytest.fixture
def config(run_config: RunConfig) -> RunConfig:
    return with_train(run_config, steps=12, checkpoint_every=4, evaluate_every=0, save="async")


class Gate:
    """A disk on which no write of the thread begins before `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []  # steps of all writes
        self.most = 0  # writes at one time
        self.opened = threading.Event()
        save, writing = checkpoint.save, []

        def slow(run, config, step, *more, **keys) -> Path:
            self.begun.append(step)
            writing.append(step)
            self.most = max(self.most, len(writing))
            if threading.current_thread() is not threading.main_thread():
                assert self.opened.wait(30), "the gate stayed closed"
            try:
                return save(run, config, step, *more, **keys)
            finally:
                writing.remove(step)

        monkeypatch.setattr(checkpoint, "save", slow)

    def open(self, *, after: float = 0) -> None:
        """Open the gate, `after` seconds from now: by then the main thread waits."""
        threading.Timer(after, self.opened.set).start() if after else self.opened.set()


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    closed = Gate(monkeypatch)
    yield closed
    closed.open()


def facts(config: RunConfig, out: Path, act: Callable = lambda _: None, **keys) -> Facts:
    """Kinds and steps of a run's events; `act` gets each event before the next step."""
    found = []
    with closing(train(config, out, device="cpu", **keys)) as events:
        for event in events:
            found.append((event.kind, event.step))
            act(event)
    return found


def content(run: Path) -> dict[str, object]:
    """Log, and hashes of the files of each checkpoint."""
    saved = {path.name: checkpoint.verify(path)["sha256"] for path in (run / "checkpoints").iterdir()}
    return {"log": (run / "log.jsonl").read_bytes(), **saved}


def saves(found: Facts) -> Facts:
    return [fact for fact in found if fact[0] in ("checkpoint", "unsaved")]


def at(step: int, action: Callable[[], object]) -> Callable:
    """Do `action` at the event of a step."""
    return lambda event: event.kind == "step" and event.step == step and action()


def test_checkpoints_and_log_equal_those_of_synchronous_saves(config, tmp_path):
    found = facts(config, tmp_path / "async")
    plain = facts(with_train(config, save="sync"), tmp_path / "sync")
    assert saves(found) == saves(plain) == [("checkpoint", step) for step in (4, 8, 12)]
    assert [fact for fact in found if fact not in saves(found)] == [fact for fact in plain if fact not in saves(plain)]
    assert content(tmp_path / "async") == content(tmp_path / "sync")


def test_steps_do_not_wait_for_a_slow_disk_and_the_state_is_that_of_its_step(config, tmp_path, gate):
    def look() -> None:
        assert gate.begun == [4]  # four steps ago
        assert not (tmp_path / "run/checkpoints/0000004").exists()
        gate.open()

    found = facts(config, tmp_path / "run", at(8, look))
    assert saves(found) == [("checkpoint", step) for step in (4, 8, 12)]
    assert found.index(("checkpoint", 4)) > found.index(("step", 8))
    facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync")


def test_a_save_waits_for_the_one_before(config, tmp_path, gate):
    found = facts(config, tmp_path / "run", at(8, lambda: gate.open(after=0.5)))
    assert gate.begun == [4, 8, 12]
    assert gate.most == 1
    assert found.index(("checkpoint", 4)) < found.index(("step", 9))  # waited for at step 8


def test_a_stop_waits_and_the_run_resumes_exactly(config, tmp_path, gate):
    stop = StopRequest()

    def ask() -> None:
        stop.ask(15)
        gate.open(after=0.5)

    found = facts(config, tmp_path / "run", at(6, ask), stop=stop)
    assert found[-3:] == [("checkpoint", 4), ("checkpoint", 6), ("stopped", 6)]
    assert gate.most == 1
    facts(config, tmp_path / "run", resume=True)
    facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync")


@pytest.mark.parametrize("end", ["closed", "error", "interrupted"])
def test_the_write_ends_before_the_run_is_unlocked(config, tmp_path, gate, end):
    def leave() -> None:
        gate.open(after=0.5)
        if end != "closed":
            raise (RuntimeError if end == "error" else KeyboardInterrupt)("enough")

    events = train(config, tmp_path / "run", device="cpu", callbacks=[at(6, leave)])
    for event in events if end == "closed" else ():
        if (event.kind, event.step) == ("step", 6):
            break
    if end != "closed":
        with pytest.raises(RuntimeError if end == "error" else KeyboardInterrupt, match="enough"):
            list(events)
    events.close()
    assert checkpoint.newest(tmp_path / "run").step == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    facts(config, tmp_path / "run", resume=True)
    facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync")


def test_a_full_disk_is_reported_later_and_the_next_checkpoint_is_saved(config, tmp_path, monkeypatch):
    plain, why = integrity.write_hashed, []

    def full(path: Path, parts) -> tuple[int, str]:
        if path.parent.name == "0000004.part" and path.name == "ema.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, parts)

    monkeypatch.setattr(integrity, "write_hashed", full)
    found = facts(config, tmp_path / "run", lambda event: event.kind == "unsaved" and why.append(event.values["why"]))
    assert saves(found) == [("unsaved", 4), ("checkpoint", 8), ("checkpoint", 12)]
    assert len(why) == 1
    assert why[0].endswith("No space left on device; older checkpoints are unchanged: make room")
    monkeypatch.undo()
    facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync")


def test_the_last_checkpoint_that_does_not_fit_gives_an_error(config, tmp_path, monkeypatch):
    def full(run, config, step, *_, **__):
        raise SaveError(f"cannot save {step}: make room")

    monkeypatch.setattr(checkpoint, "save", full)
    found: Facts = []
    with pytest.raises(SaveError, match="cannot save 12"):
        facts(config, tmp_path / "run", lambda event: found.append((event.kind, event.step)))
    assert saves(found) == [("unsaved", 4), ("unsaved", 8)]


def test_no_checkpoint_is_written_before_its_log_is_synced(config, tmp_path, monkeypatch):
    synced: dict[str, str] = {}  # the log at its last sync, by the thread that called it
    log, plain_sync, plain_save = tmp_path / "run/log.jsonl", Lines.sync, checkpoint.save

    def sync(self) -> None:
        plain_sync(self)
        synced[threading.current_thread().name] = log.read_text()

    def save(run, config, step, *more, **keys) -> Path:
        lines = synced[threading.current_thread().name].splitlines()
        assert step in [json.loads(line)["step"] for line in lines]
        return plain_save(run, config, step, *more, **keys)

    monkeypatch.setattr(Lines, "sync", sync)
    monkeypatch.setattr(checkpoint, "save", save)
    assert saves(facts(config, tmp_path / "run")) == [("checkpoint", step) for step in (4, 8, 12)]
    assert len(synced) == 2  # the thread syncs, so that training does not wait; at the end the main thread does


def test_a_log_that_cannot_be_synced_leaves_no_checkpoint(config, tmp_path, monkeypatch):
    def refuse(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SaveError("cannot write log.jsonl: make room")

    monkeypatch.setattr(Lines, "sync", refuse)
    assert saves(facts(config, tmp_path / "run")) == [("unsaved", 4), ("unsaved", 8), ("checkpoint", 12)]


def test_a_roll_back_waits_and_the_run_continues_exactly(config, tmp_path, gate, monkeypatch):
    config = with_train(config, steps=9, skip_most=2, on_divergence="roll_back", checkpoint_every=2)
    config = replace(config, data=DataConfig(source="mosaic"), model=replace(config.model, num_classes=9))
    plain = Examples.packed

    def poisoned(self, number):  # steps 4, 5 and 6 at first, then 3 and 4
        batch = plain(self, number)
        hit = torch.tensor([12 <= index < 32 for index in self.indices(number)])
        return batch._replace(x=torch.where(hit[:, None, None, None], torch.nan, batch.x))

    monkeypatch.setattr(Examples, "packed", poisoned)
    act = lambda event: event.kind == "skipped" and event.step == 6 and gate.open(after=0.5)  # noqa: E731
    found = facts(config, tmp_path / "run", act)
    assert found.index(("checkpoint", 2)) == found.index(("rolled_back", 6)) - 1
    facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync")


def test_what_a_kill_in_the_write_leaves_is_good_and_resumes_exactly(config, tmp_path, monkeypatch):
    plain, calls, left = checkpoint.save, [], []

    def watched(run, config, step, *more, **keys) -> Path:
        def watch(frame, event: str, function: Callable) -> None:
            if event != "c_call" or not is_of_the_system(function):
                return
            calls.append(function.__name__)
            if calls.count(function.__name__) == 1 or function.__name__ == "rename":
                sys.setprofile(None)
                left.append((function.__name__, tmp_path / f"killed{len(left)}"))
                shutil.copytree(run, left[-1][1])  # the folder as a process killed here leaves it
                sys.setprofile(watch)

        if step == 8:
            sys.setprofile(watch)
        try:
            return plain(run, config, step, *more, **keys)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(checkpoint, "save", watched)
    facts(config, tmp_path / "run")
    monkeypatch.undo()
    assert {"mkdir", "open", "write", "fsync", "rename", "read"} <= {name for name, _ in left}
    expected = content(tmp_path / "run")
    for name, run in left:
        assert checkpoint.newest(run).step in (4, 8), name  # what has a name verifies
        facts(config, run, resume=True)
        assert content(run) == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", SHARDED])
def test_two_processes_save_the_bits_of_synchronous_saves(config, tmp_path, parallel, full):
    if parallel == "ddp" and not full:
        pytest.skip("make test-full")
    config = with_train(config, parallel=parallel)
    found = run_together(2, trained, config, tmp_path / "async", False)
    run_together(2, trained, with_train(config, save="sync"), tmp_path / "sync", False)
    for each in found:
        assert saves([(kind, step) for kind, step, _ in each]) == [("checkpoint", step) for step in (4, 8, 12)]
    for name in ("0000008", "0000012"):
        for file in (checkpoint.STATE, checkpoint.AVERAGED):
            ours, theirs = (load_tensors(tmp_path / how / "checkpoints" / name / file) for how in ("async", "sync"))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_the_key_may_change_at_a_resume_and_changes_no_hash_at_its_default(config, tmp_path):
    plain = with_train(config, save="sync")
    facts(plain, tmp_path / "run", until=6)
    facts(config, tmp_path / "run", resume=True)
    assert from_yaml((tmp_path / "run/config.yaml").read_text()).train.save == "async"
    facts(plain, tmp_path / "sync")
    assert content(tmp_path / "run")["log"] == content(tmp_path / "sync")["log"]
    assert content(tmp_path / "run")["0000012"] == content(tmp_path / "sync")["0000012"]
    assert config_hash(config) != config_hash(plain)
