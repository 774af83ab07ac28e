"""train.save=async: a thread writes checkpoints while training continues, and a run ends as with train.save=sync.

The disk is slow or refuses at chosen moments: tests replace functions of the package, or `os.fsync`.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conftest import SHARDED, with_train
from dit_in_dit.config.files import config_hash
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import SaveError
from dit_in_dit.training import step_log
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


class SlowDisk:
    """A disk that begins a checkpoint's write only when it is released, or when nobody can release it any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []  # steps
        self.threads: set[str] = set()
        self.released = threading.Event()
        save = checkpoint.save

        def slow(run, config, step, *more, **keys) -> Path:
            self.begun.append(step)
            self.threads.add(threading.current_thread().name)
            if step not in (0, 12) and not self.released.wait(20):
                raise AssertionError("nobody released the disk")
            return save(run, config, step, *more, **keys)

        monkeypatch.setattr(checkpoint, "save", slow)


@pytest.fixture
def disk(monkeypatch) -> Iterator[SlowDisk]:
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.released.set()


def facts(config: RunConfig, out: Path, act: Callable = lambda *_: None, **keys) -> Facts:
    """Kinds and steps of the run's events; `act` gets each event, before the next step."""
    found = []
    for event in train(config, out, device="cpu", **keys):
        found.append((event.kind, event.step))
        act(event)
    return found


def content(run: Path) -> dict[str, object]:
    """Log, and names and hashes of the checkpoints."""
    saved = {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/*/manifest.json"))}
    return {"log": (run / "log.jsonl").read_bytes(), **{name: each["sha256"] for name, each in saved.items()}}


def saves(found: Facts) -> Facts:
    return [fact for fact in found if fact[0] in ("checkpoint", "unsaved")]


def test_checkpoints_and_log_equal_those_of_synchronous_saves(config, tmp_path):
    found = facts(config, tmp_path / "async")
    plain = facts(with_train(config, save="sync"), tmp_path / "sync")
    assert saves(found) == saves(plain) == [("checkpoint", step) for step in (4, 8, 12)]
    assert content(tmp_path / "async") == content(tmp_path / "sync")
    assert [fact for fact in found if fact not in saves(found)] == [fact for fact in plain if fact not in saves(plain)]


def test_steps_do_not_wait_for_a_slow_disk(config, tmp_path, disk):
    def act(event) -> None:
        if event.kind == "step" and event.step == 8:  # four steps after the save began
            assert disk.begun == [4]
            assert not (tmp_path / "run/checkpoints/0000004").exists()
            disk.released.set()

    found = facts(config, tmp_path / "run", act)
    assert saves(found) == [("checkpoint", step) for step in (4, 8, 12)]
    assert found.index(("checkpoint", 4)) > found.index(("step", 8))
    assert disk.threads == {"checkpoint_0", threading.main_thread().name}  # the last write has nothing to overlap with
    monkey = facts(with_train(config, save="sync"), tmp_path / "sync")
    assert content(tmp_path / "run") == content(tmp_path / "sync"), monkey
