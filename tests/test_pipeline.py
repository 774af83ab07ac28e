"""A run exported as a `diffusers` folder: the same images with and without the package, for every scheduler."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard
from packaging.version import Version
from safetensors.torch import load_file

from conftest import perturbed, small_model
from dit_in_dit import sample
from dit_in_dit.cli import main
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DataConfig, DiffusionConfig, RunConfig, SampleConfig
from dit_in_dit.config.schema import to_dict
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.data.encode import LatentDecoder
from dit_in_dit.diffusion.samplers import denoise, guided
from dit_in_dit.diffusion.schedulers import make_scheduler, set_steps
from dit_in_dit.interop.card import evaluation_of
from dit_in_dit.interop.export_pipeline import export, pipeline_of
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.interop.remote_code import bundle
from dit_in_dit.interop.transformer import DiTInDiTTransformer2DModel
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.reporting.images import to_pixels
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.checkpoint import Checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runtime.seeding import generator

CLASSES = ["cat", "dog", "fox", "owl", "yak"]
WHOLE = 8  # samples of one micro-batch: of other numbers the last bits may differ
LABELS = [CLASSES[i % 5] for i in range(WHOLE)]  # of samples 0 to 7: classes take turns
FLOW = RunConfig(model=small_model("outer*1 inner*1"), sample=SampleConfig(sampler="dpm++", steps=4, guidance=2.0))
DDPM = replace(FLOW, diffusion=DiffusionConfig(path="ddpm", predict="noise"))


def noise(count: int, shape: tuple[int, ...] = (3, 16, 8)) -> torch.Tensor:
    """The noise of samples 0 to count - 1 of seed 0."""
    return torch.from_numpy(
        np.stack([generator(0, "sample", i).standard_normal(shape, np.float32) for i in range(count)])
    )


def seeded(config: RunConfig) -> NestedDiT:
    torch.manual_seed(0)
    return perturbed(NestedDiT(config.model)).eval()


def piped(config: RunConfig, **options: Any) -> DiTInDiTPipeline:
    return quiet(pipeline_of(seeded(config), config, CLASSES, **options))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> DiTInDiTPipeline:
    return piped(FLOW)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint and a picture."""
    made = tmp_path_factory.mktemp("runs") / "mine"
    create_run(made, FLOW)
    weights = seeded(FLOW).state_dict()
    checkpoint.save(made, FLOW, 1200, {f"model.{k}": v + 1 for k, v in weights.items()}, weights, tuple(CLASSES))
    (made / "samples").mkdir()
    (made / "samples" / "0001200.png").write_bytes(b"a picture")
    return made


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported run, moved away from the place where it was written."""
    written = tmp_path_factory.mktemp("exports") / "mine"
    export(run, written)
    return Path(shutil.move(written, tmp_path_factory.mktemp("elsewhere") / "copy"))


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("path", "predict", "sampler"),
    [
        *product(["flow"], ["velocity"], ["euler", "heun", "dpm++", "unipc"]),
        *product(["ddpm"], ["noise"], ["ddim", "dpm++", "unipc"]),
        ("flow", "image", "dpm++"),
        ("ddpm", "image", "ddim"),
    ],
)
def test_the_pipeline_generates_the_same_images_as_sample(path, sampler, predict):
    how = SampleConfig(sampler=sampler, steps=4, guidance=2.0, interval=(0.2, 0.9))
    config = replace(FLOW, diffusion=DiffusionConfig(path=path, predict=predict), sample=how)
    ours, pipe = sample(seeded(config), config, WHOLE), piped(config)
    assert torch.equal(pipe(LABELS, latents=noise(WHOLE), output_type="latent").images, ours)
    pictures = pipe([0, 1, 2, 3, 4, 0, 1, 2], latents=noise(WHOLE)).images
    assert np.array_equal(np.stack([np.asarray(image) for image in pictures]), to_pixels(ours))


def test_a_call_overrides_steps_guidance_and_interval(pipe):
    asked = replace(FLOW, sample=SampleConfig(sampler="dpm++", steps=6, guidance=3.0, interval=(0.5, 1.0)))
    drawn = pipe(
        LABELS,
        latents=noise(WHOLE),
        num_inference_steps=6,
        guidance_scale=3.0,
        guidance_interval=(0.5, 1.0),
        output_type="latent",
    ).images
    assert torch.equal(drawn, sample(seeded(asked), asked, WHOLE))


def test_output_types_give_the_same_image(pipe):
    latent, pt, array, pil = (
        pipe("cat", latents=noise(1), output_type=kind).images for kind in ("latent", "pt", "np", "pil")
    )
    assert pt.shape == (1, 3, 16, 8)
    assert array.shape == (1, 16, 8, 3)
    assert pil[0].size == (8, 16)
    torch.testing.assert_close(pt, ((latent + 1) / 2).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    (again,) = pipe("cat", latents=noise(1), output_type="pt", return_dict=False)
    assert torch.equal(again, pt)


def test_grey_images_and_models_without_labels_are_supported():
    config = replace(FLOW, model=small_model("outer*1 inner*1", channels=1, num_classes=0, image_size=(8, 12)))
    pipe = piped(config)
    images = pipe(batch_size=WHOLE, latents=noise(WHOLE, (1, 8, 12))).images
    assert {image.mode for image in images} == {"L"}
    assert np.array_equal(np.stack(images), to_pixels(sample(seeded(config), config, WHOLE)).squeeze(-1))
    with pytest.raises(UserError, match="without labels"):
        pipe([1])


def test_each_generator_gives_the_same_image_in_any_batch(pipe):
    def drawn(*seeds: int, **options: Any) -> torch.Tensor:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(3, generator=draws, output_type="latent", **options).images

    together = drawn(7, 8, 9)
    torch.testing.assert_close(torch.cat([drawn(9), drawn(7, 8)]), together[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert torch.equal(drawn(7), pipe(3, generator=torch.Generator().manual_seed(7), output_type="latent").images)


def test_generators_also_give_the_noise_of_stochastic_steps():
    pipe = piped(replace(DDPM, sample=SampleConfig(sampler="ddim", steps=5, guidance=1)))

    def drawn(seeds: list[int], eta: float) -> torch.Tensor:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(3, generator=draws, eta=eta, output_type="latent").images

    torch.testing.assert_close(drawn([5, 4], 1.0)[1:], drawn([4], 1.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn([4], 1.0), drawn([4], 0.0), atol=1e-2)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ancestral_steps_equal_those_of_sample(learned, spacing):
    how = SampleConfig(sampler="ddpm", steps=10, guidance=2.0, spacing=spacing)
    config = replace(DDPM, model=small_model("outer*1 inner*1", learn_variance=learned), sample=how)

    def source() -> Any:
        """The same noise as that of the pipeline's generators, one after the other."""
        draws = [torch.Generator().manual_seed(seed) for seed in range(5)]
        return lambda: torch.cat([torch.randn(1, 3, 16, 8, generator=draw) for draw in draws])

    model = seeded(config)
    with torch.no_grad():
        ours = denoise(guided(model, 5, how), config.diffusion, how, source(), torch.arange(5))
    draws = [torch.Generator().manual_seed(seed) for seed in range(5)]
    assert torch.equal(piped(config)(CLASSES, generator=draws, output_type="latent").images, ours)


