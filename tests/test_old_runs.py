"""What an earlier version wrote still loads, resumes, verifies, samples and exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dit_in_dit import checkpoint
from dit_in_dit.config import config_hash
from dit_in_dit.interop.slim import export_slim
from dit_in_dit.sampling import sample

OLD = Path(__file__).parent / "old"


def test_an_old_run_and_its_export_load_verify_and_sample(tmp_path):
    for name in ("run", "slim"):
        model, config, manifest = checkpoint.load_model(OLD / name, torch.device("cpu"))
        assert "hash_version" not in manifest
        assert manifest["config"] == config_hash(config)
        assert sample(model, config, 2).isfinite().all()
    export_slim(OLD / "run", tmp_path / "given")


def test_an_old_run_resumes_and_says_that_it_notes_no_data(tmp_path):
    from dit_in_dit.training.loop import train

    shutil.copytree(OLD / "run", tmp_path / "run")
    config = checkpoint.read_config(tmp_path / "run")
    facts = list(train(config, tmp_path / "run", resume=True, device="cpu"))
    assert facts[0].step == 2
    assert facts[0].values["unrecorded"]
    assert facts[-1].step == config.train.steps
    assert "data" in checkpoint.newest(tmp_path / "run").manifest
