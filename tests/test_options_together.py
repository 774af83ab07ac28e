"""A run with every option of docs/recipes.md on at once ends with the bits of a run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_in_dit.config import presets
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.runs import checkpoint
from processes import run_together, trained

EVERY = (
    *("model.patch_size=2", "model.outer.width=32", "model.stages=outer*6 inner*1"),  # 256 patches
    *("train.token_drop=0.5", "train.token_drop_blocks=[1,4]", "train.optimizer=muon", "train.beta2=0.95"),
    *("train.ema=[0.99,0.9]", "train.ema_lengths=[0.05,0.1]", "train.ema_snapshot_every=2", "train.save=async"),
    *("train.terms.internal=0.1", "train.terms.sra=0.1", "train.dropout=0.1", "train.recompute=selective"),
    *("data.balance=class", "data.augment=0.3", "diffusion.time_shift=1.3", "train.precision=bfloat16"),
    *("train.batch_size=2", "train.accumulate=2", "train.steps=4", "train.warmup=2", "train.checkpoint_every=2"),
    *("train.sample_every=0", "train.evaluate_every=0", "train.compile=false"),
)


def config(*keys: str) -> RunConfig:
    return override(presets.get("emoji"), [*EVERY, *keys])


def bits(run: Path) -> tuple[bytes, dict[str, bytes]]:
    """The log, and the files of weights of the newest checkpoint and of all snapshots."""
    folders = (checkpoint.newest(run).folder, run / "averages")
    files = {str(path.relative_to(run)): path.read_bytes() for of in folders for path in of.rglob("*.safetensors")}
    return (run / "log.jsonl").read_bytes(), files


def test_a_stopped_run_with_every_option_ends_with_the_same_bits(tmp_path):
    run = config()
    trained(run, tmp_path / "whole", False)
    trained(run, tmp_path / "stopped", False, 1)
    trained(run, tmp_path / "stopped", True)
    log, files = bits(tmp_path / "whole")
    assert all(name in log for name in (b"loss.internal", b"loss.sra"))
    assert len(files) == 4  # state, first average, two snapshots
    assert bits(tmp_path / "stopped") == (log, files)


@pytest.mark.slow
def test_with_every_option_1_2_1_processes_give_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    run = config("train.reduction=fixed", "train.precision=float32")
    trained(run, tmp_path / "whole", False)
    trained(run, tmp_path / "moved", False, 1)
    run_together(2, trained, run, tmp_path / "moved", True, 3)
    trained(run, tmp_path / "moved", True)
    assert bits(tmp_path / "moved") == bits(tmp_path / "whole")
