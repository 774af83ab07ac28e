"""Time shift, dropout and class balance in whole runs: resumed, in two processes, and seen by doctor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SHARDED
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.doctor.doctor import examine
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train
from processes import run_together

KEYS = (
    *("model.image_size=8", "model.patch_size=4", "model.num_classes=2", "model.stages=inner outer inner"),
    *("model.outer.width=16", "model.outer.num_heads=2", "model.inner.width=16", "model.inner.num_heads=2"),
    *("model.inner.sub_patch=2", "data.balance=class", "data.held_out=0", "diffusion.time_shift=tokens"),
    *("train.dropout=0.2", "train.batch_size=4", "train.accumulate=2", "train.steps=4", "train.checkpoint_every=2"),
    *(
        "train.precision=float32",
        "train.compile=false",
        "train.sample_every=4",
        "sample.steps=2",
        "sample.sampler=euler",
    ),
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run on 40 images of one class and 1 of another."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (41, 8, 8, 3), np.uint8), np.array([0] * 40 + [1])
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return override(RunConfig(), [*KEYS, f"data.source={tmp_path / 'data.npz'}"])


def trained(config: RunConfig, out: Path, **options) -> str:
    for _ in train(config, out, device="cpu", **options):
        pass
    return (out / "log.jsonl").read_text()


def tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run).folder
    return load_tensors(newest / checkpoint.STATE) | load_tensors(newest / "ema.safetensors")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_stopped_and_resumed_has_the_bits_of_the_whole(config, tmp_path, workers):
    whole = trained(config, tmp_path / "whole")
    config = override(config, [f"data.workers={workers}"])
    trained(config, tmp_path / "run", until=2)
    assert trained(config, tmp_path / "run", resume=True) == whole
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_two_processes_train_as_one(config, tmp_path):
    config = override(config, ["train.reduction=fixed"])
    whole = trained(config, tmp_path / "whole")
    run_together(2, trained, config, tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_text() == whole
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize("parallel", [SHARDED])
def test_a_sharded_run_sees_the_same_masks(config, tmp_path, parallel):
    trained(config, tmp_path / "whole")
    run_together(2, trained, override(config, [f"train.parallel={parallel}"]), tmp_path / "run")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    for name in one:
        if one[name].is_floating_point():
            torch.testing.assert_close(one[name], other[name], atol=3e-5, rtol=1e-3)


def test_doctor_warns_of_repeated_images_and_of_times_at_one_end(config):
    report = examine(override(config, ["diffusion.time_shift=60"]), torch.device("cpu"))
    seen = {finding.check: finding.seen for finding in report.findings}
    assert seen["balance"] == "the smallest class (1 images) repeats an image 20 times as often as the average"
    assert seen["time shift"] == "diffusion.time_shift=60 puts 55% of the training times above 0.98"
    report = examine(override(config, ["diffusion.time_shift=3", "data.balance=none"]), torch.device("cpu"))
    assert not {"balance", "time shift"} & {finding.check for finding in report.findings}