def test_a_learned_variance_is_not_part_of_the_prediction():
    config = replace(DDPM, model=small_model("outer*1 inner*1", learn_variance=True))
    ours = sample(seeded(config), config, WHOLE)
    assert torch.equal(piped(config)(LABELS, latents=noise(WHOLE), output_type="latent").images, ours)


def test_guidance_can_be_limited_to_some_channels():
    config = replace(FLOW, sample=replace(FLOW.sample, guidance_channels=2))
    drawn = piped(config)(LABELS, latents=noise(WHOLE), output_type="latent").images
    assert torch.equal(drawn, sample(seeded(config), config, WHOLE))


def test_labels_are_numbers_names_or_none(pipe):
    def drawn(labels: Any) -> torch.Tensor:
        return pipe(labels, latents=noise(2), output_type="latent").images

    assert torch.equal(drawn("owl"), drawn([3, "owl"]))
    assert torch.equal(drawn(np.int64(3)), drawn(torch.tensor([3, 3])))
    assert torch.equal(drawn([None, 2])[1], drawn(2)[1])
    torch.testing.assert_close(drawn([None, 5]), drawn(None), rtol=1e-4, atol=1e-4)  # 5: the null class
    assert not torch.allclose(drawn([None, None]), drawn(2), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"class_labels": ["owk"]}, "did you mean 'owl'"),
        ({"class_labels": [6]}, "from 0 to 4, 5 means no class: got 6"),
        ({"class_labels": [1, 2], "batch_size": 3}, "class_labels: 2, batch_size: 3"),
        ({"class_labels": []}, "class_labels: 0"),
        ({"latents": torch.zeros(1, 3, 8, 16)}, r"latents must be \(1, 3, 16, 8\)"),
        ({"num_inference_steps": 0}, "steps must be from 1 to 1000: got 0"),
        ({"guidance_scale": -1}, "guidance must be from 0 to 100"),
        ({"guidance_interval": (0.8, 0.2)}, "from low to high"),
        ({"output_type": "pill"}, "did you mean 'pil'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "callbacks only get latents"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(pipe, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_guidance_without_a_trained_null_class_is_refused():
    pipe = piped(replace(FLOW, train=TrainConfig(label_drop=0), sample=SampleConfig(steps=2)))
    assert len(pipe([1]).images) == 1
    for arguments in ({"class_labels": [1], "guidance_scale": 2.0}, {"class_labels": [1, None]}, {}):
        with pytest.raises(UserError, match="no null class"):
            pipe(**arguments)


# --------------------------------------------------------------------------------------- callbacks


def test_a_callback_is_called_at_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(given: Any, number: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((number, float(timestep)))
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if number == 3 else {}

    images = pipe("cat", callback_on_step_end=callback, output_type="latent").images
    assert seen == [(number, float(t)) for number, t in enumerate(pipe.scheduler.timesteps)]
    assert (images == 0.25).all()


def test_an_interrupted_pipeline_takes_no_more_steps(pipe):
    after = []

    def stop(given: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given._interrupt = number == 1
        after.append(tensors["latents"])
        return {}

    images = pipe("cat", callback_on_step_end=stop, output_type="latent").images
    assert len(after) == 2
    assert torch.equal(images, after[-1])
    assert len(pipe("cat", output_type="latent").images) == 1  # the next call starts anew


def test_callback_objects_name_their_tensors(pipe):
    class Callback:
        tensor_inputs = ("latents",)

        def __call__(self, given: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] * 0}

    assert not pipe("cat", callback_on_step_end=Callback(), output_type="latent").images.any()


def test_the_progress_bar_counts_steps(pipe, monkeypatch):
    counts = []

    class Bar:
        def __init__(self, total: int) -> None:
            counts.append([total, 0])

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self) -> None:
            counts[-1][1] += 1

    monkeypatch.setattr(pipe, "progress_bar", Bar)
    pipe("cat", num_inference_steps=7)
    assert counts == [[7, 7]]


# -------------------------------------------------------------------------------------- schedulers


class Gaussian(torch.nn.Module):
    """The exact model of images with independent normal values, mean 0.3 and deviation 0.5."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model = to_dict(replace(config.model, num_classes=0))
        self.config = SimpleNamespace(model=model, diffusion=to_dict(config.diffusion))
        betas = np.linspace(1e-4, 0.02, 1000)
        self.left = np.cumprod(1 - betas)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: None, return_dict: bool) -> tuple[torch.Tensor]:
        a, b = 1 - float(t[0]), float(t[0])
        if self.config.diffusion["path"] == "ddpm":
            left = np.interp(float(t[0]) * 1000, np.arange(1000), self.left)
            a, b = left**0.5, (1 - left) ** 0.5
        image = 0.3 + 0.25 * a / (0.25 * a**2 + b**2) * (x - 0.3 * a)
        noise = (x - a * image) / max(b, 1e-6)
        return ({"image": image, "noise": noise, "velocity": noise - image}[self.config.diffusion["predict"]],)


@pytest.mark.parametrize(
    ("path", "predict", "scheduler"),
    [
        ("flow", "velocity", FlowMatchEulerDiscreteScheduler),
        ("flow", "velocity", FlowMatchHeunDiscreteScheduler),
        ("flow", "velocity", DPMSolverMultistepScheduler),
        ("flow", "image", UniPCMultistepScheduler),
        ("flow", "noise", FlowMatchHeunDiscreteScheduler),
        ("ddpm", "noise", DDIMScheduler),
        ("ddpm", "noise", DPMSolverMultistepScheduler),
        ("ddpm", "image", UniPCMultistepScheduler),
        ("ddpm", "noise", EulerDiscreteScheduler),
        ("ddpm", "noise", DDPMScheduler),
        ("ddpm", "image", EulerDiscreteScheduler),
    ],
)
def test_swapped_schedulers_sample_the_distribution(path, predict, scheduler):
    """Swap the scheduler only with `from_config`, as users do."""
    config = replace(
        FLOW, model=small_model(image_size=(64, 64)), diffusion=DiffusionConfig(path=path, predict=predict)
    )
    first = {"flow": "euler", "ddpm": "ddim"}[path]
    steps = 250 if scheduler in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler) else 40  # of the first order
    pipe = quiet(DiTInDiTPipeline(Gaussian(config), make_scheduler(config.diffusion, first)))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    draws = torch.Generator().manual_seed(0)
    images = pipe(batch_size=4, num_inference_steps=steps, generator=draws, output_type="latent").images
    assert images.mean().item() == pytest.approx(0.3, abs=0.02)
    assert images.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("config", "scheduler", "says"),
    [
        (FLOW, DDIMScheduler(), "DDIMScheduler has no straight paths"),
        (DDPM, FlowMatchEulerDiscreteScheduler(), "the model's path is ddpm"),
        (DDPM, UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "path is ddpm"),
        (DDPM, DDIMScheduler(beta_schedule="scaled_linear"), "other noise levels"),
        (DDPM, DDIMScheduler(timestep_spacing="linspace"), "steps past its times"),
        (FLOW, DDIMScheduler.from_config(make_scheduler(FLOW.diffusion, "dpm++").config), "has no straight paths"),
        (DDPM, DDIMScheduler(num_train_timesteps=500), "other noise levels"),
        (DDPM, EDMEulerScheduler(), "other noise levels"),
        (DDPM, EulerDiscreteScheduler(prediction_type="x"), "prediction_type 'x': known are sample"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(config, scheduler, says):
    pipe = piped(config)
    pipe.scheduler = scheduler
    with pytest.raises(UserError, match=says):
        pipe("cat")


def test_options_that_a_scheduler_lacks_are_ignored():
    """`from_config` keeps the options of the previous class."""
    straight = make_scheduler(FLOW.diffusion, "unipc").config
    ddim = {"beta_schedule": "linear", "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    pipe = piped(DDPM)
    pipe.scheduler = DDIMScheduler.from_config(straight, **ddim)
    assert pipe.scheduler.config.use_flow_sigmas
    assert len(pipe("cat").images) == 1


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        DPMSolverMultistepScheduler(timestep_spacing="linspace", use_karras_sigmas=True),
        DPMSolverMultistepScheduler(timestep_spacing="linspace", lambda_min_clipped=-5.1),
        DPMSolverMultistepScheduler(timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min"),
        DDIMScheduler(timestep_spacing="leading", steps_offset=1),
        EulerDiscreteScheduler(timestep_spacing="trailing"),
    ],
)
def test_a_scheduler_with_other_options_takes_their_steps(scheduler):
    if "FlowMatch" in type(scheduler).__name__:
        scheduler.sigma_min = 1 / 5
    scheduler.set_timesteps(5)
    times, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", torch.zeros(0))
    set_steps(scheduler, 5)
    assert torch.equal(scheduler.timesteps, times)
    assert torch.equal(getattr(scheduler, "sigmas", torch.zeros(0)), sigmas)


def test_the_unipc_shift_gives_the_timesteps_of_diffusers_0_42():
    """diffusers 0.35 gives 999, 922, 817, 666, 428."""
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    set_steps(scheduler, 5)
    assert scheduler.timesteps.tolist() == [999, 923, 818, 667, 429]


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_steps_are_even(pipe, scheduler):
    """By default, the second-last step of `diffusers` ends at time 1/1000, where velocity is 1000 times the error."""
    before, pipe.scheduler = pipe.scheduler, scheduler(num_train_timesteps=1000)
    pipe("cat", num_inference_steps=5)
    used, pipe.scheduler = pipe.scheduler.sigmas, before
    torch.testing.assert_close(used.unique(), torch.linspace(0, 1, 6))


def test_steps_that_diffusers_cannot_space_evenly_are_refused():
    with pytest.raises(UserError, match="must divide 1000"):
        piped(replace(DDPM, sample=SampleConfig(sampler="ddim", steps=50)))("cat", num_inference_steps=30)


# --------------------------------------------------------------------------------------------- VAE


def tiny_vae(**keys: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **keys,
    ).eval()


def test_latents_are_scaled_shifted_and_decoded():
    config = replace(FLOW, model=small_model("outer*1 inner*1", channels=4))
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.25)
    pipe = piped(config, vae=vae)
    latents = pipe("cat", latents=noise(1, (4, 16, 8)), output_type="latent").images
    with torch.no_grad():
        wanted = (vae.decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe("cat", latents=noise(1, (4, 16, 8)), output_type="pt").images, wanted)
    assert wanted.shape == (1, 3, 32, 16)
    with pytest.raises(UserError, match="4 channels need a VAE"):
        piped(config)("cat")


def test_latents_may_have_a_mean_and_a_deviation_per_channel():
    config = replace(FLOW, model=small_model("outer*1 inner*1", channels=4))
    mean, deviation = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    vae = tiny_vae(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=deviation.tolist())
    pipe = piped(config, vae=vae)
    latents = pipe("cat", latents=noise(1, (4, 16, 8)), output_type="latent").images
    with torch.no_grad():
        wanted = vae.decode(latents * deviation[:, None, None] + mean[:, None, None]).sample
    torch.testing.assert_close(
        pipe("cat", latents=noise(1, (4, 16, 8)), output_type="pt").images, (wanted / 2 + 0.5).clamp(0, 1)
    )


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"latent_mean": (0.5,), "latent_scale": (2.0,)},
        {"latent_mean": (0.1, 0.2, 0.3, 0.4), "latent_scale": (3.0,)},
    ],
)
def test_export_includes_the_vae_of_the_run_and_its_scale(said, tmp_path):
    """The expected images come from the decoder of `sample`."""
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    data = DataConfig(source="latents.npz", vae=str(tmp_path / "vae"), **said)
    config = replace(FLOW, model=small_model("outer*1 inner*1", channels=4), data=data)
    create_run(tmp_path / "run", config)
    checkpoint.save(tmp_path / "run", config, 1, {}, seeded(config).state_dict(), tuple(CLASSES))
    export(tmp_path / "run", tmp_path / "out")
    loaded = quiet(DiTInDiTPipeline.from_pretrained(tmp_path / "out"))
    images = loaded(LABELS, latents=noise(WHOLE, (4, 16, 8)), output_type="pt").images
    wanted = LatentDecoder(data, torch.device("cpu"))(sample(seeded(config), config, WHOLE))
    torch.testing.assert_close(images, (wanted / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_a_vae_of_other_latents_is_refused(run, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="latents of 4 channels, the model 3"):
        export(run, tmp_path / "none", vae=str(tmp_path / "vae"))
    with pytest.raises(UserError, match="no VAE"):
        export(run, tmp_path / "none", vae=str(tmp_path / "nowhere"))


# ----------------------------------------------------------------------------------------- folders


def test_a_saved_pipeline_is_loaded_bit_for_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "once")
    loaded = quiet(DiTInDiTPipeline.from_pretrained(tmp_path / "once"))
    theirs = loaded.transformer.state_dict()
    assert theirs.keys() == pipe.transformer.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in pipe.transformer.state_dict().items())
    drawn = [each(LABELS, latents=noise(WHOLE), output_type="latent").images for each in (pipe, loaded)]
    assert torch.equal(*drawn)
    loaded.save_pretrained(tmp_path / "twice")
    once, twice = (
        load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors") for name in ("once", "twice")
    )
    assert all(torch.equal(once[name], twice[name]) for name in once | twice)


def test_half_precision_images_are_close_to_float32_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = quiet(DiTInDiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    arguments = {"class_labels": LABELS, "latents": noise(WHOLE), "output_type": "latent", "guidance_scale": 1}
    whole, rounded = pipe(**arguments).images, half(**arguments).images
    assert rounded.dtype == torch.float32
    assert 0 < (whole - rounded).abs().max() < 0.1 * whole.abs().max()


WITHOUT_THE_PACKAGE = """
import importlib.abc, json, sys, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dit_in_dit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import dit_in_dit
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")

import diffusers
from diffusers import AutoModel, DiffusionPipeline
folder, again, given, results, labels = sys.argv[1:]

def drawn(place):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe(json.loads(labels), latents=torch.load(given), output_type="latent").images

try:
    DiffusionPipeline.from_pretrained(folder)
    refused = ""
except ValueError as error:
    refused = str(error)
pipe, first = drawn(folder)
pipe.save_pretrained(again)
_, second = drawn(again)
from diffusers import UniPCMultistepScheduler
pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
try:
    pipe(["owk"])
    wrong = ""
except ValueError as error:
    wrong = str(error)
picture = pipe("cat", num_inference_steps=2, callback_on_step_end=lambda pipe, i, t, tensors: {}).images[0]
# Before 0.38 AutoModel looks for the class in diffusers alone.
known = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 38)
alone = AutoModel.from_pretrained(again + "/transformer", trust_remote_code=True) if known else pipe.transformer
torch.save({
    "first": first, "second": second, "refused": refused, "wrong": wrong, "size": picture.size,
    "classes": [type(pipe).__module__, type(pipe.transformer).__module__, type(alone).__name__],
    "loaded": sorted(name for name in sys.modules if name.startswith(("dit_in_dit", "torchvision"))),
}, results)
"""


@pytest.fixture(scope="module")
def elsewhere(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output of a process that cannot import the package, on the copied folder."""
    place = tmp_path_factory.mktemp("process")
    torch.save(noise(WHOLE), place / "noise.pt")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    arguments = [
        str(exported),
        str(place / "again"),
        str(place / "noise.pt"),
        str(place / "results.pt"),
        json.dumps(LABELS),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments],
        capture_output=True, text=True, env=environment, cwd=place, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unread = [line for line in done.stderr.splitlines() if "not expected" in line and "trust_remote_code" not in line]
    assert not unread  # every key of the files is read
    return torch.load(place / "results.pt")


