"""Files of the first version load, resume, verify, sample, evaluate and export, in this version and in later ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit_in_dit
from dit_in_dit.cli import main
from dit_in_dit.config.files import config_hash
from dit_in_dit.interop.release import export_release
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import read_config
from dit_in_dit.sampling.numbered import sample
from dit_in_dit.study.plan import read_plan

OLD = Path(__file__).parent / "old"  # written by version 0.1.0, before hashes had a version; never written again


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files as working folder, because their paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def counts(study: Path) -> dict[str, int]:
    from dit_in_dit.study.queue import Queue

    return {state: count for state, count in Queue(read_plan(study), study).counts().items() if count}


def test_an_old_run_and_its_export_load_verify_and_sample(tmp_path):
    for name in ("run", "slim"):
        saved = Checkpoint.open(OLD / name)
        model, config, manifest = saved.model(torch.device("cpu")), saved.config, saved.manifest
        assert "hash_version" not in manifest
        assert manifest["config"] == config_hash(config)
        assert sample(model, config, 2).isfinite().all()
    export_release(OLD / "run", tmp_path / "given")


def test_an_old_run_resumes_exactly_and_reports_its_missing_data_record(old):
    from dit_in_dit.training.loop import train

    config = read_config(old / "run")
    list(train(config, old / "again", device="cpu"))
    facts = list(train(config, old / "run", resume=True, device="cpu"))
    assert facts[0].step == 2
    assert facts[0].values["unrecorded"]
    found, wanted = lines(old / "run/log.jsonl"), lines(old / "unbroken.jsonl")
    if lines(old / "again/log.jsonl") == wanted:  # this machine's sums have the bits of the one that wrote it
        assert found == wanted
        assert checkpoint.newest(old / "run").manifest["sha256"] == checkpoint.newest(old / "again").manifest["sha256"]
    for one, other in zip(map(json.loads, found), map(json.loads, wanted), strict=True):
        assert one.pop("held_out", {}).keys() == other.pop("held_out", {}).keys()
        assert one == pytest.approx(other, rel=1e-4)
    assert "data" in checkpoint.newest(old / "run").manifest


def test_an_old_evaluation_continues_with_its_existing_samples(old):
    out = old / "run/evaluation/0000002"
    drawn = {path: path.stat().st_mtime_ns for path in (out / "samples").iterdir()}
    before = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").unlink()
    main(["evaluate", "run", "--num", "4", "--device", "cpu"])
    assert {path: path.stat().st_mtime_ns for path in (out / "samples").iterdir()} == drawn
    after = json.loads((out / "metrics.json").read_text())
    assert after["subject"] == before["subject"]
    assert before["protocol"].items() <= after["protocol"].items()


def test_old_exports_can_be_sampled_and_used_for_a_warm_start(old):
    from dit_in_dit.interop.pipeline import DiTInDiTPipeline

    main(["train", "--config", "slim/config.yaml", "--init", "slim", "--out", "begun", "--device", "cpu"])
    pipe = DiTInDiTPipeline.from_pretrained(str(old / "pipeline"))
    images = pipe([0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()


def test_an_old_study_continues_where_it_stopped(old):
    assert read_plan(old / "study").identity == "study-d6b73a01d07a"
    before = (old / "study/runs/plain-s0/result.json").read_bytes()
    assert counts(old / "study") == {"done": 1, "waiting": 1}
    main(["study", "work", "study", "--device", "cpu"])
    assert counts(old / "study") == {"done": 2}
    main(["study", "report", "study"])
    assert (old / "study/runs/plain-s0/result.json").read_bytes() == before
    assert not (old / "study/runs/plain-s0/checkpoints").exists()  # it was not trained again


@pytest.mark.slow
def test_a_version_with_more_keys_continues_runs_of_the_first_version(old, tmp_path):
    newer = tmp_path / "src/dit_in_dit"
    shutil.copytree(Path(dit_in_dit.__file__).parent, newer, ignore=shutil.ignore_patterns("__pycache__"))
    for file, before in (
        ("config/model.py", '    fuse: Literal["add"'),
        ("config/training.py", "    clip: float"),
        ("config/run.py", "    spacing: Literal"),
        ("study/plan.py", "    prune: bool"),
    ):
        text = (newer / file).read_text()
        assert text.count(before) == 1
        added = f'    newer: bool = key(False, "of a later version", added=2)\n{before}'
        (newer / file).write_text(text.replace(before, added))
    code = """
import sys
from pathlib import Path
import dit_in_dit
from dit_in_dit.runs.folder import read_config
from dit_in_dit.cli import main
from dit_in_dit.study.queue import Queue
from dit_in_dit.study.plan import read_plan
assert dit_in_dit.__file__.startswith(sys.argv[1]), dit_in_dit.__file__
assert not read_config(Path("run")).model.inner.newer
assert Queue(read_plan(Path("study")), Path("study")).counts()["done"] == 1
for line in (
    "sample run --num 2 --out drawn", "evaluate run --num 4", "train --resume --out run",
    "sample slim --num 2 --out drawn-slim", "study work study",
):
    main([*line.split(), "--device", "cpu"])
main(["export", "run", "--format", "run", "--out", "as-run"])
main(["study", "report", "study"])
"""
    command, env = [sys.executable, "-c", code, str(newer)], {**os.environ, "PYTHONPATH": str(newer.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
