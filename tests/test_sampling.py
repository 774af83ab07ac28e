"""Samples are numbered: image i depends on (seed, i), not on its batch."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import perturbed, small_model
from dit_in_dit import sample
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.registration import register
from dit_in_dit.config.run import DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS, Sampler, check_sampler
from dit_in_dit.diffusion.path import PATHS
from dit_in_dit.diffusion.samplers import denoise, trajectory
from dit_in_dit.diffusion.schedulers import make_scheduler, set_steps
from dit_in_dit.interop.export_pipeline import pipeline_of
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import image_grid, to_pixels
from dit_in_dit.sampling.numbered import sample_batches


@pytest.fixture
def model(run_config) -> NestedDiT:
    return perturbed(NestedDiT(run_config.model))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_a_sample_has_the_same_bits_in_every_batch(run_config, model, sampler):
    config = replace(run_config, sample=replace(run_config.sample, sampler=sampler, steps=6))
    together = sample(model, config, 19)
    assert torch.equal(sample(model, config, 11), together[:11])
    for asked in ([17], [5, 2], [7, 8], [18, 0, 9]):
        drawn = list(sample_batches(model, config, asked))
        assert [index for indices, _ in drawn for index in indices] == asked
        assert torch.equal(torch.cat([images for _, images in drawn]), together[asked])


def test_every_forward_pass_has_the_same_size_and_rows_for_any_requested_samples(run_config, model):
    config = replace(run_config, sample=replace(run_config.sample, micro_batch=5))

    def inputs(asked) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        list(sample_batches(model, config, asked))
        handle.remove()
        return seen

    whole = inputs(range(15))
    assert {len(x) for x in whole} == {10}  # guidance doubles the rows: with and without the label
    calls = len(whole) // 3
    for number, asked in enumerate(([4], [5, 9], [12, 13])):
        for x, expected in zip(inputs(asked), whole[number * calls : (number + 1) * calls], strict=True):
            assert torch.equal(x, expected)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_interleaved_trajectories_equal_separate_ones(run_config, sampler):
    how = replace(run_config.sample, sampler=sampler, steps=5)
    noises = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def start(noise: torch.Tensor) -> Iterator[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
        return trajectory(lambda x, t, y: x.tanh(), run_config.diffusion, how, noise, None)

    alone = [list(start(noise)) for noise in noises]
    in_turns = list(zip(*(start(noise) for noise in noises), strict=True))
    for calls, number in itertools.product(in_turns, (0, 1)):
        t, *tensors = calls[number]
        expected, *wanted = alone[number].pop(0)
        assert t == expected
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


# Of 5 steps, as diffusers 0.42.1 spaces them: times, and the first two noise levels.
SPACED = {
    ("flow", "euler", None): ([1000, 800, 600, 400, 200], [1, 0.8]),
    ("flow", "heun", None): ([1000, 800, 800, 600, 600, 400, 400, 200, 200], [1, 0.8]),
    ("flow", "dpm++", None): ([999, 799, 599, 399, 199], [0.999, 0.7992]),
    ("flow", "unipc", None): ([999, 800, 600, 400, 200], [0.999999, 0.8002]),
    ("ddpm", "ddim", "trailing"): ([999, 799, 599, 399, 199], []),
    ("ddpm", "ddim", "leading"): ([800, 600, 400, 200, 0], []),
    ("ddpm", "ddpm", "linspace"): ([999, 749, 500, 250, 0], []),
    ("ddpm", "dpm++", "trailing"): ([999, 799, 599, 399, 199], [157.407, 25.5285]),
    ("ddpm", "dpm++", "linspace"): ([999, 799, 599, 400, 200], [157.407, 25.5285]),
    ("ddpm", "unipc", "leading"): ([830, 664, 498, 332, 166], [32.9628, 9.36076]),
}


@pytest.mark.parametrize(("path", "sampler", "spacing"), SPACED)
def test_another_diffusers_version_with_other_times_gives_the_same_samples(path, sampler, spacing, monkeypatch):
    """UniPC's flow steps, for example, are 999, 800, ... in diffusers 0.42 and 999, 799, ... in 0.35."""
    times, levels = SPACED[path, sampler, spacing]
    diffusion = DiffusionConfig(path=path)
    theirs = getattr(importlib.import_module("diffusers"), SAMPLERS[sampler].schedulers[path])
    spaced = theirs.set_timesteps

    def otherwise(self, steps, *rest, **options) -> None:
        spaced(self, steps, *rest, **options)
        self.timesteps = self.timesteps - self.timesteps // 9
        if hasattr(self, "sigmas"):
            self.sigmas = self.sigmas * 0.9

    def drawn() -> tuple[torch.Tensor, ...]:
        scheduler = make_scheduler(diffusion, sampler, spacing)
        set_steps(scheduler, 5)
        return scheduler.timesteps, getattr(scheduler, "sigmas", torch.zeros(0))

    before = drawn()
    assert before[0].tolist() == pytest.approx(times)
    assert before[1][:2].tolist() == pytest.approx(levels, rel=1e-3)
    assert before[1].tolist()[-1:] in ([], [0])
    monkeypatch.setattr(theirs, "set_timesteps", otherwise)
    assert all(torch.equal(a, b) for a, b in zip(drawn(), before, strict=True))


