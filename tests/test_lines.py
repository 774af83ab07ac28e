"""On a full disk a run loses only the checkpoints that did not fit."""

from __future__ import annotations

import errno
import json
import os

import pytest

from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import SaveError
from dit_in_dit.runs.jsonl import Lines, Log
from dit_in_dit.training.loop import train


class Narrow:
    """A file that accepts `room` bytes, and more only once it is `wide`."""

    def __init__(self, file, room):
        self.file, self.room, self.wide = file, room, False

    def write(self, content):
        if not self.wide and not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = len(content) if self.wide else min(self.room, len(content))
        self.room -= 0 if self.wide else taken
        return self.file.write(content[:taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 11, 12, 13, 30])
def test_log_lines_wait_while_the_disk_is_full(tmp_path, room):
    lines = Lines(tmp_path / "log.jsonl", bool)
    lines.file = disk = Narrow(lines.file, room)
    for step in range(4):
        lines.add({"step": step})
    with pytest.raises(SaveError, match=r"cannot write .*log\.jsonl: No space left on device; make room"):
        lines.settle()
    disk.wide = True
    lines.add({"step": 4})
    lines.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in range(5))


def test_a_log_keeps_the_steps_before_and_after_a_roll_back(tmp_path):
    def write(log):
        log.write(0, {"step": 1, "loss": 1.0})
        log.write(0, {"step": 2, "loss": 9.0})
        log.write(0, {"step": 2, "rollback": {"to": 0}})
        log.write(1, {"step": 1, "loss": 0.5})
        log.lines.close()

    for _ in range(2):  # the second time by a process that does it all again
        write(Log(tmp_path / "log.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("loss", "back") for line in found] == [1.0, 9.0, "back", 0.5]


def test_a_checkpoint_that_does_not_fit_is_retried_at_the_next_interval(run_config, tmp_path, monkeypatch):
    list(train(run_config, tmp_path / "unbroken", device="cpu"))
    plain = checkpoint.save

    def full(run, config, step, *more, **keys):
        if step == 3:
            raise SaveError("cannot save it: no space left: make room")
        return plain(run, config, step, *more, **keys)

    monkeypatch.setattr(checkpoint, "save", full)
    facts = list(train(run_config, tmp_path / "run", device="cpu"))
    found = [(fact.kind, fact.step) for fact in facts if fact.kind in ("checkpoint", "unsaved")]
    assert found == [("unsaved", 3), ("checkpoint", 6)]
    hashes = [checkpoint.newest(tmp_path / name).manifest["sha256"] for name in ("unbroken", "run")]
    assert hashes[0] == hashes[1]


def test_the_log_is_synced_to_disk_before_the_checkpoint(run_config, tmp_path, monkeypatch):
    synced, log = [], tmp_path / "run/log.jsonl"
    plain_sync, plain_save = os.fsync, checkpoint.save

    def sync(descriptor):
        plain_sync(descriptor)
        if log.exists() and os.path.samestat(os.fstat(descriptor), log.stat()):
            synced.append(log.read_text())

    def save(run, config, step, *more, **keys):
        assert [json.loads(line)["step"] for line in synced[-1].splitlines()][-1] == step
        return plain_save(run, config, step, *more, **keys)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(checkpoint, "save", save)
    list(train(run_config, tmp_path / "run", device="cpu"))
    assert len(synced) == 2


def test_a_last_checkpoint_that_does_not_fit_gives_an_error(run_config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SaveError("cannot save it: no space left: make room")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(SaveError, match="make room"):
        list(train(run_config, tmp_path / "run", device="cpu"))
