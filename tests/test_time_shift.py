"""Time shift: the times of training and sampling are those of diffusers' shifted schedulers and of the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from dit_in_dit.config import presets
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import config_hash, from_yaml, override, to_yaml
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.diffusion.objective import draw_time
from dit_in_dit.diffusion.path import make_path
from dit_in_dit.diffusion.samplers import denoise, trajectory
from dit_in_dit.diffusion.schedulers import make_scheduler, set_steps, shift_of
from dit_in_dit.sampling.numbered import sampling_protocol

FLOW = [name for name, rules in SAMPLERS.items() if "flow" in rules.schedulers]
MUST = "time_shift must be a finite number or tokens or dimension"


@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_sigmas_are_those_of_flow_match_euler(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    ours = make_scheduler(DiffusionConfig(), "euler", shift=shift)
    set_steps(ours, 10)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, atol=2e-7, rtol=0)
    assert ours.sigmas.max() <= 1
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, atol=1e-3, rtol=0)
    assert shift_of(ours) == shift


@pytest.mark.parametrize("sampler", FLOW)
def test_every_flow_sampler_takes_the_shift(sampler):
    plain = DiffusionConfig()
    how, noise = SampleConfig(sampler=sampler, steps=6), torch.randn(2, 1, 4, 4)

    def times(diffusion, how):
        return [call[0] for call in trajectory(lambda x, t, y: x.tanh(), diffusion, how, noise, None)]

    even, shifted = times(plain, how), times(plain, replace(how, time_shift=2.5))
    np.testing.assert_allclose(shifted, [2.5 * t / (1 + 1.5 * t) for t in even], atol=2e-6)
    assert times(DiffusionConfig(time_shift=2.5), how) == shifted, "null is the shift of training"
    assert times(DiffusionConfig(time_shift=2.5), replace(how, time_shift=1)) == even


@pytest.mark.parametrize("sampler", FLOW)
def test_samples_of_an_exact_model_do_not_depend_on_the_shift(sampler):
    """If all images are one image, every step along the exact velocity stays on the straight line to it."""
    image, noise = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    how = SampleConfig(sampler=sampler, steps=8, time_shift=3)
    config = DiffusionConfig(predict="image")
    result = denoise(lambda x, t, y: image.expand_as(x), config, how, noise, None)
    torch.testing.assert_close(result, image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_training_times_are_shifted_after_the_distribution(time):
    uniform = torch.rand(1000, dtype=torch.float64)
    plain, shifted = (
        draw_time(make_path(config), uniform, config).double()
        for config in (DiffusionConfig(time=time), DiffusionConfig(time=time, time_shift=3))
    )
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) + math.log(3), atol=2e-5, rtol=1e-4)
    assert torch.equal(draw_time(make_path(DiffusionConfig()), uniform, DiffusionConfig(time_shift=1)), uniform.float())


def test_named_shifts_follow_the_size_of_the_model():
    rae = presets.get("rae-xl")
    assert rae.diffusion.time_shift == "dimension"
    assert rae.diffusion.shift == rae.sample.shift(rae.diffusion) == math.sqrt(196608 / 4096)
    assert presets.get("raev2").diffusion.shift == math.sqrt(262144 / 4096)
    config = override(RunConfig(), ["model.image_size=64", "model.patch_size=2", "diffusion.time_shift=tokens"])
    assert config.diffusion.shift == 2  # 1024 patches in place of 256
    config = override(config, ["model.image_size=[16, 64]", "sample.time_shift=dimension"])
    assert (config.diffusion.shift, config.sample.shift(config.diffusion)) == (1, math.sqrt(3 * 1024 / 4096))
    lightning = presets.get("lightningdit-xl1")
    assert lightning.diffusion.shift == 1
    t = 0.25  # of the official code, where 1 is the image
    assert 1 - 0.3 * t / (1 - 0.7 * t) == pytest.approx(
        (s := lightning.sample.shift(lightning.diffusion)) * (1 - t) / (1 + (s - 1) * (1 - t))
    )


def test_names_are_written_and_read_and_defaults_keep_the_hash():
    config = override(RunConfig(), ["diffusion.time_shift=tokens", "sample.time_shift=2.5"])
    again = from_yaml(to_yaml(config))
    assert again == config
    assert again.diffusion.shift == config.diffusion.shift
    assert config_hash(override(config, ["diffusion.time_shift=1", "sample.time_shift=null"])) == config_hash(
        RunConfig()
    )
    assert config_hash(config) != config_hash(RunConfig())


def test_the_protocol_names_a_shift():
    named = {"labels": "any", "averaged": True, "seed": 0}
    assert "time_shift" not in sampling_protocol(RunConfig(), **named)
    config = override(RunConfig(), ["diffusion.time_shift=2"])
    assert sampling_protocol(config, **named)["time_shift"] == 2
    assert "time_shift" not in sampling_protocol(override(config, ["sample.time_shift=1"]), **named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["diffusion.time_shift=token"],
            f"diffusion.{MUST}: got 'token'",
        ),
        (
            ["sample.time_shift=[1]"],
            f"sample.{MUST} or null: got '[1]'",
        ),
        (["diffusion.time_shift=0"], "diffusion.time_shift must be from 0.001 to 1000: got 0.0"),
        (
            ["diffusion.path=ddpm", "sample.sampler=ddim", "diffusion.time_shift=2"],
            "diffusion.time_shift=2.0 needs diffusion.path=flow: set diffusion.time_shift=1",
        ),
        (
            ["diffusion.path=ddpm", "sample.sampler=ddim", "sample.time_shift=tokens"],
            "sample.time_shift=tokens needs diffusion.path=flow: set sample.time_shift=1",
        ),
    ],
)
def test_bad_shifts_are_one_line(changes, message):
    with pytest.raises(UserError) as error:
        override(RunConfig(), changes)
    assert str(error.value) == message


def test_a_name_needs_the_config_of_a_run():
    with pytest.raises(UserError, match="needs the size of a model"):
        _ = DiffusionConfig(time_shift="tokens").shift