class Euler:
    """A user's Euler scheduler: x + dt * velocity, in equal steps of t."""

    prediction = "velocity"

    def set_timesteps(self, steps: int) -> None:
        self.sigmas = torch.linspace(1, 1 / steps, steps)
        self.timesteps = 1000 * self.sigmas
        self.following = [*self.sigmas[1:].tolist(), 0.0]

    def step(self, prediction: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=x + (self.following.pop(0) - timestep / 1000) * prediction)


def test_a_users_euler_sampler_gives_the_samples_of_the_built_in_sampler(run_config, model, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler({"flow": Euler}, spacings=()))
    euler, mine = (replace(run_config, sample=SampleConfig(sampler=name, steps=5)) for name in ("euler", "mine"))
    drawn = sample(model, mine, 10)  # two batches, each with its own scheduler
    assert torch.allclose(drawn, sample(model, euler, 10), atol=1e-5)
    with pytest.raises(UserError, match=r"sampler=mine needs diffusion.path=flow: use ddim, .* with path ddpm"):
        check_sampler("ddpm", "mine", 5)
    with pytest.raises(UserError, match="spacing=leading does not fit sampler mine: use null"):
        SampleConfig(sampler="mine", spacing="leading")
    with pytest.raises(UserError, match="sampler=mine has no `diffusers` scheduler, which an exported folder needs"):
        pipeline_of(model, mine, ["a", "b", "c"])


@pytest.mark.parametrize("prediction", ["velocity", "image", "noise"])
def test_a_users_stochastic_sampler_receives_the_prediction_and_the_noise(monkeypatch, prediction):
    class Noisy(Euler):
        def step(self, prediction: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor, *, noise: torch.Tensor):
            seen.append(prediction)
            return SimpleNamespace(prev_sample=prediction + noise)

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Noisy, "prediction", prediction)
    monkeypatch.setitem(SAMPLERS, "mine", Sampler({"flow": Noisy}, stochastic=True))
    draws = iter(torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    how = SampleConfig(sampler="mine", steps=2)
    diffusion = DiffusionConfig(predict="image")
    calls = list(trajectory(lambda x, t, y: x / 2, diffusion, how, lambda: next(draws), None))
    for (t, x, image, after), given in zip(calls, seen, strict=True):
        noise = (x - (1 - t) * image) / t
        wanted = {"velocity": noise - image, "image": image, "noise": noise}[prediction]
        assert torch.allclose(given, wanted, atol=1e-5)
        assert not torch.equal(after, given)
    assert next(draws, None) is None  # one draw at the start and one per step


class NoStep:
    """A scheduler that lacks `step`."""

    prediction = "velocity"
    set_timesteps = Euler.set_timesteps


@pytest.mark.parametrize(
    ("schedulers", "message"),
    [
        ({"flwo": Euler}, "must use registered paths: got 'flwo'; did you mean 'flow'"),
        ({3: Euler}, "must use registered paths: got 3"),
        ({}, "needs a scheduler for each path, such as {'flow': MyScheduler}: got {}"),
        (Euler, "needs a scheduler for each path, .*: got <class"),
        ({"flow": 3}, "for path flow must be a class, or the name of a diffusers class: got 3"),
        ({"flow": NoStep}, "needs step: write them in NoStep"),
        ({"ddpm": SimpleNamespace}, "needs set_timesteps and step: write them in SimpleNamespace"),
    ],
)
def test_register_refuses_a_sampler_without_a_usable_scheduler(schedulers, message):
    with pytest.raises(UserError, match=f"sampler('s scheduler)? {message}"):
        register("sampler", "mine", Sampler(schedulers))
    assert "mine" not in SAMPLERS


def test_a_sampler_supports_a_registered_path_of_the_user(monkeypatch):
    monkeypatch.setitem(PATHS, "curved", PATHS["flow"])
    assert Sampler({"curved": Euler}).schedulers == {"curved": Euler}


def with_euler(**changes):
    """A copy of the class Euler with some attributes changed."""
    return type("Other", (Euler,), changes)


def refused(monkeypatch, scheduler, **rules) -> str:
    """The error message when a sampler with this scheduler is used."""
    monkeypatch.setitem(SAMPLERS, "mine", Sampler({"flow": scheduler}, **rules))
    noise = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError) as refusal:
        denoise(lambda x, t, y: x, DiffusionConfig(), SampleConfig(sampler="mine", steps=2), lambda: noise, None)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("EulerSchedule", "a sampler must name a scheduler class of diffusers: got EulerSchedule; did you mean"),
        (with_euler(prediction="speed"), "Other.prediction must name a quantity: got speed; choose from image"),
        (with_euler(prediction=None), "Other.prediction must name a quantity: got none; choose from"),
        (lambda: SimpleNamespace(step=print), "lacks set_timesteps: write set_timesteps(steps)"),
        (lambda: SimpleNamespace(set_timesteps=print), "lacks step: write step(prediction, timestep, x)"),
        (with_euler(__init__=lambda self, path: None), "Other() fails with TypeError: "),
        (with_euler(step=lambda self, x: x), "Other.step must take (prediction, timestep, x): got (x); change"),
        (with_euler(set_timesteps=lambda self: None), "Other.set_timesteps must take (steps): got (); change"),
        (with_euler(set_timesteps=lambda self, steps: None), "must set timesteps, a tensor (K,) of 1000 t"),
        (with_euler(set_timesteps=lambda self, steps: setattr(self, "timesteps", [500])), "call: got list; correct"),
        (with_euler(set_timesteps=lambda self, steps: setattr(self, "timesteps", torch.ones(0))), "got a tensor [0]"),
        (with_euler(step=lambda self, v, t, x: x - v), "whose prev_sample is a tensor [2, 3, 4, 4]: got Tensor;"),
        (with_euler(step=lambda self, v, t, x: SimpleNamespace(prev_sample=x[0])), "got prev_sample [3, 4, 4];"),
    ],
)
def test_an_unusable_scheduler_gives_a_one_line_error_with_the_samplers_name(monkeypatch, scheduler, message):
    error = refused(monkeypatch, scheduler)
    assert message in error
    assert error.startswith("sampler mine: " if not isinstance(scheduler, str) else "a sampler must name")


