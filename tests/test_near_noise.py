"""scripts/near_noise.py: errors close to pure noise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from conftest import small_model
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.training.held_out import HELD_OUT_IMAGES

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts/near_noise.py"))


def test_a_model_that_estimates_grey_has_the_images_own_mean_square_as_error_at_every_time(tmp_path):
    config = RunConfig(
        model=small_model("outer", image_size=(16, 16), num_classes=9),
        data=DataConfig(source="emoji"),
        diffusion=DiffusionConfig(predict="image"),
    )
    run = tmp_path / "run"
    create_run(run, config)
    weights = NestedDiT(config.model).state_dict()  # its head is zero at the start
    source = open_source(config.data, config.model)
    checkpoint.save(run, config, 1, {f"model.{k}": v for k, v in weights.items()}, weights, source.classes)
    x = torch.stack([torch.as_tensor(source.held_out(i)[0]) for i in range(min(HELD_OUT_IMAGES, source.held_out_size))])
    blocks = x.reshape(len(x), 3, 2, 8, 2, 8).mean((3, 5))
    expected = [float(v) for v in (x.square().mean(), blocks.square().mean(), -x.mean())]
    rows = list(SCRIPT["near_noise"](run))
    assert [t for t, *_ in rows] == list(SCRIPT["TIMES"])
    for _, *found in rows:
        assert found == pytest.approx(expected, rel=1e-4)