def test_a_copied_folder_needs_no_package(elsewhere):
    ours = sample(seeded(FLOW), FLOW, WHOLE)
    assert torch.equal(elsewhere["first"], ours)
    assert elsewhere["loaded"] == []
    assert all(name.startswith("diffusers_modules.local.dit_in_dit_") for name in elsewhere["classes"][:2])
    assert elsewhere["size"] == (8, 16)


def test_a_pipeline_loaded_without_the_package_can_be_saved_again(elsewhere):
    assert torch.equal(elsewhere["second"], elsewhere["first"])
    assert elsewhere["classes"][2] == "DiTInDiTTransformer2DModel"


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.38"), reason="diffusers asks since 0.38")
def test_code_of_a_folder_runs_only_when_trusted(elsewhere):
    assert "trust_remote_code=True" in elsewhere["refused"]
    assert "did you mean 'owl'" in elsewhere["wrong"]


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """diffusers copies the code of folders into a folder of the test."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_no_code_of_the_folder_runs_if_the_package_is_installed(exported, tmp_path, modules):
    shutil.copytree(exported, tmp_path / "folder")
    planted = list((tmp_path / "folder").rglob("*.py"))
    assert len(planted) == 2
    for path in planted:
        path.write_text("raise SystemExit('ran')")
    pipe = quiet(DiTInDiTPipeline.from_pretrained(tmp_path / "folder"))
    assert type(pipe) is DiTInDiTPipeline
    assert type(pipe.transformer) is DiTInDiTTransformer2DModel
    assert torch.equal(
        pipe(LABELS, latents=noise(WHOLE), output_type="latent").images, sample(seeded(FLOW), FLOW, WHOLE)
    )
    with pytest.raises(SystemExit, match="ran"):  # the trap is one
        DiffusionPipeline.from_pretrained(tmp_path / "folder", trust_remote_code=True)


def test_a_fresh_process_loads_a_pipeline_with_nothing_else_imported(exported, tmp_path):
    code = (
        "import sys; from dit_in_dit.interop.pipeline import DiTInDiTPipeline as P; "
        "print(type(P.from_pretrained(sys.argv[1]).transformer).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["dit_in_dit.interop.transformer"], done.stderr


@pytest.fixture
def repository(exported, tmp_path, modules, monkeypatch) -> Path:
    """The Hub's cache with the folder as the repository some/model; requests of the `diffusers` library are answered
    here.
    """
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(exported, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    files = [SimpleNamespace(rfilename=str(path.relative_to(snapshot))) for path in snapshot.rglob("*.*")]
    answer = SimpleNamespace(siblings=files, sha="0" * 40)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils._resolve_revision", lambda *a, **k: "main", raising=False)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", lambda *a, **k: answer)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.model_info", lambda *a, **k: answer)
    index = str(snapshot / "model_index.json")
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.hf_hub_download", lambda *a, **k: index)
    return snapshot


def test_a_hub_repository_needs_no_trust_if_the_package_is_installed(repository, tmp_path):
    """The package has its own `download`, because `diffusers` needs trust, or the classes as files of a repository."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained("some/model", cache_dir=tmp_path)
    assert type(DiTInDiTPipeline.from_pretrained("some/model", cache_dir=tmp_path)) is DiTInDiTPipeline