def test_a_stochastic_step_must_take_noise(monkeypatch):
    error = refused(monkeypatch, Euler, stochastic=True)
    assert "Euler.step must take (prediction, timestep, x, noise=): got (prediction" in error


@pytest.mark.parametrize(("name", "path"), [("FlowMatchEulerDiscreteScheduler", "flow"), ("DDPMScheduler", "ddpm")])
def test_a_users_sampler_can_have_a_scheduler_class_of_diffusers(monkeypatch, name, path):
    monkeypatch.setitem(
        SAMPLERS,
        "mine",
        Sampler({path: getattr(importlib.import_module("diffusers"), name)}, stochastic=path == "ddpm"),
    )
    how, diffusion = SampleConfig(sampler="mine", steps=2), DiffusionConfig(path=path, predict="noise")
    drawn = denoise(lambda x, t, y: x, diffusion, how, lambda: torch.zeros(2, 3, 4, 4), None)
    assert drawn.shape == (2, 3, 4, 4)


def test_samples_depend_on_seed_and_class(run_config, model):
    first = sample(model, run_config, 3)
    assert not torch.allclose(first, sample(model, run_config, 3, seed=1), atol=1e-3)
    other = sample(model, run_config, 3, classes=[2])
    assert torch.allclose(first[2], other[2], atol=1e-4)  # sample 2 has class 2 in both
    assert not torch.allclose(first[0], other[0], atol=1e-3)


def test_grids_keep_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    sheet = np.asarray(image_grid(pixels, columns=3))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert np.array_equal(sheet[68:132:2, 2:66:2], pixels[3])
    assert image_grid(pixels[..., :1]).size[0] > 0


def test_pixel_values_are_scaled_and_clipped_to_0_to_255():
    values = torch.tensor([-2.0, -1, 0, 1, 2]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_protocol_names_the_diffusers_version_for_times_that_older_versions_chose():
    from dit_in_dit.sampling.numbered import sampling_protocol

    def times(path, sampler):
        how = SampleConfig(sampler=sampler, steps=4)
        config = RunConfig(model=small_model(), diffusion=DiffusionConfig(path=path), sample=how)
        return sampling_protocol(config, labels="none", averaged=True, seed=0).get("times")

    assert times("flow", "unipc") == "of diffusers 0.42"
    assert [times("flow", "dpm++"), times("flow", "heun"), times("ddpm", "unipc")] == [None] * 3
