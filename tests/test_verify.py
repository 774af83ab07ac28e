"""`verify-resume` detects differences and reports them."""

from __future__ import annotations

import pytest
import torch

from dit_in_dit.cli import main, verify_resume
from dit_in_dit.runs.folder import create_run
from dit_in_dit.training.trainer import Trainer


@pytest.fixture
def run(run_config, tmp_path, full, monkeypatch):
    """A run that has just started. Unless all faults are tested, the command trains in this process for speed."""
    create_run(tmp_path / "run", run_config)
    if not full:
        monkeypatch.setattr(verify_resume, "_train", lambda arguments: main(["train", *arguments]))
    return tmp_path / "run"


def test_verify_resume_reports_a_stopped_run_as_equal(run, capsys):
    before = sorted(run.rglob("*"))
    main(["verify-resume", str(run), "--steps", "5", "--stop", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[:3]] == [
        ["same", "ema.safetensors"],
        ["same", "log.jsonl"],
        ["same", "state.safetensors"],
    ]
    assert "5 steps, and 2 steps + a stop + 3 steps" in said
    assert sorted(run.rglob("*")) == before


def test_verify_resume_detects_a_resume_that_loses_state(run, capsys, monkeypatch):
    monkeypatch.setattr(verify_resume, "_train", lambda arguments: main(["train", *arguments]))
    whole = Trainer.restore

    def forgetful(self, state, ema, step):
        forgotten = {n: torch.zeros_like(t) if ".exp_avg." in n else t for n, t in state.items()}
        whole(self, forgotten, ema, step)

    monkeypatch.setattr(Trainer, "restore", forgetful)
    with pytest.raises(SystemExit) as end:
        main(["verify-resume", str(run), "--steps", "5", "--device", "cpu"])
    assert end.value.code == 1
    found = capsys.readouterr()
    assert "DIFFERENT" in found.out
    assert "does NOT end as an unbroken one" in found.err


def test_verify_resume_refuses_a_stop_outside_the_run(run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify-resume", str(run), "--steps", "5", "--stop", "5"])
    assert end.value.code == 2
    assert "--stop must lie between 0 and 5" in capsys.readouterr().err