def test_all_needed_files_are_downloaded_from_the_hub(repository, tmp_path, monkeypatch):
    """The pipeline loads from exactly the files that match the patterns of the download."""
    asked = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.extend(allow_patterns)
        return str(repository)

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.snapshot_download", download)
    DiffusionPipeline.download("some/model", cache_dir=tmp_path, trust_remote_code=True, force_download=True)
    for path in [path for path in repository.rglob("*") if path.is_file()]:
        if not any(fnmatch(str(path.relative_to(repository)), pattern) for pattern in asked):
            path.unlink()
    left = sorted(path.suffix for path in repository.rglob("*.*"))
    assert left == [".json", ".json", ".json", ".py", ".py", ".safetensors"]
    pipe = quiet(DiffusionPipeline.from_pretrained(repository, trust_remote_code=True))
    assert torch.equal(
        pipe(LABELS, latents=noise(WHOLE), output_type="latent").images, sample(seeded(FLOW), FLOW, WHOLE)
    )


def test_import_paths_in_exported_files_are_unchanged(exported, tmp_path):
    """Exported folders contain these names: changing one changes a file format."""
    index = json.loads((exported / "model_index.json").read_text())
    stored = json.loads((exported / "transformer" / "config.json").read_text())
    assert (stored["model"], stored["diffusion"]) == (to_dict(FLOW.model), {"path": "flow", "predict": "velocity"})
    assert index["sample"] == {"steps": 4, "guidance": 2.0, "guidance_channels": None, "interval": [0.0, 1.0]}
    assert index["_class_name"][1] == "DiTInDiTPipeline"
    assert index["transformer"][1] == "DiTInDiTTransformer2DModel"
    for name, key in (("pipeline", index["_class_name"][0]), ("transformer", index["transformer"][0])):
        assert key.startswith(f"dit_in_dit_{name}_")
    shutil.copytree(exported, tmp_path / "old")
    index |= {"_class_name": ["dit_in_dit_pipeline_00000000", "DiTInDiTPipeline"]}  # of some other version
    for written in ("dit_in_dit_transformer_00000000", "dit_in_dit.interop.transformer"):  # the last by diffusers alone
        index["transformer"] = [written, "DiTInDiTTransformer2DModel"]
        (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
        assert type(DiTInDiTPipeline.from_pretrained(tmp_path / "old").transformer) is DiTInDiTTransformer2DModel
    assert DiTInDiTPipeline.__module__ == "dit_in_dit.interop.pipeline"
    assert DiTInDiTTransformer2DModel.__module__ == "dit_in_dit.interop.transformer"


# ------------------------------------------------------------------------------------------- code


def test_exported_code_is_self_contained(exported):
    """Ruff finds no undefined name and no unused import."""
    files = list(exported.rglob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert not any("import dit_in_dit" in path.read_text() or "from dit_in_dit" in path.read_text() for path in files)


def test_exported_code_is_the_package_s_own(exported):
    (path,) = (exported / "transformer").glob("*.py")
    carried = path.read_text()
    source = Path(sys.modules[NestedDiT.__module__].__file__).read_text()
    forward = source[source.index("class NestedDiT") : source.index("def part_of")].rstrip()
    assert forward in carried
    assert "def part_of" not in carried  # and no more than is needed


def test_changed_code_is_saved_under_another_name(exported):
    """diffusers copies the modules of all folders into one place: equal names would overwrite each other."""
    for path in exported.rglob("*.py"):
        assert path.stem.endswith("_" + hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def test_no_operator_is_exported(exported):
    """An operator registered twice in a process replaces the package's own."""
    assert not any("torch.library" in path.read_text() for path in exported.rglob("*.py"))


def test_the_annotations_of_the_pipeline_are_not_strings():
    """diffusers 0.35 reads these annotations and fails on strings."""
    assert not any(isinstance(each.annotation, str) for each in inspect.signature(DiTInDiTPipeline).parameters.values())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Modules to bundle from, written for the test."""
    monkeypatch.setattr("dit_in_dit.interop.remote_code.PACKAGE", "planted")
    monkeypatch.syspath_prepend(tmp_path)

    def write(**sources: str) -> None:
        shutil.rmtree(tmp_path / "planted", ignore_errors=True)
        (tmp_path / "planted").mkdir()
        for name, text in {"__init__": "", **sources}.items():
            (tmp_path / "planted" / f"{name}.py").write_text(text)
        from dit_in_dit.interop.remote_code import _read

        _read.cache_clear()

    yield write
    sys.modules.pop("planted", None)


def test_a_bundle_has_all_definitions_in_order(package):
    package(
        first="import math\nimport os\n\n# why\nTWICE = 2 * math.pi\nNOT = os.sep\n",
        second="from planted.first import NOT, TWICE\n\nT = {}\nT['x'] = TWICE\n\n\ndef use():\n    return T['x']\n",
    )
    text = bundle("planted.second", "use")
    place: dict[str, Any] = {}
    exec(text, place)
    assert place["use"]() == pytest.approx(6.2831853)
    assert "# why" in text
    assert "NOT" not in text
    assert "import os" not in text


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            "def f(): return g()\ndef g(): return 1\n",
            "from planted.first import f\ng = 2\nh = lambda: f() + g\n",
            "rename one",
        ),
        ("def f(): return 1\n", "def h():\n    from planted.first import f\n    return f()\n", "inside a statement"),
        ("def f(): return 1\n", "from planted.first import f as g\nh = lambda: g()\n", "imported as g"),
        ("", "def h(): return nowhere\n", "no top-level statement defines nowhere"),
    ],
)
def test_sources_that_cannot_be_bundled_are_refused(package, first, second, says):
    package(first=first, second=second)
    with pytest.raises(NotImplementedError, match=says):
        bundle("planted.second", "h")


# ------------------------------------------------------------------------------------ export, card


def evaluated(run: Path, weights: str, step: int = 1200) -> None:
    """An evaluation as `evaluate` writes it, with two scores."""
    place = run / "evaluation" / f"{step:07d}"
    place.mkdir(parents=True)
    result = {
        "subject": {"name": "/home/me/runs/mine", "step": step, "checkpoint": weights},
        "protocol": {
            "images": 512,
            "samples": {"made by": "sampling", "sampler": "dpm++", "steps": 4, "guidance": 2.0, "seed": 7},
            "reference": {"data": "/home/me/photographs", "part": "all images", "images": 4096, "sha256": "f00"},
        },
        "scores": {
            "sliced.16": {"value": 0.12345, "low": 0.11, "high": 0.13, "floor": 0.05},
            "memorised": {"value": 0.01, "low": None, "high": None, "floor": None},
        },
        "warnings": ["a warning of the evaluation"],
    }
    (place / "metrics.json").write_text(json.dumps(result))


def test_the_card_has_protocol_and_results(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    saved = Checkpoint.open(tmp_path / "run")
    manifest = saved.manifest
    evaluated(tmp_path / "run", manifest["sha256"]["ema.safetensors"])
    export(tmp_path / "run", tmp_path / "nested-cats", licence="cc-by-4.0")
    text = (tmp_path / "nested-cats" / "README.md").read_text()
    data = ModelCard(text).data  # as the Hub reads it
    assert (data.license, data.library_name) == ("cc-by-4.0", "diffusers")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert {"dit-in-dit", "class-conditional"} <= set(data.tags)
    for said in ("# nested-cats", "| sliced.16 | 0.1235 | 0.11 to 0.13 | 0.05 |", "| memorised | 0.01 |  |  |"):
        assert said in text
    for said in ("| images | 512 |", "| seed | 7 |", "photographs", "a warning of the evaluation", "1,200 of 400,000"):
        assert said in text
    assert "/home/me" not in text
    assert (tmp_path / "nested-cats" / "samples.png").read_bytes() == b"a picture"
    inside = text[text.index("```yaml\n") + 8 :]
    assert yaml.safe_load(inside[: inside.index("```")])["model"] == to_dict(FLOW.model)


def test_results_of_other_weights_are_not_in_the_card(run, exported, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    evaluated(tmp_path / "run", "0" * 64)
    assert evaluation_of(tmp_path / "run", "1" * 64) == (None, None)
    assert "have not been evaluated" in (exported / "README.md").read_text()


def test_the_code_in_the_card_runs(exported, monkeypatch):
    text = (exported / "README.md").read_text()
    code = text[text.index("```python\n") + 10 :]
    code = code[: code.index("```")].replace("this folder or repository", str(exported))
    place: dict[str, Any] = {}
    exec(code, place)
    assert [image.size for image in place["images"]] == [(8, 16)] * 2


def test_export_writes_averaged_or_trained_weights_as_asked(run, exported, tmp_path):
    export(run, tmp_path / "raw", averaged=False)
    name = "transformer/diffusion_pytorch_model.safetensors"
    averaged, trained = load_file(exported / name), load_file(tmp_path / "raw" / name)
    assert all(torch.equal(averaged[key] + 1, trained[key]) for key in averaged)


def test_the_export_command_writes_a_folder(run, tmp_path, capsys):
    command = ["export", str(run), "--format", "diffusers", "--out", str(tmp_path / "out"), "--licence", "mit"]
    main(command)
    assert type(DiTInDiTPipeline.from_pretrained(tmp_path / "out")) is DiTInDiTPipeline
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)  # again
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_export_is_complete_or_absent(run, tmp_path, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("dit_in_dit.interop.export_pipeline.card", full)
        with pytest.raises(OSError, match="No space"):
            export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out")  # what the broken one left is no hindrance
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(UserError, match="exists already: choose another --out"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="no run at"):
        export(tmp_path / "nowhere", tmp_path / "other")


# ------------------------------------------------------------- what users of `diffusers` type


def test_each_label_gives_several_images(pipe):
    together = pipe(["cat", "owl"], num_images_per_prompt=4, latents=noise(WHOLE), output_type="latent").images
    one_by_one = pipe(["cat"] * 4 + ["owl"] * 4, latents=noise(WHOLE), output_type="latent").images
    assert torch.equal(together, one_by_one)
    assert len(pipe("cat", num_images_per_prompt=3).images) == 3
    assert len(pipe("cat", batch_size=2, num_images_per_prompt=2).images) == 4
    draws = [torch.Generator().manual_seed(seed) for seed in range(6)]
    assert len(pipe(["cat", "owl"], num_images_per_prompt=3, generator=draws).images) == 6
    for options, says in (
        ({"num_images_per_prompt": 0}, "how many images"),
        ({"num_images_per_prompt": 2, "latents": noise(3)}, "class_labels: 4, latents: 3"),
    ):
        with pytest.raises(UserError, match=says):
            pipe(["cat", "owl"], **options)


def test_label_ids_are_those_of_the_names(pipe):
    assert pipe.get_label_ids(["yak", "cat"]) == [4, 0]
    assert pipe.get_label_ids("owl") == [3]
    with pytest.raises(UserError, match="did you mean 'owl'"):
        pipe.get_label_ids(["owk"])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_given_sigmas_are_the_times_of_the_steps(sampler):
    """The scheduler's own levels, given as sigmas, change no bit; other levels are the times of the model's calls."""
    how = SampleConfig(sampler=sampler, steps=4, guidance=1.0)
    pipe = piped(replace(FLOW, sample=how))
    drawn = pipe(LABELS, latents=noise(WHOLE), output_type="latent").images
    own = list(dict.fromkeys(float(level) for level in pipe.scheduler.sigmas[:-1]))
    assert len(own) == 4
    assert torch.equal(pipe(LABELS, sigmas=own, latents=noise(WHOLE), output_type="latent").images, drawn)
    times = []
    pipe.transformer.register_forward_pre_hook(lambda module, given: times.append(float(given[1][0])))
    pipe("cat", sigmas=np.array([1.0, 0.7, 0.1]), output_type="latent")
    expected = [1.0, 0.7, 0.7, 0.1, 0.1] if sampler == "heun" else [1.0, 0.7, 0.1]
    assert times == pytest.approx(expected, abs=2e-6)  # UniPC begins just below 1
    assert float(pipe.scheduler.sigmas[-1]) == 0


def test_one_euler_step_from_given_sigmas_equals_diffusers():
    pipe = piped(replace(FLOW, sample=SampleConfig(sampler="euler", steps=3, guidance=1.0)))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe("cat", sigmas=[0.9, 0.5], output_type="latent")
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[0.9, 0.5])
    torch.testing.assert_close(pipe.scheduler.sigmas, theirs.sigmas)
    torch.testing.assert_close(pipe.scheduler.timesteps, theirs.timesteps)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (FLOW, {"sigmas": [0.5, 0.9]}, "sigmas must fall from at most 1 to above 0"),
        (FLOW, {"sigmas": [999.0, 500.0]}, "sigmas must fall from at most 1 to above 0"),
        (FLOW, {"sigmas": [1.0, 0.0]}, "sigmas must fall from at most 1 to above 0"),
        (FLOW, {"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "one a step"),
        (FLOW, {"sigmas": []}, "steps must be from 1 to 1000: got 0"),
        (DDPM, {"sigmas": [1.0, 0.5]}, "takes no sigmas: give num_inference_steps"),
    ],
)
def test_sigmas_that_cannot_be_taken_are_refused(config, options, says):
    with pytest.raises(UserError, match=says):
        piped(config)("cat", **options)


def test_a_pipeline_from_another_shares_its_parts_and_takes_changes(pipe):
    pipe.transformer.half()
    other = quiet(DiTInDiTPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler()))
    assert other.transformer is pipe.transformer
    assert other.transformer.dtype == torch.float16  # diffusers' own would change it to float32, in `pipe` too
    pipe.transformer.float()
    assert (other.config.sample, other.labels, other.config.null_class) == (pipe.config.sample, pipe.labels, True)
    assert type(other.scheduler) is FlowMatchEulerDiscreteScheduler is not type(pipe.scheduler)
    assert len(other("owl").images) == 1
